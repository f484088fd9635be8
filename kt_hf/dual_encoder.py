"""Dual encoders: an image tower and a text tower that meet in one space. One interface over three families.

    transformers        CLIP, SigLIP, VisionTextDualEncoder: what has `get_image_features` and `get_text_features`
    `DualEncoderModel`  our own, for towers that VisionTextDualEncoder does not take (ResNet, DistilBERT)
    open_clip           loaded from, and saved as, `open_clip_config.json` and `open_clip_model.safetensors`

`encode`, `towers` and `heads` know the families; tasks and strategies do not. Importing this module registers
`DualEncoderModel` with transformers' `AutoConfig` and `AutoModel`.

Shapes: B rows, L tokens, D width of the shared space, W width of a tower.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers.models.clip.modeling_clip import CLIPOutput

from kt_hf import loading, open_clip_models
from kt_hf.errors import RecipeError, nearest
from kt_hf.recipe import Model
from kt_hf.task import Loaded

logger = logging.getLogger(__name__)

_IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


# --- one interface ----------------------------------------------------------------------------------------------------


@dataclass
class DualOutput:
    """What every family gives.

    image_embeds, text_embeds: (B, D), of length 1, float32; None where the batch has no such input. logit_scale: a
    scalar, already exponentiated: logits are `logit_scale * cosine + logit_bias`. logit_bias: a scalar, or None where
    the model has none. hidden_states: the image tower's, where they were asked for and the family has them.
    """

    image_embeds: torch.Tensor | None
    text_embeds: torch.Tensor | None
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def encode(model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> DualOutput:
    """Run the towers that the batch has inputs for. `kwargs` go to the image tower (`output_hidden_states`)."""
    inner: Any = loading.unwrap(model)
    image = text = hidden = None
    if "pixel_values" in batch:
        image, hidden = _encode_image(inner, batch, kwargs)
    if "input_ids" in batch:
        text = _encode_text(inner, batch)
    bias = getattr(inner, "logit_bias", None)
    return DualOutput(
        None if image is None else F.normalize(image.float(), dim=-1),
        None if text is None else F.normalize(text.float(), dim=-1),
        inner.logit_scale.float().exp().reshape(()),
        None if bias is None else bias.float().reshape(()),
        hidden,
    )


def _encode_image(inner: Any, batch: dict[str, Any], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    if is_open_clip(inner):
        return inner.encode_image(batch["pixel_values"]), None
    found = inner.get_image_features(**_accepted(inner.get_image_features, batch, _IMAGE_INPUTS), **kwargs)
    return getattr(found, "pooler_output", found), getattr(found, "hidden_states", None)


def _encode_text(inner: Any, batch: dict[str, Any]) -> torch.Tensor:
    if is_open_clip(inner):
        return inner.encode_text(batch["input_ids"])
    found = inner.get_text_features(**_accepted(inner.get_text_features, batch, _TEXT_INPUTS))
    return getattr(found, "pooler_output", found)


def _accepted(function: Any, batch: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The inputs among `names` that the function names in its signature."""
    known = inspect.signature(function).parameters
    return {name: batch[name] for name in names if name in batch and name in known}


def is_open_clip(model: Any) -> bool:
    return hasattr(model, "encode_image") and not hasattr(model, "get_image_features")


_HEADS = (
    "visual_projection",  # CLIP and pairs of towers
    "text_projection",
    "text_model.head",  # SigLIP, whose image tower ends in its pooling
    "visual.proj",  # open_clip: ViT, timm models, ResNet with attention pooling
    "visual.head",
    "visual.attnpool",
    "text.text_projection",  # open_clip with a text tower of its own
    "text.proj",
)


def heads(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What takes a tower's features into the shared space: name of the module or parameter -> its parameters."""
    inner = loading.unwrap(model)
    found = {name: _find(inner, name) for name in _HEADS}
    listed = {
        n: [x] if isinstance(x, nn.Parameter) else list(x.parameters()) for n, x in found.items() if x is not None
    }
    return {name: parameters for name, parameters in listed.items() if parameters}


def _find(root: Any, path: str) -> nn.Module | nn.Parameter | None:
    for part in path.split("."):
        root = getattr(root, part, None)
    return root if isinstance(root, (nn.Module, nn.Parameter)) else None


def towers(model: nn.Module) -> dict[str, list[list[str]]]:
    """Parameter names of the `image` and the `text` tower, layer by layer from the input, without their heads."""
    inner: Any = loading.unwrap(model)
    if not is_open_clip(inner):
        roots = {"image": inner.vision_model, "text": inner.text_model}
    elif hasattr(inner, "text"):
        roots = {"image": inner.visual, "text": inner.text}
    else:
        roots = {"image": inner.visual, "text": _open_clip_text(inner)}
    head = {id(p) for parameters in heads(model).values() for p in parameters}
    excluded = {name for name, p in model.named_parameters() if id(p) in head}
    layered = {name: loading.backbone_layers(model, root) for name, root in roots.items()}
    kept = {name: [[n for n in layer if n not in excluded] for layer in layers] for name, layers in layered.items()}
    return {name: [layer for layer in layers if layer] for name, layers in kept.items()}


def _open_clip_text(inner: Any) -> nn.Module:
    """open_clip's CLIP keeps its text tower in pieces: hold them together, in the order in which they run."""
    pieces = nn.Module()
    pieces.register_parameter("positional_embedding", inner.positional_embedding)
    for name in ("token_embedding", "transformer", "ln_final"):
        pieces.add_module(name, getattr(inner, name))
    return pieces


def by_depth(parts: Sequence[list[list[str]]]) -> list[list[str]]:
    """Layers of several towers as one sequence: first layers with first, last with last, the rest in proportion."""
    count = max(len(layers) for layers in parts)
    merged: list[list[str]] = [[] for _ in range(count)]
    for layers in parts:
        for i, layer in enumerate(layers):
            merged[round(i * (count - 1) / max(len(layers) - 1, 1))] += layer
    return [layer for layer in merged if layer]


# --- our own model ----------------------------------------------------------------------------------------------------


class DualEncoderConfig(PreTrainedConfig):
    """Two configurations and how their towers are read.

    vision_pooling, text_pooling: `pooler`, the tower's own pooled output, or `mean`, over positions that are not
    padding. vision_embed_dim, text_embed_dim: width of what is pooled. use_logit_bias: whether there is a `logit_bias`.
    """

    model_type = "kt_hf_dual_encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # type: ignore[assignment]

    vision_config: Any = None
    text_config: Any = None
    vision_pooling: str = "pooler"
    text_pooling: str = "pooler"
    vision_embed_dim: int = 0
    text_embed_dim: int = 0
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    use_logit_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            given = getattr(self, name)
            if isinstance(given, dict):
                setattr(self, name, AutoConfig.for_model(**given))
        super().__post_init__(**kwargs)


class DualEncoderModel(PreTrainedModel):
    """Two towers of transformers, each followed by a linear projection without bias into the shared space."""

    config_class = DualEncoderConfig
    config: DualEncoderConfig
    base_model_prefix = "dual_encoder"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: DualEncoderConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_model = vision_model if vision_model is not None else AutoModel.from_config(config.vision_config)
        self.text_model = text_model if text_model is not None else AutoModel.from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_embed_dim, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_embed_dim, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.use_logit_bias else None
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """The image tower's output with the projected, not normalised, (B, D) as `pooler_output`."""
        found = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        found["pooler_output"] = self.visual_projection(pool(found, self.config.vision_pooling))
        return found

    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The text tower's output with the projected, not normalised, (B, D) as `pooler_output`."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = _accepted(self.text_model.forward, {k: v for k, v in given.items() if v is not None}, given)
        found = self.text_model(**inputs, return_dict=True, **kwargs)
        found["pooler_output"] = self.text_projection(pool(found, self.config.text_pooling, attention_mask))
        return found

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CLIPOutput:
        """Embeddings of length 1 and their logits, as transformers' CLIP gives them."""
        image = self.get_image_features(pixel_values, **kwargs)
        text = self.get_text_features(input_ids, attention_mask, token_type_ids, **kwargs)
        image_embeds, text_embeds = (
            F.normalize(image["pooler_output"], dim=-1),
            F.normalize(text["pooler_output"], dim=-1),
        )
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.T
        if self.logit_bias is not None:
            logits_per_text = logits_per_text + self.logit_bias
        return CLIPOutput(
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=image,
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self.config.use_logit_bias = self.logit_bias is not None  # a strategy may have given the model one
        return super().save_pretrained(*args, **kwargs)


def pool(output: Any, how: str, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
    """(B, W) from a tower's output: its pooled output, or the mean over positions that count (of maps, over space)."""
    if how == "pooler":
        return output["pooler_output"].flatten(1)
    hidden = output["last_hidden_state"]
    if hidden.dim() == 4:
        return hidden.mean(dim=(2, 3))
    if mask_BL is None:
        return hidden.mean(dim=1)
    mask_BL1 = mask_BL.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)


AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
AutoModel.register(DualEncoderConfig, DualEncoderModel, exist_ok=True)


# --- transformers: whole models ---------------------------------------------------------------------------------------


def load_transformers(ref: Model, texts: Iterable[str]) -> Loaded:
    """A whole dual encoder with its processor: a checkpoint (`ref.path`), or a fresh one of a type (`ref.config`)."""
    if ref.path is None:
        loaded, processor = _fresh(ref, texts)
    else:
        loaded = loading.load_model(_auto(loading.config_of(_base_of(ref))), ref)
        _check_dual(loaded.model, f"model '{ref.path}'")
        source = ref.processor or ref.path
        with loading.loading(f"processor '{source}'"):
            processor = AutoProcessor.from_pretrained(
                source,
                revision=None if ref.processor else ref.revision,
                trust_remote_code=False,
                **(ref.processor_overrides or {}),
            )
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise RecipeError(
                f"processor '{source}' is not one for images and texts", "give model.processor=DIR_OR_HUB_ID"
            )
    open_clip_models.freeze_unused(loaded.model)
    loaded.processor = TransformersProcessor.of(processor, loaded.model.config)
    return loaded


def _base_of(ref: Model) -> Model:
    """The model that an adapter's folder adapts, else the model itself."""
    path = Path(str(ref.path)) / loading.ADAPTER
    if not path.is_file():
        return ref
    return Model(path=json.loads(path.read_text()).get("base_model_name_or_path"))


def _check_dual(model: Any, what: str) -> None:
    if not all(
        hasattr(model, name)
        for name in ("get_image_features", "get_text_features", "logit_scale", "vision_model", "text_model")
    ):
        raise RecipeError(
            f"{what} ({type(model).__name__}) is no dual encoder",
            "take a CLIP, SigLIP or open_clip model, or give two towers: model.image and model.text",
        )


def _fresh(ref: Model, texts: Iterable[str]) -> tuple[Loaded, Any]:
    """A fresh model of a type (CLIP, SigLIP), whose vocabulary is its tokenizer's, or of a folder's configuration."""
    what = f"model.config '{ref.config}'"
    config = loading.config_of(Model(config=ref.config))
    if not hasattr(config, "text_config") or not hasattr(config, "vision_config"):
        valid = [c.model_type for c in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING]
        raise RecipeError(f"{what} is no dual encoder", nearest(str(ref.config), [*valid, "open_clip:NAME"]))
    tokenizer = loading.load_tokenizer(ref, texts)
    overrides = dict(ref.config_overrides or {})
    if ref.config in CONFIG_MAPPING:
        overrides["text_config"] = {**_text_changes(tokenizer, ref.config), **overrides.get("text_config", {})}
    asked = Model(config=ref.config, config_overrides=overrides, attn_implementation=ref.attn_implementation)
    config = loading.config_of(asked)
    if config.text_config.vocab_size < len(tokenizer):
        field, size = "model.config_overrides.text_config.vocab_size", config.text_config.vocab_size
        raise RecipeError(f"{field}: {size} for a tokenizer of {len(tokenizer)}", "leave it out")
    with loading.loading(what):
        model = _auto(config).from_config(config, dtype=None if ref.dtype == "auto" else loading.dtype_of(ref))
    _check_dual(model, what)
    if "siglip" in config.model_type and ref.config in CONFIG_MAPPING:
        tokenizer.model_input_names = ["input_ids"]  # its text tower is trained to see padding
        tokenizer.init_kwargs["model_input_names"] = ["input_ids"]  # saved with it
    processor = _processor_class(config)(loading.load_image_processor(ref, config.vision_config), tokenizer)
    new = [name for name, _ in model.named_parameters()]
    return Loaded(model, origin={"config": ref.config}, new_parameters=new), processor


def _auto(config: Any) -> Any:
    """The family that a whole dual encoder is loaded by."""
    whole = type(config) in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING
    return AutoModelForZeroShotImageClassification if whole else AutoModel


def _processor_class(config: Any) -> Any:
    from transformers import CLIPProcessor, SiglipProcessor

    return {"clip": CLIPProcessor, "siglip": SiglipProcessor}.get(config.model_type, VisionTextDualEncoderProcessor)


def _text_changes(tokenizer: Any, model_type: str) -> dict[str, Any]:
    """Fields of a fresh text configuration that follow from its tokenizer. CLIP's text tower pools at the end token."""
    changes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if "clip" in model_type:
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        if end is None:
            raise RecipeError(
                "the tokenizer has no end token, which CLIP's text tower pools at", "give model.processor with one"
            )
        changes.update(eos_token_id=end, bos_token_id=start)
    return changes


# --- transformers: two towers -----------------------------------------------------------------------------------------


def load_towers(ref: Model, texts: Iterable[str]) -> Loaded:
    """Two towers (`ref.image`, `ref.text`) with fresh projections of width `ref.projection_dim`.

    VisionTextDualEncoderModel where it takes both, else `DualEncoderModel`. What is new is named in `new_parameters`.
    """
    image_ref, text_ref = _noun(ref.image), _noun(ref.text)
    tokenizer = loading.load_tokenizer(text_ref, texts)
    changes = _text_changes(tokenizer, text_ref.config) if text_ref.config in CONFIG_MAPPING else {}
    changes = {k: v for k, v in changes.items() if k not in (text_ref.config_overrides or {})}
    image, new_image = load_tower(image_ref, "vision")
    text, new_text = load_tower(text_ref, "text", **changes)
    model = join(image, text, ref.projection_dim)
    open_clip_models.freeze_unused(model)
    processor = VisionTextDualEncoderProcessor(loading.load_image_processor(image_ref, image.config), tokenizer)
    new = [f"vision_model.{n}" for n in new_image] + [f"text_model.{n}" for n in new_text]
    new += ["visual_projection.weight", "text_projection.weight", "logit_scale"]
    origin = {"image": str(image_ref.path or image_ref.config), "text": str(text_ref.path or text_ref.config)}
    return Loaded(model, TransformersProcessor.of(processor, model.config), origin=origin, new_parameters=new)


def _noun(given: Any) -> Model:
    return given if isinstance(given, Model) else Model(**given) if isinstance(given, dict) else Model(path=given)


def load_tower(ref: Model, part: str, **changes: Any) -> tuple[Any, list[str]]:
    """(tower, names of its new parameters). `part` is `vision` or `text`; of a dual encoder that half is taken."""
    if ref.image is not None:  # itself two towers
        return load_tower(_noun(ref.image if part == "vision" else ref.text), part, **changes)
    if open_clip_models.names_open_clip(ref):
        raise RecipeError(f"'{ref.path or ref.config}' is a model of open_clip", "take towers of transformers")
    config = loading.config_of(ref, **changes)
    inner = getattr(config, f"{part}_config", None)
    if inner is None:
        loaded = loading.load_model(AutoModel, ref, **changes)
        _make_identity(loaded.model, loaded.new_parameters)
        return loaded.model, loaded.new_parameters
    if ref.path is None:
        with loading.loading(f"model.config '{ref.config}'"):
            tower = AutoModel.from_config(inner)
        return tower, [name for name, _ in tower.named_parameters()]
    whole = loading.load_model(AutoModel, ref, **changes).model
    _check_dual(whole, f"model '{ref.path}'")
    return getattr(whole, f"{part}_model"), []


def _make_identity(tower: Any, new: list[str]) -> None:
    """A pooler that the checkpoint does not have starts as the identity on the first token, so that the projection sees
    trained features: a random one behind a tanh would scramble them, for good where the tower is locked."""
    dense = getattr(getattr(tower, "pooler", None), "dense", None)
    fresh_whole = len(new) == sum(1 for _ in tower.named_parameters())
    if (
        fresh_whole
        or "pooler.dense.weight" not in new
        or not isinstance(dense, nn.Linear)
        or dense.in_features != dense.out_features
    ):
        return
    nn.init.eye_(dense.weight)
    if dense.bias is not None:
        nn.init.zeros_(dense.bias)
    if hasattr(tower.config, "pooler_act"):  # of ViT; BERT's is always a tanh
        tower.config.pooler_act, tower.pooler.activation = "linear", nn.Identity()


def join(image: Any, text: Any, projection_dim: int) -> Any:
    """A dual encoder of two towers with fresh projections."""
    for tower, part in ((image, "image"), (text, "text")):
        if type(tower.config) not in MODEL_MAPPING:
            raise RecipeError(
                f"model.{part}: {type(tower).__name__} cannot be loaded again on its own", "take another encoder"
            )
    vision_pooling, vision_width, plain_image = _read(image, _image_probe(image.config))
    text_pooling, text_width, plain_text = _read(
        text, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, token_type_ids=None, position_ids=None
    )
    if plain_image and plain_text:
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            image.config, text.config, projection_dim=projection_dim
        )
        return _start_projections(VisionTextDualEncoderModel(config=config, vision_model=image, text_model=text))
    own = DualEncoderConfig(
        vision_config=image.config.to_dict(),
        text_config=text.config.to_dict(),
        vision_pooling=vision_pooling,
        text_pooling=text_pooling,
        vision_embed_dim=vision_width,
        text_embed_dim=text_width,
        projection_dim=projection_dim,
    )
    return _start_projections(DualEncoderModel(own, image, text))


def _start_projections(model: Any) -> Any:
    """Normal with variance 1 / W, as CLIP's: transformers' usual 0.02 is so small that a first step of Adam would turn
    embeddings around, and training may collapse."""
    for projection in (model.visual_projection, model.text_projection):
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    return model


def _image_probe(config: Any) -> dict[str, torch.Tensor]:
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width)}


def _read(tower: Any, probe: dict[str, torch.Tensor], **optional: None) -> tuple[str, int, bool]:
    """(pooling, width, whether VisionTextDualEncoder can read it), from one run on zeros."""
    training, dtype = tower.training, next(tower.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in probe.items()}
    tower.eval()
    with torch.no_grad(), loading.loading(f"{type(tower).__name__} as a tower"):
        try:
            output, takes_all = tower(**inputs, **optional), True
        except TypeError:
            output, takes_all = tower(**inputs), False
    tower.train(training)
    pooled = getattr(output, "pooler_output", None)
    how = "pooler" if pooled is not None else "mean"
    width = pool(output, how).shape[1]
    plain = (
        takes_all and pooled is not None and pooled.dim() == 2 and getattr(tower.config, "hidden_size", None) == width
    )
    return how, width, plain


class TransformersProcessor:
    """Images and texts to a transformers model's inputs.

    limit: tokens that the text tower takes. fixed: pad every text to the limit, as SigLIP's tower was trained to see.
    """

    def __init__(self, processor: Any, limit: int, fixed: bool):
        self.processor, self.limit, self.fixed = processor, limit, fixed

    @classmethod
    def of(cls, processor: Any, config: Any) -> TransformersProcessor:
        text = config.text_config
        positions = [
            n for n in (getattr(text, "max_position_embeddings", None), processor.tokenizer.model_max_length) if n
        ]
        return cls(processor, min(positions), "siglip" in config.model_type or "siglip" in text.model_type)

    def images(self, images: list[Any]) -> dict[str, Any]:
        return dict(self.processor.image_processor(images, return_tensors="pt"))

    def texts(self, texts: list[str], max_length: int) -> dict[str, Any]:
        encoded = loading.encode(self.processor.tokenizer, texts, max_length=min(max_length, self.limit))
        return {k: v for k, v in encoded.items() if k in _TEXT_INPUTS}

    def pad(self, tokens: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        names = self.processor.tokenizer.model_input_names
        how: dict[str, Any] = {"padding": "max_length", "max_length": self.limit} if self.fixed else {"padding": True}
        padded = self.processor.tokenizer.pad(
            tokens, return_tensors="pt", return_attention_mask="attention_mask" in names, **how
        )
        return dict(padded)

    def signature(self) -> dict[str, Any]:
        vocabulary = loading.tokenizer_signature(self.processor.tokenizer)
        return {
            **vocabulary,
            **loading.image_signature(self.processor.image_processor),
            "padded_to": self.limit if self.fixed else None,
        }

    def save_pretrained(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)
