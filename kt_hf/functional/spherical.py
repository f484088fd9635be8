"""Means along great circles, of tensors taken as vectors, as pure functions. Shapes: M models, C elements of a part.

Every such mean is a linear combination of the models, so only its coefficients are computed, from inner products. The
combination is made part by part; models may be in other precisions than the first, which is that of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from .magnitude import PART
from .task_vectors import gram

PARALLEL = 1e-7
"""Radians from 0 or pi below which an angle says nothing: the mean is then the straight one."""


def slerp(
    first: torch.Tensor,
    second: torch.Tensor,
    t: float,
    norms: Literal["mixed", "interpolated"] = "mixed",
    linear_above: float = 1.0,
) -> torch.Tensor:
    """(sin((1 - t) w) a + sin(t w) b) / sin w, with w the angle between a and b.

    norms: the formula is for unit vectors. `mixed` puts the tensors themselves into it, as mergekit does;
    `interpolated` puts their directions into it and gives the result the norm (1 - t) |a| + t |b|.
    linear_above: straight interpolation where cos w exceeds this (mergekit: 0.9995); also where there is no direction.
    Source: Shoemake 1985, Animating Rotation with Quaternion Curves.
    """
    norms_2, cosines_22 = _angles([first, second])
    cosine = float(cosines_22[0, 1])
    angle = math.acos(cosine)
    if not norms_2.all() or not PARALLEL < angle < math.pi - PARALLEL or cosine > linear_above:
        return _by_parts([first, second], lambda parts: torch.lerp(parts[0], parts[1], t))
    one, two = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    if norms == "interpolated":
        norm = (1 - t) * float(norms_2[0]) + t * float(norms_2[1])
        one, two = one * norm / float(norms_2[0]), two * norm / float(norms_2[1])
    return _by_parts([first, second], lambda parts: parts[0] * one + parts[1] * two)


def spherical_mean(
    tensors_M: Sequence[torch.Tensor],
    weights_M: Sequence[float],
    kind: Literal["karcher", "chordal"] = "karcher",
    iterations: int = 50,
) -> torch.Tensor:
    """The tensor with the weighted mean of the norms, in the mean of the directions u_m.

    `karcher`: the direction x that minimises sum_m w_m angle(x, u_m)^2, by x <- exp_x(sum_m w_m log_x u_m) from the
    chordal mean. `chordal`: sum_m w_m u_m, set to norm 1. The plain weighted mean where directions cancel or there is
    none. Of two models with equal weights both are `slerp` at 1/2 with interpolated norms.
    Source: Karcher 1977, Riemannian center of mass and mollifier smoothing; on spheres Buss & Fillmore 2001, Spherical
    averages.
    """
    shares_M = torch.tensor(weights_M, dtype=torch.float64) / sum(weights_M)
    norms_M, cosines_MM = _angles(tensors_M)
    length = float(shares_M @ cosines_MM @ shares_M)
    if not norms_M.all() or length < PARALLEL**2:
        return _combination(tensors_M, shares_M)
    x_M = shares_M / math.sqrt(length)
    for _ in range(iterations if kind == "karcher" else 0):
        angles_M = (cosines_MM @ x_M).clamp(-1, 1).acos()
        if float(angles_M.max()) > math.pi - PARALLEL:
            break  # opposite to a model: no direction leads there
        stretch_M = shares_M * torch.where(angles_M > PARALLEL, angles_M / angles_M.sin(), 1.0)
        step_M = stretch_M - float(stretch_M @ angles_M.cos()) * x_M
        size = math.sqrt(max(float(step_M @ cosines_MM @ step_M), 0.0))
        if size < 1e-9:
            break
        x_M = math.cos(size) * x_M + math.sin(size) / size * step_M
        x_M = x_M / math.sqrt(float(x_M @ cosines_MM @ x_M))
    return _combination(tensors_M, x_M * float(shares_M @ norms_M) / norms_M)


def _angles(tensors_M: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(norms_M, cosines_MM), 0 where a norm is."""
    gram_MM = gram(tensors_M)
    norms_M = gram_MM.diagonal().sqrt()
    scale_MM = norms_M[:, None] * norms_M[None]
    return norms_M, torch.where(scale_MM > 0, gram_MM / scale_MM.clamp(min=1e-300), 0.0).clamp(-1, 1)


def _combination(tensors_M: Sequence[torch.Tensor], coefficients_M: torch.Tensor) -> torch.Tensor:
    """sum_m c_m theta_m, as sum_m c_m theta_1 + sum_m c_m (theta_m - theta_1), which is exact for copies."""
    total, (_, *others) = float(coefficients_M.sum()), coefficients_M.tolist()

    def combined(parts: list[torch.Tensor]) -> torch.Tensor:
        first_C, *rest = parts
        merged_C = first_C * total if abs(total - 1) > 1e-12 else first_C.clone()
        for part_C, coefficient in zip(rest, others, strict=True):
            merged_C.add_(part_C - first_C, alpha=coefficient)
        return merged_C

    return _by_parts(tensors_M, combined)


def _by_parts(tensors_M: Sequence[torch.Tensor], combine: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
    merged = torch.empty_like(tensors_M[0], memory_format=torch.contiguous_format)
    parts_M = [tensor.reshape(-1).split(PART) for tensor in tensors_M]
    for out_C, *parts in zip(merged.view(-1).split(PART), *parts_M, strict=True):
        out_C.copy_(combine([part.to(out_C.dtype) for part in parts]))
    return merged
