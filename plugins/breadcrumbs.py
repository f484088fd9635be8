"""Model Breadcrumbs: task vectors without their smallest and without their largest values."""

from __future__ import annotations

from typing import Any, Literal

import torch

from kt_hf import MergeMethod
from kt_hf.errors import RecipeError
from kt_hf.functional import task_vectors
from kt_hf.merge import check_fraction, check_weights


class Breadcrumbs(MergeMethod):
    """Keeps the middle of each task vector, by magnitude within each tensor, and adds the weighted sum to the base, or
    the mean by elected sign.

    density: the fraction kept. outliers: the fraction of the largest that is left out. weights: one per parent, in
    their order; 1 each by default. scaling: of the sum or mean. combine: `linear` (the paper's) or `ties`.
    """

    paper = "Davari & Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795"
    needs_base = True
    as_stored = True

    def __init__(
        self,
        *,
        density: float = 0.15,
        outliers: float = 0.01,
        weights: list[float] | None = None,
        scaling: float = 1.0,
        combine: Literal["linear", "ties"] = "linear",
    ):
        check_fraction("breadcrumbs.density", density)
        if not 0 <= outliers <= 1 - density + 1e-9:
            raise RecipeError(
                f"breadcrumbs: density {density} and outliers {outliers} add up to more than 1, or one is negative",
                "choose 0 <= outliers <= 1 - density",
            )
        self.density, self.outliers, self.weights = density, outliers, weights
        self.scaling, self.combine = scaling, combine

    def check(self, num_parents: int) -> None:
        check_weights("breadcrumbs", self.weights, num_parents)

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        assert base is not None
        weights_M = self.weights or [1.0] * len(tensors_M)
        return task_vectors.breadcrumbs(
            base, tensors_M, weights_M, self.density, self.outliers, self.scaling, self.combine
        )
