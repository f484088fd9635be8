"""benchmarks/gpu_check.py where there is no GPU: what runs there, without the libraries that it must not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE.parent / "benchmarks" / "gpu_check.py"


def check(folder: Path, *names: str) -> tuple[int, dict]:
    output = folder / "found.json"
    command = [sys.executable, str(HERE / "without.py"), str(SCRIPT), "--device", "cpu", "--output", str(output)]
    done = subprocess.run(
        [*command, *(["--only", *names] if names else [])],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert output.exists(), done.stderr[-3000:]
    return done.returncode, json.loads(output.read_text())["checks"]


def test_some_checks_run_without_a_gpu_and_without_data_libraries(tmp_path):
    code, found = check(tmp_path, "bf16", "non_finite", "strategies", "no_syncs")
    results = {name: facts["result"] for name, facts in found.items()}
    assert results == {"bf16": "passed", "non_finite": "passed", "strategies": "passed", "no_syncs": "not here"}, found
    assert code == 0


@pytest.mark.slow
def test_all_checks(tmp_path):
    code, found = check(tmp_path)
    results = {name: facts["result"] for name, facts in found.items()}
    absent = {"no_syncs", "memory"} | ({"zero3_one_rank"} if find_spec("deepspeed") is None else set())
    assert {name for name, result in results.items() if result == "not here"} == absent, found
    assert results.pop("step_ratio") == "not judged" and code == 0, found
