"""Backbone and head of checkpoints: by which names they go, where parents have other heads, or a base has none.

A backbone's tensors begin with a prefix in the files of a model with a head (`bert.encoder...`), and have none in those
of a bare one (`encoder...`): `base_model_prefix` of the class that the configuration names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kt_hf.errors import RecipeError, nearest

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


def prefix(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """What a backbone's names begin with in this checkpoint, dot and all; empty for a bare backbone, or where nobody
    knows. settings: its config.json."""
    import transformers

    for architecture in settings.get("architectures") or []:
        found = getattr(getattr(transformers, str(architecture), None), "base_model_prefix", "")
        if found and any(name.startswith(f"{found}.") for name in names):
            return f"{found}."
    return ""


def renamed(tensors: Tensors, own: str, wanted: str) -> Tensors:
    """Tensors whose backbone has the prefix `own`, with the prefix `wanted` in its place. What is no part of the
    backbone is left out where only one of the two has a head."""
    if own == wanted:
        return dict(tensors)
    return {wanted + name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)}


def backbone(tensors: Tensors, start: str) -> set[str]:
    """Names of what is no head."""
    return {name for name in tensors if name.startswith(start)}


def place(head: str, labels: Sequence[str]) -> int:
    """Which of the parents is meant by `head`: its name, or the last part of that."""
    for found in (list(labels), [label.rstrip("/").rsplit("/", 1)[-1].removeprefix("@") for label in labels]):
        if found.count(head) == 1:
            return found.index(head)
    raise RecipeError(f"head: got '{head}', which names none of the parents", nearest(head, labels))
