"""The grid: every strategy, merge and ensemble on a task, each by a recipe of its own on tiny rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from kt_hf import registry
from kt_hf.errors import Mistakes, NotMeaningful, RecipeError
from kt_hf.recipe import Data, Ensemble, Merge, Recipe, Train
from kt_hf.testing.bench import Bench
from kt_hf.testing.strategies import required

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "eval_steps": 0}
OF_FINETUNE: dict[str, dict[str, Any]] = {
    "finetune": {},
    "frozen layers": {"freeze_layers": 1},
    "linear probe": {"linear_probe": True},
}
"""Columns that are settings of one strategy."""
MERGES = ("fisher", "greedy_soup", "learned_soup", "regmean", "uniform_soup")
"""Those that run models of a task, and the one that stands for all others, which know no tasks but tensors."""


OUTCOMES = ("tested", "refused", "not meaningful")


@dataclass(frozen=True)
class Cell:
    """What came of a pair. outcome: one of `OUTCOMES`; why: what was said."""

    outcome: str
    why: str = ""
    metrics: tuple[str, ...] = ()


class Grid:
    """One row of the grid: a task with its tiny data, and two models that were trained on them.

    training: settings beside the grid's own.
    """

    def __init__(self, task: str, folder: Path, **training: Any):
        self.task, self.folder, self.training = task, Path(folder), {**TRAINING, **training}
        self.bench = Bench(task, self.folder / "bench")

    @functools.cached_property
    def data(self) -> Data:
        folder = self.folder / "data"
        folder.mkdir(parents=True)
        for split, rows in self.bench.info.splits.items():
            rows = rows.remove_columns("index")
            if self.bench.info.labels is not None and rows.features["label"] == datasets.Value("int64"):
                rows = rows.cast_column("label", datasets.ClassLabel(names=self.bench.info.labels))
            rows.to_parquet(folder / f"{split}.parquet")
        names = next(iter(self.bench.info.splits.values())).column_names
        return Data(str(folder), columns={name: name for name in names if name != "index"})

    def stack(self, strategies: dict[str, dict[str, Any]]) -> list[Any]:
        """With an objective, where the task has none of its own and these add none."""
        found: list[Any] = [{name: given} for name, given in strategies.items()]
        if not self.bench.task.has_loss and not any(_adds(name) for name in strategies):
            found.append(next(name for name in registry.names("strategy") if _adds(name) and not _needs(name)))
        return found

    @functools.cached_property
    def parents(self) -> list[str]:
        """Two models of one start."""
        start = {"path": self.bench.saved("start")}
        stages = [
            Train(name, strategies=self.stack({"finetune": given}), model=start)
            for name, given in (("one", {}), ("two", {"freeze_layers": 1}))
        ]
        self.run(stages, "parents")
        return [str(self.folder / "parents" / stage.name / "model") for stage in stages]

    def run(self, stages: list[Any], name: str) -> dict[str, Any]:
        from kt_hf import run

        given = type(self.bench.task).conformance.get("settings", {})
        recipe = Recipe(stages, task={self.task: given}, data=self.data, training=self.training)
        return run(recipe, self.folder / name)["stages"][-1]

    def stage(self, column: str) -> Any:
        kind, name, given = columns()[column]
        if kind == "strategy":
            own = {**given, **dict.fromkeys(_needs(name), self.parents[0])}
            return Train("cell", strategies=self.stack({name: own}), model={"path": self.bench.saved("start")})
        noun = {"merge": Merge, "ensemble": Ensemble}[kind]
        cls = registry.load(kind, name)
        models = self.parents[: getattr(cls, "max_parents", None)]
        base = {"base": self.bench.saved("start")} if getattr(cls, "needs_base", False) else {}
        return noun("cell", {name: given}, models=models, **base)

    def cell(self, column: str) -> Cell:
        """Run one pair. What is refused must be refused by a `RecipeError`; anything else is a fault and raised."""
        try:
            found = self.run([self.stage(column)], column.replace(" ", "_"))
        except RecipeError as error:
            first = error.mistakes[0] if isinstance(error, Mistakes) else error
            said = first.cause.removeprefix("stages.cell: ")
            return Cell("not meaningful" if isinstance(first, NotMeaningful) else "refused", said)
        return Cell("tested", "", tuple(found["metrics"]))


def columns() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Column -> (kind, plugin, settings), for all that is registered."""
    found: dict[str, tuple[str, str, dict[str, Any]]] = {
        column: ("strategy", "finetune", given) for column, given in OF_FINETUNE.items()
    }
    for kind in ("strategy", "merge", "ensemble"):
        for name in registry.names(kind):
            if kind != "merge" or name in MERGES:
                found.setdefault(name, (kind, name, {}))
    return found


def _adds(name: str) -> bool:
    return bool(getattr(registry.load("strategy", name), "adds_objective", False))


def _needs(name: str) -> list[str]:
    """Settings of a strategy that name a model and have no default."""
    return required(registry.load("strategy", name), "model")


def page(cells: dict[str, dict[str, list[str]]]) -> str:
    """Task -> column -> (outcome, why), as a page for docs/."""
    names = list(next(iter(cells.values())))
    lines = [
        "# Every strategy, merge and ensemble on every task",
        "",
        "Written by `GRID=docs/grid pytest -m slow tests/test_grid.py`, which trains, merges or combines tiny fresh",
        "models of every task by a recipe, and compares what it finds with what is written here.",
        "",
        "Of merges these are the ones that run models of a task; for all others, which know no tasks but tensors,",
        "uniform_soup stands (tests/test_merge_methods.py tries them).",
        "",
        "yes: it ran, and its result was saved, loaded and measured. A number: refused before anything was trained, or",
        "(in brackets) without a meaning for the task; the notes below say why.",
        "",
        f"| task | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    notes: dict[str, int] = {}
    for task, row in cells.items():
        shown = [_mark(outcome, why, notes) for outcome, why in row.values()]
        lines.append(f"| `{task}` | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{number}. {why}" for why, number in notes.items()), ""])


def _mark(outcome: str, why: str, notes: dict[str, int]) -> str:
    if outcome == "tested":
        return "yes"
    number = notes.setdefault(why, len(notes) + 1)
    return f"({number})" if outcome == "not meaningful" else str(number)
