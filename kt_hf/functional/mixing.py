"""Mixtures of class probabilities as pure functions. Shapes: K members, N examples, C classes, U classes of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def place(scores_NC: torch.Tensor, columns_U: Sequence[int] | None) -> torch.Tensor:
    """scores_NU: the column that each class of all has in the scores; -inf, so that its probability is 0, where that is
    negative: a class unknown to who gave the scores. None: nothing is to be moved."""
    if columns_U is None:
        return scores_NC
    index_U = torch.as_tensor(columns_U, device=scores_NC.device)
    return scores_NC[:, index_U.clamp(min=0)].masked_fill(index_U < 0, float("-inf"))


def mixture_weights(chances_KN: torch.Tensor, steps: int = 500) -> torch.Tensor:
    """weights_K on the simplex that minimise -sum_n log sum_k w_k p_kn, where p_kn is the chance that member k gives to
    the right class of example n; in float64.

    Expectation-maximisation: r_kn = w_k p_kn / sum_j w_j p_jn, then w_k = mean_n r_kn. The objective is convex in the
    weights, so the start (equal ones) does not matter; an example to which all members give 0 does not count.

    Source: Dempster, Laird & Rubin 1977, section 4.3 (finite mixtures with known components); as weights of outputs,
    Jordan & Jacobs 1994, "Hierarchical mixtures of experts", with a gate that heeds no input.
    """
    chances_KN = chances_KN.double()
    chances_KN = chances_KN[:, chances_KN.sum(0) > 0]
    weights_K1 = torch.full((len(chances_KN), 1), 1 / len(chances_KN), dtype=torch.float64, device=chances_KN.device)
    if chances_KN.shape[1]:
        for _ in range(steps):
            share_KN = weights_K1 * chances_KN
            weights_K1 = (share_KN / share_KN.sum(0, keepdim=True).clamp(min=1e-300)).mean(1, keepdim=True)
    return weights_K1.squeeze(1)
