"""Output ensembles: a folder of members that is evaluated, distilled from, and loaded as one.

ensemble.json     method, its fitted settings, the task, the members' folders
members/0/ ...    ordinary model directories
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kt_hf import registry
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.task import Batch, Loaded, Task

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


def save(folder: Path, parents: list[Path], name: str, method: Any, task: str) -> None:
    """Write the folder; members are hard links where the file system allows, else copies."""
    for i, parent in enumerate(parents):
        shutil.copytree(parent, folder / "members" / str(i), copy_function=_link)
    names = [f"members/{i}" for i in range(len(parents))]
    facts = {"format": FORMAT, "method": name, "settings": method.state(), "task": task, "members": names}
    (folder / "ensemble.json").write_text(json.dumps(facts, indent=1))


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)  # the client's cache of the Hub holds links
    except OSError:
        shutil.copy2(source, target)


class EnsembleBundle(nn.Module):
    """Members that answer as one; stands where evaluation expects a bundle."""

    def __init__(self, members_: list[Loaded], task: Task, combine: Any):
        super().__init__()
        self.models = nn.ModuleList([m.model for m in members_])
        self.members, self.task, self.loaded, self.combine = members_, task, members_[0], combine
        self.order = [_order(members_[0], m) for m in members_]

    def begin_evaluation(self) -> None: ...

    def end_evaluation(self) -> None: ...

    def evaluated(self) -> nn.Module:
        return self.models

    def forward(self, mode: str, batch: Batch, streams: Any = None, position: Any = None, context: Any = None) -> Any:
        if mode == "context":
            return {}
        found, weight_N = [], None
        for model, order in zip(self.models, self.order, strict=True):
            scores_NC, weight_N = self.task.scores(self.task.forward(model, batch), batch)
            found.append(scores_NC if order is None else scores_NC[:, order])
        width = min(scores.shape[-1] for scores in found)  # vocabularies may be padded to different widths
        scores_KNC = torch.stack([scores[:, :width] for scores in found])
        if mode == "scores":
            return {"scores": scores_KNC.transpose(0, 1), "label": batch["labels"]}
        assert weight_N is not None
        return self.task.from_scores(self.combine(scores_KNC), weight_N, batch)


def _order(first: Loaded, other: Loaded) -> list[int] | None:
    if first.labels is None or first.labels == other.labels:
        return None
    if other.labels is None or set(first.labels) != set(other.labels):
        raise RecipeError(
            f"ensemble members disagree on labels: {first.labels} and {other.labels}",
            "combine models of the same classes",
        )
    return [other.labels.index(label) for label in first.labels]
