"""Model stock: the mean of the parents, drawn towards their base by the angle between them."""

from __future__ import annotations

from typing import Any

import torch

from kt_hf import MergeMethod
from kt_hf.functional import task_vectors


class ModelStock(MergeMethod):
    """Per tensor a point between the base and the parents' mean: the nearer to the mean, the smaller the angle between
    what the parents have learnt. Has no settings.
    """

    paper = "Jang et al. 2024, Model Stock, arXiv:2403.19522"
    needs_base = True
    as_stored = True
    min_parents = 2

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        assert base is not None
        merged, _ = task_vectors.model_stock(base, tensors_M)
        return merged
