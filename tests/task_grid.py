"""What every task is put through: the strategies that must run on it, and two processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kt_hf import Ensemble, Evaluate, Merge, Recipe, Train, inference, run

HERE = Path(__file__).parent
TEACHER = {"distill": {"teacher": "@teacher", "temperature": 2.0}}


def stages(ensemble: bool = True, freeze_layers: int = 1, more: Any = ()) -> list[Any]:
    """Every strategy, merge and ensemble, over students of one start."""
    start = {"model": {"path": "@teacher"}}
    found = [
        Train("teacher"),
        Train("frozen", strategies=[{"finetune": {"freeze_layers": freeze_layers}}], **start),
        Train("adapted", strategies=["lora"], **start),
        Train("taught", strategies=[TEACHER], **start),
        Train("mixed", strategies=["finetune", "lora", TEACHER, "ema"], seeds=2, **start),
        *more,
        Merge("uniform", "uniform_soup", models=["@frozen", "@taught"]),
        Merge("greedy", "greedy_soup", models=["@mixed"]),
        Evaluate("again", model="@uniform"),
    ]
    return [*found, Ensemble("together", "mean", models=["@frozen", "@taught"])] if ensemble else found


def run_grid(folder: Path, data: Any, model: Any, task: dict[str, Any], **given: Any) -> dict[str, Any]:
    """stage -> its entry in the report."""
    training = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "eval_steps": 0}
    recipe = Recipe(stages(**given), task=task, data=data, model=model, training=training)
    return {stage["name"]: stage for stage in run(recipe, folder)["stages"]}


def compare_ranks(folder: Path, model: str, data: str, task: str, settings: list[str]) -> dict[str, Any]:
    """The metrics of one process, which two give as well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(HERE / "evaluate_child.py"), str(folder / "two.json"), model, data, task, *settings]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = inference.evaluate(model, data, settings, task=task), json.loads((folder / "two.json").read_text())
    assert one["metrics"].keys() == two.keys()
    for name, figures in one["metrics"].items():
        for key, value in figures.items():
            assert abs(value - two[name][key]) <= 1e-5 * max(1, abs(value)), (name, key, value, two[name][key])
    return one
