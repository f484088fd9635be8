"""Backbone and head of checkpoints: by which names they go, where parents have other heads, or a base has none.

A backbone's tensors begin with a prefix in the files of a model with a head (`bert.encoder...`), and have none in those
of a bare one (`encoder...`): `base_model_prefix` of the class that the configuration names. Where there is no such
prefix, the class itself is asked, built without weights: timm's classifier, else what its backbone's class has not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
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


def by_class(folder: Path, settings: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Those of the names in a model's files that are its head, by the structure of its class; none where the class has
    no head, or none is known. settings: its config.json."""
    import torch
    import transformers

    from kt_hf import loading

    timm = "TimmWrapperForImageClassification" if "architecture" in settings else None  # a folder as timm writes it
    kind = next(iter(settings.get("architectures") or []), timm)
    if kind is None or not hasattr(transformers, str(kind)):
        return set()
    model: Any = loading.without_weights(folder, str(kind))
    modules = loading.head_modules(model)
    if not modules and not hasattr(model, "timm_model"):
        bare: Any = transformers.MODEL_MAPPING.get(type(model.config), None)
        bare = bare[0] if isinstance(bare, tuple) else bare
        if bare is None or isinstance(model, bare):
            return set()
        with loading.loading(f"the structure of '{folder}'"), torch.device("meta"):
            parts = {name for name, _ in bare(model.config).named_children()}
        modules = [name for name, _ in model.named_children() if name not in parts]
    known = loading.model_names(model, names)
    return {file for file, name in known.items() if any(name.startswith(f"{module}.") for module in modules)}


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
