"""Fisher-weighted averaging."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from kt_hf import MergeMethod, Task
from kt_hf.errors import RecipeError
from kt_hf.functional.measured import add_squares_, fisher_mean
from kt_hf.merge import check_weights
from kt_hf.randomness import number


class Fisher(MergeMethod):
    """The mean of the parents' weights, in which each of them counts by how much its own answers depend on it: by the
    diagonal of its Fisher information, the mean over training rows of the squared gradient of log p(y | x).

    The gradients are those of single rows, which costs a backward pass for each of them and every parent. A parent that
    comes from a stage is asked on that stage's data.

    examples: rows that are looked at. labels: y is drawn from what the `model` says, as the Fisher information has it,
    or is the row's own (`data`, the "empirical" one); of tasks without scores over classes it is always the row's, and
    log p less their loss. weights: one per parent, in their order; equal by default. normalize: divide each parent's by
    its norm, for parents of different tasks, whose gradients are of different sizes. epsilon: is added to all, so that
    what no parent depends on gets the plain mean.
    """

    paper = "Matena & Raffel 2022, Merging Models with Fisher-Weighted Averaging, arXiv:2111.09832"
    measures_on = "train"

    def __init__(
        self,
        *,
        examples: Annotated[int, Field(ge=1)] = 256,
        labels: Literal["model", "data"] = "model",
        weights: list[float] | None = None,
        normalize: bool = False,
        epsilon: Annotated[float, Field(ge=0)] = 1e-10,
    ):
        self.examples, self.labels, self.weights = examples, labels, weights
        self.normalize, self.epsilon = normalize, epsilon

    def takes_loss(self, task: Task) -> bool:
        return self.labels == "data" or not task.has_scores

    def check(self, num_parents: int) -> None:
        check_weights("fisher", self.weights, num_parents, positive=True)

    def measured_by(self) -> dict[str, Any]:
        return {"examples": self.examples, "labels": self.labels, "normalize": self.normalize}

    def measure(self, parent: Any, run: Any) -> dict[str, torch.Tensor]:
        named = {name: p for name, p in parent.model.named_parameters() if p.requires_grad}
        given = list(named.values())
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in given]
        count = torch.zeros((), device=parent.device)
        for batch in parent.sample("train", self.examples):
            surprise = self._surprise(parent, batch)
            if surprise.requires_grad:
                add_squares_(sums, torch.autograd.grad(surprise, given, allow_unused=True))
            count += 1
        count, *sums = parent.sum([count, *sums])
        found = {name: total / count for name, total in zip(named, sums, strict=True)}
        if self.normalize:
            norm = torch.stack([f.double().square().sum() for f in found.values()]).sum().sqrt().float()
            found = {name: f / norm.clamp(min=1e-30) for name, f in found.items()}
        return found

    def _surprise(self, parent: Any, batch: Any) -> torch.Tensor:
        """-log p(y | x) of one row, up to what does not depend on the weights."""
        outputs = parent.forward(batch)
        if self.labels == "model":
            try:
                scores_NC, weight_N = parent.task.scores(outputs, batch)
            except RecipeError:  # no scores over classes
                pass
            else:
                draw = torch.Generator().manual_seed(number("fisher", batch["index"].tolist()))
                chances_NC = scores_NC.detach().double().softmax(-1).cpu()
                drawn_N = torch.multinomial(chances_NC, 1, generator=draw).squeeze(1).to(scores_NC.device)
                return (weight_N * F.cross_entropy(scores_NC.float(), drawn_N, reduction="none")).sum()
        return torch.stack([total for total, _ in parent.losses(outputs, batch)]).sum()

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        weights_M = self.weights or [1.0] * len(tensors_M)
        return fisher_mean(tensors_M, stats or [None] * len(tensors_M), weights_M, self.epsilon)
