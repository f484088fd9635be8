"""A training of the bench in other processes: `python -m kt_hf.testing.worker SPEC.json`, or the same under torchrun.

The class is found by its module, or by the file that it was defined in.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kt_hf.testing.bench import Trained
from kt_hf.testing.rules import Broken
from kt_hf.testing.strategies import HALF, StrategyCase, Watch

TIMEOUT = 300
"""Seconds after which a process is taken to hang."""


def train(
    case: StrategyCase, where: str, processes: int = 1, kill: bool = False, **training: Any
) -> dict[str, torch.Tensor] | None:
    """Exported weights and the strategy's state after a training in new processes; None when killed as planned."""
    folder = case.folder / "processes" / where
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "name": case.name,
        "module": case.cls.__module__,
        "qualname": case.cls.__qualname__,
        "file": inspect.getsourcefile(case.cls),
        "given": case.settings(),
        "task": case.bench.name,
        "bench": str(case.bench.folder),
        "where": str(folder),
        "kill": kill,
        "threads": torch.get_num_threads() if processes == 1 else 1,
        "training": training,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, "kt_hf.testing.worker", str(folder / "spec.json")]
    paths = [p for p in (str(Path(kt_hf_folder())), *sys.path) if p]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(spec["threads"]),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise Broken(f"{processes} process(es) did not end within {TIMEOUT} s") from None
    if kill and done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or [""]
        raise Broken(f"a process failed with code {done.returncode}: {errors[0].strip()[:300]}")
    return load_file(folder / "result.safetensors")


def outcome(trained: Trained) -> dict[str, torch.Tensor]:
    """Exported weights and the strategy's state."""
    weights = {f"model/{k}": v.contiguous() for k, v in trained.weights.items()}
    return {**weights, **{f"strategy/{k}": v.contiguous() for k, v in trained.state.items()}}


def kt_hf_folder() -> Path:
    return Path(__file__).resolve().parents[2]


def find_class(module: str, qualname: str, file: str | None) -> type:
    try:
        found = importlib.import_module(module)
    except ImportError:
        assert file is not None
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[module] = found
        spec.loader.exec_module(found)
    return functools.reduce(getattr, qualname.split("."), found)  # type: ignore[return-value]


class Killer(Watch):
    """Ends the process without a word in the first step after the checkpoint."""

    def __init__(self) -> None:
        super().__init__(None)
        self.steps = 0

    def after_step(self, model: nn.Module, progress: float) -> None:
        self.steps += 1
        if self.steps > HALF:
            os.kill(os.getpid(), signal.SIGKILL)


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    cls = find_class(spec["module"], spec["qualname"], spec["file"])
    case = StrategyCase(spec["name"], cls, spec["given"], Path(spec["where"]), spec["task"])
    case.bench.folder = Path(spec["bench"])  # models are there already
    torch.set_num_threads(spec["threads"])
    strategy = case.build()
    stack = {case.name: strategy, "watch": Killer() if spec["kill"] else Watch(None)}
    trained = case.bench.train(stack, case.folder / "run", **spec["training"])
    if trained.run.rank == 0:
        save_file(outcome(trained), case.folder / "result.safetensors")
    trained.run.accelerator.wait_for_everyone()
    if trained.run.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
