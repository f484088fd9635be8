"""One run of a recipe that may be killed at a chosen point: `kill_child.py RECIPE ARGUMENTS...`, RECIPE being a `.yaml`
(run as `kt-hf run` does) or a `.py` (run as Python does). Two variables of the environment tell it what else to do:

    KILL_NOTES   folder for notes: which rows, with which values, every micro-batch of every step was made of
    KILL_POINT   where this process ends itself, as JSON; see `Point`
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  the environment first

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PATHS = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1}
"""Audit events that change the file system -> how many of their arguments are paths."""


class Point:
    """Where a process ends itself.

    {"step": n, "micro_batch": m, "training": NAME}: in the forward of that micro-batch; NAME is the folder of a stage,
    seed or trial and its seed, such as `main.42`.
    {"op": PATTERN, "nth": n}: before the n-th change of the file system whose description (`fsync .../manifest.json`)
    matches. With "tear": b, the kernel ends it in the middle of the write, as soon as a file exceeds b bytes.
    "rank": only that rank; without it, every rank that comes by.
    """

    def __init__(self, given: dict[str, Any], notes: Path | None):
        self.given, self.notes = given, notes
        self.left = given.get("nth", 1)
        self.pattern = re.compile(given["op"]) if "op" in given else None
        self.active = given.get("rank", rank()) == rank()
        self.busy = False

    def at_step(self, training: str, step: int, micro_batch: int) -> None:
        here = self.given.get("training", training) == training
        wanted = (self.given.get("step"), self.given.get("micro_batch", 0))
        if self.active and here and wanted == (step, micro_batch):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """See every change of the file system that Python makes, before it is made."""
        own, fsync = os.getpid(), os.fsync

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if self.busy or os.getpid() != own:
                return
            if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
                self.change("open", arguments[0])
            elif event in PATHS:
                folder = arguments[-1] if event != "os.rename" else -1
                parts = [_absolute(path, folder) for path in arguments[: PATHS[event]]]
                self.change(event.removeprefix("os."), *parts)

        def noted_fsync(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            self.change("fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(handle)

        sys.addaudithook(audit)
        os.fsync = noted_fsync

    def change(self, what: str, *paths: Any) -> None:
        self.busy = True
        try:
            text = " ".join([what, *(os.fsdecode(p) if not isinstance(p, int) else str(p) for p in paths)])
            if self.notes is not None and str(self.notes) not in text:
                _append(self.notes / f"changes.{rank()}", text)
            if self.active and self.pattern is not None and self.pattern.search(text):
                self.left -= 1
                if self.left == 0:
                    self.end()
        finally:
            self.busy = False

    def end(self) -> None:
        if "tear" not in self.given:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.given["tear"],) * 2)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def _absolute(path: Any, folder: Any) -> str:
    """A path relative to an open folder, as `shutil.rmtree` uses it, in full."""
    path = os.fsdecode(path)
    return (
        os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if isinstance(folder, int) and folder > 0 else path
    )


def _append(path: Path, line: str) -> None:
    """In one system call, so that a kill leaves a whole line or none."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def digest(batch: dict[str, Any]) -> str:
    """Of all tensors of a batch, names and values."""
    import torch

    found = hashlib.sha256()
    for name in sorted(batch):
        if isinstance(batch[name], torch.Tensor):
            found.update(name.encode() + batch[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def register_witness(notes: Path | None, point: Point | None) -> None:
    """A strategy `witness` that changes nothing: it notes what each micro-batch is made of, and is a place to die. And
    one that is wrong, `forgetful`."""
    from kt_hf import Strategy, register

    class Witness(Strategy):
        """Notes the rows of every micro-batch, and a digest of their tensors."""

        def ready(self, model: Any, run: Any) -> None:
            self.training_name = f"{run.folder.name}.{run.seed}"
            self.notes = None if notes is None else notes / self.training_name
            if self.notes is not None:
                self.notes.mkdir(parents=True, exist_ok=True)

        def loss(self, step: Any) -> dict[str, Any]:
            at = step._position
            if self.notes is not None:
                counts = at.rows["train"][at.rank] > 0  # else it only keeps ranks in step
                line = f"{step.batch['index'].tolist() if counts else []} {digest(step.batch)}"
                _append(self.notes / f"{at.step:03d}.{at.micro_batch}.{at.rank}", line)
            if point is not None:
                point.at_step(self.training_name, at.step, at.micro_batch)
            return {}

    class Forgetful(Strategy):
        """Counts steps in an attribute, as no strategy may: the harness must see that it does not resume."""

        def ready(self, model: Any, run: Any) -> None:
            self.steps = 0

        def after_step(self, model: Any, progress: float) -> None:
            self.steps += 1
            next(p for p in model.parameters() if p.requires_grad).data.add_(1e-6 * self.steps)

    register("strategy", "witness")(Witness)
    register("strategy", "forgetful")(Forgetful)


def run(recipe: str, arguments: list[str]) -> int:
    """Run to the end and return the exit code."""
    notes = Path(os.environ["KILL_NOTES"]) if "KILL_NOTES" in os.environ else None
    given = json.loads(os.environ.get("KILL_POINT", "{}"))
    point = Point(given, notes)
    register_witness(notes, point)
    point.watch()
    sys.argv = [recipe, *arguments]
    try:
        if recipe.endswith(".py"):
            runpy.run_path(recipe, run_name="__main__")
        else:
            from kt_hf import cli

            cli.main(["run", recipe, *arguments])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
