"""Dual encoders: an image tower and a text tower that meet in one space. One interface over three families.

    transformers        CLIP, SigLIP, VisionTextDualEncoder: what has `get_image_features` and `get_text_features`
    `DualEncoderModel`  our own, for towers that VisionTextDualEncoder does not take (ResNet, DistilBERT)
    open_clip           loaded from, and saved as, `open_clip_config.json` and `open_clip_model.safetensors`

`encode`, `towers` and `heads` know the families; tasks and strategies do not. Importing this module registers
`DualEncoderModel` with transformers' `AutoConfig` and `AutoModel`.

Shapes: B rows, L tokens, D width of the shared space, W width of a tower.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
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
from kt_hf.towers import (
    IMAGE_INPUTS,
    TEXT_INPUTS,
    TransformersProcessor,
    accepted,
    check_loads_again,
    image_probe,
    load_text_tower,
    load_tower,
    noun,
    pool,
    read,
    text_changes,
    text_probe,
)

logger = logging.getLogger(__name__)


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
    found = inner.get_image_features(**accepted(inner.get_image_features, batch, IMAGE_INPUTS), **kwargs)
    return getattr(found, "pooler_output", found), getattr(found, "hidden_states", None)


def _encode_text(inner: Any, batch: dict[str, Any]) -> torch.Tensor:
    if is_open_clip(inner):
        return inner.encode_text(batch["input_ids"])
    found = inner.get_text_features(**accepted(inner.get_text_features, batch, TEXT_INPUTS))
    return getattr(found, "pooler_output", found)


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
        inputs = accepted(self.text_model.forward, {k: v for k, v in given.items() if v is not None}, given)
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
        overrides["text_config"] = {**text_changes(tokenizer, ref.config), **overrides.get("text_config", {})}
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


# --- transformers: two towers -----------------------------------------------------------------------------------------


def load_towers(ref: Model, texts: Iterable[str]) -> Loaded:
    """Two towers (`ref.image`, `ref.text`) with fresh projections of width `ref.projection_dim`.

    VisionTextDualEncoderModel where it takes both, else `DualEncoderModel`. What is new is named in `new_parameters`.
    """
    if ref.image is None or ref.text is None:
        raise RecipeError("a dual encoder needs an image and a text tower", "give both: model.image and model.text")
    image_ref, text_ref = noun(ref.image), noun(ref.text)
    image, new_image = load_tower(image_ref, "vision")
    text, new_text, tokenizer = load_text_tower(text_ref, texts)
    model = join(image, text, ref.projection_dim)
    open_clip_models.freeze_unused(model)
    processor = VisionTextDualEncoderProcessor(loading.load_image_processor(image_ref, image.config), tokenizer)
    new = [f"vision_model.{n}" for n in new_image] + [f"text_model.{n}" for n in new_text]
    new += ["visual_projection.weight", "text_projection.weight", "logit_scale"]
    origin = {"image": str(image_ref.path or image_ref.config), "text": str(text_ref.path or text_ref.config)}
    return Loaded(model, TransformersProcessor.of(processor, model.config), origin=origin, new_parameters=new)


def join(image: Any, text: Any, projection_dim: int) -> Any:
    """A dual encoder of two towers with fresh projections."""
    check_loads_again(image, "image")
    check_loads_again(text, "text")
    seen = read(image, image_probe(image.config))
    said = read(text, text_probe(), token_type_ids=None, position_ids=None)
    if seen.plain and said.plain:
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            image.config, text.config, projection_dim=projection_dim
        )
        return _start_projections(VisionTextDualEncoderModel(config=config, vision_model=image, text_model=text))
    own = DualEncoderConfig(
        vision_config=image.config.to_dict(),
        text_config=text.config.to_dict(),
        vision_pooling=seen.pooling,
        text_pooling=said.pooling,
        vision_embed_dim=seen.width,
        text_embed_dim=said.width,
        projection_dim=projection_dim,
    )
    return _start_projections(DualEncoderModel(own, image, text))


def _start_projections(model: Any) -> Any:
    """Normal with variance 1 / W, as CLIP's: transformers' usual 0.02 is so small that a first step of Adam would turn
    embeddings around, and training may collapse."""
    for projection in (model.visual_projection, model.text_projection):
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    return model
