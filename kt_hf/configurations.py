"""What the configurations of models that are to be merged say differently: weights of one shape may be used in another
way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kt_hf.errors import RecipeError

_DECIDES = ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "head_dim", "hidden_act", "activation")
"""Settings, or what the last part of their name begins with, under which the same weights compute something else."""
_SAYS_NOTHING = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "use_cache",
    "vocab_size",
    "tie_word_embeddings",
    "_attn_implementation",
    "attn_implementation",
    "pretrained_cfg",
    "num_classes",
)


def compare(first: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What differs, in words, of all but labels, vocabularies, precision and dropout. Raises `RecipeError` where it
    decides what the weights mean. names: of the two models."""
    mine, theirs = dict(_flat(first)), dict(_flat(other))
    odd = [key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key]]
    decides = sorted(key for key in odd if key.rsplit(".", 1)[-1].startswith(_DECIDES))
    if decides:
        said = "; ".join(f"{key} is {mine[key]!r} and {theirs[key]!r}" for key in decides)
        raise RecipeError(f"'{names[0]}' and '{names[1]}' differ in their configurations: {said}", "merge models alike")
    return [f"{key}: {mine[key]!r} and {theirs[key]!r}" for key in sorted(odd)]


def _flat(settings: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key in _SAYS_NOTHING or "dropout" in key or key.endswith("token_id"):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value
