"""Metrics that are no means over examples, as functions of example weights, for resampling.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import numpy as np


def macro_f1(guess_N: np.ndarray, truth_N: np.ndarray, num_classes: int, weights_N: np.ndarray) -> float:
    """Mean over the classes that occur of F1_c = 2 TP_c / (predicted_c + actual_c), each row counted `weights_N` times.

    Equal to scikit-learn's `f1_score(average="macro", zero_division=0, sample_weight=weights_N)`.
    """
    used = weights_N > 0
    guess, truth, weights = guess_N[used], truth_N[used], weights_N[used]
    hit = guess == truth
    true_positive = np.bincount(truth[hit], weights[hit], num_classes)
    total = np.bincount(guess, weights, num_classes) + np.bincount(truth, weights, num_classes)
    occurs = total > 0
    return float((2 * true_positive[occurs] / total[occurs]).mean()) if occurs.any() else 0.0


def pearson(x_N: np.ndarray, y_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Correlation of x and y, each row counted `weights_N` times; 0 where one of them does not vary."""
    total = weights_N.sum()
    x, y = x_N - (weights_N @ x_N) / total, y_N - (weights_N @ y_N) / total
    spread = np.sqrt((weights_N @ (x * x)) * (weights_N @ (y * y)))
    return float((weights_N @ (x * y)) / spread) if spread > 1e-12 * total else 0.0


def spearman(x_groups_N: np.ndarray, y_groups_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Pearson's correlation of ranks, equal values at their mean rank, each row counted `weights_N` times.

    Groups number the distinct values from the smallest, as `np.unique(x, return_inverse=True)` does.
    """
    return pearson(_mean_ranks(x_groups_N, weights_N), _mean_ranks(y_groups_N, weights_N), weights_N)


def _mean_ranks(groups_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    sizes = np.bincount(groups_N, weights_N)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[groups_N]
