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


def f1_of_counts(counts: np.ndarray, weights_N: np.ndarray) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of counts_N3, or the mean of it over the classes of counts_NC3 that occur.

    counts: true positives, false positives and false negatives of every row, which counts `weights_N` times.
    """
    totals = np.tensordot(weights_N, counts, 1)
    bottom = 2 * totals[..., 0] + totals[..., 1] + totals[..., 2]
    occurs = bottom > 0
    return float((2 * totals[..., 0][occurs] / bottom[occurs]).mean()) if occurs.any() else 0.0


def among_best(scores_NC: np.ndarray, truth_N: np.ndarray, k: int) -> np.ndarray:
    """Whether fewer than k classes score higher than the true one."""
    own_N1 = np.take_along_axis(scores_NC, np.maximum(truth_N, 0)[:, None], 1)
    return (scores_NC > own_N1).sum(1) < k


Bins = tuple[np.ndarray, np.ndarray, np.ndarray]


def confidence_bins(scores_NC: np.ndarray, truth_N: np.ndarray, num_bins: int = 15) -> Bins:
    """(bin_N, confidence_N, hit_N) of the most probable class, with bins of equal width."""
    shifted = scores_NC.astype(np.float64) - scores_NC.max(1, keepdims=True)
    confidence_N = 1 / np.exp(shifted).sum(1)
    bin_N = np.minimum((confidence_N * num_bins).astype(int), num_bins - 1)
    return bin_N, confidence_N, (scores_NC.argmax(1) == truth_N).astype(np.float64)


def calibration_error(bins: Bins, weights_N: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error: sum over bins of |accuracy - confidence|, by their share of the rows.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, equation 3.
    """
    bin_N, confidence_N, hit_N = bins
    gap_K = np.bincount(bin_N, weights_N * (hit_N - confidence_N), num_bins)
    total = weights_N.sum()
    return float(np.abs(gap_K).sum() / total) if total else 0.0


def pearson(x_N: np.ndarray, y_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Pearson's correlation with rows that count `weights_N` times; 0 where one of the two does not vary."""
    total = weights_N.sum()
    if not total:
        return 0.0
    dx, dy = (v - (weights_N * v).sum() / total for v in (x_N, y_N))
    bottom = np.sqrt((weights_N * dx * dx).sum() * (weights_N * dy * dy).sum())
    return float((weights_N * dx * dy).sum() / bottom) if bottom > 1e-12 else 0.0


def spearman(x_groups_N: np.ndarray, y_groups_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Pearson's correlation of ranks, equal values at their mean rank, each row counted `weights_N` times.

    Groups number the distinct values from the smallest, as `np.unique(x, return_inverse=True)` does.
    """
    return pearson(_mean_ranks(x_groups_N, weights_N), _mean_ranks(y_groups_N, weights_N), weights_N)


def _mean_ranks(groups_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    sizes = np.bincount(groups_N, weights_N)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[groups_N]


def iou(counts_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(intersection over union of every class, whether it occurs) from counts of (true, predicted) pixels.

    Everingham et al. 2015, "The Pascal Visual Object Classes Challenge: A Retrospective", section 4.2.
    """
    union_C = counts_CC.sum(0) + counts_CC.sum(1) - counts_CC.diagonal()
    return counts_CC.diagonal() / np.maximum(union_C, 1e-12), union_C > 0


def mean_iou(counts_NCC: np.ndarray, weights_N: np.ndarray) -> float:
    """Mean over the classes that occur of their intersection over union, each row counted `weights_N` times."""
    value_C, occurs_C = iou(np.tensordot(weights_N, counts_NCC, 1))
    return float(value_C[occurs_C].mean()) if occurs_C.any() else 0.0


def mean_recall(counts_NCC: np.ndarray, weights_N: np.ndarray) -> float:
    """Mean over the classes that there are of the share of them that is found, each row counted `weights_N` times."""
    counts_CC = np.tensordot(weights_N, counts_NCC, 1)
    total_C = counts_CC.sum(1)
    there_C = total_C > 0
    return float((counts_CC.diagonal()[there_C] / total_C[there_C]).mean()) if there_C.any() else 0.0


def roc_auc(groups_N: np.ndarray, positive_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Area under the ROC curve, each row counted `weights_N` times: the share of pairs of a positive and a negative row
    in which the positive one scores higher, equal scores counting half. 0.5 where one of the two kinds is missing.

    Groups number the distinct scores from the smallest, as `np.unique(x, return_inverse=True)` does. Equal to
    scikit-learn's `roc_auc_score(sample_weight=weights_N)`. Hanley & McNeil 1982, "The meaning and use of the area
    under a ROC curve", Radiology 143.
    """
    size = int(groups_N.max(initial=-1)) + 1
    yes_G = np.bincount(groups_N, weights_N * positive_N, size)
    no_G = np.bincount(groups_N, weights_N * ~positive_N, size)
    total = yes_G.sum() * no_G.sum()
    below_G = np.cumsum(no_G) - no_G / 2
    return float((yes_G * below_G).sum() / total) if total else 0.5
