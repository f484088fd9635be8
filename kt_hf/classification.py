"""What all tasks with one class per example share: loss, scores, predictions, metrics.

Shapes: B rows, N examples, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kt_hf import loading
from kt_hf.functional import scoring
from kt_hf.task import Batch, Loaded, Scores

if TYPE_CHECKING:
    from kt_hf.data import DataInfo
    from kt_hf.inference import Predictor


def columns(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Columns of integers as tensors of B rows, where the rows have them."""
    return {name: torch.tensor([int(row[name]) for row in rows]) for name in names if name in rows[0]}


class Classification:
    """Half of a task: everything after the model's logits. Mixed with `Task`, which declares the contract."""

    metrics: Sequence[str] = ("accuracy", "macro_f1")

    def choose_metrics(self, names: list[str] | None) -> None:
        """Metrics to report, by our names or the Hub's; the first decides. Those of the Hub come without intervals."""
        if names:
            self.metrics, self.metric = tuple(names), names[0]

    def labels(self, rows: dict[str, list[Any]], loaded: Loaded) -> dict[str, list[int]]:
        """The model's class of every row; none where the rows have no label."""
        if "label" not in rows or loaded.label_ids is None:
            return {}
        return {"labels": [-100 if y is None or y < 0 else loaded.label_ids[y] for y in rows["label"]]}

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """Cross-entropy per example, in float32. `labels` may be classes_B or, after mixing, probabilities_BC."""
        labels = batch["labels"]
        values = F.cross_entropy(outputs.logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
        return values, None if labels.dim() == 2 else (labels != -100).float(), "label"

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        """Rows, and those of them that have a label: the loss is a mean over these, scores exist for all."""
        labels, rows = batch.get("labels"), len(batch["index"])
        return {"example": rows, "label": rows if labels is None or labels.dim() == 2 else (labels != -100).sum()}

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BC = outputs.logits.float()
        return logits_BC, torch.ones(len(logits_BC), device=logits_BC.device)

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scores_BC, _ = self.scores(self.forward(model, batch), batch)  # type: ignore[attr-defined]
        return {"scores": scores_BC, **({"label": batch["labels"]} if "labels" in batch else {})}

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return {"scores": scores_NC, **({"label": batch["labels"]} if "labels" in batch else {})}

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: DataInfo) -> Scores:
        from kt_hf import metrics

        known = predictions["label"] >= 0
        guess, truth = predictions["scores"].argmax(1), predictions["label"]
        names = [*dict.fromkeys([*self.metrics, "accuracy"])]
        found = metrics.compute(names, predictions=guess[known], references=truth[known])
        hits = np.where(known, guess == truth, False).astype(np.float64)
        num_classes = predictions["scores"].shape[1]
        statistics: dict[str, Callable[[np.ndarray], float]] = {}
        for name in names:
            if name == "macro_f1":  # much quicker than scikit-learn's, and equal to it
                statistics[name] = lambda weights: scoring.macro_f1(guess, truth, num_classes, weights * known)
            elif name in metrics.OWN and name != "accuracy":
                statistics[name] = functools.partial(metrics.weighted, name, truth[known], guess[known], known)
        return Scores(metrics=found, examples={"accuracy": (hits, known.astype(np.float64))}, statistics=statistics)

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: DataInfo) -> dict[str, Any]:
        names = np.asarray(loaded.labels)
        scores = predictions["scores"].astype(np.float32)
        known = predictions["label"] >= 0 if "label" in predictions else np.zeros(len(scores), dtype=bool)
        truth = [str(names[y]) if ok else None for y, ok in zip(predictions.get("label", known), known, strict=True)]
        return {"label": truth, "prediction": [str(n) for n in names[scores.argmax(1)]], "scores": list(scores)}

    def answer(self, predictor: Predictor, info: DataInfo, max_new_tokens: int) -> dict[str, list[Any]]:
        """The most probable class and its probability."""
        chances_NC = torch.from_numpy(predictor.scores(info, "test")["scores"]).double().softmax(-1).numpy()
        names = predictor.members[0].labels or []
        best_N = chances_NC.argmax(1)
        return {"prediction": [names[i] for i in best_N], "probability": [float(p) for p in chances_NC.max(1)]}

    def majority(
        self, train: dict[str, Any], predictions: dict[str, np.ndarray], loaded: Loaded, info: DataInfo
    ) -> Scores | None:
        """Always the most frequent training label (the first of equals)."""
        ids, count = loaded.label_ids or [], len(loaded.labels or [])
        counts = np.bincount([ids[y] for y in train["label"] if y is not None and y >= 0], minlength=count)
        constant = np.zeros_like(predictions["scores"])
        constant[:, int(counts.argmax())] = 1
        return self.measure({**predictions, "scores": constant}, loaded, info)

    def layers(self, model: nn.Module) -> list[list[str]]:
        return loading.backbone_layers(model)

    def head(self, model: nn.Module) -> list[str]:
        return loading.head_modules(model)
