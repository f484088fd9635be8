"""Metrics as `evaluate.Metric` classes of our own over scikit-learn: they need no network.

Any other metric is loaded by its Hub name through `evaluate.load`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from kt_hf.errors import HubError, RecipeError

logging.getLogger("evaluate").setLevel(logging.ERROR)


class _SklearnMetric(evaluate.Metric):
    """A metric of class numbers; `score` computes it."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "", citation="", inputs_description="class numbers", features=features
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        return {
            self.name: float(self.score(np.asarray(references), np.asarray(predictions), **kwargs))
            if len(references)
            else 0.0
        }

    def score(self, references: np.ndarray, predictions: np.ndarray, sample_weight: Any = None) -> float:
        raise NotImplementedError


class Accuracy(_SklearnMetric):
    """Share of examples whose class is right, in [0, 1]."""

    def score(self, references: np.ndarray, predictions: np.ndarray, sample_weight: Any = None) -> float:
        from sklearn.metrics import accuracy_score

        return accuracy_score(references, predictions, sample_weight=sample_weight)


class MacroF1(_SklearnMetric):
    """Unweighted mean over classes of F1, in [0, 1]."""

    def score(self, references: np.ndarray, predictions: np.ndarray, sample_weight: Any = None) -> float:
        from sklearn.metrics import f1_score

        return f1_score(references, predictions, average="macro", zero_division=0, sample_weight=sample_weight)


class MatthewsCorrelation(_SklearnMetric):
    """Matthews correlation coefficient, in [-1, 1]."""

    def score(self, references: np.ndarray, predictions: np.ndarray, sample_weight: Any = None) -> float:
        from sklearn.metrics import matthews_corrcoef

        return matthews_corrcoef(references, predictions, sample_weight=sample_weight)


class _EntityMetric(evaluate.Metric):
    """A metric of entities, which are found in lists of tags as CoNLL's script does (seqeval's default)."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        features = datasets.Features({"predictions": tags, "references": tags})
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "", citation="", inputs_description="tags of rows", features=features
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        found = getattr(seqeval(), f"{self.name.removeprefix('entity_')}_score")
        return {self.name: float(found(references, predictions, zero_division=0)) if references else 0.0}


class EntityF1(_EntityMetric):
    """F1 over entities of all types together: right where type, first and last word are. In [0, 1]."""


class EntityPrecision(_EntityMetric):
    """Share of the predicted entities that are right, in [0, 1]."""


class EntityRecall(_EntityMetric):
    """Share of the true entities that are found, in [0, 1]."""


def seqeval() -> Any:
    """The library's metrics. Raises `RecipeError` where it is not installed."""
    try:
        from seqeval.metrics import sequence_labeling
    except ImportError:
        raise RecipeError(
            "entities are measured by seqeval, which is not installed",
            "pip install kt_hf[token-classification], or measure token_accuracy alone",
        ) from None
    return sequence_labeling


OWN: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "matthews_correlation": MatthewsCorrelation,
    "entity_f1": EntityF1,
    "entity_precision": EntityPrecision,
    "entity_recall": EntityRecall,
}


@functools.cache
def load(name: str) -> evaluate.EvaluationModule:
    """A metric by name: ours, or one of the Hub's. Raises `HubError` when that cannot be reached."""
    if name in OWN:
        metric = OWN[name](keep_in_memory=True)
        metric.info.metric_name = name
        return metric
    try:
        return evaluate.load(name)
    except Exception as error:
        raise HubError(
            f"metric '{name}' is none of ours ({', '.join(OWN)}), nor did the Hub give it ({type(error).__name__})",
            "check its name and the network",
        ) from error


def weighted(name: str, truth: np.ndarray, guess: np.ndarray, known_N: np.ndarray, weights_N: np.ndarray) -> float:
    """One of our metrics with example weights, for resampling; `truth` and `guess` are those of the known examples."""
    return float(load(name).score(truth, guess, sample_weight=weights_N[known_N]))  # type: ignore[attr-defined]


def compute(names: Sequence[str], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Several metrics of the same class numbers."""
    found: dict[str, float] = {}
    for name in names:
        result = load(name).compute(predictions=predictions, references=references) or {}
        found[name] = float(next(iter(result.values())))
    return found
