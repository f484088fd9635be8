"""SIGINT and SIGTERM: the first one ends a training after its step, with a checkpoint; a second one ends it at once.

Outside of a training loop the first one already raises. Nothing that is written can be torn by either, because files
are staged and renamed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Somebody asked the process to end."""

    def __init__(self, number: int, where: str = ""):
        self.number = number
        super().__init__(f"interrupted by {signal.Signals(number).name}{where}")

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class _State:
    """What this process was told. parent: its parent when it was last told."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.parent = os.getppid()
        self.patient = False


_state = _State()


def install() -> None:
    """Listen; in the main thread only, where Python delivers signals. A signal that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        return
    _state.__init__()  # type: ignore[misc]
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _told)


def _told(number: int, frame: Any) -> None:
    parent = os.getppid()
    orphaned, _state.parent = parent != _state.parent, parent
    if number in _state.told and not orphaned:
        os._exit(128 + number)
    first = not _state.told
    _state.told.append(number)
    if not first:
        return  # a launcher passes on in its own words what the terminal has said already, or died of it
    if not _state.patient:
        raise Interrupted(number)
    name = signal.Signals(number).name
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{name}: saving after this step\n".encode())


def received() -> int | None:
    """The first signal that came, or None."""
    return _state.told[0] if _state.told else None


def check(where: str = "") -> None:
    """Raise `Interrupted` if a signal came: for long work in between steps."""
    if _state.told:
        raise Interrupted(_state.told[0], where)


@contextmanager
def patience() -> Iterator[None]:
    """Within, a first signal only leaves its mark, which `received` and `check` read."""
    _state.patient = True
    try:
        yield
    finally:
        _state.patient = False
