"""Uniform model soup."""

from __future__ import annotations

from typing import Any

import torch

from kt_hf import MergeMethod
from kt_hf.errors import RecipeError
from kt_hf.functional.averaging import weighted_mean
from kt_hf.merge import check_weights


class UniformSoup(MergeMethod):
    """The mean of the parents' weights, or their weighted mean.

    weights: one per parent, in their order; equal by default.
    """

    paper = "Wortsman et al. 2022, Model soups, arXiv:2203.05482"
    elementwise = True
    linear = True

    def __init__(self, *, weights: list[float] | None = None):
        self.weights = weights

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        weights_M = self.weights or [1.0] * len(tensors_M)
        return weighted_mean(tensors_M, weights_M)

    def check(self, num_parents: int) -> None:
        check_weights("uniform_soup", self.weights, num_parents)
        if self.weights is not None and abs(sum(self.weights)) < 1e-9:
            raise RecipeError("uniform_soup.weights: they add up to 0", "give weights with another sum")
