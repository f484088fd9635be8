"""Every strategy, merge and ensemble on every task: what is tested, what is refused and why, what has no meaning.

GRID=docs/grid pytest -m slow tests/test_grid.py   # also writes docs/grid.md and docs/grid.json
ACCELERATE_USE_CPU=false GRID_TRAINING='{"bf16": true}' pytest -m slow tests/test_grid.py   # all of it on a GPU
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import measured_on_ranks
import pytest

from kt_hf import registry
from kt_hf.testing.bench import differing
from kt_hf.testing.grid import OUTCOMES, Grid, columns, page

OURS = "kt_hf_plugins."
TASKS = sorted(n for (k, n), e in registry.entries().items() if k == "task" and e.target.startswith(OURS))
COLUMNS = [c for c, (kind, name, _) in columns().items() if registry.entries()[kind, name].target.startswith(OURS)]
DOCS = Path(__file__).parents[1] / "docs"
TRAINING = json.loads(os.environ.get("GRID_TRAINING", "{}"))
WRITTEN = json.loads((DOCS / "grid.json").read_text()) if (DOCS / "grid.json").exists() else {}
FEW = [(TASKS[i % len(TASKS)], COLUMNS[i % len(COLUMNS)]) for i in range(max(len(TASKS), len(COLUMNS)))]
"""Every task and every column once."""


@pytest.mark.parametrize(("task", "column"), FEW, ids=[f"{c}-{t}".replace(" ", "_") for t, c in FEW])
def test_some_pairs(task: str, column: str, tmp_path: Path):
    cell = Grid(task, tmp_path, **TRAINING).cell(column)
    assert [cell.outcome, cell.why] == WRITTEN[task][column]


@pytest.fixture(scope="module")
def found():
    """The cells that tests find; kept where GRID says, once all of them ran."""
    cells: dict[str, dict[str, list[str]]] = {}
    yield cells
    if target := os.environ.get("GRID"):
        ordered = {task: cells[task] for task in TASKS}
        Path(f"{target}.json").write_text(json.dumps(ordered, indent=1) + "\n")
        Path(f"{target}.md").write_text(page(ordered))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_whole_grid(task: str, tmp_path: Path, found: dict[str, dict[str, list[str]]]):
    grid = Grid(task, tmp_path, **TRAINING)
    cells = {column: grid.cell(column) for column in COLUMNS}
    found[task] = {column: [cell.outcome, cell.why] for column, cell in cells.items()}
    assert all(grid.bench.task.metric in cell.metrics for cell in cells.values() if cell.outcome == "tested")
    if "GRID" not in os.environ:
        assert found[task] == WRITTEN[task]


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one(tmp_path: Path):
    """Every task: 9 rows of test on two ranks in batches of 2, where every row must count once."""
    for task, (one, two) in measured_on_ranks.one_and_two(tmp_path, TASKS).items():
        (ours, weights), (theirs, others) = one, two
        assert ours["index"] == theirs["index"] == list(range(9)), task
        assert ours["metric"] in ours["before"], task
        assert ours["before"] == pytest.approx(theirs["before"], rel=1e-4, abs=1e-6, nan_ok=True), task
        if not any("running_mean" in name for name in weights):  # batch statistics are those of a rank's rows
            assert ours["after"] == pytest.approx(theirs["after"], rel=1e-4, abs=1e-6, nan_ok=True), task
            assert not differing(weights, others, rtol=1e-4, atol=1e-5), task


def test_the_page_is_of_what_is_registered():
    assert list(WRITTEN) == TASKS and all(list(cells) == COLUMNS for cells in WRITTEN.values())
    assert (DOCS / "grid.md").read_text() == page(WRITTEN)
    outcomes = {cell[0] for cells in WRITTEN.values() for cell in cells.values()}
    assert outcomes <= set(OUTCOMES) and all(
        cell[1] for c in WRITTEN.values() for cell in c.values() if cell[0] != "tested"
    )


@pytest.mark.parametrize("task", TASKS)
def test_what_every_task_must_run(task: str):
    """The strategies that make sense everywhere are refused nowhere."""
    for column in ("finetune", "frozen layers", "lora", "ema", "uniform_soup", "greedy_soup"):
        assert WRITTEN[task][column] == ["tested", ""], column
