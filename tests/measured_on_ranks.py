"""What a task trains and measures, alike on any number of processes: `measured_on_ranks.py TASK BENCH FOLDER SETTINGS`
trains and measures on the kit's bench in the folder BENCH (its model is there) on every rank, and writes to FOLDER what
comes out. SETTINGS: of the task, as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  the environment first
from kt_hf_plugins.finetune import Finetune
from safetensors.torch import load_file, save_file

from kt_hf import evaluation
from kt_hf.testing.bench import Bench


def main(task: str, models: Path, folder: Path, factor: int = 1, given: dict[str, Any] | None = None) -> None:
    """`factor`: how many processes this one stands for; it takes a batch so many times larger. given: settings of the
    task."""
    bench = Bench(task, models)
    bench.task = type(bench.task)(**(given or {}))
    settings = {"per_device_train_batch_size": 2 * factor, "gradient_accumulation_steps": 2, "adam_epsilon": 1e-4}
    trained = bench.train({"finetune": Finetune()}, folder / "run", max_steps=3, **settings)
    accelerator, bundle = trained.trainer.accelerator, trained.trainer.bundle
    found = evaluation.predict(bundle, bundle, accelerator, bench.info, "test", 2)
    scores = bench.task.measure(found, trained.result.loaded, bench.info)
    if accelerator.is_main_process:
        facts = {"metrics": scores.metrics, "index": found["index"].tolist()}
        (folder / "facts.json").write_text(json.dumps(facts))
        save_file({k: v.contiguous() for k, v in trained.weights.items()}, folder / "weights.safetensors")


def launch(*arguments: str) -> None:
    """This script on two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    where = Path(__file__).parent
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=400, cwd=where, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def one_and_two(task: str, models: Path, folder: Path, given: dict[str, Any]) -> list[tuple[dict[str, Any], Any]]:
    """(facts, weights) of one process, and of two."""
    for name in ("one", "two"):
        (folder / name).mkdir()
    main(task, models, folder / "one", 2, given)
    launch(task, str(models), str(folder / "two"), json.dumps(given))
    folders = [folder / name for name in ("one", "two")]
    return [(json.loads((f / "facts.json").read_text()), load_file(f / "weights.safetensors")) for f in folders]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), given=json.loads(sys.argv[4]))
