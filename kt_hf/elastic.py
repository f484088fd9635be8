"""Another number of processes than a checkpoint was made with: the same global batches, shared out differently."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

from kt_hf import checkpoint
from kt_hf.errors import RecipeError
from kt_hf.feed import global_batch
from kt_hf.recipe import Training

logger = logging.getLogger(__name__)


def fit(training: Training, world: int, checkpoints: Path, whole_batch: bool = False) -> Training:
    """The settings with which `world` processes make the steps of the newest checkpoint in a folder.

    What a process computes at a time stays at most per_device_train_batch_size rows, the rest is accumulated;
    `whole_batch`: a loss is about the batch as a whole, nothing may be accumulated. Settings are returned as they are
    where there is no checkpoint, or one of as many processes.

    Raises `RecipeError` where the global batch cannot be shared by so many, naming the numbers that can.
    """
    found = _newest(checkpoints)
    if found is None or found[1] == world:
        return training
    rows, former = found
    if rows == global_batch(training, world):
        return training
    share, rest = divmod(rows, world)
    if rest:
        numbers = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise RecipeError(
            f"the run was begun on {_processes(former)} with steps of {rows} rows, which {world} cannot share equally",
            f"continue it on as many as divide them: {numbers}",
        )
    most = training.per_device_train_batch_size
    pieces = 1 if whole_batch else next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)
    fitted = copy.copy(training)
    fitted.per_device_train_batch_size, fitted.gradient_accumulation_steps = share // pieces, pieces
    logger.warning(
        "the run was begun on %s, now there are %d: per_device_train_batch_size=%d and "
        "gradient_accumulation_steps=%d keep its steps of %d rows; sums may differ in their last bits",
        _processes(former),
        world,
        share // pieces,
        pieces,
        rows,
    )
    return fitted


def _processes(count: int) -> str:
    return f"{count} process" if count == 1 else f"{count} processes"


def _newest(checkpoints: Path) -> tuple[int, int] | None:
    """(rows of a step, processes) of the newest checkpoint that can be read; it is verified when it is loaded."""
    for path in reversed(checkpoint.steps(checkpoints)):
        try:
            facts = json.loads((path / "trainer.json").read_text())
            manifest = json.loads((path / "manifest.json").read_text())
            return int(facts["global_batch"]), int(manifest["world"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
