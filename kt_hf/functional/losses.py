"""Losses as pure functions.

Shapes: N scored units, C classes; for pairs of images and texts B own rows, N rows of all processes, D width of the
space.
"""

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


def clip_rows(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    images_ND: torch.Tensor,
    texts_ND: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor,
) -> torch.Tensor:
    """values_B: row i's half of both cross-entropies, -1/2 (log p(text_i | image_i) + log p(image_i | text_i)).

    Radford et al. 2021, figure 3. Own row i is row offset + i of all. The mean over all rows is the CLIP loss.
    """
    own_B = (offset + torch.arange(len(image_BD), device=image_BD.device)).clamp(max=len(texts_ND) - 1)
    to_text_B = F.cross_entropy(scale * image_BD @ texts_ND.T, own_B, reduction="none")
    to_image_B = F.cross_entropy(scale * text_BD @ images_ND.T, own_B, reduction="none")
    return (to_text_B + to_image_B) / 2


def siglip_rows(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    images_ND: torch.Tensor,
    texts_ND: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor,
) -> torch.Tensor:
    """values_B: sum over all texts j of -log sigmoid(z_ij (scale x_i y_j + bias)), z_ij = 1 for i's own text, else -1.

    Zhai et al. 2023, section 3.2. Own row i is row offset + i of all. The mean over all images is the SigLIP loss.
    """
    logits_BN = scale * image_BD @ texts_ND.T + (0.0 if bias is None else bias)
    columns_N = torch.arange(len(texts_ND), device=image_BD.device)
    own_BN = columns_N[None] == (offset + torch.arange(len(image_BD), device=image_BD.device))[:, None]
    return -F.logsigmoid(torch.where(own_BN, logits_BN, -logits_BN)).sum(1)
