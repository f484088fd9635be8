"""Means in weight space by what was measured of the models, as pure functions. Shapes: M models, P parameters; of a
linear layer O outputs, I inputs, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SINGULAR = 1e-6
"""The share of an input that no others explain below which it is rounding, of inner products in float32."""


def fisher_mean(
    tensors_M: Sequence[torch.Tensor],
    fishers_M: Sequence[torch.Tensor | None],
    weights_M: Sequence[float],
    epsilon: float = 0.0,
) -> torch.Tensor:
    """sum_m w_m F_m theta_m / sum_m w_m F_m, element by element, F of the tensors' shape: the mode of the product of
    Gaussians around the models, whose precisions are the diagonals of their Fisher information.

    epsilon: is added to every F. Where all F are 0, or not known (None), the weighted mean. Computed as corrections to
    the first model, so that equal inputs give exactly that input.
    Source: Matena & Raffel 2022, Merging Models with Fisher-Weighted Averaging, the closed form for diagonal Fisher
    information (arXiv:2111.09832).
    """
    first = tensors_M[0]
    known = [None if f is None else f.to(first) for f in fishers_M]
    zero = torch.zeros_like(first)
    shares_M = [w * (zero if f is None else f).add(epsilon) for w, f in zip(weights_M, known, strict=True)]
    total = torch.stack(shares_M).sum(0)
    merged, plain = first.clone(), sum(weights_M)
    for tensor, share, weight in zip(tensors_M[1:], shares_M[1:], weights_M[1:], strict=True):
        part = torch.where(total > 0, share / total, weight / plain)
        merged += part * (tensor - first)
    return merged


def add_squares_(sums_P: Sequence[torch.Tensor], gradients_P: Sequence[torch.Tensor | None]) -> None:
    """In place: sums += g * g, of the gradients that there are.

    Over examples one by one, with g the gradient of log p(y | x), the mean of this is the diagonal of the Fisher
    information; of a batch's mean gradient it is not.
    Source: Matena & Raffel 2022, the estimate of the diagonal (arXiv:2111.09832).
    """
    pairs = [(total, gradient) for total, gradient in zip(sums_P, gradients_P, strict=True) if gradient is not None]
    if pairs:
        totals, gradients = [t for t, _ in pairs], [g.to(t) for t, g in pairs]
        torch._foreach_addcmul_(totals, gradients, gradients)


def gram_of_rows(rows_NI: torch.Tensor) -> torch.Tensor:
    """X^T X in float32. Shape II."""
    rows_NI = rows_NI.float()
    return rows_NI.T @ rows_NI


def regression_mean(
    weights_MOI: Sequence[torch.Tensor], grams_MII: Sequence[torch.Tensor], alpha: float
) -> torch.Tensor:
    """W^T = (sum_m G'_m)^-1 sum_m G'_m W_m^T with G' = alpha G + (1 - alpha) diag(G), G = X^T X of the layer's inputs:
    with alpha 1 the linear layer whose outputs are nearest to those of all models, each on its own inputs.

    In float64, as corrections to the first model: equal inputs give exactly that input. Inputs that are always 0 get
    the plain mean. Shape OI, in the weights' dtype.
    Source: Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, the closed form and the
    scaled inner products (arXiv:2212.09849).

    Raises `torch.linalg.LinAlgError` where the sum of the G' is singular, or nearly so: with alpha close to 1 alone.
    """
    first_OI = weights_MOI[0].double()
    total_II, right_IO = torch.zeros_like(grams_MII[0], dtype=torch.float64), torch.zeros_like(first_OI).T
    used_I = torch.stack([gram.diagonal() for gram in grams_MII]).sum(0) > 0
    for weight_OI, gram_II in zip(weights_MOI, grams_MII, strict=True):
        scaled_II = alpha * gram_II.double()
        scaled_II.diagonal().copy_(torch.where(used_I, gram_II.diagonal().double(), 1.0))
        total_II += scaled_II
        right_IO = right_IO + scaled_II @ (weight_OI.double() - first_OI).T
    # to one scale: inputs differ by orders of magnitude
    scale_I = total_II.diagonal().rsqrt()
    factor_II = torch.linalg.cholesky(scale_I[:, None] * total_II * scale_I)
    if factor_II.diagonal().min().square() < SINGULAR:
        raise torch.linalg.LinAlgError("the inputs depend on each other")
    change_IO = scale_I[:, None] * torch.cholesky_solve(scale_I[:, None] * right_IO, factor_II)
    return (first_OI + change_IO.T).to(weights_MOI[0].dtype)
