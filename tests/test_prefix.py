"""Outputs of frozen layers, kept from one epoch to the next: the same training, without running these layers."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import helpers
import numpy as np
import pytest
import test_two_ranks
import torch
from helpers import config, distance, identical, make_trainer, weights
from kt_hf_plugins.text_generation import TextGeneration
from safetensors.torch import load_file

from kt_hf import Model, Strategy, prefix_file
from kt_hf.errors import RecipeError
from kt_hf.trainer import Result, Trainer

HERE = Path(__file__).parent
STEPS = 17
"""An epoch of 26 rows in batches of 4 has 7 steps, the last of them with 2 rows; so this ends within the third."""
PROBE, HALF = {"finetune": {"linear_probe": True}}, {"finetune": {"freeze_layers": 2}}
DROPOUT_ABOVE = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets" / "kt_hf_frozen"


@pytest.fixture(autouse=True)
def said() -> Iterator[list[str]]:
    """What is logged, whatever other tests did to the loggers above."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("kt_hf.prefix", "kt_hf.prefix_file")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def generation(train: int = 26) -> dict[str, Any]:
    """What `make_trainer` needs for a tiny Llama with a head of its own."""
    info = helpers.text_info(train)
    splits = {name: rows.remove_columns("label") for name, rows in info.splits.items()}
    info = dataclasses.replace(info, splits=splits, roles={"text": "text"}, labels=None)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    model = Model(config="llama", config_overrides=sizes, processor_overrides={"vocab_size": 300})
    return {"kind": "text", "task": TextGeneration(max_length=32), "info": info, "model": model}


def case(name: str) -> dict[str, Any]:
    kind, _, what = name.partition(" ")
    given = generation() if kind == "llama" else {"kind": {"bert": "text", "vit": "image"}.get(kind, kind)}
    if kind == "resnet":
        given["model"] = config("resnet")
    if "dropout" in what:
        given["model"] = config(given["kind"], **DROPOUT_ABOVE)
    return {**given, "strategies": PROBE if what.startswith("probe") else HALF}


def build(folder: Path, cached: Any, given: dict[str, Any], **more: Any) -> Trainer:
    """adam_epsilon: above the rounding noise, or Adam makes whole steps of gradients that are 0 but for that (those of
    key biases)."""
    return make_trainer(folder, **{"max_steps": STEPS, "cache_frozen": cached, "adam_epsilon": 1e-4, **given, **more})


def both(tmp_path: Path, given: dict[str, Any], **more: Any) -> tuple[Result, Result]:
    """The same training without and with the cache."""
    return tuple(build(tmp_path / str(c), c, given, **more).run() for c in (False, True))  # type: ignore[return-value]


def agree(a: Result, b: Result, tolerance: float = 1e-6) -> None:
    assert distance(weights(a), weights(b)) <= tolerance
    for key in ("loss", "learning_rate"):
        np.testing.assert_allclose([p[key] for p in a.curve], [p[key] for p in b.curve], rtol=tolerance)


def count_calls(trainer: Trainer, kinds: tuple[str, ...]) -> dict[str, int]:
    """How often modules of these classes really compute."""
    calls = dict.fromkeys(kinds, 0)
    for module in trainer.loaded.model.modules():
        name = type(module).__name__
        if name in kinds:
            original = module.forward

            def counted(*args, name=name, original=original, **kwargs):
                calls[name] += 1
                return original(*args, **kwargs)

            module.forward = counted
    return calls


# --- equality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "bert probe",
        "bert half",
        "bert half dropout",
        "bert probe dropout",
        "vit probe",
        "vit half",
        "vit half dropout",
        "llama half",
        "resnet probe",
        "resnet half",
    ],
)
def test_the_same_result_as_without_the_cache(name, tmp_path, cache):
    without, cached = both(tmp_path, case(name))
    agree(without, cached)
    assert len(list(cache.glob("*.bin"))) == 1
    start = helpers.distance(weights(without), weights(build(tmp_path / "0", False, case(name), max_steps=1).run()))
    assert start > 1e-3, "training has to change something for this to mean anything"


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_frozen_layers_run_no_more_once_their_outputs_are_kept(kind, tmp_path):
    classes = {"bert": ("BertEmbeddings", "BertLayer"), "vit": ("ViTEmbeddings", "ViTLayer")}[kind]
    calls = {}
    for steps in (14, 140):
        trainer = build(tmp_path / str(steps), True, case(f"{kind} probe"), max_steps=steps, logging_steps=50)
        count = count_calls(trainer, classes)
        trainer.run()
        calls[steps] = count
    assert all(0 < calls[140][name] <= calls[14][name] for name in classes)  # the second finds the file of the first


def test_without_the_cache_they_run_in_every_step(tmp_path):
    trainer = build(tmp_path, False, case("bert probe"))
    calls = count_calls(trainer, ("BertEmbeddings",))
    trainer.run()
    assert calls == {"BertEmbeddings": STEPS}


def test_a_second_training_finds_the_file(tmp_path, cache):
    build(tmp_path / "a", True, case("bert half"), seed=1, model=None).run()
    files = {p: p.read_bytes() for p in cache.glob("*.bin")}
    trainer = build(tmp_path / "b", True, case("bert half"), seed=1, learning_rate=3e-3)
    calls = count_calls(trainer, ("BertEmbeddings",))
    trainer.run()
    assert {p: p.read_bytes() for p in cache.glob("*.bin")} == files
    assert calls["BertEmbeddings"] < 7  # it is watched and compared, but not run over all rows


def test_only_the_first_token_is_kept_for_a_head_that_reads_it(tmp_path, cache):
    build(tmp_path, True, case("vit probe")).run()
    (file,) = cache.glob("*.bin")
    assert file.stat().st_size == -(-26 * 16 * 4 // 64) * 64  # rows x width x float32; 5 tokens a row are in the model


def test_rows_are_kept_without_padding(tmp_path, cache):
    trainer = build(tmp_path, True, case("bert half"))
    trainer.run()
    rows = trainer.feed.sources["train"].rows
    tokens = sum(len(row["input_ids"]) for row in rows.__getitems__([(0, i) for i in range(26)]))
    (file,) = cache.glob("*.bin")
    assert file.stat().st_size <= tokens * 16 * 4 + 27 * 8 + 128


def test_accumulation_evaluation_and_averages(tmp_path):
    given = {**case("bert half dropout"), "strategies": {**HALF, "ema": {"decay": 0.8}}}
    more = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "eval_steps": 5}
    without, cached = both(tmp_path, given, **more)
    agree(without, cached)
    assert without.evaluations == cached.evaluations and without.evaluations


class SecondPass(Strategy):
    """Runs the model again: on the batch, and on a changed one that has the same rows."""

    adds_objective = True

    def loss(self, step):
        again = step.encode(step.batch).logits
        other = step.encode({**step.batch, "input_ids": step.batch["input_ids"].flip(1)}).logits
        return {"again": step.mean(again.pow(2).sum(-1)), "other": step.mean(other.pow(2).sum(-1))}


def test_other_inputs_are_not_taken_for_the_rows_that_they_came_from(tmp_path):
    given = case("bert half dropout")
    given["strategies"] = {**HALF, "second": SecondPass()}
    agree(*both(tmp_path, given))


# --- where it would be wrong ----------------------------------------------------------------------------------------


class Changes(Strategy):
    def batch(self, batch, model, progress):
        return {**batch, "pixel_values": batch["pixel_values"] * 2}


class Asks(Strategy):
    forward_kwargs = {"output_hidden_states": True}


class Standardizes(Strategy):
    """Frozen layers that see the mean over the batch."""

    def setup(self, model, run):
        embeddings = model.vit.embeddings
        forward = embeddings.forward

        def standardized(*args, **kwargs):
            found = forward(*args, **kwargs)
            return found - found.mean(0, keepdim=True)

        embeddings.forward = standardized
        return model


class Listens(Strategy):
    def ready(self, model, run):
        model.vit.layers[0].register_forward_hook(lambda *_: None)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "augmentation": ({"data": {"augment": [{"RandomRotation": {"degrees": 30}}]}}, "augmentation"),
    "batch hook": ({"strategies": {**HALF, "changes": Changes()}}, "'changes' changes batches"),
    "hidden states": ({"strategies": {**HALF, "asks": Asks()}}, "output_hidden_states"),
    "chunks": ({"forward_chunk_size": 2}, "forward_chunk_size"),
    "checkpointing": ({"gradient_checkpointing": True}, "gradient_checkpointing"),
    "hooks": ({"strategies": {**HALF, "listens": Listens()}}, "somebody else listens"),
    "one epoch": ({"max_steps": 13}, "fewer than two epochs"),
    "too large": ({"cache_frozen_limit": 1e-6}, "the limit is 1e-06"),
    "batch statistics": ({"strategies": {**HALF, "standard": Standardizes()}}, "other rows of a batch"),
    "embeddings alone": ({"kind": "text", "strategies": {"finetune": {"freeze_layers": 1}}}, "frozen"),
    "dropout": ({"kind": "gpt2"}, "are random (in train mode: transformer.drop"),
}


def refused(name: str) -> dict[str, Any]:
    given, _ = REFUSED[name]
    if given.get("kind") != "gpt2":
        return {**case("vit half"), **given}
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64, "tie_word_embeddings": False}
    found = generation()
    found["model"] = Model(config="gpt2", config_overrides=sizes, processor_overrides={"vocab_size": 300})
    return {**found, "strategies": HALF}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_would_be_wrong_it_is_off_and_says_why(name, tmp_path, said, cache):
    reason = REFUSED[name][1]
    without, auto = (build(tmp_path / str(c), c, refused(name)).run() for c in (False, "auto"))
    assert identical(weights(without), weights(auto)) and without.curve == auto.curve
    assert any("computed in every epoch" in line and reason in line for line in said), said
    assert not list(cache.glob("*.bin"))
    with pytest.raises(RecipeError, match=r"training\.cache_frozen") as error:
        build(tmp_path / "t", True, refused(name)).run()
    assert reason in error.value.cause and error.value.remedy


@pytest.mark.parametrize("strategies", [{"finetune": {}}])
def test_nothing_is_said_or_kept_where_no_layer_is_frozen(strategies, tmp_path, said, cache):
    build(tmp_path, "auto", {"kind": "image", "strategies": strategies}).run()
    assert not said and not cache.exists()


def test_a_step_that_is_not_the_same_switches_it_off(tmp_path, said, monkeypatch):
    """Values for the wrong rows: the comparison of the first step has to see it."""
    original = prefix_file.write

    def wrong(file, layout, number, rows, values):
        original(file, layout, number, rows, -values)

    monkeypatch.setattr(prefix_file, "write", wrong)
    without, auto = (build(tmp_path / str(c), c, case("vit half")).run() for c in (False, "auto"))
    assert identical(weights(without), weights(auto))
    assert any("not the same as one without" in line for line in said)


class Moves(Strategy):
    """Changes a frozen weight in mid-run."""

    def after_step(self, model, progress):
        with torch.no_grad():
            next(p for p in model.vit.layers[0].parameters()).add_(1.0)


def test_frozen_weights_that_move_are_an_error(tmp_path):
    given = {**case("vit half"), "strategies": {**HALF, "moves": Moves()}}
    with pytest.raises(RecipeError, match="stale"):
        build(tmp_path, "auto", given).run()


# --- stale and damaged files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"model": config("image", hidden_act="relu")},
        {"seed": 7},
        {"info": helpers.image_info(seed=1), "task": helpers.task_and_info("image")[0]},
        {
            "model": Model(
                config="vit", config_overrides=helpers.VIT, processor_overrides={"image_mean": [0.1, 0.2, 0.3]}
            )
        },
    ],
    ids=["config", "weights", "data", "preprocessing"],
)
def test_what_the_outputs_depend_on_makes_another_file(change, tmp_path, cache):
    build(tmp_path / "a", True, case("vit half")).run()
    without, cached = both(tmp_path, case("vit half"), **change)
    agree(without, cached)
    assert len(list(cache.glob("*.bin"))) == 2


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-64]),
    "gone": lambda path: path.unlink(),
    "manifest": lambda path: path.with_suffix(".json").write_text("[]"),
    "no manifest": lambda path: path.with_suffix(".json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(damage, tmp_path, cache, said):
    first = build(tmp_path / "a", True, case("bert half")).run()
    (file,) = cache.glob("*.bin")
    good = file.read_bytes()
    DAMAGES[damage](file)
    again = build(tmp_path / "b", True, case("bert half")).run()
    assert file.read_bytes() == good and identical(weights(first), weights(again))
    assert damage == "no manifest" or any("are not used, but computed again" in line for line in said)


def test_what_was_not_used_for_longest_makes_room(tmp_path, cache):
    build(tmp_path / "a", True, case("vit half")).run()
    (first,) = cache.glob("*.bin")
    limit = first.stat().st_size * 1.5 / 1e9
    build(tmp_path / "b", True, case("vit half"), seed=7, cache_frozen_limit=limit).run()
    (second,) = cache.glob("*.bin")
    assert second != first and len(list(cache.iterdir())) == 2


# --- resuming and ranks ---------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


class Stop(Strategy):
    def __init__(self, step: int):
        super().__init__()
        self.left = step

    def after_step(self, model, progress):
        self.left -= 1
        if self.left == 0:
            raise Stopped


@pytest.mark.parametrize("lost", [False, True], ids=["file kept", "file lost"])
@pytest.mark.parametrize("name", ["bert half dropout", "vit probe"])
def test_resumed_in_mid_epoch_equals_uninterrupted(name, lost, tmp_path, cache):
    more = {"save_steps": 4, "logging_steps": 3}
    whole = build(tmp_path / "a", True, case(name), **more).run()
    given = case(name)
    with pytest.raises(Stopped):
        build(tmp_path / "b", True, {**given, "strategies": {**given["strategies"], "stop": Stop(11)}}, **more).run()
    if lost:
        for file in cache.iterdir():
            file.unlink()
    trainer = build(tmp_path / "b", True, given, **more)
    resumed = trainer.run()
    assert trainer.bundle.prefix is not None
    assert identical(weights(whole), weights(resumed)) and whole.curve == resumed.curve


@pytest.mark.slow
def test_two_ranks_equal_one_and_share_the_file(tmp_path):
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    for folder in (one, two):
        folder.mkdir()
    script = str(HERE / "prefix_child.py")
    test_two_ranks.launch([sys.executable, script, str(one), str(tmp_path / "other"), "4"])
    command = test_two_ranks.torchrun([str(two), str(cache), "2"])
    command[command.index(str(HERE / "rank_cases.py"))] = script
    test_two_ranks.launch(command)
    said = [json.loads((folder / "said.json").read_text()) for folder in (one, two)]
    assert all(any("computed once" in line for line in lines) for lines in said), said
    found = [load_file(folder / "weights.safetensors") for folder in (one, two)]
    assert distance(*found) < 1e-5
    files = [next((folder / "kt_hf_frozen").glob("*.bin")) for folder in (tmp_path / "other", cache)]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()
