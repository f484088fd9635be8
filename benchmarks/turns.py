"""Loops that take turns, so that a machine that is slower for a second is so for all of them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

Turn = Callable[[], None]


class Turns:
    """Lets several loops go on some steps at a time, and takes the time of these.

    block: how many steps. synchronize: called at the end of a block, so that its time is that of all that it asked for.
    """

    def __init__(self, loops: dict[str, Callable[[Turn], None]], block: int = 1, synchronize: Turn = lambda: None):
        self.block, self.synchronize = block, synchronize
        self.steps = dict.fromkeys(loops, 0)
        self.seconds: dict[str, list[float]] = {name: [] for name in loops}
        self.changed = threading.Condition()
        self.running: str | None = None
        self.ended: dict[str, BaseException | None] = {}
        self.began = 0.0
        for name, loop in loops.items():  # each loads its model, up to its first step, while the others wait
            self.running = name
            threading.Thread(target=self._run, args=(name, loop), daemon=True).start()
            self._wait_until_free()

    def _run(self, name: str, loop: Callable[[Turn], None]) -> None:
        error: BaseException | None = None
        try:
            loop(lambda: self._turn(name))
        except BaseException as raised:
            error = raised
        with self.changed:
            self.ended[name], self.running = error, None
            self.changed.notify_all()

    def _turn(self, name: str) -> None:
        """Called by a loop at the start of each of its steps."""
        self.steps[name] += 1
        if self.steps[name] % self.block != 1 % self.block:
            return
        self.synchronize()
        took = time.perf_counter() - self.began
        with self.changed:
            if self.began:
                self.seconds[name].append(took)
            self.running = None
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.running == name)
        self.began = time.perf_counter()

    def _wait_until_free(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.running is None)
            for error in self.ended.values():
                if error is not None:
                    raise error

    def go(self) -> dict[str, list[float]]:
        names = list(self.seconds)
        for i in itertools.count():
            for name in names if i % 2 == 0 else reversed(names):
                if name not in self.ended:
                    with self.changed:
                        self.running = name
                        self.changed.notify_all()
                    self._wait_until_free()
            if len(self.ended) == len(names):
                return self.seconds
