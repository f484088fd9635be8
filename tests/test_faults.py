"""The table of faults names tests that exist, for every case."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = [
    line.split("|")[1:-1] for line in (TESTS.parent / "docs/faults.md").read_text().splitlines() if line[:2] == "| "
]
ROWS = [[cell.strip() for cell in row] for row in ROWS if row[0].strip().isdigit()]


def missing(named: str) -> str:
    """What of `file.py::test` is not there."""
    file, _, test = named.partition("::")
    if not (TESTS / file).is_file():
        return f"tests/{file}"
    found = {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)}
    return "" if test in found and test.startswith("test_") else named


def test_every_case_has_a_row_with_its_test_or_says_that_it_has_none():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 47))
    for number, case, what, tests in ROWS:
        assert case and tests, number
        assert re.findall(r"`([^`]+)`", tests) or tests == "with a later issue", number
        assert what or tests == "with a later issue", number


def test_every_named_test_exists():
    named = [name for *_, tests in ROWS for name in re.findall(r"`([^`]+)`", tests)]
    assert len(named) > 60
    assert not [gone for name in named if (gone := missing(name))]


def test_a_test_that_is_gone_would_be_noticed():
    assert missing("test_faults.py::test_that_is_gone") and missing("test_gone.py::test_x")
