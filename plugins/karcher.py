"""Spherical means of several models."""

from __future__ import annotations

from typing import Any, Literal

import torch

from kt_hf import MergeMethod
from kt_hf.functional import spherical
from kt_hf.merge import check_weights


class Karcher(MergeMethod):
    """The mean of the parents' directions on the sphere, with the mean of their norms, tensor by tensor.

    weights: one per parent, in their order; equal by default. mean: `karcher` has the least squared angles to the
    parents, `chordal` is the plain mean, set to the mean norm.
    """

    paper = "Karcher 1977; Buss & Fillmore 2001, Spherical averages"
    as_stored = True

    def __init__(self, *, weights: list[float] | None = None, mean: Literal["karcher", "chordal"] = "karcher"):
        self.weights, self.mean = weights, mean

    def check(self, num_parents: int) -> None:
        check_weights("karcher", self.weights, num_parents, positive=True)

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        return spherical.spherical_mean(tensors_M, self.weights or [1.0] * len(tensors_M), self.mean)
