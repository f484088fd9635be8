"""Weights of classes of different frequency.

Shapes: C classes.
"""

from __future__ import annotations

import numpy as np


def weights(counts_C: np.ndarray, beta: float) -> np.ndarray:
    """Weights proportional to (1 - beta) / (1 - beta^n) of classes with n rows, to 1 / n for beta = 1; classes without
    rows have the weight 1. Scaled such that the mean over all rows is 1.

    Cui et al. 2019, arXiv:1901.05555, equation 2.
    """
    counts_C = np.asarray(counts_C, dtype=np.float64)
    known = counts_C > 0
    found_C = np.ones(len(counts_C))
    if beta == 1:
        found_C[known] = 1 / counts_C[known]
    elif beta > 0:
        found_C[known] = (1 - beta) / (1 - beta ** counts_C[known])
    mean = (found_C * counts_C).sum() / max(counts_C.sum(), 1)
    found_C[known] /= mean or 1.0
    return found_C
