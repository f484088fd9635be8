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
