"""Tokens learnt per second by batches at random, by batches of rows of about the same length, and by packed rows: a
causal language model (Llama of two layers, width 128) on texts of log-normal length, cut at 512 tokens.

    python benchmarks/padding.py [--rounds 7]

Reach: at least 0.97 of the tokens are no padding; tokens per second at least 1.8 times those of batches at random. A
batch holds about as many elements for all three (32 padded rows, or bins of as many tokens as these hold at random),
so that all of them need about the same memory.
"""

from __future__ import annotations

import argparse
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
from kt_hf_plugins.text_generation import TextGeneration
from ratios import compare, paired, report

from kt_hf import randomness
from kt_hf.data import DataInfo
from kt_hf.facts import Run
from kt_hf.feed import Feed
from kt_hf.recipe import Data, Model, Training
from kt_hf.trainer import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "random": {"per_device_train_batch_size": 32},
    "group_by_length": {"per_device_train_batch_size": 32, "train_sampling_strategy": "group_by_length"},
    "packing": {"per_device_train_batch_size": 32, "packing": True},
}


def texts(count: int) -> DataInfo:
    random = np.random.default_rng(0)
    lengths = random.lognormal(4.0, 0.8, count).astype(int).clip(2, 511)
    words = np.asarray(list("abcdefghijklmnopqrstuvwxyz"))
    rows = [" ".join(random.choice(words, n)) for n in lengths]
    split = datasets.Dataset.from_dict({"text": rows, "index": np.arange(count)})
    return DataInfo("texts", {"train": split}, {"text": "text"}, None, f"lognormal-{count}")


def ready(folder: Path, info: DataInfo, settings: dict[str, Any]) -> Trainer:
    """A trainer that stands before its first step."""
    training = Training(max_steps=10**6, eval_steps=0, logging_steps=10**6, **settings)
    task, accelerator = TextGeneration(max_length=512), Accelerator(cpu=True)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    randomness.seed_all("load", 0)
    loaded = task.load(Model(config="llama", config_overrides={**shape, "max_position_embeddings": 512}), info)
    run = Run(accelerator, 0, folder, task, loaded, info, training.max_steps, lambda ref: ref, None)
    trainer = Trainer(run, loaded, {"finetune": Finetune()}, training, Data("memory"), None, None)
    trainer.shards = None
    trainer.prepare_model()
    trainer.feed = Feed(run, training, trainer.data, trainer.strategies, None, training.max_steps)
    trainer.wrap()
    return trainer


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--steps", type=int, default=4)
    given = options.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    info = texts(5003)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: ready(Path(folder) / kind, info, settings) for kind, settings in KINDS.items()}
        shares = {kind: share(trainer) for kind, trainer in trainers.items()}
        running = {kind: trainer.feed.steps(0) for kind, trainer in trainers.items()}
        counter = dict.fromkeys(KINDS, 0)

        def seconds_per_token(kind: str) -> float:
            began, tokens = time.perf_counter(), 0
            for _ in range(given.steps):
                window, sizes = next(running[kind])
                trainers[kind].step(counter[kind], window, sizes)
                counter[kind] += 1
                tokens += int(window[0]["train"]["attention_mask"].sum())
            return (time.perf_counter() - began) / tokens

        found = compare({kind: lambda kind=kind: seconds_per_token(kind) for kind in KINDS}, given.rounds)  # type: ignore[misc]
    rows = [
        {
            "batches": kind,
            "share of tokens that are no padding": shares[kind],
            "tokens per second": 1 / float(np.median(found[kind])),
            "times those at random": paired(found["random"], found[kind]),
        }
        for kind in KINDS
    ]
    report("padding", rows, rounds=given.rounds, steps=given.steps)


def share(trainer: Trainer) -> float:
    """Over one epoch."""
    plan = trainer.feed.sources["train"].plan
    lengths = trainer.feed.sources["train"].rows.lengths()
    return float(lengths.sum() / sum(len(rows) * lengths[rows].max() for rows in plan.epoch(0)))


if __name__ == "__main__":
    main()
