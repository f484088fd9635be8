"""The training loop against loops and values written out by hand."""

from __future__ import annotations

import math
import os
import weakref

import helpers
import numpy as np
import pytest
import torch
from helpers import distance, identical, initial, make_trainer, train, weights
from kt_hf_plugins.image_classification import ImageClassification
from torch.nn import functional as F

from kt_hf import Strategy, Stream, checkpoint, optimizer
from kt_hf.errors import NonFiniteError, RecipeError, ResourceError
from kt_hf.recipe import Training
from kt_hf.task import Scores
from kt_hf.trainer import check_stack

SGD = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}
"""For comparisons of sums in another order: Adam blows up the rounding noise of gradients that are 0 in exact
arithmetic."""


class Recorder(Strategy):
    """Keeps the weights after every step, and the names of trained weights that had no gradient then."""

    def __init__(self):
        super().__init__()
        self.history, self.without_gradient = [], set()

    def after_step(self, model, progress):
        self.history.append({n: t.detach().clone() for n, t in model.state_dict().items()})
        self.without_gradient |= {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}


# --- one-step equality ------------------------------------------------------------------------------------------------


def by_hand(
    kind: str, steps: int, warmup: int, rate: float, decay: float, clip: float
) -> tuple[dict[str, torch.Tensor], int]:
    """The same training in plain PyTorch. Returns the weights and how often the gradient was clipped."""
    task, info = helpers.task_and_info(kind)
    loaded = task.load(helpers.config(kind), info)
    loaded.model.load_state_dict(initial(kind))
    model = loaded.model.train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}], lr=rate
    )
    rows, n, clipped = info.splits["train"], len(info.splits["train"]), 0
    order = [i for epoch in range(3) for i in _batches(np.random.default_rng([42, epoch]).permutation(n), 4)]
    for step in range(steps):
        factor = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for group in adamw.param_groups:
            group["lr"] = rate * factor
        raw = rows[order[step]]
        columns = task.preprocess({k: v for k, v in raw.items() if k != "index"}, loaded, True)
        columns = {**columns, "index": raw["index"]}
        batch = task.collate(
            [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], loaded
        )
        labels = torch.tensor(raw["label"])
        logits = task.forward(model, batch).logits
        loss = F.cross_entropy(logits, labels, reduction="sum") / len(labels)
        loss.backward()
        clipped += int(torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > clip)
        adamw.step()
        adamw.zero_grad()
    return model.state_dict(), clipped


def _batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_loop_equals_a_loop_written_by_hand(kind, tmp_path):
    expected, clipped = by_hand(kind, steps=12, warmup=3, rate=1e-2, decay=0.1, clip=1.5)
    result = train(
        tmp_path, kind, max_steps=12, warmup_ratio=0.25, weight_decay=0.1, max_grad_norm=1.5, optim="adamw_torch"
    )
    assert 0 < clipped < 12, "the comparison must see clipped and unclipped steps"
    assert distance(weights(result), expected) < 1e-7
    assert distance(expected, initial(kind)) > 1e-2


def test_fused_and_plain_adamw_agree(tmp_path):
    fused, plain = (train(tmp_path / o, optim=o, adam_epsilon=1e-3) for o in ("adamw_torch_fused", "adamw_torch"))
    assert distance(weights(fused), weights(plain)) < 1e-6


def test_one_run_equals_itself_and_leaves_no_model_behind(tmp_path):
    first = make_trainer(tmp_path / "a")
    a = weights(first.run())
    kept = weakref.ref(first.bundle)
    del first
    assert kept() is None, "no cycle, so that memory is free at once"
    assert not helpers.accelerator()._models
    assert identical(a, weights(train(tmp_path / "b")))


# --- accumulation -----------------------------------------------------------------------------------------------------


def stack(tmp_path, names: str, kind: str) -> dict:
    settings = {"finetune": {}, "lora": {"r": 4}, "ema": {"decay": 0.8}}
    if "distill" in names:
        settings["distill"] = {"teacher": helpers.teacher(tmp_path / "teacher", kind), "alpha": 0.4, "temperature": 3.0}
    return {name: settings[name] for name in names.split("+")}


@pytest.mark.parametrize(("kind", "names"), [("text", "finetune"), ("image", "lora+distill+ema"), ("text", "distill")])
@pytest.mark.parametrize(("size", "micro_batches"), [(4, 2), (3, 3)])
def test_accumulated_micro_batches_equal_one_big_batch(kind, names, size, micro_batches, tmp_path):
    """26 rows in batches of 8 or 9: the last window is uneven, and its micro-batches differ in size."""
    strategies = stack(tmp_path, names, kind)
    whole = train(
        tmp_path / "whole", kind, strategies, per_device_train_batch_size=size * micro_batches, max_steps=8, **SGD
    )
    parts = train(
        tmp_path / "parts",
        kind,
        strategies,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=micro_batches,
        max_steps=8,
        **SGD,
    )
    assert distance(weights(whole), weights(parts)) < 1e-6
    assert distance(weights(whole), initial(kind)) > 1e-3
    for a, b in zip(whole.curve, parts.curve, strict=True):
        assert a["terms"].keys() == b["terms"].keys()
        assert all(a["terms"][k] == pytest.approx(b["terms"][k], abs=1e-5) for k in a["terms"])


def test_token_losses_are_normalised_by_the_tokens_of_the_window(tmp_path):
    """Completions of unequal lengths: a mean of micro-batch means would be wrong."""
    generation = pytest.importorskip("kt_hf_plugins.text_generation")
    import datasets

    from kt_hf.data import DataInfo
    from kt_hf.recipe import Model

    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(helpers.WORDS, random.integers(2, 20))) for _ in range(11)]
    rows = datasets.Dataset.from_dict({"text": texts, "index": np.arange(11)})
    info = DataInfo("texts", {"train": rows}, {"text": "text"}, None, "lm")
    model = Model(
        config="gpt2",
        config_overrides={
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "initializer_range": 0.2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    )
    common = {"task": generation.TextGeneration(max_length=32), "info": info, "model": model, "max_steps": 5, **SGD}
    whole = train(tmp_path / "whole", "lm", per_device_train_batch_size=6, **common)
    parts = train(tmp_path / "parts", "lm", per_device_train_batch_size=2, gradient_accumulation_steps=3, **common)
    assert distance(weights(whole), weights(parts)) < 1e-6
    assert whole.curve[-1]["loss"] < whole.curve[0]["loss"]


def test_rows_without_labels_count_for_distillation_but_not_for_the_task(tmp_path):
    info = helpers.image_info(8)
    info.splits["train"] = info.splits["train"].remove_columns("label").add_column("label", [0, 1, -1, 2, -1, -1, 1, 0])
    teacher = {"distill": {"teacher": helpers.teacher(tmp_path / "teacher"), "alpha": 0.5}}
    trainer = make_trainer(
        tmp_path / "run",
        strategies=teacher,
        task=ImageClassification(),
        info=info,
        per_device_train_batch_size=8,
        max_steps=1,
        **SGD,
    )
    seen = {}

    class Spy(Strategy):
        def loss(self, step):
            seen.update(
                logits=step.outputs.logits.detach(),
                labels=step.batch["labels"],
                teacher=trainer.strategies["distill"]._frozen.scores(step.batch),
            )
            return {}

    trainer.strategies["spy"] = Spy()
    curve = trainer.run().curve[0]["terms"]
    assert curve["task"] == pytest.approx(0.5 * F.cross_entropy(seen["logits"], seen["labels"]).item(), abs=1e-6)
    p, q = (seen["teacher"] / 2).softmax(-1), (seen["logits"] / 2).softmax(-1)
    assert curve["distill/kl"] == pytest.approx(0.5 * 4 * (p * (p / q).log()).sum(-1).mean().item(), abs=1e-6)


# --- schedules, rates, freezing ---------------------------------------------------------------------------------------

SPECIFIC = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 4},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "cosine_with_restarts": {"num_cycles": 2},
}


def schedule_names() -> list[str]:
    from transformers import SchedulerType

    return [s.value for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy")]


@pytest.mark.parametrize("name", schedule_names())
def test_every_schedule_is_transformers(name):
    """Step by step the rate that transformers' scheduler gives, asked for in any order."""
    from transformers import get_scheduler

    training = Training(
        lr_scheduler_type=name, lr_scheduler_kwargs=SPECIFIC.get(name), warmup_ratio=0.21, learning_rate=1e-3
    )
    factor = optimizer.schedule(training, 12)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name, sgd, 3, 12, scheduler_specific_kwargs=SPECIFIC.get(name))
    expected = []
    for _ in range(12):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        theirs.step()
    for step in reversed(range(12)):
        assert 1e-3 * factor(step) == pytest.approx(expected[step], rel=1e-9, abs=1e-15)


def test_unknown_schedules_are_refused():
    with pytest.raises(RecipeError, match="cosine"):
        optimizer.schedule(Training(lr_scheduler_type="cosin"), 10)
    with pytest.raises(RecipeError, match="reduce_lr_on_plateau"):
        optimizer.schedule(Training(lr_scheduler_type="reduce_lr_on_plateau"), 10)


def test_layer_decay_and_head_scale_are_the_rates_of_the_groups(tmp_path):
    trainer = make_trainer(
        tmp_path,
        strategies={"finetune": {"layer_decay": 0.5, "head_scale": 3.0}},
        max_steps=2,
        lr_scheduler_type="constant",
    )
    trainer.run()
    rates = {name: group["lr"] for group in trainer.optimizer.param_groups for name in group["names"]}
    assert rates["model.classifier.weight"] == pytest.approx(3e-2)
    layers = trainer.task.layers(trainer.bundle.model)
    for i, layer in enumerate(reversed(layers)):
        assert all(rates[f"model.{name}"] == pytest.approx(1e-2 * 0.5 ** (i + 1)) for name in layer)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(rates) == len(trainer.trainable)


def test_a_rate_of_zero_equals_freezing(tmp_path):
    """No step, no decay, no moments, no part in the norm that is clipped."""
    zero = make_trainer(
        tmp_path / "zero", strategies={"finetune": {"head_scale": 0.0}}, weight_decay=0.5, max_grad_norm=0.1
    )
    frozen = train(
        tmp_path / "frozen", strategies={"finetune": {"freeze": ["classifier.*"]}}, weight_decay=0.5, max_grad_norm=0.1
    )
    after = weights(zero.run())
    assert identical(after, weights(frozen))
    assert torch.equal(after["classifier.weight"], initial()["classifier.weight"])
    assert not any("classifier" in zero.names[id(p)] for p in zero.optimizer.state)


class Unfreeze(Strategy):
    def lr_scale(self, name):
        return self.ramp if "classifier" not in name else 1.0

    def ramp(self, progress):
        return float(progress >= 0.5)


def test_rates_may_be_functions_of_progress(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, strategies={"unfreeze": Unfreeze(), "recorder": recorder}, weight_decay=0.5)
    trainer.run()
    name = next(n for n in initial() if "attention" in n and n.endswith("weight"))
    assert torch.equal(recorder.history[2][name], initial()[name])
    assert not torch.equal(recorder.history[3][name], initial()[name])
    counts = {trainer.names[id(p)]: int(s["step"]) for p, s in trainer.optimizer.state.items()}
    assert counts[f"model.{name}"] == 3 and counts["model.classifier.weight"] == 6
    assert len(trainer.optimizer.param_groups) == 4, "one group for each rate and decay, not one for each parameter"


@pytest.mark.parametrize(
    "settings", [{"freeze": ["*embeddings*", "classifier.bias"]}, {"freeze_layers": 2}, {"linear_probe": True}]
)
def test_frozen_weights_are_bit_identical(settings, tmp_path):
    trainer = make_trainer(
        tmp_path, "text", {"finetune": settings}, weight_decay=0.5, model=helpers.config("text", **helpers.DROPOUT)
    )
    after, before = weights(trainer.run()), initial("text")
    trained = {trainer.names[id(p)].removeprefix("model.") for p in trainer.trainable}
    assert trained and any(n not in trained for n in before)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in trained), name
    if "linear_probe" in settings:
        assert trained == {"classifier.weight", "classifier.bias"}


def test_nothing_trainable_and_patterns_without_match_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="nothing is trainable"):
        train(tmp_path, strategies={"finetune": {"freeze": ["*"]}})
    with pytest.raises(RecipeError, match="matches no parameter"):
        train(tmp_path, strategies={"finetune": {"freeze": ["clasifier"]}})
    with pytest.raises(RecipeError, match="lora"):
        train(tmp_path, strategies={"lora": {"target_modules": ["nonsense"]}})


def test_frozen_batch_statistics_stand_still(tmp_path):
    before = initial("resnet")
    statistics = [n for n in before if "running" in n or "num_batches" in n]
    moving = weights(train(tmp_path / "a", "resnet", model=helpers.config("resnet")))
    assert statistics and not any(torch.equal(before[n], moving[n]) for n in statistics)
    for strategies in (
        {"lora": {"r": 2}},
        {"finetune": {"linear_probe": True}},
        {"finetune": {"freeze": ["resnet.*"]}},
    ):
        trainer = make_trainer(
            tmp_path / next(iter(strategies)), "resnet", strategies, model=helpers.config("resnet"), eval_steps=2
        )
        after = weights(trainer.run())
        assert all(torch.equal(before[n], after[n]) for n in statistics)
        assert len(trainer.evaluations) == 3, "an evaluation in between must not wake them"
        assert distance(before, after) > 1e-3
    lora = make_trainer(tmp_path / "lora_conv", "resnet", {"lora": {"r": 2}}, model=helpers.config("resnet"))
    lora.run()
    assert any("convolution" in n and "lora_B" in n for n in lora.names.values())


# --- best model, early stopping, checkpoints --------------------------------------------------------------------------


class Scripted(ImageClassification):
    """Validation accuracy by script."""

    def __init__(self, script):
        self.script = list(script)

    def measure(self, predictions, loaded, info):
        return Scores({"accuracy": self.script.pop(0), "loss": 1.0})


def scripted(tmp_path, script, **training):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        strategies={"finetune": {}, "recorder": recorder},
        task=Scripted(script),
        info=helpers.image_info(),
        eval_steps=1,
        **training,
    )
    return trainer, recorder, trainer.run()


def test_the_best_model_is_exported(tmp_path):
    _, recorder, result = scripted(
        tmp_path, [0.1, 0.2, 0.9, 0.3, 0.9, 0.1], load_best_model_at_end=True, save_total_limit=1
    )
    assert result.best_step == 3, "the first of equals"
    assert identical(weights(result), recorder.history[2])
    _, recorder, result = scripted(
        tmp_path / "low", [0.5, 0.2, 0.9, 0.3, 0.2, 0.3], load_best_model_at_end=True, greater_is_better=False
    )
    assert result.best_step == 2 and identical(weights(result), recorder.history[1])
    _, recorder, result = scripted(tmp_path / "last", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], load_best_model_at_end=True)
    assert result.best_step == 6 and identical(weights(result), recorder.history[5])


def test_early_stopping_waits_for_its_patience(tmp_path):
    _, recorder, result = scripted(tmp_path, [0.5, 0.4, 0.6, 0.5, 0.6, 0.7], early_stopping_patience=2)
    assert len(recorder.history) == 5 and result.cost["optimizer_steps"] == 5
    assert [e["step"] for e in result.evaluations] == [1, 2, 3, 4, 5]
    assert result.curve[-1]["step"] == 5
    _, recorder, result = scripted(
        tmp_path / "best", [0.5, 0.4, 0.6, 0.5, 0.6, 0.7], early_stopping_patience=2, load_best_model_at_end=True
    )
    assert result.best_step == 3 and identical(weights(result), recorder.history[2])


def test_choosing_without_anything_to_choose_on_is_refused(tmp_path):
    info = helpers.image_info()
    del info.splits["validation"]
    with pytest.raises(RecipeError, match="validation"):
        train(tmp_path, task=ImageClassification(), info=info, load_best_model_at_end=True)
    with pytest.raises(RecipeError, match="eval_steps"):
        check_stack({}, Training(early_stopping_patience=1, eval_steps=0), ImageClassification(), "stage")
    with pytest.raises(RecipeError, match="metric 'acuracy'"):  # before anything is loaded
        check_stack({}, Training(metric_for_best_model="acuracy"), ImageClassification(), "stage")
    check_stack({}, Training(metric_for_best_model="f1"), ImageClassification(metrics=["f1"]), "stage")
    with pytest.raises(RecipeError, match="metric 'acuracy'"):
        train(tmp_path, load_best_model_at_end=True, metric_for_best_model="acuracy", eval_steps=2)


def test_save_total_limit_keeps_the_newest_and_the_best(tmp_path):
    scripted(
        tmp_path,
        [0.1, 0.9, 0.3, 0.1, 0.2, 0.1, 0.1, 0.1],
        load_best_model_at_end=True,
        save_steps=1,
        save_total_limit=2,
        max_steps=8,
    )
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step-000002", "step-000006", "step-000007"]
    train(tmp_path / "plain", save_steps=2, save_total_limit=1)
    assert [p.name for p in checkpoint.steps(tmp_path / "plain" / "checkpoints")] == ["step-000004"]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (999999, 1000000, 20):
        checkpoint.save(tmp_path, step, {"x": torch.zeros(1)}, {"step": step}, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-000020", "step-999999", "step-1000000"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found[1]["step"] == 1000000


def test_evaluation_does_not_change_training(tmp_path):
    often = train(tmp_path / "often", "text", model=helpers.config("text", **helpers.DROPOUT), eval_steps=1)
    never = train(tmp_path / "never", "text", model=helpers.config("text", **helpers.DROPOUT))
    assert identical(weights(often), weights(never)) and len(often.evaluations) == 6


# --- memory savers, numerics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "saver",
    [
        {"gradient_checkpointing": True},
        {"forward_chunk_size": 3},
        {"gradient_checkpointing": True, "forward_chunk_size": 1},
    ],
)
@pytest.mark.parametrize(("kind", "names"), [("text", "finetune"), ("image", "lora+distill+ema")])
def test_memory_savers_give_the_same_weights(saver, kind, names, tmp_path):
    strategies = stack(tmp_path, names, kind)
    plain = train(tmp_path / "plain", kind, strategies, **SGD)
    recorder = Recorder()
    saving = train(tmp_path / "saving", kind, {**strategies, "recorder": recorder}, **SGD, **saver)
    assert distance(weights(plain), weights(saving)) < 1e-6
    assert distance(weights(plain), initial(kind)) > 1e-3
    assert not recorder.without_gradient


def test_every_adapter_gets_a_gradient_under_gradient_checkpointing(tmp_path):
    recorder = Recorder()
    train(tmp_path, "text", {"lora": {"r": 2}, "recorder": recorder}, gradient_checkpointing=True, max_steps=2)
    before, after = recorder.history[0], recorder.history[1]
    adapters = [n for n in after if "lora_B" in n]
    assert len(adapters) >= 12 and not recorder.without_gradient
    assert all(
        after[n].abs().sum() > 0 and not torch.equal(before[n], after[n]) for n in adapters if "key.lora" not in n
    )


def test_gradient_checkpointing_is_refused_where_a_model_cannot(tmp_path):
    trainer = make_trainer(tmp_path, gradient_checkpointing=True)
    type(trainer.loaded.model).supports_gradient_checkpointing, before = (
        False,
        type(trainer.loaded.model).supports_gradient_checkpointing,
    )
    try:
        with pytest.raises(RecipeError, match="gradient_checkpointing"):
            trainer.run()
    finally:
        type(trainer.loaded.model).supports_gradient_checkpointing = before


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing(smoothing, tmp_path):
    class Spy(Strategy):
        def loss(self, step):
            seen.append(F.cross_entropy(step.outputs.logits, step.batch["labels"], label_smoothing=smoothing).item())
            return {}

    seen: list[float] = []
    curve = train(
        tmp_path, strategies={"finetune": {}, "spy": Spy()}, label_smoothing_factor=smoothing, max_steps=2
    ).curve
    assert [point["loss"] for point in curve] == pytest.approx(seen, abs=1e-6)


class Breaks(Strategy):
    """A loss that is not finite from the given step on."""

    def __init__(self, at, constant=False):
        super().__init__()
        self.at, self.constant = at, constant

    def loss(self, step):
        factor = math.nan if step.step >= self.at and not self.constant else 0.0
        total = step.outputs.logits.sum() * factor
        return {"broken": step.once(total + math.inf if step.step >= self.at and self.constant else total)}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("logging", [1, 4])
def test_non_finite_losses_stop_the_run(optim, logging, tmp_path):
    trainer = make_trainer(
        tmp_path, strategies={"finetune": {}, "breaks": Breaks(3)}, save_steps=1, optim=optim, logging_steps=logging
    )
    with pytest.raises(NonFiniteError, match=r"step 4 .*broken.*rows") as caught:
        trainer.run()
    assert caught.value.exit_code == 7
    order = np.random.default_rng([42, 0]).permutation(26)[12:16]
    assert f"rows {', '.join(str(trainer.info.splits['train']['index'][int(i)]) for i in order)}" in caught.value.cause
    assert "step-000003" in caught.value.remedy
    assert checkpoint.steps(tmp_path / "checkpoints")[-1].name == "step-000003"
    assert all(torch.isfinite(p).all() for p in trainer.bundle.parameters()), "the bad update must not have been made"


def test_an_infinite_loss_with_finite_gradients_stops_the_run_too(tmp_path):
    with pytest.raises(NonFiniteError, match="step 3"):
        train(
            tmp_path, strategies={"finetune": {}, "breaks": Breaks(2, constant=True)}, save_steps=1, logging_steps=100
        )
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step-000001", "step-000002"]


def test_bf16_trains_float32_weights(tmp_path):
    half, full = train(tmp_path / "half", "text", bf16=True, eval_steps=3), train(tmp_path / "full", "text")
    assert all(math.isfinite(point["loss"]) for point in half.curve)
    assert {t.dtype for n, t in weights(half).items() if t.is_floating_point()} == {torch.float32}
    assert half.curve[0]["loss"] != full.curve[0]["loss"]
    assert half.curve[0]["loss"] == pytest.approx(full.curve[0]["loss"], rel=0.02)


# --- data -------------------------------------------------------------------------------------------------------------

AUGMENT = [{"RandomRotation": {"degrees": 30}}, "RandomHorizontalFlip"]


def test_loader_workers_change_nothing(tmp_path):
    runs = [train(tmp_path / str(n), data={"augment": AUGMENT}, dataloader_num_workers=n) for n in (0, 2)]
    assert identical(weights(runs[0]), weights(runs[1])) and runs[0].curve == runs[1].curve
    assert not identical(weights(runs[0]), weights(train(tmp_path / "without")))


class Deadly(ImageClassification):
    """Kills the process that preprocesses, if that is a loader's worker."""

    random_rows = True

    def preprocess(self, rows, loaded, train, augment=None):
        if torch.utils.data.get_worker_info() is not None:
            os._exit(3)
        return super().preprocess(rows, loaded, train, augment)


def test_a_dead_worker_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match="worker died") as caught:
        train(tmp_path, task=Deadly(), info=helpers.image_info(), dataloader_num_workers=1)
    assert caught.value.exit_code == 6


class Indices(Strategy):
    """Notes the rows of every micro-batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def loss(self, step):
        self.seen.append(
            {"train": step.batch["index"].tolist(), **{k: b["index"].tolist() for k, b in step.streams.items()}}
        )
        return {}


def test_an_epoch_holds_every_row_once(tmp_path):
    indices = Indices()
    train(tmp_path, strategies={"finetune": {}, "indices": indices}, max_steps=14, gradient_accumulation_steps=1)
    rows = [seen["train"] for seen in indices.seen]
    assert (
        sorted(i for batch in rows[:7] for i in batch)
        == sorted(i for batch in rows[7:] for i in batch)
        == list(range(26))
    )
    assert rows[:7] != rows[7:] and [len(batch) for batch in rows[:7]] == [4] * 6 + [2]


# --- hooks ------------------------------------------------------------------------------------------------------------


class TwoViews(Strategy):
    """A consistency loss between two augmented copies of the training rows, and rows of another data set."""

    adds_objective = True

    def streams(self):
        return {"view": Stream("train", views=2, augment=AUGMENT), "other": Stream("unlabelled", ratio=0.5)}

    def loss(self, step):
        a, b = step.forward("view.0").logits, step.forward("view.1").logits
        other = step.forward("other").logits
        seen = {
            "different": (step.streams["view.0"]["pixel_values"] != step.streams["view.1"]["pixel_values"])
            .any()
            .float()
        }
        return {
            "consistency": step.mean((a - b).pow(2).sum(-1), stream="view.0"),
            "entropy": step.mean(-(other.softmax(-1) * other.log_softmax(-1)).sum(-1), stream="other"),
            "different": seen["different"],
        }


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_extra_streams(micro_batches, tmp_path):
    """8 rows of `train` and 4 of `other` in a step, the same sums in one or two micro-batches."""
    other = helpers.image_info(13, seed=5)
    indices = Indices()
    run = {
        "strategies": {"finetune": {}, "views": TwoViews(), "indices": indices},
        "streams": lambda name: {"unlabelled": other}[name],
        "max_steps": 4,
        **SGD,
    }
    result = train(
        tmp_path, per_device_train_batch_size=8 // micro_batches, gradient_accumulation_steps=micro_batches, **run
    )
    assert {"task", "views/consistency", "views/entropy", "views/different"} == set(result.curve[0]["terms"])
    assert result.curve[0]["terms"]["views/different"] == micro_batches
    for seen in indices.seen:
        assert seen["view.0"] == seen["view.1"] == seen["train"] and len(seen["other"]) == 4 // micro_batches
    reference = train(
        tmp_path / "reference",
        per_device_train_batch_size=8,
        **{**run, "strategies": {"finetune": {}, "views": TwoViews()}},
    )
    assert distance(weights(result), weights(reference)) < 1e-6


def test_two_strategies_may_share_a_stream_but_not_its_name(tmp_path):
    class Other(Strategy):
        def streams(self):
            return {"view": Stream("train")}

    with pytest.raises(RecipeError, match="'views' and 'other'"):
        train(tmp_path, strategies={"views": TwoViews(), "other": Other()}, streams=lambda name: helpers.image_info(13))


class Balanced(Strategy):
    """Batches of one row of each class."""

    @staticmethod
    def batches(data, batch_size, seed, epoch):
        labels = np.asarray(data["label"])
        random = np.random.default_rng([seed, epoch])
        return [[int(random.choice(np.flatnonzero(labels == c))) for c in range(3)] for _ in range(4)]


def test_batches_decides_the_rows(tmp_path):
    indices = Indices()
    trainer = make_trainer(tmp_path, strategies={"balanced": Balanced(), "indices": indices}, max_steps=6)
    labels = np.asarray(trainer.info.splits["train"]["label"])
    result = trainer.run()
    assert all(labels[seen["train"]].tolist() == [0, 1, 2] for seen in indices.seen) and len(indices.seen) == 6
    expected = [b for epoch in (0, 1) for b in Balanced.batches({"label": labels}, 4, 42, epoch)][:6]
    assert [seen["train"] for seen in indices.seen] == expected
    assert len(result.curve) == 6


def test_batches_of_changing_number_are_refused(tmp_path):
    class Moody(Strategy):
        @staticmethod
        def batches(data, batch_size, seed, epoch):
            return [[0, 1]] * (2 + epoch)

    with pytest.raises(RecipeError, match="2 batches in epoch 0 and 3 in epoch 1"):
        train(tmp_path, strategies={"moody": Moody()})


class PlainBackward(Strategy):
    """What the trainer does by itself, written as a hook."""

    def __init__(self, times=1):
        super().__init__()
        self.times = times

    def backward(self, compute, micro_batches, run):
        for i in range(micro_batches):
            (compute(i) * self.times).backward()


def test_backward_replaces_the_trainers(tmp_path):
    common = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, **SGD}
    plain = train(tmp_path / "plain", **common)
    assert identical(weights(plain), weights(train(tmp_path / "hook", strategies={"hook": PlainBackward()}, **common)))
    assert not identical(
        weights(plain), weights(train(tmp_path / "double", strategies={"hook": PlainBackward(2)}, **common))
    )


class Darken(Strategy):
    """Multiplies the pixels by a random factor, less and less."""

    def batch(self, batch, model, progress):
        assert model.training
        factor = 1 - torch.rand(()) * np.random.random() * (1 - progress)
        return {**batch, "pixel_values": batch["pixel_values"] * factor}


def test_batch_changes_what_the_model_sees_and_is_drawn_from_the_position(tmp_path):
    a, b = (train(tmp_path / x, strategies={"finetune": {}, "darken": Darken()}) for x in "ab")
    assert identical(weights(a), weights(b))
    assert not identical(weights(a), weights(train(tmp_path / "c")))
    assert identical(
        weights(a),
        weights(train(tmp_path / "d", strategies={"finetune": {}, "indices": Indices(), "darken": Darken()})),
    )


def test_two_passes_over_the_same_rows_draw_dropout_twice(tmp_path):
    class Twice(Strategy):
        def loss(self, step):
            same.append(torch.equal(step.encode(step.batch).logits, step.encode(step.batch).logits))
            return {}

    same: list[bool] = []
    train(
        tmp_path,
        "text",
        {"finetune": {}, "twice": Twice()},
        model=helpers.config("text", **helpers.DROPOUT),
        max_steps=2,
    )
    assert same == [False, False]


def test_a_loss_that_reaches_no_weight_is_refused(tmp_path):
    class Constant(Strategy):
        adds_objective = True

        def task_weight(self, progress):
            return 0.0

        def loss(self, step):
            return {"one": torch.ones(())}

    with pytest.raises(RecipeError, match="no term of the loss"):
        train(tmp_path, strategies={"constant": Constant()})


def test_what_a_launcher_sets_is_not_applied_twice_or_silently(tmp_path):
    plain = weights(train(tmp_path / "plain"))
    trainer = make_trainer(tmp_path / "env")
    trainer.accelerator.gradient_accumulation_steps = 4
    assert identical(plain, weights(trainer.run()))
    trainer = make_trainer(tmp_path / "fp16")
    trainer.accelerator.state._mixed_precision, before = "fp16", trainer.accelerator.state._mixed_precision
    try:
        with pytest.raises(RecipeError, match="fp16"):
            trainer.run()
    finally:
        trainer.accelerator.state._mixed_precision = before
