"""Task arithmetic: what models have learnt, added to their base and taken away from it."""

from __future__ import annotations

from typing import Any

import torch

from kt_hf import MergeMethod
from kt_hf.functional import task_vectors
from kt_hf.merge import check_weights


class TaskArithmetic(MergeMethod):
    """The base plus the weighted sum of task vectors, which are the parents less the base.

    weights: one per parent, in their order; 1 each by default. A negative weight makes the base forget what that parent
    has learnt; 1, 1, -1 is an analogy. scaling: of the sum; the paper chooses it on validation data, about 0.3 for many
    parents, and 1 over their number gives their mean.
    """

    paper = "Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv:2212.04089"
    needs_base = True
    elementwise = True
    linear = True

    def __init__(self, *, weights: list[float] | None = None, scaling: float = 1.0):
        self.weights, self.scaling = weights, scaling

    def check(self, num_parents: int) -> None:
        check_weights("task_arithmetic", self.weights, num_parents)

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        assert base is not None
        vectors_M = task_vectors.task_vectors(tensors_M, base)
        return task_vectors.task_arithmetic(base, vectors_M, self.weights or [1.0] * len(tensors_M), self.scaling)
