"""Models that fuse several media: a tower for each (image, text, audio, a table of numbers), projections into one
space, and a fusion of what they say.

    sum               the projections added up
    concatenation     side by side
    gate              weighed for every row and dimension by all of them: gated multimodal units (Arevalo et al. 2017,
                      arXiv:1702.01992, section 3.1); the gates of a dimension are a softmax over media, which for two
                      media is the paper's z and 1 - z
    cross_attention   every medium's positions look at those of all others; one block serves all directions, as in
                      LXMERT (Tan & Bansal 2019, arXiv:1908.07490, section 2.2). What is pooled of a tower is its first
                      position, and what stands there in the end is added up

`shared_layers` residual layers between projection and fusion have the same weights for all media. Importing this module
registers the models with transformers' `AutoConfig`, `AutoModel` (without a head), `AutoModelForSequenceClassification`
and `AutoModelForNextSentencePrediction` (whether image and text belong together).

Shapes: B rows, L positions of a medium, M those of all others, W width of a tower, D width of the space, F of what is
fused, K numbers of a table, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForNextSentencePrediction,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import ModelOutput

from kt_hf import audio, loading, open_clip_models, towers
from kt_hf.errors import DataError, RecipeError
from kt_hf.recipe import Model
from kt_hf.task import Loaded

PARTS = {"image": "vision", "text": "text", "audio": "audio", "table": "table"}
"""Medium -> what its tower is called in the model and its configuration."""
OF_AUDIO = "audio_"
"""Stands before the names of the audio tower's inputs, some of which the text tower's have as well."""


class FusionConfig(PreTrainedConfig):
    """The towers' configurations, how they are read, and how they are fused.

    vision_config, text_config, audio_config: None without such a tower. table_columns: numbers of a row's table, 0
    without one. pooling, pooled_widths, token_widths: by medium, see `towers.Reading`. logit_scale: of cosine
    similarities between media, as a logarithm.
    """

    model_type = "kt_hf_fusion"
    sub_configs = {f"{part}_config": AutoConfig for part in ("vision", "text", "audio")}  # type: ignore[assignment]

    vision_config: Any = None
    text_config: Any = None
    audio_config: Any = None
    table_columns: int = 0
    pooling: Any = None
    pooled_widths: Any = None
    token_widths: Any = None
    fusion: str = "concatenation"
    fusion_layers: int = 1
    shared_layers: int = 0
    projection_dim: int = 512
    logit_scale: float = math.log(1 / 0.07)

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            given = getattr(self, name)
            if isinstance(given, dict):
                setattr(self, name, AutoConfig.for_model(**given))
        super().__post_init__(**kwargs)


def media(config: FusionConfig) -> list[str]:
    """The media that a model takes, in a fixed order."""
    there = {name: getattr(config, f"{part}_config", None) is not None for name, part in PARTS.items()}
    there["table"] = config.table_columns > 0
    return [name for name in PARTS if there[name]]


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """What a tower says: pooled_BW; tokens_BLW and mask_BL where positions are asked for and there are any."""

    pooled: torch.Tensor
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def repeat(self, times: int) -> Encoded:
        """The same rows again, one time after the other."""
        parts = [x if x is None else torch.cat([x] * times) for x in (self.pooled, self.tokens, self.mask)]
        return Encoded(*parts)  # type: ignore[arg-type]


class TableEncoder(nn.Module):
    """Numbers, standardised by `mean` and `deviation` of the training rows, through a layer."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, columns: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("deviation", torch.ones(columns))
        self.hidden = nn.Linear(columns, width)

    def forward(self, table_BK: torch.Tensor) -> torch.Tensor:
        standard_BK = (table_BK.float() - self.mean.float()) / self.deviation.float()
        return F.gelu(self.hidden(standard_BK.to(self.hidden.weight.dtype)))


class Layer(nn.Module):
    """x + down(gelu(up(norm(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class CrossAttention(nn.Module):
    """x + attention of x to the others, then a `Layer`. Linear layers of its own, so that adapters may sit on them."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = next(n for n in (8, 4, 2, 1) if width % n == 0)
        self.norm, self.others_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.layer = Layer(width)

    def forward(self, x_BLD: torch.Tensor, others_BMD: torch.Tensor, mask_BM: torch.Tensor) -> torch.Tensor:
        others_BMD = self.others_norm(others_BMD)
        query, key, value = (
            layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, given in (
                (self.q_proj, self.norm(x_BLD)),
                (self.k_proj, others_BMD),
                (self.v_proj, others_BMD),
            )
        )
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_BM[:, None, None])
        return self.layer(x_BLD + self.out_proj(found.transpose(1, 2).flatten(2)))


# --- the models -------------------------------------------------------------------------------------------------------


@dataclass
class FusionOutput(ModelOutput):
    """logits_BC (with a head); pooler_output_BF, what is fused; the projections_BD of each medium, as they are."""

    logits: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    audio_embeds: torch.Tensor | None = None
    table_embeds: torch.Tensor | None = None


class _FusionPreTrained(PreTrainedModel):
    config_class = FusionConfig
    config: FusionConfig
    base_model_prefix = "fusion"
    input_modalities = ["image", "text", "audio"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with variance 1 / W: transformers' usual 0.02 is so small that a first step of Adam would turn
        everything around."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class FusionModel(_FusionPreTrained):
    """Towers, projections and fusion, without a head. encoders: towers that there are already, by medium."""

    def __init__(self, config: FusionConfig, encoders: dict[str, Any] | None = None):
        super().__init__(config)
        self.media, width = media(config), config.projection_dim
        for name in self.media:
            tower = (encoders or {}).get(name)
            self.add_module(f"{PARTS[name]}_model", self._fresh(name) if tower is None else tower)
        self.projections = nn.ModuleDict({name: nn.Linear(config.pooled_widths[name], width) for name in self.media})
        self.shared = nn.ModuleList(Layer(width) for _ in range(config.shared_layers))
        if config.fusion == "gate":
            self.gates = nn.Linear(width * len(self.media), width * len(self.media))
        if config.fusion == "cross_attention":
            widths = {name: config.token_widths[name] for name in self.media if name in config.token_widths}
            self.token_projections = nn.ModuleDict({name: nn.Linear(own, width) for name, own in widths.items()})
            self.crossing = nn.ModuleList(CrossAttention(width) for _ in range(config.fusion_layers))
        self.fused_width = width * (len(self.media) if config.fusion == "concatenation" else 1)
        self.post_init()

    def _fresh(self, name: str) -> nn.Module:
        if name == "table":
            return TableEncoder(self.config.table_columns, self.config.pooled_widths[name])
        return AutoModel.from_config(getattr(self.config, f"{PARTS[name]}_config"))

    @property
    def logit_scale(self) -> torch.Tensor:
        """Of cosine similarities between media, as a logarithm; a constant."""
        return torch.full((), self.config.logit_scale, device=self.device)

    def encode(self, inputs: dict[str, torch.Tensor]) -> dict[str, Encoded]:
        """What the towers say of the media that there are inputs of."""
        of_audio = {k.removeprefix(OF_AUDIO): v for k, v in inputs.items() if k.startswith(OF_AUDIO)}
        own = {
            "image": {k: inputs[k] for k in towers.IMAGE_INPUTS if k in inputs},
            "text": {k: inputs[k] for k in towers.TEXT_INPUTS if k in inputs},
            "audio": of_audio,
            "table": {"table_BK": inputs["table"]} if "table" in inputs else {},
        }
        return {name: self._encode(name, own[name]) for name in self.media if own[name]}

    def _encode(self, name: str, inputs: dict[str, torch.Tensor]) -> Encoded:
        tower = getattr(self, f"{PARTS[name]}_model")
        if name == "table":
            return Encoded(tower(**inputs))
        output = tower(**towers.accepted(tower.forward, inputs, inputs), return_dict=True)
        tokens_BLW, mask_BL = towers.positions(output), inputs.get("attention_mask")
        if mask_BL is not None and mask_BL.shape[1] != tokens_BLW.shape[1]:  # a convolution makes positions of samples
            reduce = getattr(tower, "_get_feature_vector_attention_mask", None)
            mask_BL = None if reduce is None else reduce(tokens_BLW.shape[1], mask_BL)
        pooled_BW = towers.pool(output, self.config.pooling[name], mask_BL)
        if self.config.fusion != "cross_attention":
            return Encoded(pooled_BW)
        mask_BL = torch.ones_like(tokens_BLW[..., 0]) if mask_BL is None else mask_BL
        return Encoded(pooled_BW, tokens_BLW, mask_BL.bool())

    def embed(self, encoded: dict[str, Encoded]) -> dict[str, torch.Tensor]:
        """Each medium's vector (B, D) in the space of all."""
        return {name: self.projections[name](found.pooled) for name, found in encoded.items()}

    def fuse(self, encoded: dict[str, Encoded], embeds: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, F) from all media. Raises `RecipeError` where one is missing."""
        missing = [name for name in self.media if name not in encoded]
        if missing:
            raise RecipeError(f"the model takes {', '.join(self.media)}; there is no {missing[0]}", "give it all")
        if self.config.fusion == "cross_attention":
            vectors = self._cross(encoded, embeds)
        else:
            vectors = [self._share(embeds[name]) for name in self.media]
        hidden = [F.gelu(F.layer_norm(x, x.shape[-1:])) for x in vectors]
        if self.config.fusion == "concatenation":
            return torch.cat(hidden, -1)
        stacked_BND = torch.stack(hidden, 1)
        if self.config.fusion == "gate":
            gates_BND = self.gates(torch.cat(hidden, -1)).view_as(stacked_BND).softmax(1)
            stacked_BND = gates_BND * stacked_BND
        return stacked_BND.sum(1)

    def _share(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.shared:
            x = layer(x)
        return x

    def _cross(self, encoded: dict[str, Encoded], embeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The first position of every medium after it has looked at the others."""
        found, masks = {}, {}
        for name in self.media:
            first_B1D, tokens, mask = embeds[name].unsqueeze(1), encoded[name].tokens, encoded[name].mask
            parts = [first_B1D] if tokens is None else [first_B1D, self.token_projections[name](tokens)]
            own = torch.ones_like(first_B1D[..., 0], dtype=torch.bool)
            found[name] = self._share(torch.cat(parts, 1))
            masks[name] = own if mask is None else torch.cat([own, mask], 1)
        for block in self.crossing:
            others = {name: [other for other in self.media if other != name] for name in self.media}
            found = {
                name: block(found[name], torch.cat([found[o] for o in rest], 1), torch.cat([masks[o] for o in rest], 1))
                for name, rest in others.items()
            }
        return [found[name][:, 0] for name in self.media]

    def forward(self, **inputs: Any) -> FusionOutput:
        """inputs: `pixel_values`, `input_ids`, `attention_mask`, ..., those of the audio tower with `audio_` in front,
        and `table`."""
        encoded = self.encode(inputs)
        embeds = self.embed(encoded)
        fused_BF = self.fuse(encoded, embeds)
        return FusionOutput(pooler_output=fused_BF, **{f"{name}_embeds": x for name, x in embeds.items()})


class FusionForClassification(_FusionPreTrained):
    """Classes, or a number, from several media."""

    def __init__(self, config: FusionConfig, encoders: dict[str, Any] | None = None):
        super().__init__(config)
        self.fusion = FusionModel(config, encoders)
        self.classifier = nn.Linear(self.fusion.fused_width, config.num_labels or 1)
        self.post_init()

    def forward(self, **inputs: Any) -> FusionOutput:
        outputs = self.fusion(**inputs)
        outputs.logits = self.classifier(outputs.pooler_output)
        return outputs


class FusionForMatching(_FusionPreTrained):
    """Whether an image and a text belong together: logits of no and yes."""

    def __init__(self, config: FusionConfig, encoders: dict[str, Any] | None = None):
        super().__init__(config)
        self.fusion = FusionModel(config, encoders)
        self.matcher = nn.Linear(self.fusion.fused_width, 2)
        self.post_init()

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.fusion.logit_scale

    def forward(self, **inputs: Any) -> FusionOutput:
        outputs = self.fusion(**inputs)
        outputs.logits = self.matcher(outputs.pooler_output)
        return outputs


AutoConfig.register(FusionConfig.model_type, FusionConfig, exist_ok=True)
AutoModel.register(FusionConfig, FusionModel, exist_ok=True)
AutoModelForSequenceClassification.register(FusionConfig, FusionForClassification, exist_ok=True)
AutoModelForNextSentencePrediction.register(FusionConfig, FusionForMatching, exist_ok=True)


# --- loading ----------------------------------------------------------------------------------------------------------


def load(
    auto: Any,
    ref: Model,
    info: Any,
    labels: list[str] | None,
    wanted: Sequence[str],
    *,
    max_seconds: float = 5.0,
    fields: dict[str, Any],
    **changes: Any,
) -> Loaded:
    """A model with its processors: a checkpoint of ours, or towers (`ref.image`, `ref.text`, `ref.audio`) that are
    fused anew, with a table where that is wanted.

    max_seconds: of a sound. fields: of a fresh model's configuration (`fusion`, `shared_layers`); changes: of any.
    Raises `RecipeError`.
    """
    if any(getattr(ref, name, None) is not None for name in ("image", "text", "audio")):
        loaded, parts = _from_towers(auto, ref, info, wanted, max_seconds, {**fields, **changes}, labels)
    else:
        loaded = _from_checkpoint(auto, ref, labels, changes)
        parts = _processors(ref, loaded.model)
    open_clip_models.freeze_unused(loaded.model)
    config: Any = loading.unwrap(loaded.model).config
    parts.table_columns = config.table_columns
    loaded.processor = towers.TransformersProcessor.of(parts, config)
    return loaded


def _from_checkpoint(auto: Any, ref: Model, labels: list[str] | None, changes: dict[str, Any]) -> Loaded:
    known = (ref.path or ref.config) and not open_clip_models.names_open_clip(ref)
    adapter = loading.is_adapter(ref)
    if not known or not (adapter or isinstance(loading.config_of(ref), FusionConfig)):
        raise RecipeError(
            f"model '{ref.path or ref.config}' does not fuse several media in a way that is known here",
            "give towers: model.image, model.text, model.audio",
        )
    return loading.load_model(auto, ref, labels, **changes)


def _processors(ref: Model, model: Any) -> towers.Parts:
    config: Any = loading.unwrap(model).config
    return towers.Parts(
        None if config.text_config is None else loading.load_tokenizer(ref),
        None if config.vision_config is None else loading.load_image_processor(ref, config.vision_config),
        None if config.audio_config is None else audio.load_extractor(ref, config.audio_config),
    )


def _from_towers(
    auto: Any,
    ref: Model,
    info: Any,
    wanted: Sequence[str],
    max_seconds: float,
    fields: dict[str, Any],
    labels: list[str] | None,
) -> tuple[Loaded, towers.Parts]:
    encoders: dict[str, Any] = {}
    parts, new, readings = towers.Parts(), [], dict[str, towers.Reading]()
    refs = {name: towers.noun(getattr(ref, name)) for name in ("image", "text", "audio") if name in wanted}
    for name, given in refs.items():
        if name == "text":
            encoders[name], fresh, parts.tokenizer = towers.load_text_tower(given, info.texts())
            readings[name] = towers.read(encoders[name], towers.text_probe())
        else:
            encoders[name], fresh = towers.load_tower(given, PARTS[name])
            config = encoders[name].config
            if name == "image":
                parts.image_processor = loading.load_image_processor(given, config)
                probe = towers.image_probe(config)
            else:
                parts.feature_extractor = audio.load_extractor(given, config)
                probe = audio.probe(parts.feature_extractor, max_seconds)
            readings[name] = towers.read(encoders[name], probe)
        towers.check_loads_again(encoders[name], name)
        new += [f"fusion.{PARTS[name]}_model.{n}" for n in fresh]
    mean, deviation = standard(info) if "table" in wanted else (None, None)
    width = ref.projection_dim
    config = FusionConfig(
        **{f"{PARTS[name]}_config": encoder.config.to_dict() for name, encoder in encoders.items()},
        table_columns=0 if mean is None else len(mean),
        pooling={name: reading.pooling for name, reading in readings.items()},
        pooled_widths={**{name: reading.width for name, reading in readings.items()}, "table": width},
        token_widths={name: reading.token_width for name, reading in readings.items()},
        projection_dim=width,
        **fields,
    )
    if labels is not None:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    model = auto._model_mapping[FusionConfig](config, encoders)
    if mean is not None:
        model.fusion.table_model.mean.copy_(torch.from_numpy(mean))
        model.fusion.table_model.deviation.copy_(torch.from_numpy(deviation))
    inside = tuple(f"fusion.{PARTS[name]}_model." for name in encoders)
    new += [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    ids = None if labels is None else list(range(len(labels)))
    origin = {name: str(given.path or given.config) for name, given in refs.items()}
    return Loaded(model, None, labels, ids, origin, new_parameters=new), parts


def standard(info: Any) -> tuple[np.ndarray, np.ndarray]:
    """(mean_K, deviation_K) of the training rows' tables; columns that do not vary are left as wide as they are.

    Raises `DataError` for rows of several widths, and where there are no training rows.
    """
    if "train" not in info.splits:
        raise DataError("there are no training rows to standardise a table by", "load a trained model")
    rows = info.splits["train"]
    sizes = [len(row) if row is not None else -1 for row in rows["table"]]
    odd = next((i for i, size in enumerate(sizes) if size != sizes[0] or size < 1), None)
    if odd is not None:
        said = "no table" if sizes[odd] < 0 else f"a table of {sizes[odd]} numbers"
        raise DataError(
            f"row {rows['index'][odd]} has {said}, the first one of {max(sizes[0], 0)}",
            "give all rows as many numbers, or leave rows without any out: data.drop=[empty]",
        )
    table_NK = np.array(rows["table"], dtype=np.float64)
    known = np.isfinite(table_NK).all(1)
    mean_K, deviation_K = table_NK[known].mean(0), table_NK[known].std(0)
    return mean_K.astype(np.float32), np.where(deviation_K > 1e-12, deviation_K, 1.0).astype(np.float32)


# --- names ------------------------------------------------------------------------------------------------------------


def layers(model: nn.Module) -> dict[str, list[list[str]]]:
    """Parameter names of every tower but the table's, layer by layer from the input."""
    inner: Any = loading.unwrap(model)
    names = [name for name in inner.fusion.media if name != "table"]
    return {name: loading.backbone_layers(model, getattr(inner.fusion, f"{PARTS[name]}_model")) for name in names}


def heads(model: nn.Module) -> list[str]:
    """Names of the modules beside the towers, which are new for a task."""
    inner: Any = loading.unwrap(model)
    encoders = {f"{PARTS[name]}_model" for name in inner.fusion.media if name != "table"}
    found = []
    for name, child in inner.fusion.named_children():
        listed = isinstance(child, (nn.ModuleDict, nn.ModuleList))
        names = [f"{name}.{key}" for key, _ in child.named_children()] if listed else [name]
        found += [f"fusion.{each}" for each in names if name not in encoders]
    return [*found, *(name for name, _ in inner.named_children() if name != "fusion")]
