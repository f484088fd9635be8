"""docs/transfer.md shows the figures that are kept, of rows whose recipes have no mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_recipe import mistakes

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import tasks

    return tasks


def test_the_page_is_of_the_figures(tasks):
    rows = json.loads((ROOT / "benchmarks" / "results" / "tasks.json").read_text())["rows"]
    assert [row["row"] for row in rows] == [name for name in tasks.ROWS if name in {row["row"] for row in rows}]
    assert tasks.PAGE.read_text() == tasks.page(rows)
    for row in rows:
        gain = row["gain"]  # without width where both models answered the majority class throughout
        assert gain["seeds"] == 3 and gain["low"] <= gain["value"] <= gain["high"], row["row"]
        assert gain["low"] < gain["high"] or gain["low"] == gain["value"] == gain["high"] == 0, row["row"]


def test_recipes_of_rows_have_no_mistakes(tasks, monkeypatch, tmp_path):
    """The data need not be there: files are looked for when a recipe runs."""
    import task_rows

    monkeypatch.setattr(task_rows, "minilm", lambda: "bert")
    for name in ("rectangles", "words", "spoken_and_written"):
        monkeypatch.setattr(task_rows.made, name, lambda *given: tmp_path)
    for name, build in tasks.ROWS.items():
        assert mistakes(build(tmp_path, tmp_path)) == [], name
