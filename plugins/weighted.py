"""Weighted sum of the members' logits."""

from __future__ import annotations

from typing import Any

import torch

from kt_hf import EnsembleMethod
from kt_hf.errors import RecipeError
from kt_hf.functional.mixing import output_weights, weighted_outputs


class Weighted(EnsembleMethod):
    """Adds the members' logits, each with a weight and an offset: p(y | x) ~ exp(sum_k w_k s_k(y | x) + b_k).

    Over classes that only some members know, each adds to its own: a fusion of models for different classes. Which of
    them a row is for, the level of their logits tells; so the rows that weights are fitted to should hold all classes.

    weights: one per member, none negative, or `fit` to choose those, and the offsets, that minimise the cross-entropy
    on validation data. offsets: one per member; they matter only where members know different classes.
    """

    paper = "Breiman 1996, Stacked regressions; Ting & Witten 1999, Issues in stacked generalization, JAIR 10"
    probabilities = False
    """A weight is also a temperature: one member alone gets other probabilities for the same classes."""

    def __init__(self, *, weights: list[float] | str = "fit", offsets: list[float] | None = None):
        if isinstance(weights, str) and weights != "fit":
            raise RecipeError(f"weighted.weights: got '{weights}'", "a list of numbers, or 'fit'")
        if offsets is not None and isinstance(weights, str):
            raise RecipeError("weighted: offsets without weights", "give both, or none to have them fitted")
        self.weights, self.offsets = weights, offsets

    @property
    def needs_validation(self) -> bool:  # type: ignore[override]
        return self.weights == "fit"

    def fit(self, scores_KNC: torch.Tensor, labels_N: torch.Tensor) -> None:
        known_N = labels_N >= 0
        self.weights, self.offsets = output_weights(scores_KNC[:, known_N], labels_N[known_N])

    def combine(self, scores_KNC: torch.Tensor) -> torch.Tensor:
        count, weights = len(scores_KNC), self.weights
        offsets = self.offsets or [0.0] * count
        if isinstance(weights, str) or len(weights) != count or len(offsets) != count or min(weights) < 0:
            raise RecipeError(
                f"weighted: weights {weights} and offsets {self.offsets} for {count} members",
                "give one of each per member, no weight negative",
            )
        return weighted_outputs(scores_KNC, weights, offsets)

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights, "offsets": self.offsets}
