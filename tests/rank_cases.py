"""Trainings that must come out alike on any number of processes: `rank_cases.py FOLDER TEACHER CASE...` runs them in
this process or on every rank, and writes what they leave to FOLDER."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  the environment first
import helpers
import torch
from helpers import make_trainer, weights
from safetensors.torch import save_file

from kt_hf import Strategy, Stream, evaluation
from kt_hf.data import DataInfo
from kt_hf.errors import NonFiniteError
from kt_hf.streaming import Source
from kt_hf.trainer import Trainer

ADAMW = {"max_steps": 20, "learning_rate": 2e-3, "adam_epsilon": 1e-4, "logging_steps": 3, "eval_steps": 10}
"""An epsilon above the rounding noise: Adam makes whole steps of gradients that are 0 but for that (those of key
biases)."""


class Indices(Strategy):
    """Notes the rows that count in every micro-batch of this rank."""

    def __init__(self):
        super().__init__()
        self.seen: dict[tuple[int, int], list[int]] = {}

    def loss(self, step):
        position = step._position
        counts = position.rows["train"][position.rank] > 0
        self.seen[position.step, position.micro_batch] = step.batch["index"].tolist() if counts else []
        return {}


class Partly(Strategy):
    """Weights of its own, of which one is never used and one only for rows of the first class."""

    adds_objective = True

    def __init__(self):
        super().__init__()
        self.used = torch.nn.Parameter(torch.ones(3))
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.sometimes = torch.nn.Parameter(torch.ones(3))

    def loss(self, step):
        logits, first = step.outputs.logits, step.batch["labels"] == 0
        terms = {"used": step.mean((logits * self.used).pow(2).sum(-1))}
        if first.any():
            terms["sometimes"] = step.mean((logits * self.sometimes).pow(2).sum(-1) * first)
        else:
            terms["sometimes"] = step.mean(logits.sum(-1) * 0)
        return terms


class Batchwise(Strategy):
    """A loss about the batch as a whole, and one on rows of another data set."""

    scope = "batch"
    adds_objective = True

    def streams(self):
        return {"other": Stream("other", ratio=0.5)}

    def loss(self, step):
        both = torch.cat([step.outputs.logits, step.outputs.logits.sigmoid()])
        rows, other = step.gather(both), step.gather(step.forward("other").logits, stream="other")
        return {
            "spread": step.once(-rows.std(0).mean()),
            "shift": step.once((rows.mean(0) - other.mean(0)).pow(2).sum()),
        }


class BreaksOnLastRank(Strategy):
    def loss(self, step):
        broken = step.step == 4 and step._position.rank == step._position.world - 1
        return {"broken": step.once(step.outputs.logits.sum() * (math.inf if broken else 0.0))}


class Stop(Strategy):
    def after_step(self, model, progress):
        if progress > 0.4:
            raise InterruptedError


def streamed(info: DataInfo) -> DataInfo:
    """The same training rows, of which nobody knows how many there are."""
    opened = info.splits["train"].remove_columns("index").to_iterable_dataset().decode(False)

    def refine(rows: list[dict[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [{**row, "index": number} for row, number in zip(rows, numbers, strict=True)]

    return dataclasses.replace(info, stream=Source(opened, refine, block_size=10))


def build(name: str, folder: Path, teacher: str, factor: int, extra: dict[str, Any]) -> Trainer:
    """`factor`: how many processes this one stands for; it takes a batch so many times larger."""
    settings: dict[str, Any] = {**ADAMW, "per_device_train_batch_size": 4 * factor}
    image: dict[str, Any] = {"kind": "image", "info": helpers.image_info(27), "task": helpers.ImageClassification()}
    if name in helpers.CASES:
        return make_trainer(folder, strategies={**helpers.stack(name, teacher), **extra}, **image, **settings)
    if name == "streamed":
        image["info"] = streamed(image["info"])
        return make_trainer(folder, strategies={"finetune": {}, **extra}, **image, **settings)
    if name == "text":
        return make_trainer(folder, "text", {"finetune": {}, **extra}, **settings)
    if name == "packed":  # batches of which the layers leave the padding out
        settings.update(per_device_train_batch_size=6 * factor, packing=True)
        return make_trainer(folder, "text", {"finetune": {}, "ema": {"decay": 0.5}, **extra}, **settings)
    if name == "contrastive":
        case = helpers.contrastive_case()
        case["info"], case["strategies"] = helpers.pair_info(23), {**case["strategies"], **extra}
        return make_trainer(folder, "pairs", **case, **settings)
    if name == "empty":  # the last of 25 rows is a batch alone: three of the four micro-batches are empty
        image["info"] = helpers.image_info(25)
        settings.update(per_device_train_batch_size=2 * factor, gradient_accumulation_steps=2)
        return make_trainer(folder, strategies={"finetune": {}, **extra}, **image, **settings)
    if name == "unused":
        return make_trainer(folder, strategies={"partly": Partly(), **extra}, **image, **settings)
    if name == "batchwise":
        other = helpers.image_info(9, seed=4)
        return make_trainer(
            folder, strategies={"batchwise": Batchwise(), **extra}, streams=lambda _: other, **image, **settings
        )
    if name == "early":
        settings.update(eval_steps=1, early_stopping_patience=3, load_best_model_at_end=True, learning_rate=2e-2)
        return make_trainer(folder, strategies={"ema": {"decay": 0.5}, **extra}, **image, **settings)
    if name == "auto":
        settings.update(per_device_train_batch_size=12 * factor, learning_rate=extra.pop("rate", "auto"), max_steps=30)
        return make_trainer(folder, strategies={"ema": {"decay": 0.5}, **extra}, **image, **settings)
    assert name == "resume", name
    settings.update(save_steps=5, logging_steps=7)
    return make_trainer(folder, strategies={**helpers.stack("distill+ema", teacher), **extra}, **image, **settings)


CASES = (
    *helpers.CASES,
    "text",
    "streamed",
    "packed",
    "contrastive",
    "empty",
    "unused",
    "batchwise",
    "early",
    "auto",
    "resume",
)


def run(name: str, folder: Path, teacher: str, factor: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(exported weights, what else the case leaves on this rank)."""
    indices = Indices()
    world = helpers.accelerator().num_processes
    if name == "resume" and world > 1:
        try:
            build(name, folder, teacher, factor, {"indices": Indices(), "stop": Stop()}).run()
        except InterruptedError:
            helpers.accelerator().wait_for_everyone()
    trainer = build(name, folder, teacher, factor, {"indices": indices})
    result = trainer.run()
    facts: dict[str, Any] = {
        "curve": result.curve,
        "evaluations": result.evaluations,
        "best": result.best_step,
        "indices": list(indices.seen.values()),
    }
    if name == "auto":
        facts["rate"] = result.range_test["learning_rate"]  # type: ignore[index]
        typed = build(name, folder / "typed", teacher, factor, {"rate": facts["rate"], "indices": Indices()}).run()
        facts["equals_typed"] = helpers.identical(weights(result), weights(typed)) and result.curve == typed.curve
    if name == "finetune":
        bundle = trainer.bundle
        found = evaluation.predict(bundle, bundle, trainer.accelerator, trainer.info, "validation", 4)
        facts["predictions"] = {key: value.tolist() for key, value in found.items()}
    return weights(result), facts


def broken(folder: Path) -> str:
    """A loss that is not finite on one rank alone stops all."""
    trainer = make_trainer(folder, strategies={"finetune": {}, "breaks": BreaksOnLastRank()}, max_steps=6)
    try:
        trainer.run()
    except NonFiniteError as error:
        return error.cause
    return "finished"


def main(folder: Path, teacher: str, names: list[str]) -> None:
    rank = helpers.accelerator().process_index
    for name in names:
        tensors, facts = run(name, folder / name, teacher)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.{rank}.safetensors")
        (folder / f"{name}.{rank}.json").write_text(json.dumps(facts))
    (folder / f"broken.{rank}.json").write_text(json.dumps(broken(folder / "broken")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
