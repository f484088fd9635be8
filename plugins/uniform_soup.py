"""Uniform model soup."""

from __future__ import annotations

from typing import Any

import torch

from kt_hf import MergeMethod
from kt_hf.functional.averaging import weighted_mean


class UniformSoup(MergeMethod):
    """The mean of the parents' weights, or their weighted mean.

    weights: one per parent, in their order; equal by default.
    """

    paper = "Wortsman et al. 2022, Model soups, arXiv:2203.05482"
    elementwise = True

    def __init__(self, *, weights: list[float] | None = None):
        self.weights = weights

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        weights_M = self.weights or [1.0] * len(tensors_M)
        return weighted_mean(tensors_M, weights_M)

    def fit(self, run: Any) -> None:
        from kt_hf.errors import RecipeError

        if self.weights is None:
            return
        if len(self.weights) != run.num_parents:
            raise RecipeError(
                f"uniform_soup.weights: {len(self.weights)} weights for {run.num_parents} parents",
                "give one weight per parent",
            )
        if sum(self.weights) == 0:
            raise RecipeError("uniform_soup.weights: they add up to 0", "give weights with another sum")
