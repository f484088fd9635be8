"""The strategy contract: how knowledge enters training. Read this page first.

A strategy is an `nn.Module`. What it registers is moved, wrapped, trained if it asks for gradients, saved and resumed.
It never stores the model: the model arrives as an argument. All hooks are optional, each has one rule by which
strategies combine, and the trainer is the only caller:

    for strategy in stack:  model = strategy.setup(model, run)          # surgery: freeze, inject, replace
    for strategy in stack:  strategy.ready(model, run)                  # names and shapes are final from here on
    optimizer over every trainable parameter, its rate times the product of lr_scale(name)
    for step in range(planned):
        for micro_batch in window:                                      # gradient accumulation
            for strategy in stack:  batch = strategy.batch(batch, model, progress)
            terms = task_weight * task loss, its values weighed  +  all of strategy.loss(step)
            backward
        clip, update
        for strategy in stack:  strategy.after_step(model, progress)
        now and then: evaluate fold(eval_model), save
    model = fold(eval_model); model = fold(export, reversed); save

Settings are the constructor's keyword arguments: typed, plain values, documented. Settings that name a model are
annotated `ModelRef`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from kt_hf.bundle import Step
    from kt_hf.facts import Run

Batch = dict[str, Any]
"""Tensors by name, B rows each; always with `index`, the row numbers. See `Task.collate`."""


@dataclass(frozen=True)
class Stream:
    """Extra data beside `train`.

    data: name of one of the recipe's data sets, or "train" for the same rows again. views: independently augmented
    copies of a row. augment: torchvision v2 transforms, by name. ratio: rows per row of `train`. labels: whether labels
    are read.
    """

    data: str = "train"
    views: int = 1
    augment: Sequence[Any] | None = None
    ratio: float = 1.0
    labels: bool = False


class Strategy(nn.Module):
    """Base of every strategy; override what you need. Hooks return values, they assign nothing on what they are
    given."""

    api_version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    """Title and identifier of the source."""
    scope: Literal["example", "batch", "weights"] = "example"
    """What the loss is about: single examples, the batch as a whole (accumulation is refused), or the weights."""
    adds_objective: ClassVar[bool] = False
    """True where `loss` is something to train on; tasks without a loss of their own need one."""
    needs_scores: ClassVar[bool] = False
    """Whether `loss` takes the task's `scores`: a task without is refused before anything is run."""
    neutral: ClassVar[dict[str, Any] | None] = None
    """Settings under which the strategy equals its absence exactly; the conformance kit checks it."""
    conformance: ClassVar[dict[str, Any]] = {}
    """How the kit tries it where the defaults do not do: `settings` to build it with, `task` to try it on."""

    forward_kwargs: ClassVar[dict[str, Any]] = {}
    """Merged over the stack: ask for `output_hidden_states`, `output_attentions`. A conflict is an error."""

    batches: ClassVar[Callable[..., Iterable[Sequence[int]]] | None] = None
    """`batches(data, batch_size, seed, epoch)`: the epoch's global batches as row numbers, a pure function.
    Exclusive."""
    backward: ClassVar[Callable[..., None] | None] = None
    """`backward(compute, micro_batches, run)`: leave rank-averaged gradients on the parameters. Exclusive."""

    def describe(self) -> str:
        """One line for the plan: what this stack member will do with its settings."""
        return next(iter((type(self).__doc__ or "").strip().splitlines()), type(self).__name__)

    def streams(self) -> dict[str, Stream]:
        """Extra data, by name. Union over the stack."""
        return {}

    def task_weight(self, progress: float) -> float:
        """Weight of the task's own loss; product over the stack. 0: it is not computed and needs no labels."""
        return 1.0

    def setup(self, model: nn.Module, run: Run) -> nn.Module:
        """Surgery on the model, folded in list order: freeze, inject adapters, replace heads."""
        return model

    def ready(self, model: nn.Module, run: Run) -> None:
        """After every `setup`: create shadows, anchors, projectors. Names and shapes of all state are final
        afterwards."""

    def lr_scale(self, name: str) -> float | Callable[[float], float]:
        """Factor on the learning rate of the parameter `name`, or a function of progress. 0 skips its update wholly."""
        return 1.0

    def batch(self, batch: Batch, model: nn.Module, progress: float) -> Batch:
        """Change the batch on the device, inside the forward: mixup, masking, routing. Return a new mapping."""
        return batch

    def weigh(self, weight: torch.Tensor | None, values: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        """Weights of the values of the task's own loss (None: all 1), folded in list order: rare classes, doubtful
        labels. The loss stays a mean by count."""
        return weight

    def loss(self, step: Step) -> dict[str, torch.Tensor]:
        """Extra objectives by name, each from `step.mean` or `step.once`; logged as `strategy/name`."""
        return {}

    def after_step(self, model: nn.Module, progress: float) -> None:
        """After the update, before gradients are cleared: averages, importance of weights."""

    def eval_model(self, model: nn.Module) -> nn.Module:
        """The model to evaluate and export. Never swaps weights in place."""
        return model

    def export(self, model: nn.Module) -> nn.Module:
        """Once, as the last act, reversed: merge adapters, drop what was only for training."""
        return model
