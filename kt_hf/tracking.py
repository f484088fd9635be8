"""What a training tells a tracker (TensorBoard, W&B, MLflow, trackio, ...): its settings once, then its curves.

A tracker is started with the first figures, so that none delays the first step; one that fails is left out with a
warning and costs no training. `<stage>/logs/trackers.json` remembers which run of a tracker is ours: a training that is
resumed continues it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_hf import recipe as grammar
from kt_hf.errors import KtError, RecipeError, nearest
from kt_hf.progress import title
from kt_hf.recipe import Train, Training

if TYPE_CHECKING:
    from kt_hf.runner import Context
    from kt_hf.trainer import Trainer

logger = logging.getLogger(__name__)

FILE = "trackers.json"


@contextmanager
def tracking(context: Context, stage: Train, trainer: Trainer) -> Iterator[Callable[..., None] | None]:
    """A function that logs values at a step, to all that `report_to` names; None on other processes than the main."""
    names = trainer.training.report_to if trainer.training.report_to is not None else ["tensorboard"]
    names = [n for n in ([names] if isinstance(names, str) else names) if n != "none"]
    for name in names:
        check_installed(name)
    if not names or not context.accelerator.is_main_process:
        yield None
        return
    settings = configuration(context, stage, trainer.training)
    trackers = [Tracker(name, context, trainer.run_facts.folder, settings) for name in names]

    def track(values: dict[str, float], step: int) -> None:
        for tracker in trackers:
            tracker.log(values, step)

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


def check_installed(name: str) -> None:
    """Raises `RecipeError` for a tracker that is unknown or not installed, without importing it."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        raise RecipeError(f"training.report_to: got '{name}'", nearest(name, map(str, LOGGER_TYPE_TO_CLASS)))
    modules = (name, "tensorboardX") if name == "tensorboard" else (name,)
    if not any(importlib.util.find_spec(module) for module in modules):
        raise RecipeError(f"training.report_to: {name} is not installed", f"pip install {name}, or report_to=none")


class Tracker:
    """One of accelerate's trackers for one training. It begins with the first figures."""

    def __init__(self, name: str, context: Context, folder: Path, settings: dict[str, Any]):
        self.name, self.context, self.folder, self.settings = name, context, folder, settings
        self.tracker: Any = None
        self.failed = False

    def log(self, values: dict[str, float], step: int) -> None:
        if self.tracker is None:
            self._try("be started", self._start)
        if self.tracker is not None:
            self._try("take figures", lambda: self.tracker.log(values, step=step))

    def finish(self) -> None:
        if self.tracker is not None:
            self._try("be closed", self.tracker.finish)

    def _try(self, what: str, work: Callable[[], Any]) -> None:
        if self.failed:
            return
        try:
            work()
        except KtError:
            raise
        except Exception as error:
            from kt_hf.hub import scrub

            self.failed = True
            text = scrub(f"{type(error).__name__}: {error}".strip().splitlines()[0][:200])
            logger.warning(
                "%s: tracker %s could not %s and is left out (%s)", title(self.folder), self.name, what, text
            )

    def _start(self) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        path = self.folder / "logs" / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text()) if path.is_file() else {}
        resumed = self.name in known
        number = known.setdefault(self.name, uuid.uuid4().hex[:12])
        tracker = self._make(LOGGER_TYPE_TO_CLASS[self.name], number, resumed)
        if hasattr(tracker, "start"):
            tracker.start()
        if self.name == "mlflow":  # numbers its runs itself
            known[self.name] = tracker.tracker.info.run_id
        staged = path.with_name(f".{FILE}.partial")
        staged.write_text(json.dumps(known))
        os.replace(staged, path)
        if not resumed:
            tracker.store_init_configuration(self.settings)
        self.tracker = tracker

    def _make(self, cls: Any, number: str, resumed: bool) -> Any:
        """The tracker, told which run to make or to continue."""
        project = self.context.recipe.name or self.context.root.resolve().name
        run, logs = run_name(self.folder), self.folder / "logs"
        if self.name == "wandb":
            where = {} if os.environ.get("WANDB_DIR") else {"dir": str(logs)}
            return cls(project, id=number, name=run, resume="allow", **where)
        if self.name == "trackio":  # knows runs by their names alone, and forgets settings that it is not told again
            return cls(project, name=f"{run} {number}", resume="allow", embed=False, config=dict(self.settings))
        if self.name == "mlflow":
            import mlflow

            artifacts = None
            if not os.environ.get("MLFLOW_TRACKING_URI"):
                root = self.context.root.resolve()
                mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
                artifacts = (root / "mlflow").as_uri()
            return cls(project, logging_dir=artifacts, run_id=number if resumed else None, run_name=run)
        if self.name == "tensorboard":
            return cls("logs", self.folder)
        return cls(run, self.folder) if cls.requires_logging_directory else cls(run)


def run_name(folder: Path) -> str:
    """The training's stage, its seed, and which trial of a search it is."""
    stage, _, rest = title(folder).partition(" ")
    return f"{stage} {rest}" if rest.startswith("seed ") else f"{stage} seed 0 {rest}".strip()


def configuration(context: Context, stage: Train, training: Training) -> dict[str, str | int | float | bool]:
    """The recipe's settings for a stage, flat, without anything secret."""
    from kt_hf.hub import scrub

    given: dict[str, Any] = {
        "stage": stage.name,
        "seed": training.seed,
        "task": type(context.task(stage)).__name__,
        "data": stage.data[1].plain() if stage.data else None,
        "model": stage.model.plain() if stage.model is not None else None,
        "training": {key: getattr(training, key) for key in grammar.settings.parameters(Training)},
        "strategies": {
            grammar.named(item)[0]: context.settings[stage.name, f"strategy:{grammar.named(item)[0]}"]
            for item in stage.strategies
        },
    }
    found: dict[str, str | int | float | bool] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}".strip("."))
        elif isinstance(value, (bool, int, float)):
            found[path] = value
        elif value is not None and value != {}:
            found[path] = scrub(str(value))

    walk(given, "")
    return found
