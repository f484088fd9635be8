"""DeepSpeed's ZeRO-3 with two processes (gloo) against one process with the doubled batch, and its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import shard_cases
import test_sharding
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_sharding import BOTH, HERE, OwnBackward, compare, logits, sums

from kt_hf import Strategy, checkpoint, sharding, zero3
from kt_hf.errors import RecipeError
from kt_hf.recipe import Training

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: pip install kt_hf[deepspeed]")

ZERO3 = {
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(HERE / "zero3.json"),  # small weights are released, too
}


def launch(processes: int, folder: Path, teacher: str, *jobs: str) -> None:
    test_sharding.launch(processes, folder, teacher, *jobs, **ZERO3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return helpers.teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def two(teacher, tmp_path_factory) -> Path:
    """What one pair of processes has left of all cases."""
    folder = tmp_path_factory.mktemp("zero3")
    launch(2, folder, teacher, *[f"run:{name}" for name in (*BOTH, "micro1", "micro4")], "stop:saving", "run:full")
    return folder


@pytest.mark.parametrize("name", BOTH)
def test_sharded_equals_one_process(name, two, teacher, tmp_path):
    compare(name, two, teacher, tmp_path)


@pytest.mark.parametrize("name", ["finetune", "lora+distill+ema"])
def test_the_saved_model_is_whole(name, two, teacher, tmp_path):
    shard_cases.run("run", name, tmp_path, teacher, factor=2)
    ours, theirs = logits(tmp_path / "model"), logits(two / name / "model")
    assert (ours - theirs).abs().max() < 1e-5 and ours.std() > 1e-2


def test_an_adapter_is_whole(two, teacher, tmp_path):
    shard_cases.run("run", "adapter", tmp_path, teacher, factor=2)
    ours, theirs = (load_file(f / "model" / "adapter_model.safetensors") for f in (tmp_path, two / "adapter"))
    assert helpers.distance(ours, theirs) < 1e-5 and all(t.abs().max() > 0 for t in theirs.values())


# --- checkpoints


def test_every_process_writes_its_part(two):
    (path,) = (two / "saving" / "checkpoints").glob("step-*")
    checkpoint.verify(path)
    shards = ["shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors"]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *shards, "trainer.json"]
    first, second = (load_file(path / name) for name in shards)
    whole = sharding.saved(path)
    assert set(whole) == set(first) | set(second) and not any("base_layer" in n for n in whole)
    split = [n for n in whole if n in first and n in second]
    assert len(split) > 10 and all(len(first[n]) + len(second[n]) == len(whole[n]) for n in split)


def test_resume_is_exact_on_as_many_processes(two, teacher, tmp_path):
    shutil.copytree(two / "saving", tmp_path / "a" / "saving")
    launch(2, tmp_path / "a", teacher, "go:saving")
    (tmp_path / "b").mkdir()
    launch(2, tmp_path / "b", teacher, "run:saving")
    resumed, at_once = (load_file(tmp_path / folder / "saving.0.safetensors") for folder in "ab")
    assert helpers.identical(resumed, at_once)
    facts = [json.loads((tmp_path / folder / "saving.0.json").read_text()) for folder in "ab"]
    assert facts[0]["curve"] == facts[1]["curve"] and facts[0]["evaluations"] == facts[1]["evaluations"]


@pytest.mark.parametrize(
    ("first", "then"), [("2", "1"), ("1", "2"), ("2", "1 sharded"), ("2 FSDP", "2"), ("2", "2 FSDP")]
)
def test_resume_elsewhere(first, then, two, teacher, tmp_path):
    """On another number of processes, and sharded in another way or not at all."""
    name, folder = "saving", tmp_path / "interrupted"
    folder.mkdir()
    if first == "2":
        shutil.copytree(two / name, folder / name)
    elif first == "1":
        shard_cases.run("stop", name, folder / name, teacher, factor=2)
    else:
        test_sharding.launch(2, folder, teacher, f"stop:{name}")
    assert [p.name for p in checkpoint.steps(folder / name / "checkpoints")] == ["step-000005"]
    if then == "1":
        theirs, facts = shard_cases.run("go", name, folder / name, teacher, factor=2)
    else:
        test_sharding.launch(int(then[0]), folder, teacher, f"go:{name}", **({} if "FSDP" in then else ZERO3))
        theirs = load_file(folder / f"{name}.0.safetensors")
        facts = json.loads((folder / f"{name}.0.json").read_text())
    ours, expected = shard_cases.run("run", name, tmp_path / "uninterrupted", teacher, factor=2)
    assert helpers.distance(ours, theirs) < 1e-5
    assert [p["step"] for p in facts["curve"]] == [p["step"] for p in expected["curve"]]


def test_a_process_that_cannot_write_stops_all(two):
    first, second = (json.loads((two / f"full.{rank}.json").read_text())["error"] for rank in (0, 1))
    assert "another process could not write" in first and "the disk is full" in second
    assert list((two / "full" / "checkpoints").iterdir()) == []


# --- communication


def test_gradients_are_exchanged_once_per_step(two):
    """Four micro-batches reduce as much as one; the weights are gathered for each."""
    assert sums(two / "micro4") == sums(two / "micro1") > 1


# --- refusals and the launch configuration


@pytest.mark.slow
def test_accelerate_launch(teacher, tmp_path):
    """The launch configuration of the recipes."""
    config = HERE.parent / "recipes" / "accelerate" / "deepspeed_zero3_cpu_two_ranks.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [*command, str(HERE / "shard_cases.py"), str(tmp_path), teacher, "run:lora+distill+ema"],
        capture_output=True,
        text=True,
        timeout=400,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compare("lora+distill+ema", tmp_path, teacher, tmp_path / "one")


class AboutWeights(Strategy):
    scope = "weights"

    def loss(self, step):
        return {"norm": step.once(sum(p.pow(2).sum() for p in step.model.parameters()))}


def test_what_zero3_does_not_do_is_refused(monkeypatch):
    sharding.check_stack({"own": OwnBackward(), "about": AboutWeights()}, Training(), "stages.s")
    for name, value in ZERO3.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="'own' makes its own gradients, which DeepSpeed"):
        sharding.check_stack({"own": OwnBackward()}, Training(), "stages.s")
    with pytest.raises(RecipeError, match="the loss of 'about' is about weights"):
        sharding.check_stack({"about": AboutWeights()}, Training(), "stages.s")
    for settings in ({"fp16": True}, {"torch_compile": True}, {"channels_last": True}, {"optim": "adafactor"}):
        with pytest.raises(RecipeError, match=f"{next(iter(settings))}.* and DeepSpeed exclude"):
            sharding.check_stack({}, Training(**settings), "stages.s")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_stage"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param_device"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer_device"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"optimizer": {"type": "AdamW", "params": {}}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
        ({"fp16": {"enabled": True}}, "mixed_precision"),
        ({"bf16": {"enabled": True}}, "mixed_precision"),
    ],
)
def test_launch_configurations_that_nobody_tried_are_refused(change, match, monkeypatch, tmp_path):
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, mixed_precision="no")
    for name, setting in ZERO3.items():
        monkeypatch.setenv(name, setting)
    assert zero3.check(accelerator, Training()) is not None
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads((HERE / "zero3.json").read_text()), **change}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(config))
    with pytest.raises(RecipeError, match=match):
        zero3.check(accelerator, Training())


def test_loading_by_deepspeed_is_refused(monkeypatch):
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, mixed_precision="no")
    for name, setting in {**ZERO3, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}.items():
        monkeypatch.setenv(name, setting)
    with pytest.raises(RecipeError, match="zero3_init_flag"):
        zero3.check(accelerator, Training())


def test_models_are_loaded_whole(monkeypatch):
    """What accelerate tells transformers on GPUs is taken back."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    for name, setting in ZERO3.items():
        monkeypatch.setenv(name, setting)
    plugin = DeepSpeedPlugin()
    plugin.set_deepspeed_weakref()
    assert is_deepspeed_zero3_enabled()
    zero3.load_whole(SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, plugin=plugin))
    assert not is_deepspeed_zero3_enabled()


def test_flattened_tensors_are_told_from_others():
    size = torch.Size
    assert sharding.fits(size([2, 3]), size([2, 3])) and sharding.fits(size([6]), size([2, 3]))
    assert sharding.fits(size([2, 3]), size([6])) and sharding.fits(size([]), size([]))
    assert not sharding.fits(size([3, 2]), size([2, 3])) and not sharding.fits(size([5]), size([2, 3]))
    assert not sharding.fits(size([]), size([1])) and not sharding.fits(size([1]), size([]))
