"""What `--print` foresees: memory against what PyTorch's profiler counts, optimizer states against real ones, and
steps that are timed and leave nothing behind."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path

import helpers
import pytest
import torch
from helpers import BERT, DROPOUT, VIT

from kt_hf import (
    Data,
    Ensemble,
    Merge,
    Model,
    Recipe,
    Train,
    estimate,
    launch,
    nouns,
    optimizer,
    runner,
    settings,
    timing,
)
from kt_hf import recipe as grammar
from kt_hf.errors import Collector
from kt_hf.recipe import Training

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}


def context_of(recipe: Recipe, root: Path) -> runner.Context:
    """A planned recipe."""
    collect = Collector()
    resolved = grammar.resolve(grammar.normalise(recipe), collect)
    grammar.raise_all(resolved, collect)
    context = runner.Context(helpers.accelerator(), root, resolved, grammar.check_plugins(resolved, collect))
    runner.plan(context, collect)
    collect.raise_if_any()
    return context


def texts(folder: Path, count: int = 40) -> Data:
    info = helpers.text_info(train=count)
    for name, rows in info.splits.items():
        named = [{"text": r["text"], "label": helpers.LABELS[r["label"]]} for r in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    return Data(str(folder))


def model(kind: str, **changes) -> Model:
    return Model(config=kind, config_overrides={**(VIT if kind == "vit" else BERT), **WIDE, **changes})


CASES = {
    "vit": ("vit", ["finetune"], {}),
    "bert": ("bert", ["finetune"], {}),
    "dropout": ("bert", ["finetune"], {"optim": "sgd"}),
    "lora, ema": ("vit", ["lora", "ema"], {}),
    "distill": ("vit", ["finetune", {"distill": {"teacher": "@first"}}], {}),
    "accumulation": ("vit", ["finetune"], {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 8}),
    "checkpointing": ("vit", ["finetune"], {"gradient_checkpointing": True}),
    "chunks": ("vit", ["finetune"], {"forward_chunk_size": 8}),
    "bf16": ("vit", ["finetune"], {"bf16": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_profiler_counts(case, tmp_path):
    kind, strategies, training = CASES[case]
    data = Data("digits", "source") if kind == "vit" else texts(tmp_path)
    start = model(kind, **(DROPOUT if case == "dropout" else {}))
    training = {"per_device_train_batch_size": 32, "max_steps": 8, **training}
    stages = [Train("first", strategies=["finetune"]), Train("a", strategies=strategies)]
    recipe = Recipe(data=data, model=start, training=training, stages=stages)
    context = context_of(recipe, tmp_path / "out")
    stage = context.stage("a")
    found = timing.measure(context, stage)
    assert isinstance(found, timing.Timing)
    expected = estimate.memory(context, stage, context.setups["a"], found.largest)
    assert expected.peak == pytest.approx(found.peak, rel=0.05), expected
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", typing.get_args(settings.parameters(nouns.Training)["optim"][0]))
def test_optimizer_state_by_its_kind(kind, momentum):
    training = Training(optim=kind, momentum=momentum if kind == "sgd" else 0.0)
    parameters = [torch.nn.Parameter(torch.ones(*shape)) for shape in ((12, 7), (5,), (3, 4, 5), (2, 3, 4, 5))]
    made = optimizer.build(training, [{"params": parameters}], 1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    states = [v for s in made.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
    assert estimate.optimizer_bytes(parameters, training) == sum(v.numel() * v.element_size() for v in states)


def test_tied_weights_count_once(tmp_path):
    a = torch.nn.Linear(4, 4, bias=False)
    b = torch.nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert estimate.bytes_of([a, b]) == 64


def printed(recipe: Recipe, folder: Path, capsys, *arguments: str) -> str:
    options = launch.parser().parse_intermixed_args([*arguments, "--output-dir", str(folder)])
    assert launch.execute(recipe, options, "r") is None
    return capsys.readouterr().out


def test_print_says_examples_and_memory_and_times_nothing(tmp_path, capsys):
    stage = Train("a", model=model("vit"), training={"num_train_epochs": 2, "per_device_train_batch_size": 16})
    out = printed(Recipe(data=Data("digits", "target"), stages=[stage]), tmp_path / "out", capsys, "--print")
    assert "8 steps of 16 (100 examples, 2 epochs)" in out
    assert re.search(r"memory: about [\d.]+ MB at its height \(weights .*activations .*pixel_values 16 x 3", out)
    assert "timed" not in out


def test_timed_steps_leave_nothing_behind(tmp_path, capsys):
    first = Train("first", model=model("vit"), training={"learning_rate": [1e-3, 1e-4]})
    student = Train("student", model=Model("@first"), seeds=2, strategies=["lora", {"distill": {"teacher": "@soup"}}])
    soup = Merge("soup", "uniform_soup", models=["@first", "@first"])
    recipe = Recipe(data=Data("digits", "target"), training={"max_steps": 20}, stages=[first, soup, student])
    out = printed(recipe, tmp_path / "out", capsys, "--time-steps")
    assert out.count("s a step") == 2 and out.count("measured: ") == 2
    assert "untrained model stood in for @first, @soup" in out
    assert "for 2 of 2 trainings" in out
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_known_is_said(tmp_path, capsys):
    """An ensemble has no shape before it is there."""
    first = Train("first", model=model("vit"))
    pair = Ensemble("pair", "mean", models=["@first", "@first"])
    student = Train("student", model=model("vit"), strategies=[{"distill": {"teacher": "@pair"}}])
    recipe = Recipe(data=Data("digits", "target"), training={"max_steps": 20}, stages=[first, pair, student])
    out = printed(recipe, tmp_path / "out", capsys, "--time-steps")
    assert "activations unknown (" in out
    assert "not timed: the model @pair is not there yet" in out
    assert "for 1 of 2 trainings" in out
