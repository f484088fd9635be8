"""Rare classes count as much as frequent ones.

Shapes: C classes, N values of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from kt_hf import Strategy
from kt_hf.errors import NotMeaningful, RecipeError
from kt_hf.functional import balancing


class Balance(Strategy):
    """Makes rare classes count as much as frequent ones, by weights in the loss or by how often their rows are drawn.

    by: `weights` multiplies every value of the task's loss by the weight of its class; `sampling` draws training rows
    with these weights, with replacement. beta: 1 weighs classes by 1 / n of their n rows, 0 alike, between them by the
    effective number of rows, (1 - beta) / (1 - beta^n). Weights are scaled such that their mean over the training rows
    is 1. `sampling` takes rows with a single class.
    """

    paper = "Cui et al. 2019, Class-Balanced Loss Based on Effective Number of Samples, arXiv:1901.05555"
    neutral = {"beta": 0.0}

    def __init__(
        self, *, by: Literal["weights", "sampling"] = "weights", beta: Annotated[float, Field(ge=0, le=1)] = 1.0
    ):
        super().__init__()
        self.by, self.beta = by, beta
        if by == "sampling":
            self.batches = self._draw  # type: ignore[assignment, misc]

    def describe(self) -> str:
        how = "weighs the loss of classes" if self.by == "weights" else "draws rows of classes"
        return f"{how} by {'1 / n' if self.beta == 1 else f'their effective number, beta {self.beta:g}'}"

    def setup(self, model: nn.Module, run: Any) -> nn.Module:
        if self.beta and run.task.class_counts(run.info.splits["train"].select([]), run.loaded) is None:
            raise NotMeaningful("'balance': values of this task's loss are not each about one class", "leave it out")
        return model

    def ready(self, model: nn.Module, run: Any) -> None:
        if self.by != "weights" or not self.beta:
            return
        counts_C = run.task.class_counts(run.info.splits["train"], run.loaded)
        weights_C = torch.from_numpy(balancing.weights(counts_C, self.beta)).float()
        self.register_buffer("weights_C", weights_C.to(run.device))

    def weigh(self, weight: torch.Tensor | None, values: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor | None:
        if self.by != "weights" or not self.beta:
            return weight
        labels = batch["labels"]
        if labels.is_floating_point() or labels.numel() != values.numel():
            raise RecipeError(
                "'balance': every value of the loss must have one class", "use by=sampling, or leave it out"
            )
        own = self.get_buffer("weights_C")[labels.clamp(min=0)].reshape(values.shape)
        return own if weight is None else own * weight

    def _draw(self, data: Any, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """As many rows as an epoch has, drawn with the weights of their classes."""
        labels_N = np.asarray(data["label"][:])
        if labels_N.ndim != 1 or labels_N.dtype.kind not in "iu":
            raise RecipeError("'balance' by sampling takes rows with a single class", "use by=weights")
        weights_C = balancing.weights(np.bincount(labels_N[labels_N >= 0]), self.beta)
        weights_N = np.where(labels_N >= 0, weights_C[labels_N], 0.0)
        drawn = np.random.default_rng([seed, epoch]).choice(len(labels_N), len(labels_N), p=weights_N / weights_N.sum())
        yield from np.split(drawn, range(batch_size, len(drawn), batch_size))
