"""Matrices as products of two thin ones, as pure functions. Shapes: O outputs, I inputs, R rank, M models, P a few more
than the rank.

Singular values go to both factors in equal parts, so that neither is much larger than the other. Computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

EXACT = 1024
"""The smaller side of a matrix above which a decomposition to a given rank is randomised."""
NOTHING = 1e-14
"""A share of the squared norm that is rounding."""
CANCELLED = 1e-12
"""A share of the size of a product's factors below which its singular values are rounding, too."""
ROWS = 2**20
"""Elements that are taken to float64 at once."""


@dataclass(frozen=True)
class Factors:
    """b_OR @ a_RI, with the squared Frobenius norm of what was factored and of what that leaves out."""

    b_OR: torch.Tensor
    a_RI: torch.Tensor
    total: float
    lost: float

    @property
    def rank(self) -> int:
        return self.b_OR.shape[1]


def rank_for(squares_R: torch.Tensor, rank: int | None = None, error: float | None = None) -> int:
    """The smallest rank whose relative error, sqrt(sum_{i > r} s_i^2 / sum_i s_i^2), is `error` at most, and `rank` at
    most; squares_R: squared singular values, the largest first. Without either: all that are no rounding."""
    total = float(squares_R.sum())
    if not total > 0:
        return 0
    lost = squares_R.flip(0).cumsum(0).flip(0)  # by keeping fewer than so many
    allowed = NOTHING if error is None else max(error**2, NOTHING)
    needed = int((lost > allowed * total).sum())
    return needed if rank is None else min(needed, rank)


def factored(delta_OI: torch.Tensor, rank: int | None = None, error: float | None = None) -> Factors:
    """The nearest matrix of a rank in the Frobenius norm, or of the smallest rank within a relative error of it.

    Exact by the eigenvectors of the smaller Gram matrix; a matrix that is large on both sides, to a given rank alone,
    by `sketched`. What is left out is measured in both.
    Source: Eckart & Young 1936, The approximation of one matrix by another of lower rank.
    """
    if rank is not None and error is None and min(delta_OI.shape) > max(EXACT, 4 * rank):
        return sketched(delta_OI, rank)
    if delta_OI.shape[0] < delta_OI.shape[1]:
        flipped = factored(delta_OI.T, rank, error)
        return Factors(flipped.a_RI.T.contiguous(), flipped.b_OR.T.contiguous(), flipped.total, flipped.lost)
    count = delta_OI.shape[1]
    gram_II = torch.zeros(count, count, dtype=torch.float64)
    for part in delta_OI.split(max(1, ROWS // max(1, count))):
        wide = part.double()
        gram_II.addmm_(wide.T, wide)
    squares_I, vectors_II = torch.linalg.eigh(gram_II)
    squares_I, vectors_II = squares_I.flip(0).clamp(min=0), vectors_II.flip(1)
    kept = rank_for(squares_I, rank, error)
    roots_R = squares_I[:kept].sqrt().sqrt()
    found_IR = vectors_II[:, :kept]
    b_OR = torch.cat([p.double() @ found_IR for p in delta_OI.split(max(1, ROWS // max(1, count)))]) / roots_R
    a_RI = (found_IR * roots_R).T
    return Factors(b_OR, a_RI.contiguous(), float(squares_I.sum()), float(squares_I[kept:].sum()))


def sketched(delta_OI: torch.Tensor, rank: int, iterations: int = 3, more: int = 16, seed: int = 0) -> Factors:
    """`factored` to a rank by subspace iteration from a random start: within a few thousandths of the least error on
    spectra that hardly decay, nearer on others.

    Source: Halko, Martinsson & Tropp 2011, Finding structure with randomness, algorithms 4.4 and 5.1 (arXiv:0909.4061).
    """
    delta_OI = delta_OI.float()
    generator = torch.Generator().manual_seed(seed)
    basis_IP = torch.randn(delta_OI.shape[1], rank + more, generator=generator)
    basis_OP = torch.linalg.qr(delta_OI @ basis_IP).Q
    for _ in range(iterations):
        basis_IP = torch.linalg.qr(delta_OI.T @ basis_OP).Q
        basis_OP = torch.linalg.qr(delta_OI @ basis_IP).Q
    left_PP, singular_P, right_PI = torch.linalg.svd((basis_OP.T @ delta_OI).double(), full_matrices=False)
    roots_R = singular_P[:rank].sqrt()
    total = sum(float(part.double().square().sum()) for part in delta_OI.split(max(1, ROWS // delta_OI.shape[1])))
    b_OR = basis_OP.double() @ left_PP[:, :rank] * roots_R
    lost = max(total - float((singular_P[:rank] ** 2).sum()), 0.0)
    return Factors(b_OR, roots_R[:, None] * right_PI[:rank], total, lost)


def added(
    b_M: Sequence[torch.Tensor], a_M: Sequence[torch.Tensor], weights_M: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_m w_m B_m A_m as one product, [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...], exactly and of the sum of the ranks.

    The square root of a weight's size goes to either factor, and its sign to B alone. Weights of 0 are left out.
    """
    kept = [(b, a, w) for b, a, w in zip(b_M, a_M, weights_M, strict=True) if w]
    if not kept:
        return b_M[0].double()[:, :0], a_M[0].double()[:0]
    b_OR = torch.cat([b.double() * (abs(w) ** 0.5 * (1 if w > 0 else -1)) for b, _, w in kept], 1)
    return b_OR, torch.cat([a.double() * abs(w) ** 0.5 for _, a, w in kept])


def reduced(b_OR: torch.Tensor, a_RI: torch.Tensor, rank: int | None = None, error: float | None = None) -> Factors:
    """`factored` of the product b_OR @ a_RI, which is not formed: B = Q_b T_b, A^T = Q_a T_a, and the singular values
    of the small T_b T_a^T are those of the product."""
    left, right = torch.linalg.qr(b_OR.double()), torch.linalg.qr(a_RI.double().T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    s = s * (s > CANCELLED * left.R.norm() * right.R.norm())
    kept = rank_for(s**2, rank, error)
    roots_R = s[:kept].sqrt()
    b, a = left.Q @ (u[:, :kept] * roots_R), (roots_R[:, None] * vh[:kept]) @ right.Q.T
    return Factors(b, a, float((s**2).sum()), float((s[kept:] ** 2).sum()))
