"""What tasks share whose models write a text by a decoder: what it starts with, its inputs, its layers, and texts as
arrays.

Shapes: B rows of a batch, L tokens of the longest target, N texts, W bytes of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from kt_hf import loading
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.language import IGNORED
from kt_hf.task import Loaded


def fresh_fields(ref: Any, tokenizer: Any) -> dict[str, Any]:
    """Fields of a fresh configuration that follow from the tokenizer; those that the user set stay."""
    wanted = {
        "vocab_size": len(tokenizer),
        "forced_eos_token_id": None,
        "decoder_start_token_id": padding_of(tokenizer),
    }
    wanted |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return loading.unset_fields(ref, wanted)


def start_fresh(model: Any, tokenizer: Any) -> None:
    """A fresh decoder starts with the padding token, as those of T5 and Marian do, where nothing else is asked for."""
    for config in (model.config, model.generation_config):
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = padding_of(tokenizer)
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, padding_of(tokenizer)


def padding_of(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id)


def check_model(loaded: Loaded, tokenizer: Any, fresh: bool) -> None:
    """Refuse what would train or score without an error, but wrongly."""
    model: Any = loaded.model
    if not fresh and loaded.new_parameters:
        raise IntegrityError(
            f"the checkpoint has no language-model head ({', '.join(loaded.new_parameters[:3])} would be random)",
            "take a checkpoint that was saved as a sequence-to-sequence language model",
        )
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    table = model.get_output_embeddings() or model.get_input_embeddings()
    if num_tokens > table.weight.shape[0]:
        raise RecipeError(
            f"the tokenizer has {num_tokens} tokens, the model embeddings for {table.weight.shape[0]}",
            "give the model its own tokenizer (model.processor), or a fresh one a larger vocab_size",
        )
    if start_of(model) is None:
        raise RecipeError(
            f"the configuration of {type(model).__name__} does not say what its decoder starts with",
            "set model.config_overrides.decoder_start_token_id",
        )


def start_of(model: Any) -> int | None:
    """The token that the decoder starts with, in training as in writing."""
    for config in (model.generation_config, model.config):
        if getattr(config, "decoder_start_token_id", None) is not None:
            return int(config.decoder_start_token_id)
    return None


def padding(model: Any) -> int:
    return int(model.generation_config.pad_token_id if model.generation_config.pad_token_id is not None else 0)


def positions(model: Any) -> int | None:
    """The longest text that the model has places for; None where it counts distances."""
    names = ("max_position_embeddings", "max_target_positions")
    found = (getattr(model.config, name, None) for name in names)
    return next((places for places in found if isinstance(places, int) and places > 0), None)


def shifted(labels_BL: torch.Tensor, model: Any) -> torch.Tensor:
    """decoder_input_ids_BL: the start token, then the labels but for the last; what is ignored becomes padding, which
    no real place sees."""
    start = start_of(model)
    assert start is not None  # `load` has looked
    first_B1 = labels_BL.new_full((len(labels_BL), 1), start)
    moved_BL = torch.cat([first_B1, labels_BL[:, :-1]], dim=1)
    return moved_BL.masked_fill(moved_BL == IGNORED, padding(model))


def ended(ids: list[int], end: int, limit: int) -> list[int]:
    """Token ids of a target that end with the end token, also where the target is cut."""
    return ids if end in ids[-2:] else [*ids[: limit - 1], end]


def layers(model: nn.Module) -> list[list[str]]:
    """Parameter names of embeddings, the encoder's layers, the decoder's."""
    inner: Any = loading.unwrap(model)
    encoder = loading.backbone_layers(model, inner.get_encoder())
    known = {name for layer in encoder for name in layer}
    decoder = loading.backbone_layers(model, inner.get_decoder())
    left = [[name for name in layer if name not in known] for layer in decoder]
    return encoder + [layer for layer in left if layer]


def generate(model: Any, width: int, num_beams: int, **inputs: Any) -> torch.Tensor:
    """ids_BW: what `generate` gives, padded to a fixed width."""
    sharded = any(type(p).__name__ == "DTensor" for p in model.parameters())  # all ranks must take as many steps
    return model.generate(
        **inputs,
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=width,
        **({"synced_gpus": True} if sharded else {}),
    )


# --- texts as arrays -------------------------------------------------------------------------------------------------


def to_bytes(texts: Sequence[str]) -> np.ndarray:
    """UTF-8 bytes_NW, filled up with zeros, which no text needs."""
    encoded = [text.replace("\0", " ").encode() for text in texts]
    width = max([1, *map(len, encoded)])
    return np.frombuffer(b"".join(e.ljust(width, b"\0") for e in encoded), np.uint8).reshape(-1, width).copy()


def from_bytes(bytes_NW: np.ndarray) -> list[str]:
    return [row.tobytes().rstrip(b"\0").decode() for row in bytes_NW]
