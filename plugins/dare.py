"""DARE: task vectors, dropped at random and rescaled."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from kt_hf import MergeMethod
from kt_hf.functional import task_vectors
from kt_hf.merge import check_fraction, check_weights
from kt_hf.randomness import number


class Dare(MergeMethod):
    """Drops elements of the task vectors at random, rescales the rest, and adds their weighted sum to the base, or
    their mean by elected sign.

    density: the fraction kept, which is 1 less the paper's drop rate. weights: one per parent, in their order; 1 each
    by default. scaling: of the sum or mean. combine: `linear` or `ties`. rescale: by 1 / density (`density`, the
    paper's), to the same sum of magnitudes (`l1`, mergekit's) or `none`. seed: what is dropped depends on it, on the
    tensor's name and the parent's place alone.
    """

    paper = "Yu et al. 2024, Language Models are Super Mario, arXiv:2311.03099"
    needs_base = True
    as_stored = True
    order_matters = True

    def __init__(
        self,
        *,
        density: float = 0.5,
        weights: list[float] | None = None,
        scaling: float = 1.0,
        combine: Literal["linear", "ties"] = "linear",
        rescale: Literal["density", "l1", "none"] = "density",
        seed: int = 0,
    ):
        check_fraction("dare.density", density)
        self.density, self.weights, self.scaling, self.seed = density, weights, scaling, seed
        self.combine, self.rescale = combine, rescale

    def check(self, num_parents: int) -> None:
        check_weights("dare", self.weights, num_parents)

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        assert base is not None
        weights_M = self.weights or [1.0] * len(tensors_M)
        makes_M = [partial(self._drop, number("dare", self.seed, name, i)) for i in range(len(tensors_M))]
        sparse_M = [
            task_vectors.keeping_l1(make, tensor, base) if self.rescale == "l1" else make()
            for make, tensor in zip(makes_M, tensors_M, strict=True)
        ]
        return task_vectors.by_parts(base, tensors_M, sparse_M, weights_M, self.scaling, self.combine)

    def _drop(self, seed: int) -> task_vectors.Sparse:
        source, rescale = np.random.SFC64(seed), self.rescale == "density"
        return partial(task_vectors.drop, density=self.density, source=source, rescale=rescale)
