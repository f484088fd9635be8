"""Trainings whose weights are sharded over processes: `shard_cases.py FOLDER TEACHER WHAT:CASE...` on every rank.

WHAT is `run`, or `stop` (leave after the checkpoint of step 5), or `go` (continue what `stop` has left). A case is one
of `rank_cases`, or one of `CASES` here.
"""

import errno
import json
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  the environment first
import helpers
import rank_cases
import torch
from helpers import weights
from kt_hf_plugins.fill_mask import FillMask
from kt_hf_plugins.text2text_generation import Text2TextGeneration
from kt_hf_plugins.text_generation import TextGeneration
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from kt_hf import Strategy, checkpoint
from kt_hf.errors import ResourceError
from kt_hf.recipe import Model
from kt_hf.trainer import Trainer


class DiskFull(Strategy):
    """From the second step on, the last process finds no space."""

    def after_step(self, model, progress):
        accelerator = helpers.accelerator()
        if accelerator.process_index == accelerator.num_processes - 1:
            checkpoint.write = out_of_space


def out_of_space(path, chunks):
    raise OSError(errno.ENOSPC, "no space left", str(path))


class Share(Strategy):
    """Notes which share of the model's weights this process holds after an update."""

    def __init__(self):
        super().__init__()
        self.held = 0.0

    def after_step(self, model, progress):
        parameters = list(model.parameters())
        mine = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        self.held = mine / sum(p.numel() for p in parameters)


class Rates(Strategy):
    """A rate of its own for the head; the first layer begins in the middle of the run."""

    def lr_scale(self, name):
        if "classifier" in name:
            return 3.0
        return (lambda progress: float(progress > 0.4)) if "layers.0" in name else 1.0


CASES = (
    "checkpointing",
    "chunks",
    "accumulation",
    "adapter",
    "tied",
    "rates",
    "skips",
    "masked",
    "writing",
    "saving",
    "micro1",
    "micro4",
    "full",
)


def build(name: str, folder: Path, teacher: str, factor: int, extra: dict[str, Strategy]) -> Trainer:
    if name not in CASES:
        return rank_cases.build(name, folder, teacher, factor, extra)
    image: dict[str, Any] = {"kind": "image", "info": helpers.image_info(27), "task": helpers.ImageClassification()}
    settings: dict[str, Any] = {**rank_cases.ADAMW, "per_device_train_batch_size": 4 * factor}
    stack = {**helpers.stack("finetune", teacher), **extra}
    if name == "checkpointing":
        settings["gradient_checkpointing"] = True
    if name == "chunks":
        settings["forward_chunk_size"] = 2
    if name == "accumulation":
        settings.update(per_device_train_batch_size=2 * factor, gradient_accumulation_steps=2)
    if name == "adapter":
        stack = {"lora": {"r": 4, "save": "adapter"}, "ema": {"decay": 0.8}, **extra}
    if name == "rates":
        settings["weight_decay"] = 0.5
        stack = {**stack, "rates": Rates()}
    if name == "skips":
        settings["non_finite"] = "skip"
        stack = {**stack, "breaks": rank_cases.BreaksOnLastRank()}
    if name == "tied":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = Model(config="llama", config_overrides={**sizes, "tie_word_embeddings": True})
        task, info = TextGeneration(), helpers.text_info(27)
        del info.roles["label"]
        stack = {"finetune": {}, "ema": {"decay": 0.8}, **extra}
        return helpers.make_trainer(folder, strategies=stack, task=task, info=info, model=model, **settings)
    if name == "masked":  # embeddings that are a group of their own, but tied to the head
        info = helpers.text_info(27)
        del info.roles["label"]
        model = Model(config="bert", config_overrides=helpers.BERT)
        return helpers.make_trainer(folder, strategies=stack, task=FillMask(), info=info, model=model, **settings)
    if name == "writing":  # ranks write texts of different lengths
        info = helpers.text_info(27)
        rows = {split: r.remove_columns("label").rename_column("text", "source") for split, r in info.splits.items()}
        info.splits = {split: r.add_column("target", [t[:12] for t in r["source"]]) for split, r in rows.items()}
        info.roles = {"source": "source", "target": "target"}
        model = Model(**Text2TextGeneration.conformance["model"])
        task = Text2TextGeneration(max_target_length=16)
        return helpers.make_trainer(folder, strategies=stack, task=task, info=info, model=model, **settings)
    if name == "full":
        settings["save_steps"] = 5
        stack = {**stack, "full": DiskFull()}
    if name == "saving":
        settings["save_steps"] = 5
        stack = {**helpers.stack("lora+distill+ema", teacher), **extra}
    if name.startswith("micro"):
        settings.update(gradient_accumulation_steps=int(name[-1]), profile_steps=1, max_steps=5)
    return helpers.make_trainer(folder, strategies=stack, **image, **settings)


def run(what: str, name: str, folder: Path, teacher: str, factor: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """(exported weights, facts) of one case; no weights for `stop`."""
    share = Share()
    extra: dict[str, Strategy] = {"share": share, **({"stop": rank_cases.Stop()} if what == "stop" else {})}
    trainer = build(name, folder, teacher, factor, extra)
    try:
        result = trainer.run()
    except InterruptedError:
        return {}, {"held": share.held}
    except ResourceError as error:
        return {}, {"error": error.cause}
    if trainer.accelerator.is_main_process:
        trainer.task.save(result.loaded, folder / "model")
    facts = {"curve": result.curve, "evaluations": result.evaluations, "held": share.held, "best": result.best_step}
    facts["skipped"] = result.cost["skipped_steps"]
    facts["left"] = left(result.loaded.model)
    return weights(result), facts


def left(model: torch.nn.Module) -> list[str]:
    """What the sharding has forgotten to take out of a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    found = [name for module in model.modules() for name in hooks if vars(module)[name]]
    found += [
        name for module in model.modules() for name in vars(module) if name.startswith(("ds_", "_external", "applied_"))
    ]
    return found + [n for n, p in model.named_parameters() if isinstance(p, DTensor) or hasattr(p, "ds_id")]


def main(folder: Path, teacher: str, jobs: list[str]) -> None:
    accelerator = helpers.accelerator()
    for job in jobs:
        what, _, name = job.partition(":")
        tensors, facts = run(what, name, folder / name, teacher, 2 // accelerator.num_processes)
        accelerator.wait_for_everyone()
        rank = accelerator.process_index
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.{rank}.safetensors")
        (folder / f"{name}.{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
