"""`learning_rate: auto`: a learning-rate range test on the target data, before the first step of a training.

Some steps of that very training (its batches, stack, accumulation and ranks) are made while the rate grows; then every
tensor is as before, so that the training equals one with the found rate typed in, bit for bit. What was found stays in
`<stage>/range_test.json`: a run that is continued takes it from there, one that was killed within the test begins the
test again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kt_hf import checkpoint, signals
from kt_hf.errors import RecipeError
from kt_hf.functional import learning_rate
from kt_hf.notes import Notes
from kt_hf.progress import title

if TYPE_CHECKING:
    from kt_hf.recipe import Training
    from kt_hf.trainer import Trainer

logger = logging.getLogger(__name__)

FILE = "range_test.json"
FEWEST, USUAL, MOST = 20, 50, 100
"""Steps: a tenth of the planned ones, but not fewer than usual nor more than most; trainings shorter than the fewest
are refused."""
_RANGES = {"sgd": (1e-4, 10.0)}
_RANGE = 1e-6, 1.0
_REMEDY = (
    "give learning_rate a number (5e-5 is usual for pretrained transformers) or a list to choose from, or take larger "
    "batches"
)


def num_steps(planned: int) -> int:
    """Steps of the test of a training of so many. Raises `RecipeError` where those are too few."""
    if planned < FEWEST:
        raise RecipeError(
            f"training.learning_rate=auto: a test takes at least {FEWEST} steps, the training has {planned}", _REMEDY
        )
    return min(planned, MOST, max(USUAL, planned // 10))


def settle(trainer: Trainer) -> dict[str, Any]:
    """Let the trainer go on with the rate that the test finds, or found before; returns the test's facts.

    Raises `RecipeError` where the loss never falls.
    """
    path, run = trainer.run_facts.folder / FILE, trainer.run_facts
    found = json.loads(path.read_text()) if path.is_file() else None
    if found is None or found["data"] != run.info.fingerprint:
        found = measure(trainer)
        if run.accelerator.is_main_process:
            staged = path.with_name(f".{FILE}.partial")
            with checkpoint.disk(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.write_json(staged, found)
                os.replace(staged, path)
                checkpoint.fsync_folder(path.parent)
        run.accelerator.wait_for_everyone()
    trainer.training.learning_rate = found["learning_rate"]
    trainer.begin()
    logger.info(
        "%s: learning rate %.2e, found by a range test of %d steps (%.1f s)",
        title(run.folder),
        found["learning_rate"],
        len(found["losses"]),
        found["seconds"],
    )
    return found


def measure(trainer: Trainer) -> dict[str, Any]:
    """Make the test; every rank finds the same."""
    run, began = trainer.run_facts, time.perf_counter()
    planned = num_steps(run.planned_steps)
    rates = learning_rate.ramp(*_RANGES.get(trainer.training.optim, _RANGE), planned)
    with restored(trainer):
        losses = climb(trainer, rates)
    found = learning_rate.best_rate(rates, losses, planned)
    if found is None:
        raise RecipeError(
            f"training.learning_rate=auto: the loss never fell in {len(losses)} steps with rates from {rates[0]:g} to "
            f"{rates[max(len(losses) - 1, 0)]:g} (it began at {losses[0]:.4g} and was {min(losses):.4g} at its lowest, "
            "which is within its noise)"
            if losses
            else "training.learning_rate=auto: the loss was not finite from the first step on",
            _REMEDY,
        )
    return {
        "learning_rate": found,
        "rates": rates[: len(losses)],
        "losses": losses,
        "smoothed": learning_rate.smooth(losses, planned),
        "seconds": time.perf_counter() - began,
        "data": run.info.fingerprint,
    }


def climb(trainer: Trainer, rates_N: list[float]) -> list[float]:
    """Train with each rate for a step; the losses, averaged over ranks, until they diverge or are not finite."""
    trainer.base_rate, trainer.factor_at = 1.0, rates_N.__getitem__
    trainer.notes = Notes(trainer.run_facts.device, trainer.run_facts.world)  # stops on what others may skip
    losses: list[float] = []
    with signals.patience(), closing(trainer.feed.steps(0, len(rates_N))) as steps:
        for step, (window, sizes) in enumerate(steps):
            trainer.step(step, [{k: trainer.to_device(b) for k, b in micro.items()} for micro in window], sizes)
            loss = trainer.notes.means(1)["loss"]
            if trainer.told.to_stop:
                raise signals.Interrupted(signals.received() or signal.SIGTERM, " in the test of learning rates")
            if not math.isfinite(loss) or trainer.notes.first_bad() is not None:
                break
            losses.append(loss)
            if learning_rate.has_diverged(losses):
                break
    return losses


@contextmanager
def restored(trainer: Trainer) -> Iterator[None]:
    """Afterwards, all that a step changes is as it was: trained weights, buffers, everything of strategies."""
    bundle = trainer.bundle
    own = [p for p in bundle.model.parameters() if p.requires_grad]
    changing = {id(t): t for t in [*own, *bundle.strategies.parameters(), *bundle.buffers()]}
    kept = [(tensor, tensor.detach().clone()) for tensor in changing.values()]
    try:
        yield
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def describe(training: Training, planned: int) -> str:
    """One line for the plan."""
    low, high = _RANGES.get(training.optim, _RANGE)
    return f"learning rate: by a range test of {num_steps(planned)} steps from {low:g} to {high:g}"
