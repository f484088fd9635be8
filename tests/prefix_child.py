"""Trains with a frozen prefix on every rank: `prefix_child.py FOLDER CACHE BATCH`. The first rank writes the weights
and what it was said."""

import json
import logging
import sys
from pathlib import Path

import conftest  # noqa: F401  the environment first
import datasets
import helpers
from safetensors.torch import save_file

if __name__ == "__main__":
    folder, cache, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    datasets.config.HF_DATASETS_CACHE = cache
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("kt_hf.prefix")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    trainer = helpers.make_trainer(
        folder,
        "text",
        {"finetune": {"freeze_layers": 2}},
        max_steps=16,
        cache_frozen="auto",
        per_device_train_batch_size=batch,
        learning_rate=2e-3,
        adam_epsilon=1e-4,
    )
    result = trainer.run()
    if trainer.run_facts.rank == 0:
        save_file({k: v.contiguous() for k, v in helpers.weights(result).items()}, folder / "weights.safetensors")
        (folder / "said.json").write_text(json.dumps(said))
