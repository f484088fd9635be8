"""TIES: task vectors, trimmed, of one sign, averaged."""

from __future__ import annotations

from typing import Any, Literal

import torch

from kt_hf import MergeMethod
from kt_hf.functional import task_vectors
from kt_hf.merge import check_fraction, check_weights


class Ties(MergeMethod):
    """Trims each task vector to its largest values, elects a sign for every element, and adds the mean of those parents
    that agree with it to the base.

    density: the fraction that trimming keeps, within each tensor. weights: one per parent, in their order; 1 each by
    default. scaling: of the mean. divide_by: the mean divides the weighted sum by the number of parents that agree
    (`count`, as in the paper and peft) or by the sum of their weights (`weights`, as mergekit does).
    """

    paper = "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708"
    needs_base = True
    as_stored = True

    def __init__(
        self,
        *,
        density: float = 0.2,
        weights: list[float] | None = None,
        scaling: float = 1.0,
        divide_by: Literal["count", "weights"] = "count",
    ):
        check_fraction("ties.density", density)
        self.density, self.weights, self.scaling, self.divide_by = density, weights, scaling, divide_by

    def check(self, num_parents: int) -> None:
        check_weights("ties", self.weights, num_parents, positive=self.divide_by == "weights")

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        assert base is not None
        weights_M = self.weights or [1.0] * len(tensors_M)
        return task_vectors.ties(base, tensors_M, weights_M, self.density, self.scaling, self.divide_by)
