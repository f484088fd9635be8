"""The loop itself: it does not wait for the device, decides there what to do with bad numbers, and says where time
goes."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import helpers
import pytest
import torch
from helpers import identical, make_trainer, train, weights

from kt_hf import Strategy, checkpoint, registry
from kt_hf.errors import RecipeError
from kt_hf.notes import Notes
from kt_hf.testing import waits
from kt_hf.testing.bench import Bench
from kt_hf.trainer import Trainer

WAITS = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "cpu", "numpy")


@contextmanager
def watched(monkeypatch, step_of):
    """Records every call that would wait for a device, with the step in which it was made."""
    calls: list[tuple[int, str]] = []

    def wrap(name, real):
        def call(self, *args, **kwargs):
            calls.append((step_of(), name))
            return real(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, wrap(name, getattr(torch.Tensor, name)), raising=False)
        yield calls


class Counter(Strategy):
    """Tells the test in which step the loop is."""

    def __init__(self):
        super().__init__()
        self.now = 0

    def after_step(self, model, progress):
        self.now += 1


@pytest.mark.parametrize("names", ["finetune", "finetune+ema", "lora+distill+ema"])
@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}, {"optim": "sgd"}])
def test_nothing_waits_for_the_device_between_log_points(names, extra, tmp_path, monkeypatch):
    teacher = helpers.teacher(tmp_path / "teacher", "image") if "distill" in names else ""
    counter = Counter()
    strategies = {**helpers.stack(names, teacher), "counter": counter}
    trainer = make_trainer(tmp_path / "run", "image", strategies, max_steps=6, logging_steps=4, **extra)
    with watched(monkeypatch, lambda: counter.now) as calls:
        trainer.run()
    between = sorted({(step, name) for step, name in calls if step in (1, 2, 3, 5)})
    assert not between, f"waited in steps {between}"
    assert any(step == 4 for step, _ in calls), "the log point must read, or the watch sees nothing"


def test_the_watch_sees_what_an_optimizer_without_a_device_decision_does(tmp_path, monkeypatch):
    counter = Counter()
    trainer = make_trainer(tmp_path, strategies={"finetune": {}, "c": counter}, logging_steps=4, optim="adamw_torch")
    with watched(monkeypatch, lambda: counter.now) as calls:
        trainer.run()
    assert any(step in (1, 2) for step, _ in calls)


# What a step does beside the models' own forward is watched, operation by operation.
STACKS = [
    ("text-generation", "distill+ema", {}),
    ("text-generation", "finetune", {"packing": True}),
    ("text-generation", "lora", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}),
    ("fill-mask", "distill", {"forward_chunk_size": 2}),
    ("text2text-generation", "distill", {}),
    ("token-classification", "distill+balance", {}),
    ("image-segmentation", "distill+balance", {}),
    ("image-text-matching", "finetune", {}),
    ("question-answering", "distill", {"forward_chunk_size": 2}),
    ("zero-shot-image-classification", "contrastive", {}),
]


def waits_of_steps(folder, task, names, monkeypatch, **training):
    """What waits in the steps after the first, within any task and strategies."""
    bench, found = Bench(task, folder), []
    step = Trainer.step

    def watched_step(self, number, *args):
        frozen = [model for _, model in self.run_facts.all_frozen()]
        with waits.watching(self.bundle.model, *frozen) as watch:
            step(self, number, *args)
        found.extend(watch.found if number else [])

    settings = {"distill": {"teacher": bench.saved("teacher")}} if "distill" in names else {}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", watched_step)
        stack = {n: registry.load("strategy", n)(**settings.get(n, {})) for n in names.split("+")}
        bench.train(stack, folder / "run", **training)
    return sorted({wait.name for wait in found})


@pytest.mark.parametrize(("task", "names", "extra"), STACKS, ids=["-".join([t, n, *x]) for t, n, x in STACKS])
def test_no_task_waits_for_the_device(task, names, extra, tmp_path, monkeypatch):
    assert waits_of_steps(tmp_path, task, names, monkeypatch, **extra) == []


def test_an_optimizer_that_looks_is_seen_to_wait(tmp_path, monkeypatch):
    found = waits_of_steps(tmp_path, "image-classification", "finetune", monkeypatch, optim="adamw_torch")
    assert "_local_scalar_dense" in found


# --- numbers that are not finite --------------------------------------------------------------------------------------


class Spoils(Strategy):
    """Makes the loss of one step NaN, and the batch of that step with it."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def batch(self, batch, model, progress):
        if round(progress * 6) == self.at:
            return {**batch, "pixel_values": batch["pixel_values"] * math.nan}
        return batch


@pytest.mark.parametrize("kind", ["image", "resnet"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
def test_a_skipped_step_changes_nothing(kind, optim, tmp_path, caplog, monkeypatch):
    """Weights, moments and batch statistics after step 3, which is bad, are those after step 2."""
    monkeypatch.setattr(logging.getLogger("kt_hf"), "propagate", True)
    common = {"model": helpers.config(kind), "optim": optim, "non_finite": "skip", "save_steps": 1}
    spoilt = make_trainer(tmp_path, kind, {"finetune": {}, "spoils": Spoils(2)}, save_total_limit=9, **common)
    with caplog.at_level(logging.WARNING, "kt_hf"):
        result = spoilt.run()
    assert result.cost["skipped_steps"] == 1 and "1 steps were not finite and were skipped" in caplog.text
    states = []
    for step in (2, 3, 4):
        path = tmp_path / "checkpoints" / f"step-{step:06d}"
        manifest = checkpoint.verify(path)
        assert manifest["step"] == step
        from safetensors.torch import load_file

        states.append(load_file(path / "state.safetensors"))
    assert identical(states[0], states[1]) and not identical(states[1], states[2])
    assert all(torch.isfinite(t).all() for t in weights(result).values())
    assert [math.isfinite(point["loss"]) for point in result.curve] == [True] * 6


def test_skips_are_resumed(tmp_path):
    def build(folder, extra=None):
        strategies = {"finetune": {}, "spoils": Spoils(1), **(extra or {})}
        return make_trainer(tmp_path / folder, strategies=strategies, non_finite="skip", save_steps=3, logging_steps=5)

    from test_resume import Stop, Stopped

    with pytest.raises(Stopped):
        build("b", {"stop": Stop(4)}).run()
    a, b = build("a").run(), build("b").run()
    assert identical(weights(a), weights(b)) and a.curve == b.curve
    assert a.cost["skipped_steps"] == b.cost["skipped_steps"] == 1


def test_notes_keep_the_first_bad_step_and_its_terms():
    notes = Notes(torch.device("cpu"))
    fine, nan = torch.tensor(1.0), torch.tensor(math.nan)
    for step, (a, norm) in enumerate([(fine, fine), (nan, fine), (fine, fine), (nan, nan)]):
        notes.add({"a": a, "b": fine}, a + fine)
        assert float(notes.close(step, norm)) == (step > 0)
    assert notes.first_bad() == (1, ["a", "loss"])


def test_terms_may_come_and_go_in_mid_run():
    notes = Notes(torch.device("cpu"))
    one = torch.tensor(1.0)
    for terms in ({"a": one}, {"b": one}, {"a": one, "b": 3 * one}):
        notes.add(terms, one)
        notes.close(0, one)
    assert notes.means(2) == {"a": 1.0, "b": 2.0, "loss": 1.5} and notes.means(1)["loss"] == 0.0


# --- precision, compilation, memory format ----------------------------------------------------------------------------


def test_fp16_trains_float32_weights_with_a_scale(tmp_path):
    trainer = make_trainer(tmp_path / "half", "text", fp16=True)
    half, full = trainer.run(), train(tmp_path / "full", "text")
    assert {t.dtype for t in weights(half).values() if t.is_floating_point()} == {torch.float32}
    assert half.curve[0]["loss"] != full.curve[0]["loss"]
    assert half.curve[-1]["loss"] == pytest.approx(full.curve[-1]["loss"], rel=0.05)
    assert trainer.scaler.get_scale() > 1


def test_fp16_resumes_its_scale(tmp_path):
    from test_resume import Stop, Stopped

    def build(folder, extra=None):
        strategies = {"finetune": {}, **(extra or {})}
        trainer = make_trainer(tmp_path / folder, "text", strategies, fp16=True, save_steps=2)
        return trainer

    with pytest.raises(Stopped):
        build("b", {"stop": Stop(5)}).run()
    a, b = build("a"), build("b")
    assert identical(weights(a.run()), weights(b.run())) and a.scaler.state_dict() == b.scaler.state_dict()


def test_fp16_excludes_bf16(tmp_path):
    from kt_hf.trainer import check_stack

    trainer = make_trainer(tmp_path, fp16=True, bf16=True)
    with pytest.raises(RecipeError, match="fp16 and bf16 exclude each other"):
        check_stack(trainer.strategies, trainer.training, trainer.task, "stages.a")


def test_channels_last_gives_the_same_weights(tmp_path):
    settings = {"model": helpers.config("resnet"), "optim": "sgd"}
    trainer = make_trainer(tmp_path / "last", "resnet", channels_last=True, **settings)
    result = trainer.run()
    convolutions = [p for p in trainer.bundle.parameters() if p.dim() == 4 and min(p.shape) > 1]
    assert convolutions and all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    plain = train(tmp_path / "first", "resnet", **settings)
    assert helpers.distance(weights(result), weights(plain)) < 1e-4


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_weights(tmp_path):
    """With SGD: Adam divides rounding errors by themselves where gradients are tiny."""
    compiled = make_trainer(tmp_path / "compiled", torch_compile=True, optim="sgd")
    result = compiled.run()
    assert compiled.bundle.model._compiled_call_impl is not None
    assert helpers.distance(weights(result), weights(train(tmp_path / "plain", optim="sgd"))) < 1e-5


# --- where time goes --------------------------------------------------------------------------------------------------


def test_shares_of_time_add_up_and_traces_name_phases_and_strategies(tmp_path):
    teacher = helpers.teacher(tmp_path / "teacher", "image")
    strategies = helpers.stack("finetune+distill", teacher)
    result = train(tmp_path / "run", strategies=strategies, profile_steps=2, save_steps=2, eval_steps=3)
    phases = result.cost["phases"]
    assert sum(phases.values()) == pytest.approx(1.0, abs=1e-6)
    assert all(phases[name] > 0 for name in ("data", "forward", "backward", "optimizer", "evaluation", "saving"))
    names = {event.get("name") for event in json.loads((tmp_path / "run/logs/trace.json").read_text())["traceEvents"]}
    assert {"kt_hf.forward", "kt_hf.backward", "kt_hf.optimizer", "kt_hf.distill.loss"} <= names
    assert {"kt_hf.distill.after_step", "kt_hf.data"} <= names


_LISTENER = r"""
#include <stdio.h>
#include <stdlib.h>
typedef void (*function)(void);
typedef struct { size_t size; int (*get)(int module, function ***table, unsigned *size); } callbacks;
static FILE *out;
static int push(const char *name) { fprintf(out, "%s\n", name); fflush(out); return 0; }
static int pop(void) { fprintf(out, "-\n"); fflush(out); return 0; }
int InitializeInjectionNvtx2(const void *(*exported)(unsigned)) {
    const callbacks *found = exported(1);
    function **table;
    unsigned size;
    out = fopen(getenv("NVTX_LOG"), "w");
    if (!out || !found || !found->get(1, &table, &size) || size < 12) return 0;
    *table[9] = (function) push;
    *table[11] = (function) pop;
    return 1;
}
"""
"""What Nsight does to hear of ranges, in small: a library that NVTX loads because the environment names it."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler to build a listener with")
@pytest.mark.skipif(not hasattr(torch._C, "_nvtx"), reason="this build of PyTorch has no NVTX")
def test_a_tool_of_nvidia_hears_of_phases_and_strategies(tmp_path):
    (tmp_path / "listener.c").write_text(_LISTENER)
    library = tmp_path / "listener.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "listener.c"], check=True)
    code = "import sys, helpers; helpers.train(sys.argv[1], strategies={'ema': {}}, save_steps=2)"
    environment = {**os.environ, "NVTX_LOG": str(tmp_path / "ranges"), "NVTX_INJECTION64_PATH": str(library)}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(command, env=environment, cwd=Path(__file__).parent, check=True, timeout=300)
    ranges = (tmp_path / "ranges").read_text().splitlines()
    assert {"data", "forward", "backward", "optimizer", "saving", "ema.after_step"} <= set(ranges)
    assert ranges.count("-") == len(ranges) / 2, "every range is closed"
    assert ranges[ranges.index("optimizer") + 1] == "ema.after_step", "strategies' ranges lie within the phases'"


def test_a_training_is_called_by_its_stage():
    from pathlib import Path

    from kt_hf.progress import title

    names = {
        "out/student": "student",
        "out/student/seeds/2": "student seed 2",
        "out/student/trials/2-of-6": "student trial 2 of 6",
        "out/student/seeds/1/trials/1-of-3": "student seed 1 trial 1 of 3",
    }
    assert {path: title(Path(path)) for path in names} == names
