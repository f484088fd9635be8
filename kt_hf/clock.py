"""Where the time of a training goes: seconds by phase, and the same phases as named ranges in a profiler's trace."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "saving")
_SKIPPED, _WARM = 2, 1
"""Steps before a trace: the first ones are slower than any other."""


class Clock:
    """Seconds by phase. On a GPU the phases of a step are those of the device, taken from events that are read when
    the loop waits for the device anyhow (`settle`)."""

    def __init__(self, device: torch.device):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.device = device
        self._events: list[tuple[str, Any, Any]] = []
        self._phases = {name: Phase(self, name) for name in PHASES}

    def phase(self, name: str) -> Phase:
        return self._phases[name]

    def begin(self, name: str) -> Any:
        """When a phase begins."""
        if self.device.type != "cuda" or name not in ("forward", "backward", "optimizer"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, name: str, began: Any) -> None:
        if isinstance(began, float):
            self.seconds[name] += time.perf_counter() - began
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((name, began, event))

    def settle(self) -> None:
        """Read the device's events; it has finished the last of them."""
        for name, begin, end in self._events:
            self.seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()

    def shares(self, total: float) -> dict[str, float]:
        """Share of the training's seconds by phase; `other` is what none of them took."""
        if not total:
            return {}
        found = {name: seconds / total for name, seconds in self.seconds.items()}
        return {**found, "other": max(0.0, 1.0 - sum(found.values()))}


class Phase:
    """A part of a step whose time is taken; entered anew in every step, but not within itself."""

    def __init__(self, clock: Clock, name: str):
        self.clock, self.name = clock, name
        self.range: AbstractContextManager[None] | None = None
        self.began: Any = None

    def __enter__(self) -> None:
        if _tracing or _LISTENS:
            self.range = _named(self.name)
            self.range.__enter__()
        self.began = self.clock.begin(self.name)

    def __exit__(self, *error: Any) -> None:
        self.clock.end(self.name, self.began)
        if self.range is not None:
            self.range.__exit__(*error)
            self.range = None


_tracing: list[str] = []
"""The trace that is being taken, if any."""


_LISTENS = any(name in os.environ for name in ("NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH"))
"""Whether this process runs under a tool of NVIDIA: those say so to the processes that they start."""


def named(name: str) -> AbstractContextManager[None]:
    """A range with a name, in PyTorch's profiler and, as NVTX, in NVIDIA's tools; nothing where nobody listens."""
    return _named(name) if _tracing or _LISTENS else nullcontext()


@contextmanager
def _named(name: str) -> Iterator[None]:
    nvtx = (_LISTENS and hasattr(torch._C, "_nvtx")) or torch.cuda.is_available()
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(f"kt_hf.{name}"):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()


class Tracer:
    """PyTorch's profiler over `steps` steps of a training, from the fourth on; none for 0."""

    def __init__(self, steps: int, path: Path):
        self.path = path
        self.profile: Any = None
        if steps:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.profile = torch.profiler.profile(
                schedule=torch.profiler.schedule(skip_first=_SKIPPED, wait=0, warmup=_WARM, active=steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
            )
            _tracing.append(str(path))
            self.profile.start()

    def step(self) -> None:
        if self.profile is not None:
            self.profile.step()

    def _write(self, profile: Any) -> None:
        profile.export_chrome_trace(str(self.path))
        _tracing.clear()
        logger.info("trace: %s (open it in chrome://tracing or perfetto)", self.path)

    def close(self) -> None:
        if self.profile is not None:
            self.profile.stop()
            _tracing.clear()
            self.profile = None
