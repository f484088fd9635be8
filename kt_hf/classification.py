"""What all tasks share that answer a row as a whole: with a class, several classes or a number.

Shapes: B rows, N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from kt_hf import labels, loading
from kt_hf.problems import PROBLEMS, SingleLabel, check_metrics
from kt_hf.task import Batch, Loaded, Role, Scores

if TYPE_CHECKING:
    from kt_hf.data import DataInfo
    from kt_hf.inference import Predictor


LABEL = Role("label", ("class", "classes", "number"), aliases=("labels", "target", "category"))
"""Of tasks that answer a row as a whole."""


def columns(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Columns of integers as tensors of B rows, where the rows have them."""
    return {name: torch.tensor([int(row[name]) for row in rows]) for name in names if name in rows[0]}


class Classification:
    """Half of a task: everything after the model's logits. Mixed with `Task`, which declares the contract.

    What the labels are, `settle` finds out from the data: the column `label` holds a class, a list of classes, or a
    number.
    """

    problem: SingleLabel = PROBLEMS["class"]
    num_classes: int = 1
    chosen: Sequence[str] = ()
    """Metrics that the recipe names; empty: the problem's own."""
    metrics: Sequence[str] = tuple(dict.fromkeys(n for p in PROBLEMS.values() for n in (*p.metrics, *p.extras)))
    """To report; the first decides. Until the labels are known, all that there may be."""

    def choose_metrics(self, names: list[str] | None) -> None:
        """Metrics to report, by our names or the Hub's; the first decides. Those of the Hub come without intervals."""
        self.chosen = tuple(names or ())
        if names:
            self.metric = names[0]

    def settle(self, info: DataInfo) -> None:
        rows = next(iter(info.splits.values()))
        if "label" in rows.column_names:
            feature = rows.features["label"]
            kind = "class" if info.labels is not None and labels.inner(feature) is None else labels.kind_of(feature)
            self.problem = PROBLEMS[kind]
        check_metrics(self.problem, self.chosen)
        self.metrics = tuple(dict.fromkeys([*(self.chosen or self.problem.metrics), *self.problem.always]))
        self.metric = self.metrics[0]
        self.greater_is_better = self.metric not in self.problem.lower
        self.lower_metrics = self.problem.lower
        self.unit, self.num_classes = self.problem.unit, len(info.labels or [0])

    def settle_by_model(self, config: Any) -> None:
        """For rows without labels: the model's files say what it gives."""
        known = {problem.kind: problem for problem in PROBLEMS.values()}
        self.problem = known.get(str(getattr(config, "problem_type", None)), self.problem)

    def head_fields(self, info: DataInfo) -> dict[str, Any]:
        """Fields of the model's configuration that follow from the labels."""
        if "label" not in info.roles or self.problem is PROBLEMS["class"]:
            return {}
        return {"problem_type": self.problem.kind, **({"num_labels": 1} if info.labels is None else {})}

    def labels(self, rows: dict[str, list[Any]], loaded: Loaded) -> dict[str, list[Any]]:
        """The rows' labels as the model numbers them; none where the rows have none."""
        if "label" not in rows or (loaded.label_ids is None and self.problem is not PROBLEMS["number"]):
            return {}
        return {"labels": self.problem.labels(rows["label"], loaded)}

    def label_tensor(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"labels": self.problem.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {}

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """One value for each label, in float32."""
        return *self.problem.loss(outputs.logits, batch["labels"], label_smoothing), "label"

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        """Rows, labels, and what has scores: the loss is a mean over labels, scores exist for all."""
        rows = len(batch["index"])
        labels = self.problem.count(batch["labels"]) if "labels" in batch else rows
        return {"example": rows, self.problem.unit: self.problem.num_scores(rows, self.num_classes), "label": labels}

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.problem.scores(outputs.logits)

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits_BC = self.forward(model, batch).logits.float()  # type: ignore[attr-defined]
        return {"scores": logits_BC, **({"label": batch["labels"]} if "labels" in batch else {})}

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        logits_BC = self.problem.from_scores(scores_NC).reshape(len(batch["index"]), -1)
        return {"scores": logits_BC, **({"label": batch["labels"]} if "labels" in batch else {})}

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: DataInfo) -> Scores:
        names = self.metrics if "metrics" in vars(self) else self.problem.metrics  # not settled: the problem's own
        return self.problem.measure(predictions, names)

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: DataInfo) -> dict[str, Any]:
        return self.problem.table(predictions, [str(name) for name in loaded.labels or []])

    def answer(self, predictor: Predictor, info: DataInfo, max_new_tokens: int) -> dict[str, list[Any]]:
        found = predictor.scores(info, "test")["scores"]
        return self.problem.answer(found, predictor.loaded.labels or [])

    def majority(
        self, train: dict[str, Any], predictions: dict[str, np.ndarray], loaded: Loaded, info: DataInfo
    ) -> Scores | None:
        """What an answer scores that heeds no input."""
        constant = self.problem.constant(train["label"], predictions["scores"], loaded)
        return self.measure({**predictions, "scores": constant}, loaded, info)

    def layers(self, model: nn.Module) -> list[list[str]]:
        return loading.backbone_layers(model)

    def head(self, model: nn.Module) -> list[str]:
        return loading.head_modules(model)
