"""SIGINT and SIGTERM: the first one ends a training after its step, with a checkpoint; a second one ends it at once.

Outside of a training loop the first one already raises. Nothing that is written can be torn by either, because files
are staged and renamed. Python runs its handlers between two steps of the interpreter, so a call that waits in C (for
ranks that never come, say) would hold them off for good: a thread watches, and ends the process then.
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
GRACE = 10.0
"""Seconds that the process has to end after a signal outside of a training."""
ORPHAN_GRACE = 300.0
"""Seconds that a training has to save after its launcher has died, when nobody else would end it."""


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
        self.process, self.parent = os.getpid(), os.getppid()
        self.patient = False


_state = _State()


def install() -> None:
    """Listen; in the main thread only, where Python delivers signals. A signal that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        return
    _state.__init__()  # type: ignore[misc]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(reader, os.getppid()), name="kt_hf-signals", daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _told)


def _forget() -> None:
    """In a forked child, such as a data worker: its signals are not the parent's."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def _watch(reader: int, parent: int) -> None:
    while True:
        for number in os.read(reader, 16):
            limit = GRACE if not _state.patient else ORPHAN_GRACE if os.getppid() != parent else None
            if number in SIGNALS and limit is not None:
                timer = threading.Timer(limit, os._exit, (128 + number,))
                timer.daemon = True
                timer.start()


def _told(number: int, frame: Any) -> None:
    if os.getpid() != _state.process:  # a data worker: the terminal tells it, too, but its parent decides
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
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
