"""Output ensembles: a folder of members that is evaluated, distilled from, and loaded as one.

ensemble.json     method, its fitted settings, the task, the classes, the members' folders
members/0/ ...    ordinary model directories

Members may know different classes: those of the ensemble are the union, by name. A member gives a class that it does
not know the score -inf.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kt_hf import loading, registry
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.functional.mixing import place
from kt_hf.recipe import Model
from kt_hf.task import Batch, Loaded, Task

if TYPE_CHECKING:
    from kt_hf.data import DataInfo

FORMAT = "kt_hf.ensemble/1"


def is_ensemble(folder: Path) -> bool:
    return (folder / "ensemble.json").is_file()


def describe(folder: Path) -> dict[str, Any]:
    """The checked content of ensemble.json."""
    facts = json.loads((folder / "ensemble.json").read_text())
    if facts.get("format") != FORMAT:
        raise IntegrityError(f"{folder}: ensemble.json has format {facts.get('format')!r}", f"expected {FORMAT}")
    for name in facts["members"]:
        if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_dir():
            raise IntegrityError(
                f"{folder}: ensemble.json names the member '{name}'", "members are folders inside of the ensemble's"
            )
    return facts


def members(folder: Path) -> tuple[list[Path], Any]:
    """(the members' folders, scores_KNC -> scores_NC)."""
    facts = describe(folder)
    method = registry.load("ensemble", facts["method"])(**facts["settings"])
    return [folder / name for name in facts["members"]], method.combine


def save(folder: Path, parents: list[Path], name: str, method: Any, task: str, labels: list[str] | None = None) -> None:
    """Write the folder; members are hard links where the file system allows, else copies. labels: those of all."""
    for i, parent in enumerate(parents):
        shutil.copytree(parent, folder / "members" / str(i), copy_function=_link)
    names = [f"members/{i}" for i in range(len(parents))]
    facts = {"format": FORMAT, "method": name, "settings": method.state(), "task": task, "members": names}
    facts |= {"labels": labels} if labels is not None else {}
    (folder / "ensemble.json").write_text(json.dumps(facts, indent=1))


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)  # the client's cache of the Hub holds links
    except OSError:
        shutil.copy2(source, target)


@dataclass
class Members:
    """The members of an ensemble, loaded.

    joined: what stands for all: the first one's processor, the classes of all. columns: per member, its class for every
    class of all, -1 for one that it does not know; None where they are the same.
    """

    each: list[Loaded]
    joined: Loaded
    columns: list[list[int] | None]


def load(refs: Sequence[Model], task: Task, info: DataInfo) -> Members:
    """Load members, which may know some of the data's classes each.

    Raises `RecipeError` for a class that none of them knows, and for members that read their inputs differently.
    """
    each = [task.load(ref, _as_known(task, ref, info)) for ref in refs]
    task.settle(info)  # a member may have seen less
    return join(each, task, info.labels)


def _as_known(task: Task, ref: Model, info: DataInfo) -> DataInfo:
    """The data with those of their classes that the model knows, where it names some of them."""
    if task.classes_from != "model" or info.labels is None or ref.path is None:
        return info
    own = {loading.label_key(label) for label in loading.known_labels(ref) or []}
    known = [label for label in info.labels if loading.label_key(label) in own]
    return dataclasses.replace(info, labels=known) if known else info


def join(each: list[Loaded], task: Task, labels: list[str] | None) -> Members:
    """What members are together. labels: the data's classes."""
    first = each[0]
    for other in each[1:]:
        _check_inputs(task, first, other)
    if labels is None or any(member.labels is None for member in each):
        return Members(each, first, [None] * len(each))
    union = {loading.label_key(label): label for member in each[::-1] for label in member.labels or []}
    order = list(dict.fromkeys(loading.label_key(label) for member in each for label in member.labels or []))
    if unknown := [label for label in labels if loading.label_key(label) not in union]:
        raise RecipeError(
            f"no member of the ensemble knows {', '.join(unknown[:8])}",
            "add a member that does, or name the classes to keep with data.labels",
        )
    ids = [order.index(loading.label_key(label)) for label in labels]
    joined = Loaded(first.model, first.processor, [union[key] for key in order], ids, first.origin, first.kind)
    columns = [_columns(member, order) for member in each]
    if task.unit == "class" and any(found is not None for found in columns):
        raise RecipeError(
            "members with several classes a row must have the same ones, in the same order",
            "train them on data that name the classes alike: data.labels=[...]",
        )
    return Members(each, joined, columns)


def _columns(member: Loaded, order: list[str]) -> list[int] | None:
    own = [loading.label_key(label) for label in member.labels or []]
    return None if own == order else [own.index(key) if key in own else -1 for key in order]


def _check_inputs(task: Task, first: Loaded, other: Loaded) -> None:
    """Members see one batch: what makes it must be alike."""
    ours, theirs = task.signature(first), task.signature(other)
    for key in (ours.keys() & theirs.keys()) - {"labels", "num_scores", "vocabulary_size", "preprocessing"}:
        if ours[key] != theirs[key]:
            names = [loaded.origin.get("path") for loaded in (first, other)]
            raise RecipeError(
                f"the ensemble's members '{names[0]}' and '{names[1]}' differ in {key}",
                "combine models of the same vocabulary and preprocessing",
            )


class EnsembleBundle(nn.Module):
    """Members that answer as one; stands where evaluation expects a bundle."""

    def __init__(self, members_: Members, task: Task, combine: Any):
        super().__init__()
        self.models = nn.ModuleList([m.model for m in members_.each])
        self.columns, self.task, self.loaded, self.combine = members_.columns, task, members_.joined, combine

    def begin_evaluation(self) -> None: ...

    def end_evaluation(self) -> None: ...

    def evaluated(self) -> nn.Module:
        return self.models

    def forward(self, mode: str, batch: Batch, streams: Any = None, position: Any = None, context: Any = None) -> Any:
        if mode == "context":
            return {}
        found, weight_N = [], None
        for model, columns in zip(self.models, self.columns, strict=True):
            scores_NC, weight_N = self.task.scores(self.task.forward(model, batch), batch)
            found.append(place(scores_NC, columns))
        width = min(scores.shape[-1] for scores in found)  # vocabularies may be padded to different widths
        scores_KNC = torch.stack([scores[:, :width] for scores in found])
        if mode == "scores":
            return {"scores": scores_KNC.transpose(0, 1), "label": batch["labels"]}
        assert weight_N is not None
        return self.task.from_scores(self.combine(scores_KNC), weight_N, batch)
