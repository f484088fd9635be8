"""A learning-rate range test as pure functions of its curve. Shapes: N steps, each at a higher rate than the last.

Source: Smith 2015, "Cyclical learning rates for training neural networks", section 3.3 (arXiv:1506.01186): train for
some steps while the rate grows, and look where the loss falls. He takes the rates by eye from a linear ramp; ours is
geometric, the curve is smoothed on both sides, and the rate is half a decade below that of the lowest loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BELOW_LOWEST = 10**0.5
"""By what the rate of the lowest loss is divided: there the loss is about to rise again."""
_WIDTH = 0.06
"""Standard deviation of the smoothing kernel, as a share of the planned steps of the test."""
_NOISES = 3.0
"""By how many standard errors the smoothed curve has to fall to have fallen at all."""
_CHI2_MEDIAN = 0.455
"""Median of a squared standard normal variable."""


def ramp(low: float, high: float, num_steps: int) -> list[float]:
    """Rates from `low` to `high`, each the same multiple of the one before."""
    return [low * (high / low) ** (i / (num_steps - 1)) for i in range(num_steps)]


def smooth(losses_N: Sequence[float], planned: int) -> list[float]:
    """The losses of the first N of `planned` steps, each averaged with its neighbours on both sides (Gaussian)."""
    return (_kernel_NN(len(losses_N), planned) @ np.asarray(losses_N, dtype=np.float64)).tolist()


def _kernel_NN(num: int, planned: int) -> np.ndarray:
    """Weights of the smoother; rows add up to 1, so that ends are means of what there is."""
    places_N, width = np.arange(num), max(1.0, _WIDTH * planned)
    kernel_NN = np.exp(-0.5 * ((places_N[:, None] - places_N[None, :]) / width) ** 2)
    return kernel_NN / kernel_NN.sum(1, keepdims=True)


def has_diverged(losses_N: Sequence[float]) -> bool:
    """Whether the last three losses are above the first ones by more than they had ever fallen, and by more than
    they scatter: at higher rates nothing will be learned."""
    if len(losses_N) < 8:
        return False
    values_N = np.asarray(losses_N, dtype=np.float64)
    start, scatter = values_N[:3].mean(), np.abs(np.diff(values_N[:-3])).mean()
    return bool(values_N[-3:].min() > start + max(start - values_N.min(), 3 * scatter))


def best_rate(rates_N: Sequence[float], losses_N: Sequence[float], planned: int) -> float | None:
    """The rate at which the smoothed loss is lowest, divided by `BELOW_LOWEST`; None where the loss never falls by more
    than its noise. `losses_N` are finite and may be fewer than the rates.

    The noise of a loss is half the variance of the differences of neighbours, which hold little of the trend.
    """
    if len(losses_N) < 8:
        return None
    values_N, kernel_NN = np.asarray(losses_N, dtype=np.float64), _kernel_NN(len(losses_N), planned)
    smoothed_N = kernel_NN @ values_N
    lowest = int(smoothed_N.argmin())
    highest = int(smoothed_N[: lowest + 1].argmax())
    noise = math.sqrt(float(np.median(np.diff(values_N[: lowest + 2]) ** 2)) / 2 / _CHI2_MEDIAN)
    error = noise * math.sqrt(float((kernel_NN[lowest] ** 2).sum() + (kernel_NN[highest] ** 2).sum()))
    fall = smoothed_N[highest] - smoothed_N[lowest]
    if not fall > max(_NOISES * error, 1e-6 * abs(smoothed_N[highest])):
        return None
    return rates_N[lowest] / BELOW_LOWEST
