"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from kt_hf import Strategy
from kt_hf.functional import averaging


class Ema(Strategy):
    """Keeps an exponential moving average of the trained weights, which is evaluated and exported.

    decay: weight of the past at every step. warmup: raise the decay as (1 + t) / (10 + t) until it is reached; without
    it, a short run exports little but the weights it started from.
    Batch statistics and other buffers are copied, not averaged.
    """

    paper = (
        "Polyak & Juditsky 1992, Acceleration of Stochastic Approximation by Averaging; "
        "Tarvainen & Valpola 2017, Mean teachers are better role models, arXiv:1703.01780"
    )
    scope = "weights"
    neutral = {"decay": 0.0}

    def __init__(self, *, decay: Annotated[float, Field(ge=0, lt=1)] = 0.999, warmup: bool = True):
        super().__init__()
        self.decay, self.warmup = decay, warmup

    def describe(self) -> str:
        return f"decay {self.decay:g}{' with warm-up' if self.warmup else ''}; the average is evaluated and exported"

    def ready(self, model: nn.Module, run: Any) -> None:
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.average = copy.deepcopy(model, shared).requires_grad_(False).eval()
        self._planned_steps = run.planned_steps

    def decay_at(self, progress: float) -> float:
        """The decay of the update at a point of the run: a function of the step, not a counter."""
        t = round(progress * self._planned_steps) + 1
        return min(self.decay, (1 + t) / (10 + t)) if self.warmup else self.decay

    def after_step(self, model: nn.Module, progress: float) -> None:
        with torch.no_grad():
            pairs = [(a, p) for a, p in zip(self.average.parameters(), model.parameters(), strict=True) if a is not p]
            averaging.ema_([a for a, _ in pairs], [p for _, p in pairs], self.decay_at(progress))
            for mine, theirs in zip(self.average.buffers(), model.buffers(), strict=True):
                mine.copy_(theirs)

    def eval_model(self, model: nn.Module) -> nn.Module:
        return self.average
