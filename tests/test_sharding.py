"""FSDP2 with two processes (gloo) against one process with the doubled batch; checkpoints on another number of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import rank_cases
import shard_cases
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_two_ranks import read
from transformers import AutoModelForImageClassification

import kt_hf
from kt_hf import Data, Model, Recipe, Strategy, Train, checkpoint, sharding
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.recipe import Training

HERE = Path(__file__).parent
FSDP = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
ALONE = ("checkpointing", "chunks", "accumulation", "adapter", "tied", "masked", "writing", "rates", "skips")
BOTH = (*rank_cases.CASES, *ALONE)


def launch(processes: int, folder: Path, teacher: str, *jobs: str, **environment: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(HERE / "shard_cases.py"), str(folder), teacher, *jobs],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **FSDP, **environment},
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return helpers.teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def two(teacher, tmp_path_factory) -> Path:
    """What one pair of processes has left of all cases."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(2, folder, teacher, *[f"run:{name}" for name in (*BOTH, "micro1", "micro4")], "stop:saving", "run:full")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_sharded_equals_one_process(name, two, teacher, tmp_path):
    compare(name, two, teacher, tmp_path)


def compare(name: str, two: Path, teacher: str, folder: Path) -> None:
    ours, facts = shard_cases.run("run", name, folder, teacher, factor=2)
    theirs, ranks = read(two, name)
    assert all(0.4 < rank["held"] < 0.62 for rank in ranks), "the weights were not sharded"
    assert helpers.identical(*theirs) and helpers.distance(ours, theirs[0]) < 1e-5
    assert ranks[0]["evaluations"] == ranks[1]["evaluations"] and facts["best"] == ranks[0]["best"]
    assert [rank["skipped"] for rank in (facts, *ranks)] == [name == "skips"] * 3 and ranks[0]["left"] == []
    for mine, other in zip(facts["evaluations"], ranks[0]["evaluations"], strict=True):
        assert mine == pytest.approx(other, rel=1e-6)
    for mine, other in zip(facts["curve"], ranks[0]["curve"], strict=True):
        assert all(mine["terms"][k] == pytest.approx(other["terms"][k], abs=1e-4) for k in mine["terms"])


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "lora+distill+ema"])
def test_the_saved_model_is_whole(name, two, teacher, tmp_path):
    shard_cases.run("run", name, tmp_path, teacher, factor=2)
    ours, theirs = logits(tmp_path / "model"), logits(two / name / "model")
    assert (ours - theirs).abs().max() < 1e-5 and ours.std() > 1e-2


@pytest.mark.slow
def test_an_adapter_is_whole(two, teacher, tmp_path):
    shard_cases.run("run", "adapter", tmp_path, teacher, factor=2)
    ours, theirs = (load_file(f / "model" / "adapter_model.safetensors") for f in (tmp_path, two / "adapter"))
    assert helpers.distance(ours, theirs) < 1e-5 and all(t.abs().max() > 0 for t in theirs.values())


# --- checkpoints


def saved(folder: Path) -> Path:
    (path,) = (folder / "checkpoints").glob("step-*")
    return path


@pytest.mark.slow
def test_every_process_writes_its_part(two):
    path = saved(two / "saving")
    manifest = checkpoint.verify(path)
    shards = ["shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors"]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *shards, "trainer.json"]
    assert sorted(manifest["files"]) == [*shards, "trainer.json"]
    first, second = (load_file(path / name) for name in shards)
    whole = sharding.saved(path)
    assert set(whole) == set(first) | set(second)
    assert all("lora_" in n or "classifier" in n for n in whole if n.startswith("optim/")), "frozen weights have none"
    assert not any("base_layer" in n for n in whole), "frozen weights are not saved"
    split = [n for n in whole if n in first and n in second]
    assert len(split) > 10 and all(len(first[n]) + len(second[n]) == len(whole[n]) for n in split)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 2), (2, 1), (1, 2), (2, "1 sharded")])
def test_resume_on_another_number_of_processes(first, then, two, teacher, tmp_path):
    name, folder = "saving", tmp_path / "interrupted"
    if first == 2:
        shutil.copytree(two / name, folder / name)
    else:
        shard_cases.run("stop", name, folder / name, teacher, factor=2)
    assert [p.name for p in checkpoint.steps(folder / name / "checkpoints")] == ["step-000005"]
    if then == 1:
        theirs, facts = shard_cases.run("go", name, folder / name, teacher, factor=2)
    else:
        launch(2 if then == 2 else 1, folder, teacher, f"go:{name}")
        theirs = load_file(folder / f"{name}.0.safetensors")
        facts = json.loads((folder / f"{name}.0.json").read_text())
    ours, expected = shard_cases.run("run", name, tmp_path / "uninterrupted", teacher, factor=2)
    assert helpers.distance(ours, theirs) < 1e-5
    assert [p["step"] for p in facts["curve"]] == [p["step"] for p in expected["curve"]]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: torch.full(t.shape, 7.0, dtype=t.dtype) for n, t in sharding.saved(path).items()}


@pytest.mark.slow
def test_a_part_that_is_missing_or_damaged_is_found(two, tmp_path):
    for what in ("missing", "damaged"):
        folder = tmp_path / what
        shutil.copytree(two / "saving" / "checkpoints", folder)
        (path,) = checkpoint.steps(folder)
        shard = path / "shard-00002-of-00002.safetensors"
        if what == "missing":
            shard.unlink()
        else:
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)
        with pytest.raises(IntegrityError, match="shard-00002"):
            checkpoint.verify(path)
        assert checkpoint.newest(folder) is None


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, 2])
def test_nothing_is_half_loaded(index, two, tmp_path):
    """Also where the manifest does not know of the missing part."""
    path = tmp_path / "step-000005"
    shutil.copytree(saved(two / "saving"), path)
    whole = tensors_of(path)
    (path / f"shard-0000{index}-of-00002.safetensors").unlink()
    with pytest.raises(IntegrityError):
        sharding.load_into(path, whole)
    assert all((t == 7).all() for t in whole.values())


@pytest.mark.slow
def test_slices_come_together(two):
    path = saved(two / "saving")
    whole = tensors_of(path)
    assert sharding.load_into(path, whole) == set()
    parts = [load_file(path / f"shard-0000{i}-of-00002.safetensors") for i in (1, 2)]
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([p[name] for p in parts if name in p]) if tensor.dim() else parts[0][name])


@pytest.mark.slow
def test_a_process_that_cannot_write_stops_all(two):
    first, second = (json.loads((two / f"full.{rank}.json").read_text())["error"] for rank in (0, 1))
    assert "another process could not write" in first and "the disk is full" in second
    assert list((two / "full" / "checkpoints").iterdir()) == []


# --- communication


def sums(folder: Path) -> int:
    """How often one step adds something up over the processes; gloo does a reduce-scatter by an all-reduce, too."""
    events = json.loads((folder / "logs" / "trace.json").read_text())["traceEvents"]
    return sum(str(e.get("name", "")) == "gloo:all_reduce" for e in events)


@pytest.mark.slow
def test_gradients_are_exchanged_once_per_step(two, teacher, tmp_path):
    """Four micro-batches exchange as much as one: the counts and, under FSDP, gradients of three groups."""
    launch(2, tmp_path, teacher, "run:micro1", "run:micro4", ACCELERATE_USE_FSDP="false")
    assert sums(tmp_path / "micro4") == sums(tmp_path / "micro1") > 0
    assert sums(two / "micro4") == sums(two / "micro1") == 2 * sums(tmp_path / "micro1")


# --- refusals and the launch configuration


@pytest.mark.slow
def test_accelerate_launch(teacher, tmp_path):
    """The launch configuration of the recipes."""
    config = HERE.parent / "recipes" / "accelerate" / "fsdp2_cpu_two_ranks.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [*command, str(HERE / "shard_cases.py"), str(tmp_path), teacher, "run:lora+distill+ema"],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ours, _ = shard_cases.run("run", "lora+distill+ema", tmp_path / "one", teacher, factor=2)
    theirs, ranks = read(tmp_path, "lora+distill+ema")
    assert all(0.4 < rank["held"] < 0.62 for rank in ranks) and helpers.distance(ours, theirs[0]) < 1e-5


class OwnBackward(Strategy):
    def backward(self, compute, micro_batches, run):
        raise AssertionError


def test_what_sharding_does_not_do_is_refused(monkeypatch):
    stack = {"own": OwnBackward()}
    sharding.check_stack(stack, Training(), "stages.s")  # nobody asks for FSDP
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="'own' makes its own gradients"):
        sharding.check_stack(stack, Training(), "stages.s")
    for settings in ({"fp16": True}, {"torch_compile": True}, {"channels_last": True}, {"optim": "adafactor"}):
        with pytest.raises(RecipeError, match=next(iter(settings))):
            sharding.check_stack({}, Training(**settings), "stages.s")


def test_deepspeed_is_refused_where_it_is_not_installed(monkeypatch, tmp_path):
    """Before accelerate looks for the library."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(sharding, "find_spec", lambda name: None)
    recipe = Recipe(data=Data("digits"), model=Model(config="vit"), stages=[Train("s", strategies=["finetune"])])
    with pytest.raises(RecipeError, match="DeepSpeed, which is not installed"):
        kt_hf.run(recipe, output_dir=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("variable", "value", "match"),
    [
        ("FSDP_VERSION", "1", "fsdp_version"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy"),
    ],
)
def test_launch_configurations_that_nobody_tried_are_refused(variable, value, match, monkeypatch):
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, mixed_precision="no")
    for name, setting in FSDP.items():
        monkeypatch.setenv(name, setting)
    assert sharding.check(accelerator, Training()) is not None
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=match):
        sharding.check(accelerator, Training())
