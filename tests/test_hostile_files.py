"""Weights and checkpoints that are torn, lie about themselves or would run code: a clean error, quickly, and nothing
half-loaded."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
import time
from pathlib import Path

import abuse
import helpers
import pytest
import torch
from helpers import identical, make_trainer, weights

from kt_hf import checkpoint
from kt_hf.errors import IntegrityError
from kt_hf.recipe import Model

TASK, INFO = helpers.task_and_info("image")


def load(folder: Path):
    return TASK.load(Model(path=str(folder)), INFO)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(helpers.teacher(tmp_path_factory.mktemp("model")))


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("case", abuse.CASES)
def test_models_that_lie_about_themselves(case, model, tmp_path):
    folder = copy_of(model, tmp_path / "m")
    (folder / "model.safetensors").write_bytes(abuse.CASES[case])
    began = time.monotonic()
    with pytest.raises(IntegrityError) as error:
        load(folder)
    assert str(folder) in error.value.cause and error.value.remedy and time.monotonic() - began < 30


def sharded(model: Path, folder: Path) -> dict:
    """The model in two shards; returns its index."""
    from safetensors.torch import load_file, save_file

    copy_of(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_load(model, tmp_path):
    sharded(model, tmp_path / "m")
    assert identical(load(tmp_path / "m").model.state_dict(), load(model).model.state_dict())


@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "absolute", "up"])
def test_a_shard_that_is_not_there_or_lies_elsewhere_is_named(fault, model, tmp_path):
    folder, second = tmp_path / "m", "model-00002-of-00002.safetensors"
    index = sharded(model, folder)
    path, named = folder / second, second
    if fault == "missing":
        path.unlink()
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        elsewhere = tmp_path / "elsewhere.safetensors"
        path.rename(elsewhere)
        named = str(elsewhere) if fault == "absolute" else "../elsewhere.safetensors"
        index["weight_map"] = {k: named if v == second else v for k, v in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError) as error:
        load(folder)
    assert named in error.value.cause, error.value


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_refused_unopened(model, tmp_path):
    folder = copy_of(model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(IntegrityError):
        load(folder)
    assert not (tmp_path / "canary").exists()


# --- checkpoints ---

SETTINGS = {"max_steps": 4, "save_steps": 2}


def test_a_pickle_beside_a_checkpoint_is_not_opened(tmp_path):
    make_trainer(tmp_path, until=0.75, **SETTINGS).run()
    (step,) = checkpoint.steps(tmp_path / "checkpoints")
    (step / "rng_state.pth").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    resumed = weights(make_trainer(tmp_path, **SETTINGS).run())
    assert identical(resumed, weights(make_trainer(tmp_path / "whole", **SETTINGS).run()))
    assert not (tmp_path / "canary").exists()


def forge(step: Path, content: bytes) -> None:
    """Replace a checkpoint's tensors, and make its manifest agree."""
    (step / "state.safetensors").write_bytes(content)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["state.safetensors"] |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (step / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("case", ["header of 4 GB", "overlapping", "trailing bytes", "deeply nested"])
def test_checkpoints_that_lie_about_themselves(case, tmp_path):
    make_trainer(tmp_path, until=0.75, **SETTINGS).run()
    (step,) = checkpoint.steps(tmp_path / "checkpoints")
    forge(step, abuse.CASES[case])
    with pytest.raises(IntegrityError) as error:
        make_trainer(tmp_path, **SETTINGS).run()
    assert step.name in error.value.cause and error.value.remedy


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_files_changed_at_random_are_read_or_refused(seconds, tmp_path):
    """Random changes of a sound file, of its header above all: an `IntegrityError` or tensors, nothing else."""
    found = {f"t{i}": torch.arange(float(i + 1)) for i in range(4)}
    checkpoint.save(tmp_path, 1, found, {"step": 1}, 1)
    (step,) = checkpoint.steps(tmp_path)
    path = step / "state.safetensors"
    sound, draw = path.read_bytes(), random.Random(seconds)
    header = 8 + struct.unpack("<Q", sound[:8])[0]
    read, refused, end = 0, 0, time.monotonic() + seconds
    while time.monotonic() < end:
        changed = bytearray(sound)
        for _ in range(draw.randint(1, 4)):
            where = draw.randrange(header if draw.random() < 0.9 else len(changed))
            kind = draw.random()
            if kind < 0.6:
                changed[where] = (
                    draw.choice(b'0123456789[]{}":,F3264-\x00\xff') if draw.random() < 0.7 else draw.randrange(256)
                )
            elif kind < 0.8:
                del changed[where : where + draw.randint(1, 9)]
            else:
                changed[where:where] = changed[where : where + draw.randint(1, 9)]
        path.write_bytes(changed)
        try:
            checkpoint.read_tensors(step, set(found))
            read += 1
        except IntegrityError:
            refused += 1
    assert refused > 20 and read + refused > 100
