"""A run that was stopped goes on bit for bit, from the newest checkpoint that is intact."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from helpers import identical, make_trainer, weights

from kt_hf import Strategy, checkpoint, elastic
from kt_hf.errors import IntegrityError, RecipeError, ResourceError
from kt_hf.recipe import Training
from kt_hf.trainer import Trainer

HERE = Path(__file__).parent
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 11,
    "save_steps": 3,
    "eval_steps": 4,
    "logging_steps": 5,
}
"""An epoch has 7 steps: checkpoints 3 and 6 lie within the first, 9 in the second; none is where a point of the
curve is."""


class Stopped(Exception):
    pass


class Stop(Strategy):
    """Raises after the update of the n-th step of this process."""

    def __init__(self, step: int):
        super().__init__()
        self.left = step

    def after_step(self, model, progress):
        self.left -= 1
        if self.left == 0:
            raise Stopped


def trainer(folder: Path, kind: str, names: str, teacher: str, extra: dict | None = None, **training) -> Trainer:
    """With dropout, augmentation and accumulation."""
    strategies = {**helpers.stack(names, teacher), **(extra or {})}
    data = {"augment": [{"RandomRotation": {"degrees": 30}}]} if kind == "image" else {}
    return make_trainer(
        folder, kind, strategies, model=helpers.config(kind, **helpers.DROPOUT), data=data, **{**SETTINGS, **training}
    )


def state(finished: Trainer) -> dict[str, torch.Tensor]:
    """The optimizer's state and everything that the bundle registered."""
    from kt_hf import optimizer

    moments = optimizer.state_tensors(finished.optimizer, finished.names)
    return {k: v.clone() for k, v in {**moments, **finished.bundle.state_dict()}.items()}


def stopped(folder: Path, kind: str, names: str, teacher: str, step: int, **training) -> None:
    with pytest.raises(Stopped):
        trainer(folder, kind, names, teacher, {"stop": Stop(step)}, **training).run()


def compare(a: Trainer, b: Trainer) -> None:
    """Run both to the end; all they leave is equal."""
    first, second = a.run(), b.run()
    assert first.curve == second.curve and first.evaluations == second.evaluations
    assert first.best_step == second.best_step
    assert identical(weights(first), weights(second))
    if "lora" not in a.strategies:  # merged away by the export
        assert identical(state(a), state(b))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    return {kind: helpers.teacher(tmp_path_factory.mktemp(kind), kind) for kind in ("image", "text")}


@pytest.mark.parametrize("names", helpers.CASES)
def test_resumed_equals_uninterrupted(names, teachers, tmp_path):
    stopped(tmp_path / "b", "image", names, teachers["image"], 8)
    assert [p.name for p in checkpoint.steps(tmp_path / "b" / "checkpoints")] == ["step-000003", "step-000006"]
    again = trainer(tmp_path / "b", "image", names, teachers["image"])
    compare(trainer(tmp_path / "a", "image", names, teachers["image"]), again)
    assert again.curve[0]["step"] == 5


def test_resumed_contrastive_equals_uninterrupted(tmp_path):
    pytest.importorskip("kt_hf_plugins.contrastive")
    common = {"per_device_train_batch_size": 4, "max_steps": 8, "save_steps": 3, "logging_steps": 2}

    def build(folder, extra=None):
        case = helpers.contrastive_case()
        case["strategies"] |= {"ema": {"decay": 0.8}} | (extra or {})
        return make_trainer(tmp_path / folder, "pairs", **case, **common)

    with pytest.raises(Stopped):
        build("b", {"stop": Stop(5)}).run()
    compare(build("a"), build("b"))


def test_a_killed_process_is_continued_by_another(teachers, tmp_path):
    """SIGKILL in the middle of the second epoch, in a process of its own."""
    command = [sys.executable, str(HERE / "resume_child.py"), str(tmp_path / "b"), teachers["text"], "10"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr
    found = checkpoint.newest(tmp_path / "b" / "checkpoints")
    assert found is not None and found[1]["step"] == 9
    compare(*(trainer(tmp_path / x, "text", "lora+distill+ema", teachers["text"]) for x in "ab"))


def test_several_resumes_in_one_epoch(teachers, tmp_path):
    for steps in (3, 2, 2, 2):
        stopped(tmp_path / "b", "text", "finetune+ema", teachers["text"], steps, save_steps=1)
    compare(*(trainer(tmp_path / x, "text", "finetune+ema", teachers["text"], save_steps=1) for x in "ab"))


@pytest.mark.parametrize(
    "optim", [{"optim": "adamw_torch"}, {"optim": "sgd", "momentum": 0.9}, {"optim": "sgd"}, {"optim": "adafactor"}]
)
def test_every_optimizer_resumes(optim, teachers, tmp_path):
    stopped(tmp_path / "b", "text", "finetune", teachers["text"], 8, **optim)
    compare(*(trainer(tmp_path / x, "text", "finetune", teachers["text"], **optim) for x in "ab"))


def test_best_model_and_patience_are_resumed(teachers, tmp_path):
    settings = {
        "load_best_model_at_end": True,
        "early_stopping_patience": 5,
        "eval_steps": 1,
        "max_steps": 14,
        "save_total_limit": 1,
    }
    stopped(tmp_path / "b", "image", "finetune+ema", teachers["image"], 4, **settings)
    whole = trainer(tmp_path / "a", "image", "finetune+ema", teachers["image"], **settings)
    compare(whole, trainer(tmp_path / "b", "image", "finetune+ema", teachers["image"], **settings))
    assert whole.best["step"] < whole.stop_at, "the best must not be the last"


def test_batch_statistics_are_resumed(tmp_path):
    def build(folder, extra=None):
        return make_trainer(
            tmp_path / folder,
            "resnet",
            {"finetune": {}, "ema": {"decay": 0.5}, **(extra or {})},
            model=helpers.config("resnet"),
            save_steps=2,
        )

    with pytest.raises(Stopped):
        build("b", {"stop": Stop(5)}).run()
    compare(build("a"), build("b"))


def test_workers_may_change_between_the_parts(teachers, tmp_path):
    stopped(tmp_path / "b", "image", "finetune", teachers["image"], 8, dataloader_num_workers=2)
    compare(*(trainer(tmp_path / x, "image", "finetune", teachers["image"]) for x in "ab"))


# --- checkpoints that are not intact ----------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped weights": lambda p: flip(p / "state.safetensors"),
    "truncated weights": lambda p: os.truncate(p / "state.safetensors", 1000),
    "flipped facts": lambda p: flip(p / "trainer.json"),
    "no weights": lambda p: (p / "state.safetensors").unlink(),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "an empty manifest": lambda p: (p / "manifest.json").write_text(json.dumps({"files": {}})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, teachers, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("kt_hf"), "propagate", True)
    stopped(tmp_path / "b", "text", "finetune", teachers["text"], 8)
    DAMAGE[damage](tmp_path / "b" / "checkpoints" / "step-000006")
    with caplog.at_level(logging.WARNING, "kt_hf"):
        result = trainer(tmp_path / "b", "text", "finetune", teachers["text"]).run()
    assert any("skipping checkpoint step-000006" in r.getMessage() for r in caplog.records)
    assert any("resumed at step 3" in r.getMessage() for r in caplog.records)
    assert identical(weights(result), weights(trainer(tmp_path / "a", "text", "finetune", teachers["text"]).run()))


def test_a_damaged_best_checkpoint_is_not_exported(teachers, tmp_path):
    settings = {"load_best_model_at_end": True, "eval_steps": 1}

    class Damage(Strategy):
        done: set[Path] = set()

        def eval_model(self, model):
            for path in set(checkpoint.steps(tmp_path / "checkpoints")) - self.done:
                flip(path / "state.safetensors")
                self.done.add(path)
            return model

    with pytest.raises(IntegrityError, match="sha256"):
        trainer(tmp_path, "image", "finetune", teachers["image"], {"damage": Damage()}, **settings).run()


class Crash(BaseException):
    """As sudden as a kill: no handler of ours catches it."""


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_write_leaves_an_intact_checkpoint(keep, tmp_path, monkeypatch):
    """Crashes at every call to the file system during a save; the old or the new checkpoint is whole."""
    real = {name: getattr(os, name) for name in ("fsync", "rename", "unlink", "rmdir")}
    calls = 0

    def save(folder, step):
        checkpoint.save(folder, step, {"x": torch.full((100,), float(step))}, {"step": step}, keep)

    def crashing(name, at):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                raise Crash
            return real[name](*args, **kwargs)

        return call

    at = 0
    while True:
        at, calls, folder = at + 1, 0, tmp_path / f"{keep}-{at}"
        for step in (1, 2):
            save(folder, step)
        for name in real:
            monkeypatch.setattr(os, name, crashing(name, at))
        try:
            save(folder, 3)
            break
        except Crash:
            pass
        finally:
            for name in real:
                monkeypatch.setattr(os, name, real[name])
        path, facts, _ = checkpoint.newest(folder)
        tensor = torch.zeros(100)
        checkpoint.load_into(path, {"x": tensor})
        assert facts["step"] in (2, 3) and torch.equal(tensor, torch.full((100,), float(facts["step"])))
        save(folder, 3)
        assert checkpoint.newest(folder)[1]["step"] == 3
    assert at > 6


def test_a_full_disk_is_a_resource_error_and_loses_nothing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": torch.ones(3)}, {"step": 1}, keep=1)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="disk is full") as caught:
            checkpoint.save(tmp_path, 2, {"x": torch.ones(3)}, {"step": 2}, keep=1)
    assert caught.value.exit_code == 6
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"] and checkpoint.newest(tmp_path)[1]["step"] == 1


def test_checkpoints_hold_tensors_and_json_only(teachers, tmp_path):
    trainer(tmp_path, "image", "lora+distill+ema", teachers["image"]).run()
    path, facts, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state.safetensors", "trainer.json"]
    from safetensors.torch import load_file

    tensors = load_file(path / "state.safetensors")
    assert any(n.startswith("optim/model.") for n in tensors) and any(
        n.startswith("strategies.ema.average.") for n in tensors
    )
    assert not any("generator" in n or "rng" in n for n in [*tensors, *facts])


def test_what_killed_saves_have_left_is_removed_by_the_next(tmp_path):
    for name in (".step-000001.partial", ".step-000001.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_text("half")
    checkpoint.save(tmp_path, 2, {"x": torch.ones(3)}, {"step": 2}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("shipped", [None, {"max_length": 7}])
def test_the_exported_tokenizer_does_not_depend_on_what_was_in_the_cache(shipped):
    """A fast tokenizer keeps what it was last called with, and writes it to its file."""
    from kt_hf import loading

    tokenizer = loading.train_tokenizer(helpers.WORDS)
    if shipped:
        tokenizer.backend_tokenizer.enable_truncation(**shipped)
        tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer.backend_tokenizer.to_str()
    assert len(loading.encode(tokenizer, "word1 " * 9, max_length=4)["input_ids"]) == 4
    assert tokenizer.backend_tokenizer.to_str() == before


# --- resuming something else ------------------------------------------------------------------------------------------


def test_changed_data_labels_or_batch_are_refused(teachers, tmp_path):
    stopped(tmp_path, "image", "finetune", teachers["image"], 8)

    def again(**changes):
        return trainer(tmp_path, "image", "finetune", teachers["image"], **changes)

    other = again()
    other.info.fingerprint = "other"
    with pytest.raises(RecipeError, match="data have changed"):
        other.run()
    other = again()
    other.loaded.labels = ["dog", "cat", "owl"]
    with pytest.raises(RecipeError, match="labels were"):
        other.run()
    with pytest.raises(RecipeError, match=r"a step took 4 rows, now it is 8 .*\n.*= 4"):
        again(per_device_train_batch_size=4).run()
    again(per_device_train_batch_size=1, gradient_accumulation_steps=4).run()


def test_other_strategies_cannot_take_over_a_checkpoint(teachers, tmp_path):
    stopped(tmp_path, "image", "finetune", teachers["image"], 8)
    with pytest.raises(IntegrityError, match=r"lacks .*ema"):
        trainer(tmp_path, "image", "finetune+ema", teachers["image"]).run()


def test_another_number_of_processes_shares_the_same_batches(teachers, tmp_path):
    stopped(tmp_path, "image", "finetune", teachers["image"], 8)
    found = next(tmp_path.rglob("checkpoints"))
    given = Training(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert elastic.fit(given, 1, found) is given and elastic.fit(given, 3, tmp_path / "nothing") is given
    two, four = (elastic.fit(given, world, found) for world in (2, 4))
    assert (two.per_device_train_batch_size, two.gradient_accumulation_steps) == (2, 1)
    assert (four.per_device_train_batch_size, four.gradient_accumulation_steps) == (1, 1)
    small = Training(per_device_train_batch_size=1)
    assert elastic.fit(small, 2, found).gradient_accumulation_steps == 2, "no more at a time than the recipe says"
    assert elastic.fit(small, 2, found, whole_batch=True).per_device_train_batch_size == 2
    with pytest.raises(RecipeError, match=r"which 3 cannot share equally\n.*1, 2, 4$"):
        elastic.fit(given, 3, found)
