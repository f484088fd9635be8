"""DELLA: task vectors, dropped at random, small values more often than large ones."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from kt_hf import MergeMethod
from kt_hf.errors import RecipeError
from kt_hf.functional import task_vectors
from kt_hf.merge import check_fraction, check_weights
from kt_hf.randomness import number


class Della(MergeMethod):
    """Drops elements of the task vectors at random, within a row the smaller the more likely, rescales the rest, and
    adds their mean by elected sign to the base, or their weighted sum.

    density: the mean fraction kept. epsilon: by how much the likelihoods within a row differ, from density +
    epsilon / 2 for the largest to density - epsilon / 2 for the smallest. weights: one per parent, in their order; 1
    each by default. scaling: of the mean or sum. combine: `ties` or `linear`. rescale: each by what it was kept with
    (`density`), to the same sum of magnitudes (`l1`) or `none`. seed: as in `dare`.
    """

    paper = "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617"
    needs_base = True
    as_stored = True
    order_matters = True

    def __init__(
        self,
        *,
        density: float = 0.5,
        epsilon: float = 0.2,
        weights: list[float] | None = None,
        scaling: float = 1.0,
        combine: Literal["linear", "ties"] = "ties",
        rescale: Literal["density", "l1", "none"] = "density",
        seed: int = 0,
    ):
        check_fraction("della.density", density)
        if epsilon < 0 or (density < 1 and not epsilon / 2 < density <= 1 - epsilon / 2):
            raise RecipeError(
                f"della: density {density} with epsilon {epsilon} gives likelihoods outside of 0 to 1",
                "choose 0 <= epsilon < 2 * min(density, 1 - density)",
            )
        self.density, self.epsilon, self.seed = density, epsilon, seed
        self.weights, self.scaling, self.combine, self.rescale = weights, scaling, combine, rescale

    def check(self, num_parents: int) -> None:
        check_weights("della", self.weights, num_parents)

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        assert base is not None
        weights_M = self.weights or [1.0] * len(tensors_M)
        count = task_vectors.row_length(base)
        makes_M = [partial(self._drop, number("della", self.seed, name, i), base) for i in range(len(tensors_M))]
        sparse_M = [
            task_vectors.keeping_l1(make, tensor, base, count) if self.rescale == "l1" else make()
            for make, tensor in zip(makes_M, tensors_M, strict=True)
        ]
        return task_vectors.by_parts(base, tensors_M, sparse_M, weights_M, self.scaling, self.combine, unit=count)

    def _drop(self, seed: int, base: torch.Tensor) -> task_vectors.Sparse:
        source, rescale = np.random.SFC64(seed), self.rescale == "density"
        return task_vectors.dropping_by_rank(base, self.density, self.epsilon, source, rescale)
