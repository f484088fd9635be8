"""What a row's label may be, for all tasks that answer a row as a whole: one class, several classes, or a number. Loss,
scores, predictions and metrics of each; what reads the rows and runs the model is the task's.

Shapes: B rows of a batch, N rows of a split, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from kt_hf.errors import RecipeError, nearest
from kt_hf.functional import scoring
from kt_hf.task import Loaded, Scores

IGNORED = -100
"""Label of a row that has none."""
Table = dict[str, list[Any]]


class SingleLabel:
    """One class of several."""

    kind: ClassVar[str] = "single_label_classification"
    unit: ClassVar[str] = "example"
    """What scores are counted in."""
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    always: ClassVar[tuple[str, ...]] = ("accuracy",)
    extras: ClassVar[tuple[str, ...]] = ("matthews_correlation", "top5_accuracy", "calibration_error")
    lower: ClassVar[tuple[str, ...]] = ("calibration_error",)
    open_ended = True
    """Other metrics are looked for on the Hub."""

    def __repr__(self) -> str:  # a part of the key under which preprocessed rows are kept
        return self.kind

    def labels(self, values: list[Any], loaded: Loaded) -> list[Any]:
        """The model's class of every row."""
        ids = loaded.label_ids or []
        return [IGNORED if y is None or y < 0 else ids[y] for y in values]

    def tensor(self, labels: Sequence[Any]) -> torch.Tensor:
        return torch.tensor([int(y) for y in labels])

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, Any]:
        """Cross-entropy per row, in float32. Labels may be classes_B or, after mixing, probabilities_BC."""
        values_B = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        return values_B, None if labels.dim() == 2 else (labels != IGNORED).float()

    def count(self, labels: torch.Tensor) -> Any:
        return len(labels) if labels.dim() == 2 else (labels != IGNORED).sum()

    def scores(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.float(), torch.ones(len(logits), device=logits.device)

    def num_scores(self, rows: int, num_classes: int) -> int:
        return rows

    def from_scores(self, scores_NC: torch.Tensor) -> torch.Tensor:
        """The logits that have these scores."""
        return scores_NC

    def known(self, found: dict[str, np.ndarray]) -> np.ndarray:
        return found["label"] >= 0

    def measure(self, found: dict[str, np.ndarray], names: Sequence[str]) -> Scores:
        from kt_hf import metrics

        scores_NC, truth, known = found["scores"], found["label"], self.known(found)
        guess, num_classes = scores_NC.argmax(1), scores_NC.shape[1]
        names = [*dict.fromkeys([*names, "accuracy"])]
        plain = [name for name in names if name not in ("top5_accuracy", "calibration_error")]
        scores = Scores(metrics.compute(plain, predictions=guess[known], references=truth[known]))
        hits = {"accuracy": guess == truth}
        if "top5_accuracy" in names:
            hits["top5_accuracy"] = scoring.among_best(scores_NC, truth, 5)
        for name, hit in hits.items():
            values = np.where(known, hit, False).astype(np.float64)
            scores.examples[name] = (values, known.astype(np.float64))
            scores.metrics.setdefault(name, float(values[known].mean()) if known.any() else 0.0)
        for name in names:
            if name == "macro_f1":  # much quicker than scikit-learn's, and equal to it
                scores.statistics[name] = lambda w: scoring.macro_f1(guess, truth, num_classes, w * known)
            elif name == "calibration_error":
                bins = scoring.confidence_bins(scores_NC, truth)
                scores.statistics[name] = lambda w, bins=bins: scoring.calibration_error(bins, w * known)  # type: ignore[misc]
                scores.metrics[name] = scores.statistics[name](np.ones(len(truth)))
            elif name in metrics.OWN and name not in hits:
                scores.statistics[name] = functools.partial(metrics.weighted, name, truth[known], guess[known], known)
        return scores

    def table(self, found: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
        scores = found["scores"].astype(np.float32)
        known = self.known(found) if "label" in found else np.zeros(len(scores), dtype=bool)
        truth = [names[y] if ok else None for y, ok in zip(found.get("label", known), known, strict=True)]
        return {"label": truth, "prediction": [names[n] for n in scores.argmax(1)], "scores": list(scores)}

    def answer(self, scores_NC: np.ndarray, names: list[str]) -> Table:
        """The most probable class and its probability."""
        chances_NC = torch.from_numpy(scores_NC).double().softmax(-1).numpy()
        best_N = chances_NC.argmax(1)
        return {"prediction": [names[i] for i in best_N], "probability": [float(p) for p in chances_NC.max(1)]}

    def constant(self, train: list[Any], scores_NC: np.ndarray, loaded: Loaded) -> np.ndarray:
        """Scores that always give the most frequent training label (the first of equals)."""
        counts = np.bincount([y for y in self.labels(train, loaded) if y >= 0], minlength=scores_NC.shape[1])
        constant = np.zeros_like(scores_NC)
        constant[:, int(counts.argmax())] = 1
        return constant


class MultiLabel(SingleLabel):
    """Any number of classes: each is a yes or no of its own, and a unit of the loss."""

    kind = "multi_label_classification"
    unit = "class"
    metrics = ("micro_f1", "macro_f1", "subset_accuracy")
    always = ("subset_accuracy",)
    extras = ()
    lower = ()
    open_ended = False

    def labels(self, values: list[Any], loaded: Loaded) -> list[Any]:
        ids, count = loaded.label_ids or [], len(loaded.labels or [])
        rows: list[Any] = []
        for classes in values:
            row = [0] * count if classes is not None else [IGNORED] * count
            for y in classes or []:
                row[ids[y]] = 1
            rows.append(row)
        return rows

    def tensor(self, labels: Sequence[Any]) -> torch.Tensor:
        return torch.tensor([list(row) for row in labels])

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, Any]:
        """Binary cross-entropy of every class; smoothing moves targets towards 1/2."""
        known_BC = labels != IGNORED
        target_BC = labels.clamp(min=0).float() * (1 - smoothing) + smoothing / 2
        values_BC = F.binary_cross_entropy_with_logits(logits.float(), target_BC, reduction="none")
        return values_BC, known_BC.float()

    def count(self, labels: torch.Tensor) -> Any:
        return (labels != IGNORED).sum()

    def scores(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A row for each row and class, over no and yes."""
        yes_N = logits.float().flatten()
        return torch.stack([torch.zeros_like(yes_N), yes_N], 1), torch.ones_like(yes_N)

    def num_scores(self, rows: int, num_classes: int) -> int:
        return rows * num_classes

    def from_scores(self, scores_NC: torch.Tensor) -> torch.Tensor:
        return scores_NC[:, 1] - scores_NC[:, 0]

    def known(self, found: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray((found["label"] >= 0).all(1))

    def measure(self, found: dict[str, np.ndarray], names: Sequence[str]) -> Scores:
        known = self.known(found)
        guess, truth = found["scores"][known] > 0, found["label"][known] > 0
        counts_NC3 = np.stack([guess & truth, guess & ~truth, ~guess & truth], -1).astype(np.float64)
        whole = np.zeros(len(known))
        whole[known] = (guess == truth).all(1)
        statistics: dict[str, Callable[[np.ndarray], float]] = {
            "micro_f1": lambda w: scoring.f1_of_counts(counts_NC3.sum(1), w[known]),
            "macro_f1": lambda w: scoring.f1_of_counts(counts_NC3, w[known]),
        }
        ones = np.ones(len(known))
        metrics = {name: statistics[name](ones) for name in names if name in statistics}
        share = float(whole[known].mean()) if known.any() else 0.0
        return Scores(
            {**metrics, "subset_accuracy": share},
            {"subset_accuracy": (whole, known.astype(np.float64))},
            {name: statistics[name] for name in metrics},
        )

    def table(self, found: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
        scores = found["scores"].astype(np.float32)
        known = self.known(found) if "label" in found else np.zeros(len(scores), dtype=bool)

        def listed(row: np.ndarray) -> list[str]:
            return [name for name, yes in zip(names, row, strict=True) if yes]

        truth = [listed(y > 0) if ok else None for y, ok in zip(found.get("label", scores), known, strict=True)]
        return {"label": truth, "prediction": [listed(row > 0) for row in scores], "scores": list(scores)}

    def answer(self, scores_NC: np.ndarray, names: list[str]) -> Table:
        """All classes that are more probable than not, and the probabilities of all."""
        chances_NC = torch.from_numpy(scores_NC).double().sigmoid().numpy()
        said = [[name for name, p in zip(names, row, strict=True) if p > 0.5] for row in chances_NC]
        return {"prediction": said, "probability": [[float(p) for p in row] for row in chances_NC]}

    def constant(self, train: list[Any], scores_NC: np.ndarray, loaded: Loaded) -> np.ndarray:
        """Always the classes that more than half of the training rows have."""
        rows = np.asarray([row for row in self.labels(train, loaded) if IGNORED not in row])
        return np.broadcast_to(np.where(rows.mean(0) > 0.5, 1.0, -1.0), scores_NC.shape).astype(scores_NC.dtype)


class Regression(SingleLabel):
    """A number."""

    kind = "regression"
    metrics = ("pearson", "spearman", "mean_squared_error")
    always = ("mean_squared_error",)
    extras = ()
    lower = ("mean_squared_error",)
    open_ended = False

    def labels(self, values: list[Any], loaded: Loaded) -> list[Any]:
        return [float("nan") if y is None else float(y) for y in values]

    def tensor(self, labels: Sequence[Any]) -> torch.Tensor:
        return torch.tensor([float(y) for y in labels])

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, Any]:
        """Squared error per row, in float32."""
        known_B = ~labels.isnan()
        return (logits.float().squeeze(1) - torch.where(known_B, labels, 0.0)).square(), known_B.float()

    def count(self, labels: torch.Tensor) -> Any:
        return (~labels.isnan()).sum()

    def scores(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise RecipeError("a task with numbers for labels has no scores over classes", "use another strategy or task")

    def known(self, found: dict[str, np.ndarray]) -> np.ndarray:
        return ~np.isnan(found["label"])

    def measure(self, found: dict[str, np.ndarray], names: Sequence[str]) -> Scores:
        known = self.known(found)
        guess, truth = (found[key].astype(np.float64).reshape(len(known)) for key in ("scores", "label"))
        errors = np.where(known, np.square(guess - np.where(known, truth, 0.0)), 0.0)
        x_groups, y_groups = (np.unique(values[known], return_inverse=True)[1] for values in (guess, truth))
        correlations: dict[str, Callable[[np.ndarray], float]] = {
            "pearson": lambda w: scoring.pearson(guess[known], truth[known], w[known]),
            "spearman": lambda w: scoring.spearman(x_groups, y_groups, w[known]),
        }
        wanted = {name: correlations[name] for name in names if name in correlations}
        ones = np.ones(len(known))
        values = {name: statistic(ones) for name, statistic in wanted.items()}
        error = float(errors[known].mean()) if known.any() else 0.0
        scores = Scores({**values, "mean_squared_error": error}, statistics=dict(wanted))
        scores.examples["mean_squared_error"] = (errors, known.astype(np.float64))
        return scores

    def table(self, found: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
        guess = found["scores"].astype(np.float32).reshape(len(found["scores"]))
        truth = found.get("label", np.full(len(guess), np.nan))
        return {"label": [None if np.isnan(y) else float(y) for y in truth], "prediction": guess}

    def answer(self, scores_NC: np.ndarray, names: list[str]) -> Table:
        return {"prediction": [float(value) for value in scores_NC.reshape(len(scores_NC))]}

    def constant(self, train: list[Any], scores_NC: np.ndarray, loaded: Loaded) -> np.ndarray:
        """Always the mean of the training rows."""
        return np.full_like(scores_NC, np.nanmean([np.nan if y is None else y for y in train]))


PROBLEMS: dict[str, SingleLabel] = {"class": SingleLabel(), "classes": MultiLabel(), "number": Regression()}
"""By the kind of label (`labels.Kind`)."""


def check_metrics(problem: SingleLabel, names: Sequence[str]) -> None:
    """Raises `RecipeError` for a metric that this kind of label has not."""
    valid = [*problem.metrics, *problem.extras]
    for name in names:
        if name not in valid and not problem.open_ended:
            raise RecipeError(f"metrics: '{name}' is none for {problem.kind.replace('_', ' ')}", nearest(name, valid))
