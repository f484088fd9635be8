"""Merges of task vectors, tau_m = theta_m - theta_0, as pure functions of one tensor. Shapes: M models, C elements of a
part, R rows of N elements.

What is random comes from a source of bits that is given. All trim or drop within a tensor; density is the fraction
kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from .magnitude import PART, Keep, KeepBetween, num_kept, ranks_of_rows

Combination = Literal["linear", "ties"]
Division = Literal["count", "weights", "none"]
Sparse = Callable[[torch.Tensor], torch.Tensor]
"""A part of a task vector -> what is left of it; called with the parts in their order."""
TINY = 1e-9
"""Keeps a sum of no shares from being divided by."""


def task_vectors(tensors_M: Sequence[torch.Tensor], base: torch.Tensor) -> list[torch.Tensor]:
    """tau_m = theta_m - theta_0. Source: Ilharco et al. 2023, section 2 (arXiv:2212.04089)."""
    return [tensor - base for tensor in tensors_M]


def task_arithmetic(
    base: torch.Tensor, vectors_M: Sequence[torch.Tensor], weights_M: Sequence[float], scaling: float = 1.0
) -> torch.Tensor:
    """theta_0 + scaling * sum_m w_m tau_m; a negative weight takes away what a model has learnt.

    Source: Ilharco et al. 2023, Editing Models with Task Arithmetic, section 2: addition, negation and analogies
    (w = 1, 1, -1) (arXiv:2212.04089).
    """
    merged = base.clone()
    for vector, weight in zip(vectors_M, weights_M, strict=True):
        merged.add_(vector, alpha=scaling * weight)
    return merged


def elected_mean(
    vectors_M: Sequence[torch.Tensor], weights_M: Sequence[float], divide_by: Division = "count"
) -> torch.Tensor:
    """Of each element the mean over those models that have the elected sign, which is that of sum_m w_m tau_m; a sum
    of 0 elects the positive sign, and a tau of 0 agrees with none.

    `count` divides the weighted sum by the number of models that agree, as the paper and peft do; `weights` by the sum
    of their |w_m|, as mergekit does; `none` leaves the sum, as mergekit does without `normalize`. The first two are one
    where all weights are 1. Elects by weighted values, as mergekit does (peft weighs after the election; the paper has
    no weights). Sums up in float64, so that the order of the models does not decide a sign.
    Writes into the vectors.
    Source: Yadav et al. 2023, TIES-Merging, steps 2 and 3 (elect, disjoint merge) (arXiv:2306.01708).
    """
    for vector_C, weight in zip(vectors_M, weights_M, strict=True):
        if weight != 1:
            vector_C.mul_(weight)
    sum_C = vectors_M[0].to(torch.float64, copy=True)
    for vector_C in vectors_M[1:]:
        sum_C.add_(vector_C.double())
    # truth values as numbers of the same type, which multiply faster
    elected_C = sum_C.to(vectors_M[0].dtype).ge_(0).mul_(2).sub_(1)
    merged_C, shares_C, agrees_C = (torch.zeros_like(elected_C) for _ in range(3))
    for vector_C, weight in zip(vectors_M, weights_M, strict=True):
        merged_C.add_(vector_C.mul_(elected_C).relu_())
        if divide_by != "none":
            torch.gt(vector_C, 0, out=agrees_C)
            shares_C.add_(agrees_C, alpha=abs(weight) if divide_by == "weights" else 1.0)
    merged_C.mul_(elected_C)
    return merged_C if divide_by == "none" else merged_C.div_(shares_C.clamp_(min=TINY))


def _parts(
    base: torch.Tensor, tensors_M: Sequence[torch.Tensor], unit: int
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """(part of the base, the same part of every task vector), one after another."""
    part = max(PART // unit, 1) * unit
    parts_M = [tensor.reshape(-1).split(part) for tensor in tensors_M]
    for base_C, *given in zip(base.reshape(-1).split(part), *parts_M, strict=True):
        yield base_C, [tensor_C.to(base_C.dtype) - base_C for tensor_C in given]


def ties(
    base: torch.Tensor,
    tensors_M: Sequence[torch.Tensor],
    weights_M: Sequence[float],
    density: float,
    scaling: float = 1.0,
    divide_by: Division = "count",
) -> torch.Tensor:
    """theta_0 + scaling * `elected_mean` of the trimmed task vectors, part by part: no task vector is ever whole.

    A task vector is trimmed to its largest magnitudes; of equal ones the first stay.
    Source: Yadav et al. 2023, TIES-Merging, steps 1 to 3 (arXiv:2306.01708). Deviation: trims within each tensor, as
    mergekit and peft do; the paper's code trims over the whole model.
    """
    count = num_kept(density, base.numel())
    keeps = [Keep(tensor, count, base) for tensor in tensors_M]
    return by_parts(base, tensors_M, keeps, weights_M, scaling, "ties", divide_by)


def by_parts(
    base: torch.Tensor,
    tensors_M: Sequence[torch.Tensor],
    sparse_M: Sequence[Sparse],
    weights_M: Sequence[float],
    scaling: float = 1.0,
    combine: Combination = "linear",
    divide_by: Division = "count",
    unit: int = 1,
) -> torch.Tensor:
    """theta_0 + scaling * (the weighted sum of what `sparse_M` leave of the task vectors, or its `elected_mean`), part
    by part: no task vector is ever whole. The models' tensors may be in another precision than the base, which is that
    of the result.

    unit: elements that are not to be parted.
    """
    merged, start = torch.empty_like(base, memory_format=torch.contiguous_format), 0
    for base_C, taus_M in _parts(base, tensors_M, unit):
        out_C, start = merged.view(-1)[start : start + len(base_C)], start + len(base_C)
        vectors_M = [sparse(tau_C) for sparse, tau_C in zip(sparse_M, taus_M, strict=True)]
        if combine == "ties":
            mean_C = elected_mean(vectors_M, weights_M, divide_by)
            torch.add(base_C, mean_C, alpha=scaling, out=out_C)
            continue
        out_C.copy_(base_C)
        for vector_C, weight in zip(vectors_M, weights_M, strict=True):
            out_C.add_(vector_C, alpha=scaling * weight)
    return merged


def draws(shape: Sequence[int], source: np.random.BitGenerator) -> torch.Tensor:
    """Uniform from 0 to 1, of 32 bits each before they are rounded to float32."""
    count = math.prod(shape)
    bits = source.random_raw((count + 1) // 2).view(np.int32)[:count]
    return torch.from_numpy(bits).float().mul_(2.0**-32).add_(0.5).view(*shape)


def drop(vector: torch.Tensor, density: float, source: np.random.BitGenerator, rescale: bool = True) -> torch.Tensor:
    """m * tau / density with m ~ Bernoulli(density): dropped at random, and rescaled so that its mean stays.

    rescale: whether to divide by the density.
    Source: Yu et al. 2024, Language Models are Super Mario, with the drop rate p = 1 - density (arXiv:2311.03099).
    """
    if density >= 1:
        return vector.clone()
    kept = vector * draws(vector.shape, source).lt_(density)
    return kept.div_(density) if rescale else kept


def drop_by_rank(
    vector: torch.Tensor,
    density: float,
    epsilon: float,
    source: np.random.BitGenerator,
    rescale: bool = True,
) -> torch.Tensor:
    """m_i tau_i / (1 - p_i) with m_i ~ Bernoulli(1 - p_i), where p_i grows from p - epsilon / 2 for the largest
    magnitude of a row to p + epsilon / 2 for its smallest, linearly in the rank; p = 1 - density.

    A row is what leads to one unit (all but the first dimension); vectors and matrices of one column are one row.
    Deviations: ranks are counted from 1/2, so that the mean of p_i is p; in rows of 1,024 elements and more those of
    nearly the same magnitude share their mean rank (`magnitude.ranks_of_rows`).
    Source: Deep et al. 2024, DELLA-Merging, MAGPRUNE (arXiv:2406.11617).
    """
    if density >= 1 or not vector.numel():
        return vector.clone()
    count = row_length(vector)
    rows_RN = vector.reshape(-1, count)
    kept_RN, block = torch.empty_like(rows_RN), max(PART // count, 1)
    for some_RN, out_RN in zip(rows_RN.split(block), kept_RN.split(block), strict=True):
        keep_RN = ranks_of_rows(some_RN, -epsilon / count, density + epsilon / 2)
        torch.mul(some_RN, draws(some_RN.shape, source).lt_(keep_RN), out=out_RN)
        if rescale:
            out_RN.div_(keep_RN)
    return kept_RN.reshape(vector.shape)


def row_length(tensor: torch.Tensor) -> int:
    """Elements that lead to one unit; all of a vector, and of a matrix with one column. At least 1."""
    alone = tensor.dim() < 2 or tensor.numel() == len(tensor)
    return max(tensor.numel() if alone else tensor.numel() // len(tensor), 1)


def dropping_by_rank(
    base: torch.Tensor, density: float, epsilon: float, source: np.random.BitGenerator, rescale: bool = True
) -> Sparse:
    """`drop_by_rank` for parts that have whole rows of what is like `base`."""
    count = row_length(base)
    return lambda part_C: drop_by_rank(part_C.view(-1, count), density, epsilon, source, rescale).view(-1)


def keeping_l1(make: Callable[[], Sparse], tensor: torch.Tensor, base: torch.Tensor, unit: int = 1) -> Sparse:
    """What `make` gives, scaled so that the sum of magnitudes stays; as it is where nothing is left. A first pass over
    the task vector finds the sums, so `make` is called twice, and must give the same both times.

    unit: as in `by_parts`. What mergekit's `rescale` does.
    """
    sparse, left, whole = make(), 0.0, 0.0
    for _, (vector_C,) in _parts(base, [tensor], unit):
        whole += float(vector_C.abs().sum(dtype=torch.float64))
        left += float(sparse(vector_C).abs().sum(dtype=torch.float64))
    again, factor = make(), whole / left if left > 0 else 1.0
    return lambda part_C: again(part_C) * factor


def breadcrumbs(
    base: torch.Tensor,
    tensors_M: Sequence[torch.Tensor],
    weights_M: Sequence[float],
    density: float,
    outliers: float,
    scaling: float = 1.0,
    combine: Combination = "linear",
) -> torch.Tensor:
    """`by_parts` of the task vectors without their largest magnitudes (the fraction `outliers`) and without the
    smallest: the fraction `density` next to the outliers stays.

    Source: Davari & Belilovsky 2023, Model Breadcrumbs, the mask of a layer (arXiv:2312.06795); their beta, the
    fraction of the smallest that is masked, is 1 - density - outliers.
    """
    top, count = int(outliers * base.numel()), num_kept(density, base.numel())
    sparse_M = [KeepBetween(tensor, top, count, base) for tensor in tensors_M]
    return by_parts(base, tensors_M, sparse_M, weights_M, scaling, combine)


def model_stock(base: torch.Tensor, tensors_M: Sequence[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """(theta_0 + t * mean_m tau_m, t) with t = M cos / (1 + (M - 1) cos), where cos is the mean cosine between two task
    vectors of this tensor.

    Source: Jang et al. 2024, Model Stock, the ratio for N models (arXiv:2403.19522). Deviation: a negative cosine,
    where t is negative or has no bound, counts as 0, which gives the base (mergekit goes beyond it).
    """
    count = len(tensors_M)
    gram_MM = gram(tensors_M, base)
    norms_M = gram_MM.diagonal().sqrt()
    scale_MM = norms_M[:, None] * norms_M[None]
    cosines_MM = torch.where(scale_MM > 0, gram_MM / scale_MM.clamp(min=1e-300), 0.0).clamp(-1, 1)
    cosine = max(float(cosines_MM.sum() - cosines_MM.trace()) / (count * (count - 1)), 0.0)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return by_parts(base, tensors_M, [all_of_it] * count, [ratio / count] * count), ratio


def all_of_it(part_C: torch.Tensor) -> torch.Tensor:
    """Drops nothing: a `Sparse`."""
    return part_C


def gram(tensors_M: Sequence[torch.Tensor], base: torch.Tensor | None = None) -> torch.Tensor:
    """Inner products of all pairs, in float64; with a base, of the task vectors. Shape MM."""
    found_MM, part = torch.zeros(len(tensors_M), len(tensors_M), dtype=torch.float64), PART // len(tensors_M) // 2
    parts_M = [tensor.reshape(-1).split(part) for tensor in tensors_M]
    bases = [None] * len(parts_M[0]) if base is None else base.reshape(-1).split(part)
    for base_C, *parts in zip(bases, *parts_M, strict=True):
        vectors_M = parts if base_C is None else [given.to(base_C.dtype) - base_C for given in parts]
        rows_MC = torch.stack([vector.double() for vector in vectors_M])
        found_MM += rows_MC @ rows_MC.T
    return found_MM
