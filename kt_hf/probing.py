"""Whether plugins can be imported, each in a process of its own, so that none can hurt another or the caller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from kt_hf.registry import Entry

TIMEOUT = 120
"""Seconds in which a plugin has to be imported."""
BASES = {"task": "Task", "strategy": "Strategy", "merge": "MergeMethod", "ensemble": "EnsembleMethod"}


def probe(entries: Sequence[Entry]) -> dict[Entry, str]:
    """entry -> what is wrong with it, empty where nothing is."""
    if not hasattr(os, "fork"):
        return {entry: _in_new_process(entry) for entry in entries}
    import kt_hf.strategy  # noqa: F401  imports torch once, for all the children

    return {entry: _in_child(entry) for entry in entries}


def problem(entry: Entry) -> str:
    """What is wrong with a plugin, found by importing it here."""
    import kt_hf
    from kt_hf import settings
    from kt_hf.errors import KtError

    try:
        found: Any = entry.load()
        base = getattr(kt_hf, BASES[entry.kind])
        if not (isinstance(found, type) and issubclass(found, base)):
            return f"{entry.target} is no subclass of kt_hf.{BASES[entry.kind]}"
        settings.schema(found)
    except KtError as error:
        return error.cause
    except Exception as error:
        return f"its settings cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _in_child(entry: Entry) -> str:
    """Fork, import, and hear through a pipe; a child that dies or hangs is told by its silence."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _mute()
        try:
            os.write(writing, json.dumps(problem(entry)).encode()[:60_000])
        except BaseException as error:  # whatever a plugin does, the parent hears of it
            os.write(writing, json.dumps(f"importing it raised {type(error).__name__}").encode())
        finally:
            os._exit(0)
    os.close(writing)
    said, status = _listen(reading, child)
    os.close(reading)
    if said:
        return str(json.loads(said))
    if status is None:
        return f"importing it takes longer than {TIMEOUT} s"
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    return f"importing it ends the process ({how})"


def _listen(reading: int, child: int) -> tuple[bytes, int | None]:
    """(what the child wrote, its exit status, None when it had to be stopped)."""
    import select

    said, deadline = b"", time.monotonic() + TIMEOUT
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return b"", None
        part = os.read(reading, 65_536)
        if not part:
            return said, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said += part


def _mute() -> None:
    """What plugins print while they are imported is not the answer."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)


def _in_new_process(entry: Entry) -> str:
    code = (
        "import json, sys; from kt_hf import probing, registry; "
        "print(); print(json.dumps(probing.problem(registry.find(*sys.argv[1:3]))))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, entry.kind, entry.name],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing it takes longer than {TIMEOUT} s"
    if done.returncode:
        return f"importing it ends the process (exit code {done.returncode})"
    return str(json.loads(done.stdout.splitlines()[-1]))
