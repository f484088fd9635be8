"""How long a recipe will take: a few steps of every training are made on its own data and thrown away.

Nothing is written to the output folder. A model that an earlier stage is still to make is played by an untrained one of
the same shape.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kt_hf import estimate, range_test, search, skeleton, stages
from kt_hf import folder as folders
from kt_hf.errors import RecipeError
from kt_hf.recipe import Model, Train
from kt_hf.trainer import Trainer

if TYPE_CHECKING:
    from kt_hf.runner import Context
    from kt_hf.task import Batch

logger = logging.getLogger(__name__)

WARM, TIMED = 2, 3
"""Steps: the first ones are slower than any other."""


@dataclass
class Timing:
    """What was measured of a stage.

    step, seconds, evaluation: seconds of a step, of all that are planned, of all evaluations. peak: bytes of tensors at
    their height; resident: of the process, above those before the model was loaded (0 on a GPU). largest: the largest
    micro-batch by stream, with which the height was measured.
    """

    step: float
    seconds: float
    evaluation: float
    peak: int
    resident: int
    largest: dict[str, Batch]
    stand_ins: list[str]


def measure(context: Context, stage: Train) -> Timing | str:
    """Make a few steps of the stage's training; or in words why that cannot be."""
    stand_ins: list[str] = []

    def resolve(ref: Any) -> Model:
        model = ref if isinstance(ref, Model) else Model(**ref) if isinstance(ref, dict) else Model(path=ref)
        made = context.resolve(model, 0)
        if not _waits(context, model):
            return made
        shape = skeleton.fresh(context, model)
        if shape is None:
            raise _NotThere(f"the model {model.path} is not there yet, and what it will look like is not known")
        stand_ins.append(str(model.path))
        return shape

    whole = stage
    context, stage = context.changed(stage, search.trials(stage)[0])
    test = stage.training.learning_rate == "auto"
    if test:
        context, stage = context.changed(stage, {"training.learning_rate": 1e-6})
    before = _baseline(context.accelerator.device)
    with tempfile.TemporaryDirectory(prefix="kt_hf-") as folder:
        try:
            made = stages.make_trainer(context, stage, 0, Path(folder) / stage.name, resolve)
            try:
                return _steps(whole, made, before, stand_ins, test)
            finally:
                made.release()
        except _NotThere as missing:
            return missing.cause


class _NotThere(RecipeError):
    """A model that an earlier stage is still to make, of a shape that is not known."""


def _waits(context: Context, model: Model) -> bool:
    """Whether an earlier stage is still to make this model."""
    path = model.path
    if not (isinstance(path, str) and path.startswith("@")):
        return False
    return folders.finished(folders.stage_folder(context.root, path[1:], 0)) is None


def _steps(stage: Train, made: Trainer, before: int, stand_ins: list[str], range_tested: bool) -> Timing:
    """Warm up, time, and reckon what the whole stage takes, were all trials of a search like the first."""
    made.prepare()
    planned, device = made.run_facts.planned_steps, made.run_facts.device
    number = min(WARM + TIMED, planned)
    warm = min(WARM, number - 1)
    largest: tuple[Any, Any] = ([], [])
    with stages.peak_memory(device) as resident, closing(made.feed.steps(0, number)) as steps:
        for step in range(number):
            if step == warm:
                made.clock.seconds.update(dict.fromkeys(made.clock.seconds, 0.0))
                began = _now(device)
            window, sizes = next(steps)
            if _elements(window) > _elements(largest[0]):
                largest = window, sizes
            _step(made, step, window, sizes)
        seconds = _now(device) - began
    made.clock.settle()
    each = seconds / (number - warm)
    rows = sum(len(micro["train"]["index"]) for micro in window) * (number - warm)
    evaluated = evaluated_rows(made, planned) / made.run_facts.world
    runs = stage.seeds + len(search.trials(stage)) - 1
    test = range_test.num_steps(planned) * each if range_tested else 0.0
    evaluation = runs * evaluated * made.clock.seconds["forward"] / max(rows, 1)
    peak = _tensors_at_height(made, *largest)
    above = 0 if device.type == "cuda" else resident["bytes"] - before
    biggest = max(largest[0], key=lambda micro: _elements([micro]))
    return Timing(each, runs * planned * each + test, evaluation, peak, above, biggest, stand_ins)


def _step(made: Trainer, step: int, window: list[dict[str, Batch]], sizes: Any) -> None:
    made.step(step, [{k: made.to_device(batch) for k, batch in micro.items()} for micro in window], sizes)


def evaluated_rows(made: Trainer, planned: int) -> int:
    """Rows that one training evaluates in all: validation now and then, the split of the report at the end."""
    splits, every = made.info.splits, made.cadence(made.training.eval_steps, True)
    times = -(-planned // every) if every else 0
    return times * len(splits.get("validation", ())) + len(splits[made.info.evaluation_split])


def _tensors_at_height(made: Trainer, window: list[dict[str, Batch]], sizes: Any) -> int:
    """Bytes of tensors at the height of one more step: as the device counts them, on a CPU as the profiler does."""
    device = made.run_facts.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _step(made, 0, window, sizes)
        return torch.cuda.max_memory_allocated(device)
    state = [v for s in made.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    frozen = [member.model for each in made.run_facts._frozen.values() for member in each.members]
    resident = estimate.bytes_of([made.bundle, *frozen]) + sum(v.numel() * v.element_size() for v in state)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _step(made, 0, window, sizes)
    with tempfile.TemporaryDirectory(prefix="kt_hf-") as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = height = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        height = max(height, now)
    return resident + height


def _elements(window: list[dict[str, Batch]]) -> int:
    tensors = (v for micro in window for batch in micro.values() for v in batch.values())
    return sum(v.numel() for v in tensors if isinstance(v, torch.Tensor))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _baseline(device: torch.device) -> int:
    """Bytes in use before the model is loaded; memory that was freed goes back to the system first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            pass
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
    return 0


def describe(context: Context, stage: Train, found: Timing | str) -> list[str]:
    """Lines for the plan."""
    if isinstance(found, str):
        return [f"not timed: {found}"]
    played = f"; an untrained model stood in for {', '.join(dict.fromkeys(found.stand_ins))}" if found.stand_ins else ""
    lines = [
        f"timed: {found.step:.3g} s a step, {minutes(found.seconds)} for all steps of the stage and about "
        f"{minutes(found.evaluation)} for its evaluations{played}"
    ]
    shape = estimate.shape_of(found.largest["train"])
    _, context, stage = context.trials(stage)[0]
    sketch = skeleton.plan_setup(context, stage)
    expected = estimate.memory(context, stage, sketch, found.largest).peak if sketch else None
    beside = f"estimated {estimate.size_of(expected)}" if expected else "no estimate"
    resident = (
        f"; the process grew by {estimate.size_of(found.resident)}, with what libraries and allocator keep"
        if found.resident
        else ""
    )
    lines.append(f"measured: {estimate.size_of(found.peak)} at its height, {beside} ({shape}){resident}")
    return lines


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"
