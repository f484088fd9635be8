"""Strategies compose: each one counts, neutral ones do not, and stacks that cannot be right are refused."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from helpers import distance, identical, initial, make_trainer, train, weights
from kt_hf_plugins.distill import Distill
from kt_hf_plugins.image_classification import ImageClassification

from kt_hf import Strategy, checkpoint
from kt_hf.errors import RecipeError
from kt_hf.recipe import Model, Training
from kt_hf.trainer import check_stack


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return helpers.teacher(tmp_path_factory.mktemp("teacher"))


def full_stack(teacher: str, decay: float = 0.8) -> dict:
    return {"lora": {"r": 4}, "distill": {"teacher": teacher, "alpha": 0.5}, "ema": {"decay": decay, "warmup": False}}


class Recorder(Strategy):
    """The trained weights before the first and after every step."""

    def ready(self, model, run):
        self.history = [self.snapshot(model)]

    def after_step(self, model, progress):
        self.history.append(self.snapshot(model))

    @staticmethod
    def snapshot(model):
        return {n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad}


# --- LoRA + distill + EMA ---------------------------------------------------------------------------------------------


def test_removing_any_one_of_the_stack_changes_the_result(teacher, tmp_path):
    whole = weights(train(tmp_path / "whole", strategies=full_stack(teacher)))
    for name in ("lora", "distill", "ema"):
        rest = {n: s for n, s in full_stack(teacher).items() if n != name}
        other = weights(train(tmp_path / name, strategies=rest))
        assert distance(whole, other) > 1e-3, f"'{name}' did nothing"


def test_all_of_the_stack_is_in_the_result(teacher, tmp_path):
    trainer = make_trainer(tmp_path, strategies=full_stack(teacher))
    result = trainer.run()
    assert set(result.curve[0]["terms"]) == {"task", "distill/kl"}
    trained = [trainer.names[id(p)] for p in trainer.trainable]
    assert trained and all("lora" in n or "classifier" in n for n in trained)
    assert weights(result).keys() == initial().keys(), "adapters are merged, nothing of them is left"


@pytest.mark.parametrize("names", ["finetune+ema", "lora+distill+ema"])
def test_ema_equals_its_closed_form(names, teacher, tmp_path):
    """decay^n theta_0 + (1 - decay) sum_i decay^(n - i) theta_i for every trained weight."""
    decay, recorder = 0.7, Recorder()
    strategies = {n: {**full_stack(teacher, decay), "finetune": {}}[n] for n in names.split("+")}
    trainer = make_trainer(tmp_path, strategies={**strategies, "recorder": recorder}, max_steps=7)
    average = {}
    trainer.strategies["keep"] = keep = Keep()
    trainer.run()
    average = keep.average
    theta, n = recorder.history, 7
    for name in theta[0]:
        expected = decay**n * theta[0][name] + (1 - decay) * sum(
            decay ** (n - i) * theta[i][name] for i in range(1, n + 1)
        )
        torch.testing.assert_close(average[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert (theta[n][name] - expected).abs().max() > 1e-5 or "key" in name, (
            "the average must differ from the last weights"
        )


class Keep(Strategy):
    """What `eval_model` of those before has made, when it is exported."""

    def eval_model(self, model):
        self.average = {n: p.detach().clone() for n, p in model.named_parameters()}
        return model


def test_ema_with_warmup_equals_the_recursion(tmp_path):
    recorder, keep = Recorder(), Keep()
    train(
        tmp_path, strategies={"finetune": {}, "ema": {"decay": 0.9, "warmup": True}, "recorder": recorder, "keep": keep}
    )
    for name, average in recorder.history[0].items():
        for t, current in enumerate(recorder.history[1:], 1):
            decay = min(0.9, (1 + t) / (10 + t))
            average = decay * average + (1 - decay) * current[name]
        torch.testing.assert_close(keep.average[name].double(), average, rtol=1e-5, atol=1e-6)


def test_ema_is_what_is_evaluated_and_does_not_leak_into_training(tmp_path):
    """Evaluating the average at every step leaves the raw weights as without any average."""
    with_ema, without = Recorder(), Recorder()
    train(tmp_path / "a", strategies={"finetune": {}, "ema": {"decay": 0.5}, "r": with_ema}, eval_steps=1)
    train(tmp_path / "b", strategies={"finetune": {}, "r": without})
    assert all(torch.equal(a[n], b[n]) for a, b in zip(with_ema.history, without.history, strict=True) for n in a)


def test_ema_copies_batch_statistics(tmp_path):
    plain = weights(train(tmp_path / "a", "resnet", model=helpers.config("resnet")))
    averaged = weights(
        train(tmp_path / "b", "resnet", {"finetune": {}, "ema": {"decay": 0.5}}, model=helpers.config("resnet"))
    )
    for name in plain:
        assert torch.equal(plain[name], averaged[name]) == ("running" in name or "num_batches" in name), name


# --- neutral settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "text"])
def test_neutral_settings_equal_absence_bit_for_bit(kind, teacher, tmp_path):
    model = helpers.config(kind, **helpers.DROPOUT)
    data = {"augment": ["RandomHorizontalFlip"]} if kind == "image" else {}
    common = {"model": model, "data": data, "gradient_accumulation_steps": 2}
    plain = train(tmp_path / "plain", kind, {"finetune": {}}, **common)
    for i, extra in enumerate([{"distill": {"teacher": teacher, "alpha": 0.0}}, {"ema": {"decay": 0.0}}]):
        assert identical(weights(plain), weights(train(tmp_path / str(i), kind, {"finetune": {}, **extra}, **common)))
    both = {"ema": {"decay": 0.0}, "distill": {"teacher": "nowhere", "alpha": 0.0}, "finetune": {}}
    result = train(tmp_path / "both", kind, both, **common)
    assert identical(weights(plain), weights(result)) and plain.curve == result.curve
    assert not identical(
        weights(plain), weights(train(tmp_path / "other", kind, {"finetune": {}}, **{**common, "seed": 43}))
    )


def test_weight_of_a_term_scales_smoothly_to_absence(teacher, tmp_path):
    """alpha -> 0: what is drawn for dropout does not depend on who else is in the stack."""
    model = helpers.config("image", **helpers.DROPOUT)
    sgd = {"optim": "sgd", "learning_rate": 0.1, "model": model}
    plain = weights(train(tmp_path / "plain", **sgd))
    nearly = weights(train(tmp_path / "nearly", strategies={"distill": {"teacher": teacher, "alpha": 1e-6}}, **sgd))
    assert 0 < distance(plain, nearly) < 1e-4


# --- refused stacks ---------------------------------------------------------------------------------------------------


class Rows(Strategy):
    @staticmethod
    def batches(data, batch_size, seed, epoch):
        return [[0, 1]]


class Back(Strategy):
    def backward(self, compute, micro_batches, run):
        compute(0).backward()


class Whole(Strategy):
    scope = "batch"


def test_two_exclusive_hooks_are_refused_naming_both():
    task = ImageClassification()
    for hook, cls in (("batches", Rows), ("backward", Back)):
        with pytest.raises(RecipeError, match=f"'first' and 'second' both decide the {hook}"):
            check_stack({"first": cls(), "between": Whole(), "second": cls()}, Training(), task, "stages.x")
    check_stack({"first": Rows(), "second": Back()}, Training(), task, "stages.x")


def test_batch_scope_with_accumulation_is_refused_naming_both():
    with pytest.raises(RecipeError, match="'whole' and gradient_accumulation_steps=4"):
        check_stack({"whole": Whole()}, Training(gradient_accumulation_steps=4), ImageClassification(), "stages.x")
    check_stack({"whole": Whole()}, Training(), ImageClassification(), "stages.x")


def test_a_task_without_a_loss_needs_an_objective():
    class Silent(ImageClassification):
        has_loss = False

    with pytest.raises(RecipeError, match="no strategy"):
        check_stack({"whole": Whole()}, Training(), Silent(), "stages.x")
    check_stack({"distill": Distill(teacher="x")}, Training(), Silent(), "stages.x")


def test_conflicting_forward_kwargs_are_refused_naming_both(tmp_path):
    class Wants(Strategy):
        def __init__(self, value):
            super().__init__()
            self.forward_kwargs = {"output_hidden_states": value}

    with pytest.raises(RecipeError, match="'yes' asks the model for output_hidden_states=True, 'no' for False"):
        train(tmp_path, strategies={"yes": Wants(True), "no": Wants(False)})
    assert train(tmp_path, strategies={"yes": Wants(True), "also": Wants(True)}, max_steps=1).curve


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_a_teacher_with_another_order_of_labels_is_matched_by_name(tmp_path):
    """The same teacher, its classes and the rows of its head permuted, teaches the same."""
    order = [2, 0, 1]
    straight = helpers.teacher(tmp_path / "straight")
    task, info = helpers.task_and_info("image")
    loaded = task.load(Model(path=straight), info)
    with torch.no_grad():
        for tensor in (loaded.model.classifier.weight, loaded.model.classifier.bias):
            tensor.copy_(tensor[order].clone())
    names = [helpers.LABELS[i] for i in order]
    loaded.model.config.id2label, loaded.model.config.label2id = (
        dict(enumerate(names)),
        {n: i for i, n in enumerate(names)},
    )
    task.save(loaded, tmp_path / "turned")
    results = [
        train(tmp_path / f"run-{n}", strategies={"distill": {"teacher": str(tmp_path / n)}})
        for n in ("straight", "turned")
    ]
    assert distance(weights(results[0]), weights(results[1])) < 1e-5
    wrong = copy.deepcopy(loaded.model.config)
    wrong.id2label, wrong.label2id = dict(enumerate(helpers.LABELS)), {n: i for i, n in enumerate(helpers.LABELS)}
    loaded.model.config = wrong
    task.save(loaded, tmp_path / "wrong")
    other = train(tmp_path / "run-wrong", strategies={"distill": {"teacher": str(tmp_path / "wrong")}})
    assert distance(weights(results[0]), weights(other)) > 1e-3


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    labels = helpers.teacher(tmp_path / "labels", info=helpers.image_info(labels=["cat", "dog", "emu"]))
    with pytest.raises(RecipeError, match="labels cat, dog, emu"):
        train(tmp_path / "a", strategies={"distill": {"teacher": labels}})

    task, info = helpers.task_and_info("image")
    loaded = task.load(helpers.config("image"), info)
    loaded.processor.image_mean = [0.1, 0.2, 0.3]
    task.save(loaded, tmp_path / "normalisation")
    with pytest.raises(RecipeError, match=r"normalisation.*image_mean"):
        train(tmp_path / "b", strategies={"distill": {"teacher": str(tmp_path / "normalisation")}})

    task, info = helpers.task_and_info("text", seed=3)
    info.splits["train"] = info.splits["train"].map(lambda row: {"text": row["text"].replace("word", "wort")})
    loaded = task.load(helpers.config("text"), info)
    task.save(loaded, tmp_path / "vocabulary")
    with pytest.raises(RecipeError, match="vocabulary"):
        train(tmp_path / "c", "text", {"distill": {"teacher": str(tmp_path / "vocabulary")}})


def test_a_teacher_is_never_trained_saved_or_exported(teacher, tmp_path):
    trainer = make_trainer(
        tmp_path,
        strategies=full_stack(teacher),
        save_steps=2,
        weight_decay=0.5,
        model=helpers.config("image", **helpers.DROPOUT),
    )
    result = trainer.run()
    (frozen,) = trainer.run_facts._frozen.values()
    member = frozen.members[0].model
    task, info = helpers.task_and_info("image")
    before = task.load(Model(path=teacher), info).model.state_dict()
    assert identical(before, member.state_dict())
    assert not member.training and not any(p.requires_grad or p.grad is not None for p in member.parameters())
    theirs = {id(p) for p in member.parameters()}
    assert not theirs & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not theirs & {id(p) for p in trainer.bundle.parameters()}
    assert not theirs & {id(p) for p in result.loaded.model.parameters()}
    sizes = {tuple(t.shape) for t in before.values()} - {tuple(p.shape) for p in trainer.bundle.state_dict().values()}
    path, _, _ = checkpoint.newest(tmp_path / "checkpoints")
    from safetensors.torch import load_file

    saved = load_file(path / "state.safetensors")
    assert sizes and not sizes & {tuple(t.shape) for t in saved.values()}
    assert not any("teacher" in name or "frozen" in name for name in saved)


def test_a_teacher_is_loaded_once_for_all_who_ask(teacher, tmp_path):
    trainer = make_trainer(tmp_path, strategies={"distill": {"teacher": teacher}, "again": Distill(teacher=teacher)})
    trainer.run()
    assert len(trainer.run_facts._frozen) == 1
    assert trainer.strategies["distill"]._frozen is trainer.strategies["again"]._frozen


def test_a_strategy_without_a_word_about_itself_is_called_by_its_class():
    class Silent(Strategy):
        pass

    assert Silent().describe() == "Silent"
