"""Intervals over seeds and examples: identities, planted cases, and their coverage in simulated runs."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from kt_hf.functional import scoring, statistics
from kt_hf.functional.statistics import bounds, gain, interval, ratios, resample, verdict

SHARED, OWN = 1.0, 0.6
"""Scatter of the examples that all seeds share, and of each answer; seeds scatter besides."""


def outcomes(generator, shift: float, seed_scatter: float, difficulty, S: int):
    """Right or wrong by a threshold on a normal sum: the expected accuracy is known. difficulty: runs x 1 x N."""
    runs, _, N = difficulty.shape
    latent = shift + SHARED * difficulty + OWN * generator.standard_normal((runs, S, N))
    latent = latent + seed_scatter * generator.standard_normal((runs, S, 1))
    scale = math.sqrt(2 * (SHARED**2 + OWN**2 + seed_scatter**2))
    return (latent > 0).astype(float), 0.5 * (1 + math.erf(shift / scale))


def coverage(values_RSN, truth: float, replicates: int = 300) -> float:
    """Share of simulated runs whose interval holds the truth; all runs share their draws, which is quick."""
    R, S, N = values_RSN.shape
    every = ratios(values_RSN.reshape(R * S, N), None, replicates)
    hits = 0
    for run in range(R):
        own = slice(run * S, run * S + S)
        found = statistics.Replicates(every.point_S[own], every.draws_BS[:, own], N)
        _, low, high = bounds(found, seed=run)
        hits += low - 1e-9 <= truth <= high + 1e-9
    return hits / R


@pytest.mark.parametrize("S", [3, 5])
@pytest.mark.parametrize("N", [100, 600])
@pytest.mark.parametrize("seed_scatter", [0.0, 0.1, 0.4], ids=["seeds_alike", "moderate", "seeds_decide"])
def test_coverage_of_a_metric_and_of_a_gain(S, N, seed_scatter):
    generator = np.random.default_rng([S, N, int(10 * seed_scatter)])
    difficulty = generator.standard_normal((1000, 1, N))
    better, p = outcomes(generator, 0.9, seed_scatter, difficulty, S)
    assert 0.90 <= coverage(better, p) <= 0.98
    worse, q = outcomes(generator, 0.7, seed_scatter, difficulty, S)
    assert 0.90 <= coverage(better - worse, p - q) <= 0.98


def test_value_is_the_mean_over_seeds_of_weighted_ratios():
    generator = np.random.default_rng(0)
    values, weights = generator.random((3, 50)), generator.integers(0, 9, (3, 50))
    value, low, high = interval(values, weights)
    assert value == pytest.approx(np.mean([np.average(v, weights=w) for v, w in zip(values, weights, strict=True)]))
    assert low < value < high


def test_the_same_call_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(1).random((3, 80))
    assert interval(values) == interval(values)
    assert interval(values) != interval(values, seed=1)


def test_one_seed_is_the_ordinary_percentile_interval():
    values = np.random.default_rng(2).integers(0, 2, (1, 400)).astype(float)
    value, low, high = interval(values, replicates=20_000)
    expected = 1.96 * math.sqrt(value * (1 - value) / 400)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.06)


def test_three_equal_seeds_are_as_one():
    values = np.random.default_rng(3).integers(0, 2, (1, 300)).astype(float)
    assert interval(np.repeat(values, 3, axis=0)) == pytest.approx(interval(values), abs=1e-12)


def test_seeds_that_differ_greatly_widen_the_interval_as_student_says():
    """Without scatter of examples it is mean +- t s / sqrt(S), at nu = S - 1."""
    levels = np.array([0.2, 0.5, 0.6])
    _, low, high = interval(np.repeat(levels[:, None], 200, axis=1), replicates=40_000)
    half = 4.302652730 * levels.std(ddof=1) / math.sqrt(3)
    # The range of what was observed is the limit.
    assert (low, high) == (0.2, 0.6) and half > 0.4
    spread = np.repeat(levels[:, None], 200, axis=1)
    spread[:, 0], spread[:, 1] = -9, 9
    _, low, high = interval(spread, replicates=40_000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)


def test_constant_data_have_an_interval_of_no_width():
    assert interval(np.full((3, 20), 0.1)) == (0.1, 0.1, 0.1)
    assert interval(np.ones((1, 1))) == (1.0, 1.0, 1.0)
    assert gain(np.ones((3, 5)), np.zeros((1, 5))) == (1.0, 1.0, 1.0)


def test_never_nan_even_if_draws_miss_every_counted_example():
    weights = np.zeros((3, 40))
    weights[:, 7] = 2
    values = np.where(weights > 0, 0.5, np.nan)
    assert interval(values, weights) == (0.5, 0.5, 0.5)


def test_refuses_what_has_no_value():
    with pytest.raises(ValueError, match="no example counts"):
        interval(np.ones((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="finite"):
        interval(np.array([[1.0, np.inf]]))
    with pytest.raises(ValueError, match="2 and 3 seeds"):
        gain(np.ones((2, 4)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="4 and 5 examples"):
        gain(np.ones((2, 4)), np.zeros((2, 5)))


def test_the_same_model_twice_is_no_evidence_and_a_worse_one_hurts():
    generator = np.random.default_rng(5)
    difficulty = generator.standard_normal((1, 1, 400))
    model, _ = outcomes(generator, 1.0, 0.05, difficulty, 3)
    worse, _ = outcomes(generator, 0.4, 0.05, difficulty, 3)
    again, _ = outcomes(generator, 1.0, 0.05, difficulty, 3)
    assert gain(model[0], model[0]) == (0.0, 0.0, 0.0)
    assert verdict(*gain(model[0], model[0])[1:], 3) == "no evidence"
    assert verdict(*gain(again[0], model[0])[1:], 3) == "no evidence"
    assert verdict(*gain(worse[0], model[0])[1:], 3) == "hurt"
    assert verdict(*gain(model[0], worse[0])[1:], 3) == "helped"
    assert verdict(*gain(model[0], worse[0])[1:], 3, higher_is_better=False) == "hurt"


def test_pairing_is_worth_it():
    generator = np.random.default_rng(6)
    difficulty = generator.standard_normal((1, 1, 400))
    a, b = (outcomes(generator, shift, 0.0, difficulty, 3)[0][0] for shift in (1.0, 0.8))
    _, low, high = gain(a, b)
    assert high - low < 0.8 * math.hypot(*(np.ptp(interval(x)[1:]) for x in (a, b)))


def test_a_baseline_of_one_row_stands_for_every_seed():
    generator = np.random.default_rng(7)
    a, b = generator.random((3, 60)), generator.random((1, 60))
    assert gain(a, b) == pytest.approx(gain(a, np.repeat(b, 3, axis=0)), abs=1e-12)
    assert gain(a, b)[0] == pytest.approx(-gain(b, a)[0])


def test_verdicts():
    assert verdict(0.1, 0.2, 1) == "one seed: no claim"
    assert verdict(0.1, 0.2, 2) == "no evidence"
    assert verdict(0.0, 0.2, 3) == "no evidence"
    assert verdict(0.1, 0.2, 3) == "helped"
    assert verdict(-0.2, -0.1, 3) == "hurt"
    assert verdict(-0.2, -0.1, 3, higher_is_better=False) == "helped"


def test_a_function_of_weights_is_resampled_as_a_mean_is():
    values = np.random.default_rng(8).random((3, 90))
    found = resample([lambda w, v=v: float((v * w).sum() / w.sum()) for v in values], 90, replicates=300)
    assert bounds(found) == pytest.approx(interval(values, replicates=300))


def test_macro_f1_has_an_interval():
    generator = np.random.default_rng(9)
    truth = generator.integers(0, 4, 200)
    guess_S = [np.where(generator.random(200) < 0.8, truth, generator.integers(0, 4, 200)) for _ in range(3)]
    found = resample([lambda w, g=g: scoring.macro_f1(g, truth, 4, w) for g in guess_S], 200, replicates=300)
    value, low, high = bounds(found)
    assert 0.7 < low < value < high < 0.95


@pytest.mark.parametrize(
    ("q", "nu", "table"),
    [
        (0.975, 1, 12.706204736),
        (0.975, 2, 4.302652730),
        (0.975, 4, 2.776445105),
        (0.975, 10, 2.228138852),
        (0.95, 1, 6.313751515),
        (0.95, 2, 2.919985580),
        (0.995, 4, 4.604094871),
        (0.975, 120, 1.979930405),
        (0.975, 1e6, 1.959966375),
    ],
)
def test_quantiles_of_student(q, nu, table):
    assert statistics.student_t(q, nu) == pytest.approx(table, rel=1e-6)


def test_many_examples_need_little_memory_and_time():
    values = np.random.default_rng(10).integers(0, 2, (3, 10_000))
    assert max(part.size for part in statistics.draws(10_000, 300, 0)) <= statistics.CHUNK
    started = time.perf_counter()
    interval(values)
    assert time.perf_counter() - started < 20
