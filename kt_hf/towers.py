"""Towers: encoders of one medium each that larger models are made of, and how their outputs are read.

Shapes: B rows, L positions, W width of a tower.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel

from kt_hf import audio, loading, open_clip_models
from kt_hf.errors import RecipeError
from kt_hf.recipe import Model

IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


# --- loading ----------------------------------------------------------------------------------------------------------


def noun(given: Any) -> Model:
    """The model that a recipe gives for a tower."""
    return given if isinstance(given, Model) else Model(**given) if isinstance(given, dict) else Model(path=given)


def load_tower(ref: Model, part: str, **changes: Any) -> tuple[Any, list[str]]:
    """(tower, names of its new parameters). `part` is `vision`, `text` or `audio`; of a model of several towers that
    one is taken."""
    within = ref.image if part == "vision" else ref.text if part == "text" else ref.audio
    if within is not None:  # itself made of towers
        return load_tower(noun(within), part, **changes)
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
    whole: Any = loading.load_model(AutoModel, ref, **changes).model
    if not hasattr(whole, f"{part}_model"):
        raise RecipeError(
            f"model '{ref.path}' ({type(whole).__name__}) has no {part} tower that could be taken out of it",
            "take an encoder, or a dual encoder such as CLIP",
        )
    return getattr(whole, f"{part}_model"), []


def check_loads_again(tower: Any, part: str) -> None:
    """Raises `RecipeError` for a tower that its own configuration does not lead back to."""
    if type(tower.config) not in MODEL_MAPPING:
        raise RecipeError(
            f"model.{part}: {type(tower).__name__} cannot be loaded again on its own", "take another encoder"
        )


def text_changes(tokenizer: Any, model_type: str) -> dict[str, Any]:
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


def load_text_tower(given: Any, texts: Iterable[str]) -> tuple[Any, list[str], Any]:
    """(text tower, names of its new parameters, its tokenizer); a fresh tower has its tokenizer's vocabulary."""
    ref = noun(given)
    tokenizer = loading.load_tokenizer(ref, texts)
    changes = text_changes(tokenizer, ref.config) if ref.config in CONFIG_MAPPING else {}
    changes = {k: v for k, v in changes.items() if k not in (ref.config_overrides or {})}
    return *load_tower(ref, "text", **changes), tokenizer


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


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """How a tower's output is read. pooling: `pooler`, its own pooled output, or `mean`. width, token_width: of what is
    pooled, and of a position. plain: whether VisionTextDualEncoder can read it."""

    pooling: str
    width: int
    token_width: int
    plain: bool


def accepted(function: Any, batch: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The inputs among `names` that the function names in its signature."""
    known = inspect.signature(function).parameters
    return {name: batch[name] for name in names if name in batch and name in known}


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


def positions(output: Any) -> torch.Tensor:
    """(B, L, W) from a tower's output; of maps, the places are the positions."""
    hidden = output["last_hidden_state"]
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


def read(tower: Any, probe: dict[str, torch.Tensor], **optional: None) -> Reading:
    """How a tower is read, from one run on zeros."""
    training, first = tower.training, next(tower.parameters())
    inputs = {k: v.to(first if v.is_floating_point() else first.device) for k, v in probe.items()}
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
    own = getattr(tower.config, "hidden_size", None)
    plain = takes_all and pooled is not None and pooled.dim() == 2 and own == width
    return Reading(how, width, positions(output).shape[2], plain)


def image_probe(config: Any) -> dict[str, torch.Tensor]:
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width)}


def text_probe() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}


def by_depth(parts: Sequence[list[list[str]]]) -> list[list[str]]:
    """Layers of several towers as one sequence: first layers with first, last with last, the rest in proportion."""
    count = max(len(layers) for layers in parts)
    merged: list[list[str]] = [[] for _ in range(count)]
    for layers in parts:
        for i, layer in enumerate(layers):
            merged[round(i * (count - 1) / max(len(layers) - 1, 1))] += layer
    return [layer for layer in merged if layer]


# --- processors -------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """The processors of a model's towers, saved as transformers' own processors are: each `Auto...` finds its own.
    table_columns: numbers of a row's table, which need no processor."""

    tokenizer: Any = None
    image_processor: Any = None
    feature_extractor: Any = None
    table_columns: int = 0

    def save_pretrained(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        others = {"image_processor": self.image_processor, "feature_extractor": self.feature_extractor}
        described = {name: json.loads(part.to_json_string()) for name, part in others.items() if part is not None}
        (folder / "processor_config.json").write_text(json.dumps(described, indent=2))


class TransformersProcessor:
    """Images, texts and sounds to the inputs of a model of transformers; of those it has processors for.

    limit: tokens that the text tower takes. fixed: pad every text to the limit, as SigLIP's tower was trained to see.
    """

    def __init__(self, processor: Any, limit: int, fixed: bool):
        self.processor, self.limit, self.fixed = processor, limit, fixed

    @classmethod
    def of(cls, processor: Any, config: Any) -> TransformersProcessor:
        text = config.text_config
        if text is None:
            return cls(processor, 0, False)
        positions = [
            n for n in (getattr(text, "max_position_embeddings", None), processor.tokenizer.model_max_length) if n
        ]
        return cls(processor, min(positions), "siglip" in config.model_type or "siglip" in text.model_type)

    def images(self, images: list[Any]) -> dict[str, Any]:
        return dict(self.processor.image_processor(images, return_tensors="pt"))

    def texts(self, texts: list[str], max_length: int) -> dict[str, Any]:
        encoded = loading.encode(self.processor.tokenizer, texts, max_length=min(max_length, self.limit))
        return {k: v for k, v in encoded.items() if k in TEXT_INPUTS}

    def pad(self, tokens: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        names = self.processor.tokenizer.model_input_names
        how: dict[str, Any] = {"padding": "max_length", "max_length": self.limit} if self.fixed else {"padding": True}
        padded = self.processor.tokenizer.pad(
            tokens, return_tensors="pt", return_attention_mask="attention_mask" in names, **how
        )
        return dict(padded)

    def signature(self) -> dict[str, Any]:
        tokenizer, pictures, sounds = (
            getattr(self.processor, name, None) for name in ("tokenizer", "image_processor", "feature_extractor")
        )
        return {
            **(loading.tokenizer_signature(tokenizer) if tokenizer is not None else {}),
            **(loading.image_signature(pictures) if pictures is not None else {}),
            **({"sound": audio.signature(sounds)} if sounds is not None else {}),
            "padded_to": self.limit if self.fixed else None,
        }

    def save_pretrained(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)
