"""Outputs of several models in one, as pure functions.

Shapes: K members, N examples, C classes, U classes of all, J = 2K parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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


def weighted_outputs(scores_KNC: torch.Tensor, weights_K: Sequence[float], offsets_K: Sequence[float]) -> torch.Tensor:
    """log p_NC of p(y) ~ exp(sum over the members k that know y of w_k s_k(y) + b_k), in float32.

    A score of -inf says that a member does not know the class: it then adds nothing, where a product of probabilities
    would have excluded the class. A class that nobody knows keeps -inf.
    """
    known_KNC = scores_KNC > float("-inf")
    weights_K11, offsets_K11 = (
        torch.tensor(list(values), dtype=torch.float32, device=scores_KNC.device)[:, None, None]
        for values in (weights_K, offsets_K)
    )
    terms_KNC = weights_K11 * scores_KNC.float().masked_fill(~known_KNC, 0.0) + offsets_K11 * known_KNC
    return terms_KNC.sum(0).masked_fill(~known_KNC.any(0), float("-inf")).log_softmax(-1)


def output_weights(scores_KNC: torch.Tensor, labels_N: torch.Tensor) -> tuple[list[float], list[float]]:
    """(weights_K, offsets_K) of `weighted_outputs` that minimise the mean cross-entropy; no weight is negative, offsets
    are relative to their mean.

    The logarithm is linear in weights and offsets, so the objective is convex; a ridge of 1e-4 around weights of 1/K
    and offsets of 0 makes the minimum unique where members say the same, and finite where they err on no example.

    Source: Breiman 1996, "Stacked regressions" (weights that are not negative); Ting & Witten 1999, "Issues in stacked
    generalization", JAIR 10, for classes. Deviation: they stack probabilities; here it is logits, whose level also says
    how much a member has to do with an example (Hendrycks et al. 2019, arXiv:1911.11132, maximum logit).
    """
    from scipy import optimize

    count, ridge = len(scores_KNC), 1e-4
    known_KNC = (scores_KNC > float("-inf")).numpy()
    nobody_NC = ~known_KNC.any(0)
    finite_KNC = scores_KNC.double().masked_fill(~(scores_KNC > float("-inf")), 0.0).numpy()
    parts_JNC = np.concatenate([finite_KNC, known_KNC.astype(np.float64)])
    start_J = np.concatenate([np.full(count, 1 / count), np.zeros(count)])
    right, rows = labels_N.numpy(), np.arange(len(labels_N))

    def objective(x_J: np.ndarray) -> tuple[float, np.ndarray]:
        logits_NC = np.where(nobody_NC, -np.inf, np.einsum("j,jnc->nc", x_J, parts_JNC))
        logits_NC -= logits_NC.max(1, keepdims=True)
        chances_NC = np.exp(logits_NC)
        total_N1 = chances_NC.sum(1, keepdims=True)
        value = (np.log(total_N1[:, 0]) - logits_NC[rows, right]).mean()
        pull_NC = chances_NC / total_N1
        pull_NC[rows, right] -= 1
        slope_J = np.einsum("nc,jnc->j", pull_NC, parts_JNC) / len(rows)
        return value + ridge * np.square(x_J - start_J).sum(), slope_J + 2 * ridge * (x_J - start_J)

    if not len(rows):
        return start_J[:count].tolist(), start_J[count:].tolist()
    limits = [(0.0, None)] * count + [(None, None)] * count
    found_J = optimize.minimize(objective, start_J, jac=True, method="L-BFGS-B", bounds=limits).x
    offsets_K = found_J[count:] - found_J[count:].mean()
    return found_J[:count].tolist(), offsets_K.tolist()
