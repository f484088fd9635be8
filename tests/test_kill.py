"""Runs that are killed, at any moment and any number of times, end bit for bit as the run that never was.

    pytest -m slow tests/test_kill.py                          # minutes; prints the table
    KILL_TABLE=docs/resume pytest -m slow tests/test_kill.py   # also writes docs/resume.md and docs/resume.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kill_harness
import kill_rows
import pytest
from kill_harness import Parent, Place, Row
from kill_rows import ROWS, WAITING

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    found = Parent(tmp_path_factory.mktemp("cache"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    kill_rows.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Lines that tests add; printed at the end, and written where KILL_TABLE says."""
    lines: list[dict[str, Any]] = []
    yield lines
    text = kill_harness.markdown(lines)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{text}")
    if target := os.environ.get("KILL_TABLE"):
        Path(f"{target}.md").write_text(f"{HEAD}\n{text}")
        Path(f"{target}.json").write_text(json.dumps(lines, indent=1) + "\n")


HEAD = """# Killed and resumed

Every row is a recipe that was run twice: once left alone, once killed by SIGKILL at the given number of points and started
again each time. `equal` means bit for bit: exported weights, every tensor of the checkpoints (weights, optimizer, EMA), losses,
learning rates, evaluations, metrics, predictions, the files that are left, and the rows and pixels or tokens of every
micro-batch, each time it was computed. `resumed at` are the steps at which the started-again processes went on; `-`: no
checkpoint was there yet, or the training was finished. Written by `KILL_TABLE=docs/resume pytest -m slow tests/test_kill.py`.
"""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{'+'.join(row.strategies())}: {row.name}")
def test_killed_equals_undisturbed(row: Row, parent: Parent, data: Path, table: list[Any], tmp_path: Path) -> None:
    outcome = kill_harness.play(parent, row, tmp_path, data)
    table.append(kill_harness.entry(outcome))
    assert not outcome.differences, "\n".join(outcome.differences)
