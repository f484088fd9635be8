"""Weighted mean of the members' probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from kt_hf import EnsembleMethod
from kt_hf.errors import RecipeError
from kt_hf.functional.mixing import mixture_weights


class Mean(EnsembleMethod):
    """The (weighted) mean of the members' class probabilities: p(y | x) = sum_k w_k p_k(y | x).

    weights: one per member, or `fit` to choose those on the simplex that minimise the cross-entropy on validation data.
    A class that a member does not know has the probability 0 from it. Where members share no class, fitted weights are
    the shares of their classes in the validation data, and heed no input: which member is right for a row, only the
    members' confidence tells.
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
        """Minimise the mixture's cross-entropy."""
        known = labels_N >= 0
        right_K1 = labels_N[known].expand(len(scores_KNC), -1).unsqueeze(-1)
        chances_KN = scores_KNC.double().softmax(-1)[:, known].gather(-1, right_K1).squeeze(-1)
        self.weights = mixture_weights(chances_KN).tolist()

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
