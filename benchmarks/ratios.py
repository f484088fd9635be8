"""Side-by-side timing: alternatives take turns in every round, so that what else the machine does strikes all of them.

A ratio is the median of the rounds' own ratios, with a bootstrap interval; absolute times are only there to be looked
at.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def compare(functions: dict[str, Callable[[], Any]], rounds: int = 7, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every function in every round; each round starts with another function."""
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            functions[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def paired(a: Sequence[float], b: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """(median of a_i / b_i, lower, upper end of its 95 % bootstrap interval)."""
    ratios = np.asarray(a) / np.asarray(b)
    picked = np.random.default_rng(0).integers(0, len(ratios), (draws, len(ratios)))
    low, high = np.percentile(np.median(ratios[picked], axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def machine() -> dict[str, Any]:
    """What a figure depends on, without saying whose machine it is."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def report(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table and write them to results/NAME.json."""
    shown = [{key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    width = {key: max(len(key), *(len(row.get(key, "")) for row in shown)) for key in columns}
    for row in ({key: key for key in columns}, *shown):
        print("  ".join(row.get(key, "").ljust(width[key]) for key in columns).rstrip())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": list(rows)}, indent=1) + "\n")
