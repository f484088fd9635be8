"""Learned soup: mixing coefficients by gradient on validation data."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from kt_hf import MergeMethod
from kt_hf.functional.averaging import weighted_mean
from kt_hf.progress import Progress


class LearnedSoup(MergeMethod):
    """The mean of the parents' weights with the coefficients that minimise the task's loss on validation data, found by
    gradient (AdamW): a softmax over the parents, which begins equal.

    Test data are never looked at; an interval on the validation rows would be too good. All parents are in memory at
    once. The paper also learns a temperature of the outputs, which it then drops; that is left out here.

    by: one coefficient for each parent (`model`), or for each parent and layer (`layer`, the head and what else is in
    no layer being one more). steps, batch_size: how long it learns, from how many rows at once on all processes.
    """

    paper = "Wortsman et al. 2022, Model soups, appendix I, arXiv:2203.05482"
    needs_validation = True
    elementwise = True

    def __init__(
        self,
        *,
        by: Literal["model", "layer"] = "model",
        steps: Annotated[int, Field(ge=1)] = 100,
        learning_rate: Annotated[float, Field(gt=0)] = 0.1,
        batch_size: Annotated[int, Field(ge=1)] = 32,
    ):
        self.by, self.steps, self.learning_rate, self.batch_size = by, steps, learning_rate, batch_size
        self.coefficients_GM: list[list[float]] = []
        self.groups: dict[str, int] = {}
        """Names in the files -> row of the coefficients; of all others it is the last."""
        self.losses: list[float] = []

    def takes_loss(self, task: Any) -> bool:
        return True

    def fit(self, run: Any) -> None:
        parent = run.parent(0)
        own = _groups(parent) if self.by == "layer" else {}
        learnt = {name for name, _ in parent.model.named_parameters()}
        states = [_state(parent)]
        for i in range(1, run.num_parents):
            states.append(_state(run.parent(i)))
        logits_GM = torch.zeros(max(own.values(), default=-1) + 2, run.num_parents, device=parent.device)
        logits_GM.requires_grad_()
        optimizer = torch.optim.AdamW([logits_GM], self.learning_rate, weight_decay=0.0)
        with closing(Progress("learning the soup", self.steps, 0, parent.accelerator.is_main_process)) as progress:
            for batch, rows in parent.steps("validation", self.steps, self.batch_size):
                shares_GM = logits_GM.softmax(-1)
                mixed = _mixed(states, shares_GM, own, learnt)
                loss = _mean_loss(parent, parent.forward(batch, mixed), batch, rows)
                (gradient,) = torch.autograd.grad(loss, [logits_GM])
                gradient, shown = parent.sum([gradient, loss.detach()])
                logits_GM.grad = gradient
                optimizer.step()
                self.losses.append(float(shown))
                point = {"loss": self.losses[-1], "terms": {}, "learning_rate": self.learning_rate}
                progress.step()
                progress.losses(point)
        self.coefficients_GM = logits_GM.detach().softmax(-1).tolist()
        self.groups = {place: group for name, group in own.items() for place in parent.names.get(name, [])}

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        return weighted_mean(tensors_M, self.coefficients_GM[self.groups.get(name, -1)])

    def summary(self) -> dict[str, Any]:
        few = max(len(self.losses) // 10, 1)
        ends = {"first": sum(self.losses[:few]) / few, "last": sum(self.losses[-few:]) / few}
        rows = self.coefficients_GM[0] if self.by == "model" else self.coefficients_GM
        return {"coefficients": rows, "validation_loss": ends}


def _groups(parent: Any) -> dict[str, int]:
    """Parameter -> number of its layer."""
    return {name: i for i, layer in enumerate(parent.task.layers(parent.model)) for name in layer}


def _state(parent: Any) -> dict[str, torch.Tensor]:
    """Parameters, each once, and buffers: batch statistics are mixed, too, though nothing is learnt through them."""
    tensors = [*parent.model.named_parameters(), *parent.model.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors}


def _mixed(
    states: list[dict[str, torch.Tensor]], shares_GM: torch.Tensor, groups: dict[str, int], learnt: set[str]
) -> dict[str, torch.Tensor]:
    """The mean with these coefficients, by name; without a gradient but for what is learnt through."""
    mixed = {}
    for name, first in states[0].items():
        shares_M = shares_GM[groups.get(name, -1)]
        shares_M = shares_M if name in learnt else shares_M.detach()
        mean = first * shares_M[0] if first.is_floating_point() else first
        for state, share in zip(states[1:], shares_M[1:] if first.is_floating_point() else (), strict=False):
            mean = mean + state[name] * share
        mixed[name] = mean
    return mixed


def _mean_loss(parent: Any, outputs: Any, batch: Any, rows: int) -> torch.Tensor:
    """This process' part of the mean loss of the batch on all of them."""
    units = parent.task.units(batch)
    counted = 1.0 if rows else 0.0
    parts = []
    for total, unit in parent.losses(outputs, batch):
        count = torch.as_tensor(units[unit], dtype=torch.float32, device=total.device) * counted
        (count,) = parent.sum([count])
        parts.append(counted * total / count.clamp(min=1))
    return torch.stack(parts).sum()
