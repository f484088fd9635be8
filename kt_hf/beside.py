"""What a merge is measured beside: each of its parents, the best of them, and the mean of their outputs.

Which parent is the best is decided on validation data; the report compares on the evaluation split.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kt_hf import checkpoint, ensembling, evaluation, registry
from kt_hf.bundle import Bundle
from kt_hf.errors import RecipeError
from kt_hf.recipe import Merge, Model
from kt_hf.task import Loaded

if TYPE_CHECKING:
    from kt_hf.runner import Context

logger = logging.getLogger(__name__)

BEST, ENSEMBLE = "best_parent", "parents_ensemble"


@dataclass
class Beside:
    """What was found.

    figures: on the evaluation split. best: the best parent's place, None where no validation data say so. scores,
    merged: the metric on validation data of each parent and of the merge. absent: in words, why a baseline was not
    measured.
    """

    names: Sequence[str]
    metric: str
    higher_is_better: bool
    figures: dict[str, float] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    merged: float | None = None
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> int | None:
        if not self.scores:
            return None
        order = sorted(range(len(self.scores)), key=lambda i: self.scores[i], reverse=self.higher_is_better)
        return order[0]

    @property
    def loses(self) -> bool:
        """Whether the merge is worse than the best parent on validation data."""
        if self.best is None or self.merged is None:
            return False
        best = self.scores[self.best]
        return self.merged < best if self.higher_is_better else self.merged > best

    def summary(self, kept: bool) -> dict[str, Any]:
        """For the report."""
        found: dict[str, Any] = {f"{self.metric} of the parents": self.figures}
        if self.best is not None:
            name = self.names[self.best]
            found["best parent on validation data"] = name
            if self.loses:
                best = self.scores[self.best]
                words = f"{self.metric} on validation data: merge {self.merged:.4g}, '{name}' {best:.4g}"
                found["fallback" if kept else "loses to the best parent"] = (
                    f"'{name}' takes the merge's place; {words}" if kept else words
                )
        return found


def measure(
    context: Context,
    stage: Merge,
    merged: Loaded,
    names: Sequence[str],
    models: Sequence[Model],
    folder: Path,
    known: Mapping[int, float],
) -> Beside:
    """Measure the parents one after another, and their output ensemble; their predictions are kept in `folder` for the
    report. Nothing is chosen on the evaluation split. known: scores on validation data, by the parent's place."""
    task, info = context.task(stage), context.info(stage)
    if stage.head is not None:
        names, models = _answering(context, stage, merged, names, models)
        known = {}  # places are others
    found = Beside(names, task.metric, task.greater_is_better)
    validates = "validation" in info.splits
    if validates:
        found.merged = _value(context, stage, merged, "validation")
    predictions: list[dict[str, np.ndarray]] = []
    for i, (name, model) in enumerate(zip(names, models, strict=True)):
        loaded = task.load(model, info)
        if validates:
            found.scores.append(known[i] if i in known else _value(context, stage, loaded, "validation"))
        predictions.append(_predict(context, stage, loaded, info.evaluation_split))
        found.figures[name] = task.measure(predictions[-1], loaded, info).metrics[task.metric]
        del loaded
    if found.best is None:
        found.absent[BEST] = "no validation data tell which parent is the best"
    else:
        keep(context, predictions[found.best], folder / f"{BEST}.safetensors")
    if len(models) == 1:
        found.absent[ENSEMBLE] = "one parent is no ensemble"
        return found
    try:
        members = ensembling.load(models, task, info)
        together = ensembling.EnsembleBundle(members, task, registry.load("ensemble", "mean")().combine)  # type: ignore[attr-defined]
        together.to(context.accelerator.device)
        outputs = evaluation.predict(together, together, context.accelerator, info, info.evaluation_split, 64)
    except RecipeError as error:
        found.absent[ENSEMBLE] = error.cause
        return found
    found.figures["their output ensemble"] = task.measure(outputs, members.joined, info).metrics[task.metric]
    keep(context, outputs, folder / f"{ENSEMBLE}.safetensors")
    return found


def _answering(
    context: Context, stage: Merge, merged: Loaded, names: Sequence[str], models: Sequence[Model]
) -> tuple[list[str], list[Model]]:
    """Those of the parents whose heads answer what the head that is kept does."""
    task, info = context.task(stage), context.info(stage)
    found = []
    for name, model in zip(names, models, strict=True):
        try:
            loaded = task.load(model, info)
        except RecipeError as error:
            logger.info("'%s' is not measured beside the merge: %s", name, error.cause)
            continue
        if loaded.labels == merged.labels and not loaded.new_parameters:
            found.append((name, model))
    return [name for name, _ in found], [model for _, model in found]


def _predict(context: Context, stage: Merge, loaded: Loaded, split: str) -> dict[str, np.ndarray]:
    task, info = context.task(stage), context.info(stage)
    bundle = Bundle(loaded, task, {}).to(context.accelerator.device).eval()
    return evaluation.predict(bundle, bundle, context.accelerator, info, split, 64)


def _value(context: Context, stage: Merge, loaded: Loaded, split: str) -> float:
    task, info = context.task(stage), context.info(stage)
    return float(task.measure(_predict(context, stage, loaded, split), loaded, info).metrics[task.metric])


def keep(context: Context, found: dict[str, np.ndarray], path: Path) -> None:
    """Predictions in a file, for the report."""
    if context.accelerator.is_main_process:
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in found.items()}
        checkpoint.write(path, checkpoint.tensor_chunks(tensors))
