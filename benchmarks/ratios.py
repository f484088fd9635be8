"""Comparisons side by side: the candidates take turns within one process, so that a busy machine slows all of them, and
what is reported is the ratio within a round, as a median with a 95 % interval over rounds."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def compare(candidates: dict[str, Callable[[], Any]], rounds: int = 7, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every candidate in every round. The order within a round alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(warmup + rounds):
        for name in names if i % 2 == 0 else reversed(names):
            began = time.perf_counter()
            given = candidates[name]()
            took = given if isinstance(given, float) else time.perf_counter() - began
            if i >= warmup:
                seconds[name].append(took)
    return seconds


def paired(
    ours: list[float], theirs: list[float], of: Callable[[float, float], float] = lambda a, b: a / b
) -> tuple[float, float, float]:
    """(median, low, high) of the ratios (or of what `of` makes) within rounds; 95 % by bootstrap over rounds."""
    values = [of(a, b) for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[49], medians[1949]


def report(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print a table of rows with the same keys, and keep it as JSON beside the scripts."""
    columns = list(rows[0])
    texts = [[_text(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(t[i]) for t in texts)) for i, c in enumerate(columns)]
    print("  ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)))
    for text in texts:
        print("  ".join(t.ljust(w) for t, w in zip(text, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"rows": rows, **machine(), **facts}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{value[0]:.4g} [{value[1]:.4g}, {value[2]:.4g}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
