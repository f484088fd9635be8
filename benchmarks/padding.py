"""Tokens learnt per second by batches at random, by batches of rows of about the same length, and by packed rows, on
texts of log-normal length, cut at 512 tokens: a causal language model (Llama of two layers, width 128), whose packed
rows are bins, and an encoder that classifies (BERT of four layers, width 128), whose layers leave padding out.

    python benchmarks/padding.py [--rounds 7]

Reach: at least 0.97 of the tokens are no padding; tokens per second at least 1.8 times those of batches at random. A
batch of the language model holds about as many elements for all three (32 padded rows, or bins of as many tokens as
these hold at random), so that all of them need about the same memory. Batches of the encoder hold the same 32 rows,
packed or not; of the tokens, those count that its layers see.
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
from kt_hf_plugins.text_classification import TextClassification
from kt_hf_plugins.text_generation import TextGeneration
from ratios import compare, paired, report

from kt_hf import randomness, unpadding
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
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
ENCODER = {**SHAPE, "intermediate_size": 512, "num_hidden_layers": 4}
MODELS: dict[str, tuple[Any, Model]] = {
    "language model": (TextGeneration, Model(config="llama", config_overrides=SHAPE)),
    "encoder": (TextClassification, Model(config="bert", config_overrides=ENCODER)),
}


def texts(count: int) -> DataInfo:
    random = np.random.default_rng(0)
    lengths = random.lognormal(4.0, 0.8, count).astype(int).clip(2, 511)
    words = np.asarray(list("abcdefghijklmnopqrstuvwxyz"))
    rows = [" ".join(random.choice(words, n)) for n in lengths]
    columns = {"text": rows, "label": np.arange(count) % 3, "index": np.arange(count)}
    split = datasets.Dataset.from_dict(columns)
    roles = {"text": "text", "label": "label"}
    return DataInfo("texts", {"train": split}, roles, ["cat", "dog", "owl"], f"lognormal-{count}")


def ready(folder: Path, info: DataInfo, kind: str, settings: dict[str, Any]) -> Trainer:
    """A trainer that stands before its first step."""
    training = Training(max_steps=10**6, eval_steps=0, logging_steps=10**6, **settings)
    (task_class, model), accelerator = MODELS[kind], Accelerator(cpu=True)
    task = task_class(max_length=512)
    randomness.seed_all("load", 0)
    loaded = task.load(model, info)
    run = Run(accelerator, 0, folder, task, loaded, info, training.max_steps, lambda ref: ref, None)
    trainer = Trainer(run, loaded, {"finetune": Finetune()}, training, Data("memory"), None, None)
    trainer.shards = None
    trainer.prepare_model()
    trainer.feed = Feed(run, training, trainer.data, trainer.strategies, None, training.max_steps)
    if training.packing and task.packs == "rows":
        unpadding.begin(trainer.bundle.model, run, trainer.feed.sources["train"].rows)
    trainer.wrap()
    return trainer


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--steps", type=int, default=4)
    given = options.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    info, rows = texts(5003), []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            trainers = {kind: ready(Path(folder) / kind, info, model, settings) for kind, settings in KINDS.items()}
            shares = {kind: share(trainer) for kind, trainer in trainers.items()}
            found = measure(trainers, given.rounds, given.steps)
        rows += [
            {
                "model": model,
                "batches": kind,
                "share of tokens that are no padding": shares[kind],
                "tokens per second": 1 / float(np.median(found[kind])),
                "times those at random": paired(found["random"], found[kind]),
            }
            for kind in KINDS
        ]
    report("padding", rows, rounds=given.rounds, steps=given.steps)


def measure(trainers: dict[str, Trainer], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per token of each in every round."""
    running = {kind: trainer.feed.steps(0) for kind, trainer in trainers.items()}
    counter = dict.fromkeys(trainers, 0)

    def seconds_per_token(kind: str) -> float:
        began, tokens = time.perf_counter(), 0
        for _ in range(steps):
            window, sizes = next(running[kind])
            trainers[kind].step(counter[kind], window, sizes)
            counter[kind] += 1
            tokens += int(window[0]["train"]["attention_mask"].sum())
        return (time.perf_counter() - began) / tokens

    return compare({kind: lambda kind=kind: seconds_per_token(kind) for kind in trainers}, rounds)  # type: ignore[misc]


def share(trainer: Trainer) -> float:
    """Over one epoch."""
    source = trainer.feed.sources["train"]
    lengths, seen = source.rows.lengths(), 0
    for rows in source.plan.epoch(0):
        longest = int(lengths[rows].max())
        mask = torch.arange(longest)[None] < torch.as_tensor(lengths[rows])[:, None]
        bins = unpadding.arguments(trainer.bundle.model, {"attention_mask": mask}).get("packed_rows")
        seen += len(rows) * longest if bins is None else bins.num_bins * bins.capacity
    return float(lengths.sum() / seen)


if __name__ == "__main__":
    main()
