"""Two processes (gloo) against one with the doubled batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import rank_cases
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
LAUNCH = HERE.parent / "recipes" / "accelerate" / "cpu_two_ranks.yaml"


def launch(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=HERE)
    assert done.returncode == 0, done.stderr[-4000:]


def torchrun(arguments: list[str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(HERE / "rank_cases.py"),
        *arguments,
    ]


def accelerate(arguments: list[str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(LAUNCH),
        str(HERE / "rank_cases.py"),
        *arguments,
    ]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return helpers.teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def two(teacher, tmp_path_factory) -> Path:
    """The folder that one pair of processes has written for all cases."""
    folder = tmp_path_factory.mktemp("two")
    launch(torchrun([str(folder), teacher, *rank_cases.CASES]))
    return folder


def read(folder: Path, name: str) -> tuple[list[dict[str, torch.Tensor]], list[dict]]:
    tensors = [load_file(folder / f"{name}.{rank}.safetensors") for rank in (0, 1)]
    return tensors, [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def compare(folder: Path, name: str, teacher: str, one_folder: Path) -> None:
    ours, facts = rank_cases.run(name, one_folder, teacher, factor=2)
    theirs, ranks = read(folder, name)
    start = rank_cases.build(name, one_folder / "start", teacher, 2, {}).loaded.model.state_dict()
    assert helpers.identical(*theirs), "the ranks have drifted apart"
    assert helpers.distance(ours, theirs[0]) < 1e-5
    assert helpers.distance(ours, start) > 1e-3
    for mine, other in zip(facts["curve"], ranks[0]["curve"], strict=True):
        assert mine["step"] == other["step"] and mine["terms"].keys() == other["terms"].keys()
        assert all(mine["terms"][k] == pytest.approx(other["terms"][k], abs=1e-4) for k in mine["terms"])
    assert ranks[0]["curve"] == ranks[1]["curve"]
    assert facts["evaluations"] == ranks[0]["evaluations"] == ranks[1]["evaluations"]
    assert facts["best"] == ranks[0]["best"]


@pytest.mark.parametrize("name", [name for name in rank_cases.CASES if name != "contrastive"])
def test_two_ranks_equal_one_with_the_doubled_batch(name, two, teacher, tmp_path):
    compare(two, name, teacher, tmp_path)


def test_ranks_take_the_rate_that_one_process_finds(two, teacher, tmp_path):
    alone = rank_cases.run("auto", tmp_path, teacher, factor=2)[1]
    assert all(facts["rate"] == alone["rate"] and facts["equals_typed"] for facts in read(two, "auto")[1])


def test_contrastive_sees_the_rows_of_all_ranks(two, teacher, tmp_path):
    pytest.importorskip("kt_hf_plugins.contrastive")
    compare(two, "contrastive", teacher, tmp_path)


@pytest.mark.parametrize(("name", "rows"), [("finetune", 27), ("streamed", 27), ("contrastive", 23), ("empty", 25)])
def test_ranks_share_the_rows(name, rows, two):
    """Disjoint in every step, all rows in every epoch, sizes that differ by at most one."""
    (first, second) = (facts["indices"] for facts in read(two, name)[1])
    micro_batches = len(first) // 20
    per_epoch = -(-rows // 8) * micro_batches
    for a, b in zip(first, second, strict=True):
        assert not set(a) & set(b) and abs(len(a) - len(b)) <= 1
    epoch = [i for part in (*first[:per_epoch], *second[:per_epoch]) for i in part]
    assert sorted(epoch) == list(range(rows))
    if name == "empty":
        assert sum(len(part) == 0 for part in (*first[:per_epoch], *second[:per_epoch])) == 3


def test_every_example_is_counted_once(two):
    """7 examples in batches of 4 on two ranks."""
    for facts in read(two, "finetune")[1]:
        found = facts["predictions"]
        assert found["index"] == list(range(7)) and len(found["scores"]) == 7


def test_a_fault_on_one_rank_stops_all(two):
    causes = [json.loads((two / f"broken.{rank}.json").read_text()) for rank in (0, 1)]
    assert all("step 5" in cause for cause in causes)


@pytest.mark.slow
def test_accelerate_launch(teacher, tmp_path):
    """The launch configuration of the recipes."""
    launch(accelerate([str(tmp_path), teacher, "lora+distill+ema"]))
    compare(tmp_path, "lora+distill+ema", teacher, tmp_path / "one")
