"""Spherical interpolation of two models."""

from __future__ import annotations

from typing import Any, Literal

import torch

from kt_hf import MergeMethod
from kt_hf.errors import RecipeError
from kt_hf.functional import spherical


class Slerp(MergeMethod):
    """Goes from the first of two parents to the second along a great circle, tensor by tensor.

    t: how far, 0 is the first, 1 the second. norms: `mixed` puts the tensors themselves into the formula for unit
    vectors, as mergekit does; `interpolated` goes along their directions, and interpolates their norms. linear_above:
    goes straight where the cosine between the two exceeds this (mergekit: 0.9995).
    """

    paper = "Shoemake 1985, Animating Rotation with Quaternion Curves"
    min_parents = 2
    max_parents = 2
    as_stored = True
    order_matters = True

    def __init__(self, *, t: float = 0.5, norms: Literal["mixed", "interpolated"] = "mixed", linear_above: float = 1.0):
        if not 0 <= t <= 1:
            raise RecipeError(f"slerp.t: got {t}", "a number from 0 to 1")
        self.t, self.norms, self.linear_above = t, norms, linear_above

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        first, second = tensors_M
        return spherical.slerp(first, second, self.t, self.norms, self.linear_above)
