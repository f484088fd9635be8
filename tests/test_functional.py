"""Identities that the pure functions behind losses, averages and scores must satisfy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from kt_hf.functional import averaging, losses, scoring


def logits(seed: int, n: int = 5, c: int = 4, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_from_oneself_is_zero(temperature):
    student = logits(0).requires_grad_()
    values = losses.distillation(student, student.detach(), temperature)
    values.sum().backward()
    assert values.abs().max() < 1e-5
    assert student.grad.abs().max() < 1e-5


def test_distillation_is_t_squared_times_kl_by_hand():
    """One unit, two classes, T = 2: teacher logits (2, 0) soften to (e, 1) / (e + 1), student logits (0, 0) to
    halves."""
    p = math.e / (math.e + 1)
    by_hand = 4 * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    value = losses.distillation(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), 2.0)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 10.0])
def test_distillation_equals_its_definition(temperature):
    student, teacher = logits(1), logits(2)
    p, q = (teacher / temperature).softmax(-1).double(), (student / temperature).softmax(-1).double()
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(
        losses.distillation(student, teacher, temperature).double(), expected, rtol=1e-4, atol=1e-6
    )


def test_gradient_does_not_depend_on_the_temperature_for_small_logits():
    """For logits near 0 the gradient is (student - teacher, centred) / C at every temperature."""
    gradients = []
    for temperature in (1.0, 5.0, 20.0):
        student, teacher = logits(3, scale=1e-2).requires_grad_(), logits(4, scale=1e-2)
        losses.distillation(student, teacher, temperature).sum().backward()
        gradients.append(student.grad)
    expected = logits(3, scale=1e-2) - logits(4, scale=1e-2)
    expected = (expected - expected.mean(-1, keepdim=True)) / 4
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=0.03, atol=1e-5)


def test_distillation_is_computed_in_float32():
    assert losses.distillation(logits(1).bfloat16(), logits(2).bfloat16(), 2.0).dtype == torch.float32


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_ema_equals_its_closed_form(decay):
    weights = [torch.randn(3, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(6)]
    average = [weights[0].clone()]
    for current in weights[1:]:
        averaging.ema_(average, [current], decay)
    n = len(weights) - 1
    expected = decay**n * weights[0] + (1 - decay) * sum(decay ** (n - i) * weights[i] for i in range(1, n + 1))
    torch.testing.assert_close(average[0], expected, rtol=1e-12, atol=1e-12)


def test_ema_with_decay_zero_is_the_current_weight_exactly():
    average, current = [logits(0)], [logits(1)]
    averaging.ema_(average, current, 0.0)
    assert torch.equal(average[0], current[0])


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_soup_of_k_copies_is_exactly_the_model(k):
    model = logits(5)
    assert torch.equal(averaging.weighted_mean([model.clone() for _ in range(k)], [1 / k] * k), model)


def test_weighted_mean_is_the_weighted_mean():
    tensors, weights = [logits(i) for i in range(3)], [0.5, 2.0, 1.5]
    expected = sum(w * t for w, t in zip(weights, tensors, strict=True)) / 4
    torch.testing.assert_close(averaging.weighted_mean(tensors, weights), expected)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_equals_sklearn_with_weights(seed):
    random = np.random.default_rng(seed)
    truth, guess = random.integers(0, 4, 30), random.integers(0, 5, 30)
    for weights in (np.ones(30), random.integers(0, 3, 30).astype(float), random.random(30)):
        used = weights > 0
        expected = f1_score(truth[used], guess[used], average="macro", zero_division=0, sample_weight=weights[used])
        assert scoring.macro_f1(guess, truth, 5, weights) == pytest.approx(expected, abs=1e-12)


def test_macro_f1_of_nothing_is_zero():
    assert scoring.macro_f1(np.array([1]), np.array([1]), 3, np.array([0.0])) == 0.0
