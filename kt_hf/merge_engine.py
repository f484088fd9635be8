"""How tensors go through a merge: in pieces that stay in the processor's cache where the method goes by elements, whole
otherwise; on several threads, from mapped files into files that are written in place. What a thread computes does not
depend on the others, nor on where it is written, so the bits are the same for any number of threads and any shards.
What becomes of a tensor is a `Job`: which tensors it is made of, and how.

Shapes: M parents.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.merge import MergeMethod
from kt_hf.tensor_files import Writer

PIECE = 2**17
"""Elements that are worked on at once. Fixed: vectorised code and its remainder may round differently."""
UNIT = 2**22
"""Elements that a thread takes at once."""
SLACK = 2**27
"""Bytes that whole tensors may take at once beside twice the inputs of the largest of them, as they are stored."""


@dataclass(frozen=True)
class Job:
    """What a tensor of the result is made of.

    sources: (whose, tensor) of the parents, all of one shape. method: how; None: a copy of the first source, in the
    result's precision. name: under which the method knows it. base: (whose, tensor) where the method has a use for it.
    stats: what the method has measured about it, as `tensor` gets it.
    """

    name: str
    sources: tuple[tuple[str, torch.Tensor], ...]
    method: MergeMethod | None = None
    base: tuple[str, torch.Tensor] | None = None
    stats: Any = None

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the result's shape."""
        return self.sources[0][1]

    @property
    def inputs(self) -> list[torch.Tensor]:
        if self.method is None:
            return [self.like]
        return [t for _, t in (*self.sources, *([self.base] if self.base else []))]

    @property
    def stored(self) -> list[bool]:
        """Of each input whether the method takes it as it is stored, where it gets whole tensors."""
        if self.method is None or not self.method.as_stored:
            return [False] * len(self.inputs)
        converted = len(self.sources) if self.base else 0
        return [i != converted for i in range(len(self.inputs))]

    @property
    def whole(self) -> bool:
        return self.method is not None and not self.method.elementwise


@dataclass(frozen=True)
class Unit:
    """Work for one thread: elements of a tensor."""

    name: str
    start: int
    stop: int
    whole: bool


class Fusion:
    """One merge: what becomes of each tensor, where it goes, and whether that is computed in float32 or float64."""

    def __init__(self, jobs: Mapping[str, Job], writer: Writer, compute: torch.dtype):
        self.jobs, self.writer, self.compute = jobs, writer, compute
        self._most = max((len(job.inputs) for job in jobs.values() if not job.whole), default=0)
        self._own = threading.local()
        whole = [(self._bytes(u), self._stored(u)) for u in self.units() if u.whole]
        most, stored = (max(sizes, default=0) for sizes in zip(*whole, strict=True)) if whole else (0, 0)
        self._memory = Memory(max(SLACK + 2 * stored, most))

    def units(self) -> Iterator[Unit]:
        for name, spec in self.writer.specs.items():
            count, whole = self.jobs[name].like.numel(), self.jobs[name].whole
            if count and whole and spec.dtype.is_floating_point:
                yield Unit(name, 0, count, True)
                continue
            for start in range(0, count, UNIT):
                yield Unit(name, start, min(start + UNIT, count), False)

    def run(self, threads: int, progress: Callable[[int], None], sync: bool) -> None:
        """progress: called with bytes of the result as they are written. sync: make sure that they are on the disk."""
        left = [0] * len(self.writer.files)
        for name, spec in self.writer.specs.items():
            left[self.writer.place[name][0]] += spec.bytes
        with one_thread_each(threads) as workers, ThreadPoolExecutor(1) as syncer:
            # the largest first: else one thread has a table of embeddings left when the others are done
            units = sorted(self.units(), key=lambda unit: unit.start - unit.stop)
            running: dict[Future[None], Unit] = {workers.submit(self.do, unit): unit for unit in units}
            syncing = [syncer.submit(self.writer.sync, i) for i, size in enumerate(left) if sync and not size]
            try:
                for done in as_completed(running):
                    done.result()
                    unit = running.pop(done)
                    written = (unit.stop - unit.start) * self.writer.specs[unit.name].dtype.itemsize
                    i = self.writer.place[unit.name][0]
                    left[i] -= written
                    if sync and not left[i]:  # the disk works while the rest is computed
                        syncing.append(syncer.submit(self.writer.sync, i))
                    progress(written)
                for future in syncing:
                    future.result()
            except BaseException:
                for future in running:
                    future.cancel()
                raise

    def do(self, unit: Unit) -> None:
        with torch.no_grad():
            if not self.writer.specs[unit.name].dtype.is_floating_point:
                self._copy(unit)
            elif unit.whole:
                with self._memory.hold(self._bytes(unit)):
                    self._whole(unit)
            else:
                self._pieces(unit)

    def _copy(self, unit: Unit) -> None:
        """A buffer that is no floating point number: the first parent's."""
        flat = self.jobs[unit.name].like.reshape(-1)[unit.start : unit.stop]
        if flat.numel():
            data = memoryview(flat.clone().view(torch.uint8).numpy())  # type: ignore[arg-type]
            self.writer.write(unit.name, data, unit.start * flat.element_size())

    def _pieces(self, unit: Unit) -> None:
        job = self.jobs[unit.name]
        flats = [tensor.reshape(-1) for tensor in job.inputs]
        buffers, out, data = self._buffers(self.writer.specs[unit.name].dtype)
        for start in range(unit.start, unit.stop, PIECE):
            stop = min(start + PIECE, unit.stop)
            pieces = [flat[start:stop] for flat in flats]
            if job.method is not None:
                pieces = [b[: stop - start].copy_(piece) for b, piece in zip(buffers, pieces, strict=False)]
            self._write(job, unit.name, start, self._merged(job, pieces), out, data)

    def _whole(self, unit: Unit) -> None:
        # Copies, even where nothing is to be converted: the files are mapped for reading, and a method may be careless.
        job = self.jobs[unit.name]
        given = [
            t if stored else t.to(self.compute, copy=True) for t, stored in zip(job.inputs, job.stored, strict=True)
        ]
        merged = self._merged(job, given).reshape(-1)
        del given
        _, out, data = self._buffers(self.writer.specs[unit.name].dtype)
        for start in range(0, unit.stop, PIECE):
            self._write(job, unit.name, start, merged[start : start + PIECE], out, data)

    def _merged(self, job: Job, given: list[torch.Tensor]) -> torch.Tensor:
        if job.method is None:
            return given[0]
        count = len(job.sources)
        merged = job.method.tensor(job.name, given[:count], given[count] if job.base else None, job.stats)
        if merged.shape != given[0].shape:
            raise RecipeError(
                f"{_name(job.method)} gives {tuple(merged.shape)} for {job.name}, which is {tuple(given[0].shape)}",
                "mend the merge: `tensor` returns what it is given in shape",
            )
        if self.compute == torch.float64 and merged.dtype != torch.float64:
            raise RecipeError(f"{_name(job.method)} computes in {_word(merged.dtype)}", "leave float64 out")
        return merged

    def _write(
        self, job: Job, name: str, start: int, merged: torch.Tensor, out: torch.Tensor, data: memoryview
    ) -> None:
        count = merged.numel()
        # The sum is finite if all are, unless it overflows: one pass instead of three, while the piece is in the cache.
        if not math.isfinite(merged.sum().item()) and not bool(merged.isfinite().all()):
            self._explain(job)
        out[:count].copy_(merged)
        if out.dtype == torch.float16 and not bool(out[:count].isfinite().all()):
            raise RecipeError(f"{name} has values that float16 cannot hold", "ask for bfloat16 or float32")
        self.writer.write(name, data[: count * out.element_size()], start * out.element_size())

    def _explain(self, job: Job) -> None:
        """Say whose fault a number is that is none."""
        for label, tensor in [*job.sources, *([job.base] if job.base else [])]:
            if not finite(tensor):
                raise IntegrityError(
                    f"parent '{label}' has non-finite values in {job.name}", "leave it out of the merge"
                )
        raise RecipeError(
            f"{_name(job.method)} gives non-finite values in {job.name}, of parents that are finite",
            "look at its settings: weights that add up to 0, or that are too large",
        )

    def _buffers(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, memoryview]:
        """This thread's: one for each input, one for the result and the bytes of that."""
        own = self._own
        if not hasattr(own, "outs"):
            own.inputs = [torch.empty(PIECE, dtype=self.compute) for _ in range(self._most)]
            own.outs = {}
        if dtype not in own.outs:
            out = torch.empty(PIECE, dtype=dtype)
            own.outs[dtype] = out, memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        return own.inputs, *own.outs[dtype]

    def _bytes(self, unit: Unit) -> int:
        """What a whole tensor takes: the inputs that are converted, the result, and as much again as a method may want
        for itself that does not work by parts."""
        stored = self.jobs[unit.name].stored
        held = stored.count(False) + (1 if any(stored) else 2)
        return held * (unit.stop - unit.start) * self.compute.itemsize

    def _stored(self, unit: Unit) -> int:
        return sum(t.numel() * t.element_size() for t in self.jobs[unit.name].inputs)


class Memory:
    """Bytes that threads may hold between them."""

    def __init__(self, limit: int):
        self.limit, self.used, self.changed = limit, 0, threading.Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.used + count <= self.limit)
            self.used += count
        try:
            yield
        finally:
            with self.changed:
                self.used -= count
                self.changed.notify_all()


@contextmanager
def one_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Workers inside which torch uses one thread: sums do not depend on how many there are."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "merge", initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(before)


def finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are, piece by piece."""
    flat = tensor.reshape(-1)
    for piece in flat.split(2**20):
        if not bool(piece.sum(dtype=torch.float32).isfinite()) and not bool(piece.isfinite().all()):
            return False
    return True


def _name(method: MergeMethod | None) -> str:
    return f"the merge {type(method).__name__}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
