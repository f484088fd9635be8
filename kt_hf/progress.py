"""What a person sees of a training: a bar on a terminal, now and then a line elsewhere. Only the main process
speaks."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds between two lines where there is no terminal; the first comes after a tenth of that."""


class Progress:
    """Steps done, rate, time left, terms of the loss and learning rate of one training."""

    def __init__(self, name: str, total: int, start: int, main: bool):
        self.name, self.total, self.start, self.done = name, total, start, start
        self.main = main
        self.bar: Any = None
        if main and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, desc=name, leave=False, dynamic_ncols=True)
        self.began = time.monotonic()
        self.next_line = self.began + PATIENCE / 10

    def step(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def losses(self, point: dict[str, Any]) -> None:
        """New means of the terms."""
        terms = {"loss": point["loss"], **(point["terms"] if len(point["terms"]) > 1 else {})}
        shown = {name: f"{value:.4g}" for name, value in terms.items()}
        if self.bar is not None:
            self.bar.set_postfix({**shown, "lr": f"{point['learning_rate']:.2e}"})
        elif self.main and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + PATIENCE
            text = ", ".join(f"{name} {value}" for name, value in shown.items())
            logger.info("%s, %s, learning rate %.2e, %s", self.where(), text, point["learning_rate"], self.speed())

    def where(self) -> str:
        return f"{self.name} step {self.done}/{self.total}"

    def speed(self) -> str:
        seconds, steps = time.monotonic() - self.began, self.done - self.start
        if not steps or not seconds:
            return "just begun"
        return f"{steps / seconds:.3g} steps/s, {_duration((self.total - self.done) * seconds / steps)} left"

    def say(self, text: str) -> None:
        """A line that must not be lost, above the bar."""
        if self.bar is not None:
            self.bar.clear()
        logger.info("%s: %s", self.where(), text)
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Bytes:
    """Bytes done of a long piece of work: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.done = name, total, 0
        self.bar: Any = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total, desc=name, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, mininterval=0.2
            )
        self.next_line = time.monotonic() + PATIENCE

    def add(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + PATIENCE
            logger.info("%s: %.1f of %.1f GB", self.name, self.done / 1e9, self.total / 1e9)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def title(folder: Path) -> str:
    """The training of a folder in words: its stage, its seed, and which trial of a search it is."""
    parts, stage = [], folder
    if stage.parent.name == "trials":
        number, _, count = stage.name.partition("-of-")
        parts, stage = [f"trial {number} of {count}"], stage.parent.parent
    if stage.parent.name == "seeds":
        parts, stage = [f"seed {stage.name}", *parts], stage.parent.parent
    return " ".join([stage.name, *parts])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"
