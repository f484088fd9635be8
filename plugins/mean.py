"""Weighted mean of the members' probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from kt_hf import EnsembleMethod
from kt_hf.errors import RecipeError


class Mean(EnsembleMethod):
    """The (weighted) mean of the members' class probabilities.

    weights: one per member, or `fit` to choose those on the simplex that minimise the cross-entropy on validation data.
    """

    paper = "Lakshminarayanan et al. 2017, Simple and Scalable Predictive Uncertainty Estimation, arXiv:1612.01474"

    def __init__(self, *, weights: list[float] | str | None = None):
        if isinstance(weights, str) and weights != "fit":
            raise RecipeError(f"mean.weights: got '{weights}'", "a list of numbers, or 'fit'")
        self.weights = weights

    @property
    def needs_validation(self) -> bool:  # type: ignore[override]
        return self.weights == "fit"

    def fit(self, scores_KNC: torch.Tensor, labels_N: torch.Tensor) -> None:
        """Minimise the mixture's cross-entropy by expectation-maximisation; convex, so the start does not matter."""
        known = labels_N >= 0
        right_KN = (
            scores_KNC.double()
            .softmax(-1)[:, known]
            .gather(-1, labels_N[known].expand(len(scores_KNC), -1).unsqueeze(-1))
            .squeeze(-1)
        )
        weights_K1 = torch.full((len(scores_KNC), 1), 1 / len(scores_KNC), dtype=torch.float64)
        for _ in range(500):
            share_KN = weights_K1 * right_KN
            weights_K1 = (share_KN / share_KN.sum(0, keepdim=True).clamp(min=1e-300)).mean(1, keepdim=True)
        self.weights = weights_K1.squeeze(1).tolist()

    def combine(self, scores_KNC: torch.Tensor) -> torch.Tensor:
        given = self.weights if isinstance(self.weights, list) else [1.0] * len(scores_KNC)
        if len(given) != len(scores_KNC) or min(given) < 0 or sum(given) <= 0:
            raise RecipeError(
                f"mean.weights: {given} for {len(scores_KNC)} members", "give one weight per member, none negative"
            )
        weights_K = torch.tensor(given, dtype=torch.float32, device=scores_KNC.device)
        logs_KNC = F.log_softmax(scores_KNC.float(), dim=-1) + (weights_K / weights_K.sum()).log()[:, None, None]
        return torch.logsumexp(logs_KNC, dim=0)

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights}
