"""Read-only facts of one execution, as strategies see them, and the one door to frozen models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kt_hf.bundle import Frozen
from kt_hf.errors import RecipeError
from kt_hf.recipe import Model
from kt_hf.task import Loaded, Task

if TYPE_CHECKING:
    from kt_hf.data import DataInfo

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Facts of one stage with one seed.

    accelerator: accelerate's. resolve: model reference -> `Model` with a real path. planned_steps: optimizer steps.
    """

    accelerator: Any
    seed: int
    folder: Path
    task: Task
    loaded: Loaded
    info: DataInfo
    planned_steps: int
    resolve: Callable[[Any], Model]
    autocast: torch.dtype | None = None
    _frozen: dict[str, Frozen] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    def frozen(self, ref: Any) -> Frozen:
        """A frozen model: loaded once, checked against the student, in eval mode on the device, without gradients.

        Raises `RecipeError` when vocabulary, labels or input normalisation differ from the student's.
        """
        model = self.resolve(ref)
        key = f"{model!r}@{model.revision}"
        if key not in self._frozen:
            self._frozen[key] = load_frozen(
                model, self.task, self.info, self.device, self.loaded, str(ref), self.autocast
            )
        return self._frozen[key]

    def all_frozen(self) -> list[tuple[str, nn.Module]]:
        """Name and model of all that were asked for so far."""
        return [(frozen.name, member.model) for frozen in self._frozen.values() for member in frozen.members]

    def revisions(self) -> dict[str, str]:
        """The commits of the frozen models that came from the Hub, by the reference that asked for them."""
        found = {frozen.name: frozen.members[0].origin.get("revision") for frozen in self._frozen.values()}
        return {name: revision for name, revision in found.items() if revision}


def load_frozen(
    model: Model,
    task: Task,
    info: DataInfo,
    device: torch.device,
    student: Loaded | None,
    name: str,
    autocast: torch.dtype | None = None,
) -> Frozen:
    """A model directory or a folder of ensemble members, frozen."""
    from kt_hf import ensembling

    folder = Path(str(model.path))
    paths, combine = ensembling.members(folder) if ensembling.is_ensemble(folder) else ([], None)
    together = ensembling.load([Model(path=str(p)) for p in paths], task, info) if paths else None
    members = [task.load(model, info)] if together is None else together.each
    for member in members:
        member.model.requires_grad_(False).eval().to(device)
    frozen = Frozen(members, task, name, combine, autocast=autocast)
    if student is not None:
        for member in members:
            known = member.labels if together is None else together.joined.labels
            frozen.classes.append(_agree(task, student, member, name, frozen, known))
        if all(c == list(range(len(c))) for c in frozen.classes):
            frozen.classes = []
    return frozen


def _agree(
    task: Task, student: Loaded, teacher: Loaded, name: str, frozen: Frozen, known: list[str] | None
) -> list[int]:
    """Check what teacher and student must share; the teacher's class of every class of the student, -1 for one that
    only others of an ensemble know. known: the classes of all of them."""
    ours, theirs = task.signature(student), task.signature(teacher)
    for key in ours.keys() & theirs.keys() - {"labels", "num_scores", "vocabulary_size", "preprocessing"}:
        if ours[key] != theirs[key]:
            remedy = (
                "give the student model.processor of the teacher"
                if key != "vocabulary"
                else "take a teacher with the same tokenizer"
            )
            raise RecipeError(
                f"teacher '{name}' and student differ in {key}: {_difference(theirs[key], ours[key])}", remedy
            )
    if "num_scores" in ours:
        frozen.num_scores = ours["num_scores"]
        widths = [_width(loaded.model) for loaded in (teacher, student)]
        if None not in widths and widths[0] != widths[1]:
            logger.warning(
                "teacher '%s' has %d scores and the student %d: both are cut to the %d of their tokenizer",
                name,
                *widths,
                frozen.num_scores,
            )
    labels, own = ours.get("labels"), theirs.get("labels")
    if labels is None or own is None or known is None:
        return []
    if set(labels) != set(known):
        only = sorted(set(labels) ^ set(known))
        raise RecipeError(
            f"teacher '{name}' and student do not have the same labels: {', '.join(only[:8])}",
            "train the teacher on the same classes",
        )
    return [own.index(label) if label in own else -1 for label in labels]


def _width(model: Any) -> int | None:
    """Entries of a language model's output, which may be padded beyond its tokenizer's."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None else int(head.weight.shape[0])


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
        return "; ".join(f"{k} {a.get(k)} and {b.get(k)}" for k in sorted(keys))
    return f"{a} and {b}"
