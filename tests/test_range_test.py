"""`learning_rate: auto`: what a range test finds, and that nothing of it is left in the training."""

from __future__ import annotations

import json
import math

import helpers
import numpy as np
import pytest
import torch
from helpers import identical, make_trainer, weights
from kt_hf_plugins.image_classification import ImageClassification

from kt_hf import range_test
from kt_hf.errors import RecipeError
from kt_hf.functional import learning_rate

SETTINGS = {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": "auto"}


def valley(best: float, noise: float, num: int = 60, seed: int = 0) -> tuple[list[float], list[float]]:
    """Rates, and losses that fall by 1 until `best` and then rise."""
    rates = learning_rate.ramp(1e-6, 1.0, num)
    random = np.random.default_rng(seed)
    x = np.log10(np.asarray(rates) / best)
    losses = 2 - 1 / (1 + np.exp(-3 * (x + 1))) + np.where(x > 0, x**2, 0) + random.normal(0, noise, num)
    return rates, losses.tolist()


def test_a_ramp_is_geometric():
    rates = learning_rate.ramp(1e-4, 10.0, 6)
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("best", [1e-4, 1e-2])
def test_the_rate_is_half_a_decade_below_the_lowest_loss(best, seed):
    rates, losses = valley(best, 0.05, seed=seed)
    found = learning_rate.best_rate(rates, losses, 60)
    assert found is not None and abs(math.log10(found / (best / 10**0.5))) < 0.5


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_gives_no_rate(seed):
    random = np.random.default_rng(seed)
    rates = learning_rate.ramp(1e-6, 1.0, 60)
    assert learning_rate.best_rate(rates, (2 + random.normal(0, 0.3, 60)).tolist(), 60) is None
    assert learning_rate.best_rate(rates, (2 + np.linspace(0, 1, 60)).tolist(), 60) is None, "a loss that only rises"


def test_smoothing_keeps_a_constant_and_looks_to_both_sides():
    assert learning_rate.smooth([3.0] * 20, 20) == pytest.approx([3.0] * 20)
    spike = learning_rate.smooth([0.0] * 10 + [1.0] + [0.0] * 10, 21)
    assert spike[9] == pytest.approx(spike[11]) and max(spike) == spike[10] and sum(spike) == pytest.approx(1, abs=1e-2)


def test_divergence_is_seen_and_scatter_is_not():
    rates, losses = valley(1e-3, 0.05)
    stopped = next(i for i in range(1, 61) if learning_rate.has_diverged(losses[:i]))
    assert rates[stopped - 1] > 1e-3
    random = np.random.default_rng(0)
    noise = (2 + random.normal(0, 0.3, 100)).tolist()
    assert not any(learning_rate.has_diverged(noise[:i]) for i in range(1, 101))


CASES = {
    "finetune": ("image", "finetune", {}),
    "batch statistics, accumulation": ("resnet", "finetune", {"gradient_accumulation_steps": 2, "optim": "sgd"}),
    "stack": ("image", "lora+distill+ema", {"per_device_train_batch_size": 26}),
    "dropout, skip": (
        "text",
        "finetune",
        {"optim": "adamw_torch", "non_finite": "skip", "per_device_train_batch_size": 26},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_training_equals_one_with_the_rate_typed_in(case, tmp_path):
    kind, names, training = CASES[case]
    strategies = helpers.stack(names, helpers.teacher(tmp_path / "t", "image") if "distill" in names else "")
    changes = helpers.DROPOUT if kind == "text" else {}
    given = {"model": helpers.config(kind, **changes), "save_steps": 15, **SETTINGS, **training}
    auto = make_trainer(tmp_path / "auto", kind, strategies, **given).run()
    rate = auto.range_test["learning_rate"]
    typed = make_trainer(tmp_path / "typed", kind, strategies, **{**given, "learning_rate": rate}).run()
    assert identical(weights(auto), weights(typed))
    assert auto.curve == typed.curve
    saved = [tmp_path / n / "checkpoints" / "step-000030" / "state.safetensors" for n in ("auto", "typed")]
    assert saved[0].read_bytes() == saved[1].read_bytes(), "the optimizer's and the strategies' state, too"
    assert len(auto.range_test["losses"]) <= 40 and 1e-6 < rate < 10


def test_a_test_that_was_made_is_not_repeated_and_one_that_was_killed_is(tmp_path, monkeypatch):
    whole = make_trainer(tmp_path / "whole", **SETTINGS, save_steps=10).run()
    real = range_test.climb

    def killed(trainer, rates):
        real(trainer, rates[:5])
        raise MemoryError

    monkeypatch.setattr(range_test, "climb", killed)
    with pytest.raises(MemoryError):
        make_trainer(tmp_path / "cut", **SETTINGS, save_steps=10).run()
    assert not (tmp_path / "cut" / range_test.FILE).exists()
    monkeypatch.setattr(range_test, "climb", real)
    stopped = make_trainer(tmp_path / "cut", **SETTINGS, save_steps=10, until=0.5)
    stopped.run()
    assert stopped.curve == whole.curve[:20]
    monkeypatch.delattr(range_test, "climb")
    resumed = make_trainer(tmp_path / "cut", **SETTINGS, save_steps=10)
    result = resumed.run()
    assert resumed.saved >= 10 and result.curve == whole.curve
    assert identical(weights(result), weights(whole))
    assert json.loads((tmp_path / "cut" / range_test.FILE).read_text()) == result.range_test


def test_a_loss_that_never_falls_is_refused(tmp_path):
    class Still(ImageClassification):
        def loss(self, outputs, batch, label_smoothing=0.0):
            values, weights_, unit = super().loss(outputs, batch, label_smoothing)
            return values * 0.0 + 1.0, weights_, unit

    trainer = make_trainer(tmp_path, task=Still(), info=helpers.image_info(), **SETTINGS)
    with pytest.raises(RecipeError, match="the loss never fell in 40 steps") as caught:
        trainer.run()
    assert "a number" in caught.value.remedy
    start = helpers.initial()
    assert identical({k: v for k, v in trainer.bundle.model.state_dict().items()}, start)


def test_short_trainings_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="at least 20 steps"):
        make_trainer(tmp_path, **{**SETTINGS, "max_steps": 12}).run()


def test_losses_that_are_not_finite_end_the_test(tmp_path):
    class Burst(ImageClassification):
        def loss(self, outputs, batch, label_smoothing=0.0):
            values, weights_, unit = super().loss(outputs, batch, label_smoothing)
            return torch.where(values > 9, torch.inf, values), weights_, unit

    trainer = make_trainer(tmp_path, task=Burst(), info=helpers.image_info(), **SETTINGS)
    trainer.run()
    assert all(math.isfinite(v) for v in trainer.range_test["losses"])
    assert len(trainer.range_test["losses"]) < 40
