"""Averages in weight space as pure functions. Shapes: M models."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def weighted_mean(tensors_M: Sequence[torch.Tensor], weights_M: Sequence[float]) -> torch.Tensor:
    """sum_m w_m theta_m / sum_m w_m, in float32 (float64 if the first is) and as corrections to what is there: equal
    inputs give exactly that input.

    Weights that are not negative make a running mean, in one pass over memory for each model.
    Source: Wortsman et al. 2022, "Model soups", equation (1) for equal weights (arXiv:2203.05482).
    """
    first = tensors_M[0] if tensors_M[0].dtype == torch.float64 else tensors_M[0].float()
    others = [t.to(first.dtype) for t in tensors_M[1:]]
    if not others:
        return first.clone()
    if min(weights_M) < 0 or weights_M[0] == 0:
        mean, total = first.clone(), float(sum(weights_M))
        for tensor, weight in zip(others, weights_M[1:], strict=True):
            mean.add_(tensor - first, alpha=weight / total)
        return mean
    total = weights_M[0] + weights_M[1]
    mean = torch.lerp(first, others[0], weights_M[1] / total)
    for tensor, weight in zip(others[1:], weights_M[2:], strict=True):
        total += weight
        mean.lerp_(tensor, weight / total)
    return mean


def ema_(average: Sequence[torch.Tensor], current: Sequence[torch.Tensor], decay: float) -> None:
    """In place: average <- decay * average + (1 - decay) * current, tensor by tensor.

    Closed form after n steps: decay^n theta_0 + (1 - decay) sum_i decay^(n-i) theta_i.
    Source: Polyak & Juditsky 1992; exponential form as in Tarvainen & Valpola 2017 (arXiv:1703.01780).
    """
    torch._foreach_lerp_(list(average), list(current), 1.0 - decay)
