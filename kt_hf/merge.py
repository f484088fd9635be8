"""The merge contract: weight space, no training loop. The engine streams over the parents' tensors and calls `tensor`.

Shapes: M parents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from kt_hf.merging import MergeRun


class MergeMethod:
    """Base of every merge. Its settings are the constructor's keyword arguments."""

    api_version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    needs_validation: ClassVar[bool] = False
    """Whether `fit` scores candidates on validation data."""
    min_parents: ClassVar[int] = 1
    elementwise: ClassVar[bool] = False
    """Whether an element of the result depends on that element of the inputs and on the name alone. The engine then
    hands out flat pieces of a tensor, in buffers that it uses again, and memory does not grow with the tensors; else
    `tensor` gets whole tensors."""

    def fit(self, run: MergeRun) -> None:
        """Before the tensors: choose weights. `run.score(weights_M)` is the validation metric of that weighted mean."""

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        """The merged tensor from the parents' (float32, same shape) and the base's, in their dtype: float64 where the
        user asked for it. Called from several threads, and in any order of names."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """What `fit` decided, for the report."""
        return {}
