"""Losses as pure functions. Shapes: N scored units, C classes."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def distillation(student_NC: torch.Tensor, teacher_NC: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) for every unit: values_N, float32, not negative.

    The factor T^2 keeps the gradient's size independent of the temperature.
    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2 (arXiv:1503.02531).
    """
    student = F.log_softmax(student_NC.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_NC.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
