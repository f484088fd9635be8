"""What tasks train and measure, alike on any number of processes.

`measured_on_ranks.py FOLDER TASK...` trains and measures every task on the kit's bench in FOLDER/TASK/bench (its model
is there) on every rank, and writes to FOLDER/TASK/two what comes out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  the environment first
from safetensors.torch import load_file, save_file

from kt_hf import evaluation, registry
from kt_hf.bundle import Bundle
from kt_hf.task import Loaded
from kt_hf.testing.bench import Bench, cpu_accelerator, on_cpu

Found = tuple[dict[str, Any], dict[str, Any]]


def measure(task: str, models: Path, folder: Path, factor: int = 1) -> None:
    """`factor`: how many processes this one stands for; it takes a batch so many times larger."""
    bench = Bench(task, models)
    names = ["finetune"] if bench.task.has_loss else ["finetune", "contrastive"]
    windows = 2 if bench.task.has_loss else 1  # a loss over the whole batch has no accumulation
    settings = {"per_device_train_batch_size": 2 * factor, "gradient_accumulation_steps": windows}
    stack = {name: registry.load("strategy", name)() for name in names}
    start = bench.load(bench.saved("start"))
    before, _ = metrics(bench, Bundle(start, bench.task, {}).eval(), start)
    trained = bench.train(stack, folder / "run", max_steps=3, adam_epsilon=1e-4, **settings)
    after, index = metrics(bench, trained.trainer.bundle, trained.result.loaded)
    if trained.trainer.accelerator.is_main_process:
        facts = {"before": before, "after": after, "index": index, "metric": bench.task.metric}
        (folder / "facts.json").write_text(json.dumps(facts))
        save_file({k: v.contiguous() for k, v in trained.weights.items()}, folder / "weights.safetensors")


def metrics(bench: Bench, bundle: Any, loaded: Loaded) -> tuple[dict[str, float], list[int]]:
    """(metrics, rows) of the test split in batches of 2."""
    found = evaluation.predict(bundle, bundle, cpu_accelerator(), bench.info, "test", 2)
    return bench.task.measure(found, loaded, bench.info).metrics, found["index"].tolist()


def one_and_two(folder: Path, tasks: list[str]) -> dict[str, tuple[Found, Found]]:
    """Task -> (facts, weights) of one process, and of two; a single launch does all tasks."""
    for task in tasks:
        for name in ("one", "two"):
            (folder / task / name).mkdir(parents=True)
        with on_cpu():
            measure(task, folder / task / "bench", folder / task / "one", 2)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    where = Path(__file__).parent
    command = [*start, str(folder), *tasks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=where, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return {task: (read(folder / task / "one"), read(folder / task / "two")) for task in tasks}


def read(folder: Path) -> Found:
    return json.loads((folder / "facts.json").read_text()), load_file(folder / "weights.safetensors")


if __name__ == "__main__":
    for given in sys.argv[2:]:
        root = Path(sys.argv[1]) / given
        measure(given, root / "bench", root / "two")
