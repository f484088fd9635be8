"""What a task trains and measures, alike on any number of processes: `measured_on_ranks.py TASK BENCH FOLDER` trains
and measures on the kit's bench in the folder BENCH (its model is there) on every rank, and writes to FOLDER what comes
out."""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  the environment first
from kt_hf_plugins.finetune import Finetune
from safetensors.torch import save_file

from kt_hf import evaluation
from kt_hf.testing.bench import Bench


def main(task: str, models: Path, folder: Path, factor: int = 1) -> None:
    """`factor`: how many processes this one stands for; it takes a batch so many times larger."""
    bench = Bench(task, models)
    settings = {"per_device_train_batch_size": 2 * factor, "gradient_accumulation_steps": 2, "adam_epsilon": 1e-4}
    trained = bench.train({"finetune": Finetune()}, folder / "run", max_steps=3, **settings)
    accelerator, bundle = trained.trainer.accelerator, trained.trainer.bundle
    found = evaluation.predict(bundle, bundle, accelerator, bench.info, "test", 2)
    scores = bench.task.measure(found, trained.result.loaded, bench.info)
    if accelerator.is_main_process:
        facts = {"metrics": scores.metrics, "index": found["index"].tolist()}
        (folder / "facts.json").write_text(json.dumps(facts))
        save_file({k: v.contiguous() for k, v in trained.weights.items()}, folder / "weights.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
