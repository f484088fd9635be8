"""Knowledge distillation from the logits of a live teacher."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from kt_hf import ModelRef, Strategy
from kt_hf.functional import losses


class Distill(Strategy):
    """Adds the divergence from a frozen teacher's softened predictions.

    loss = (1 - alpha) * task + alpha * T^2 KL(teacher || student), both softened by the temperature T. The teacher
    may be a model directory, a Hub id, `@stage`, or an ensemble; labels are matched by name.
    """

    paper = "Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531"
    adds_objective = True
    needs_scores = True
    neutral = {"alpha": 0.0}

    def __init__(
        self,
        *,
        teacher: ModelRef,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.5,
    ):
        super().__init__()
        self.teacher, self.temperature, self.alpha = teacher, temperature, alpha
        self._frozen: Any = None

    def describe(self) -> str:
        return f"teacher {self.teacher}, temperature {self.temperature:g}, alpha {self.alpha:g}"

    def ready(self, model: nn.Module, run: Any) -> None:
        if self.alpha:
            self._frozen = run.frozen(self.teacher)

    def task_weight(self, progress: float) -> float:
        return 1.0 - self.alpha

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        if not self.alpha:
            return {}
        student_NC, weight_N = step.task.scores(step.outputs, step.batch)
        teacher_NC = self._frozen.scores(step.batch)
        values_N = losses.distillation(self._frozen.select(student_NC), teacher_NC, self.temperature)
        return {"kl": self.alpha * step.mean(values_N, weight_N, step.task.unit)}
