"""How tensors go through a merge: in pieces that stay in the processor's cache where the method goes by elements, whole
otherwise; on several threads, from mapped files into files that are written in place. What a thread computes does not
depend on the others, nor on where it is written, so the bits are the same for any number of threads and any shards.

Shapes: M parents.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.merge import MergeMethod
from kt_hf.tensor_files import Writer

PIECE = 2**17
"""Elements that are worked on at once. Fixed: vectorised code and its remainder may round differently."""
UNIT = 2**22
"""Elements that a thread takes at once."""
SLACK = 2**27
"""Bytes of whole tensors that may be in memory at once, unless one tensor needs more."""


@dataclass(frozen=True)
class Unit:
    """Work for one thread: elements of a tensor."""

    name: str
    start: int
    stop: int
    whole: bool


class Fusion:
    """One merge: what goes in, how it is computed and where it goes.

    parents: label -> name -> tensor; base: the same of the base, if any. compute: float32 or float64. aliases: names of
    tensors that are merged under another's name, of which they are copies.
    """

    def __init__(
        self,
        method: MergeMethod,
        parents: dict[str, dict[str, torch.Tensor]],
        base: dict[str, torch.Tensor] | None,
        writer: Writer,
        compute: torch.dtype,
        aliases: Mapping[str, str],
    ):
        self.aliases = aliases
        self.method, self.parents, self.base, self.writer, self.compute = method, parents, base, writer, compute
        self.models = [*parents.values(), *([base] if base is not None else [])]
        self._own = threading.local()
        units = list(self.units())
        self._memory = Memory(max([SLACK, *(self._bytes(u) for u in units if u.whole)]))

    def units(self) -> Iterator[Unit]:
        for name, spec in self.writer.specs.items():
            count = self.models[0][name].numel()
            if count and not self.method.elementwise and spec.dtype.is_floating_point:
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
            running: dict[Future[None], Unit] = {workers.submit(self.do, unit): unit for unit in self.units()}
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
        flat = self.models[0][unit.name].reshape(-1)[unit.start : unit.stop]
        if flat.numel():
            data = memoryview(flat.clone().view(torch.uint8).numpy())  # type: ignore[arg-type]
            self.writer.write(unit.name, data, unit.start * flat.element_size())

    def _pieces(self, unit: Unit) -> None:
        flats = [model[unit.name].reshape(-1) for model in self.models]
        buffers, out, data = self._buffers(self.writer.specs[unit.name].dtype)
        for start in range(unit.start, unit.stop, PIECE):
            stop = min(start + PIECE, unit.stop)
            count = stop - start
            given = [buffer[:count].copy_(flat[start:stop]) for buffer, flat in zip(buffers, flats, strict=True)]
            self._write(unit.name, start, self._merged(unit.name, given), out, data)

    def _whole(self, unit: Unit) -> None:
        # Copies, even where nothing is to be converted: the files are mapped for reading, and a method may be careless.
        given = [model[unit.name].to(self.compute, copy=True) for model in self.models]
        merged = self._merged(unit.name, given).reshape(-1)
        del given
        _, out, data = self._buffers(self.writer.specs[unit.name].dtype)
        for start in range(0, unit.stop, PIECE):
            self._write(unit.name, start, merged[start : start + PIECE], out, data)

    def _merged(self, name: str, given: list[torch.Tensor]) -> torch.Tensor:
        count = len(self.parents)
        base = given[count] if self.base is not None else None
        merged = self.method.tensor(self.aliases.get(name, name), given[:count], base, None)
        if merged.shape != given[0].shape:
            raise RecipeError(
                f"{_name(self.method)} gives {tuple(merged.shape)} for {name}, which is {tuple(given[0].shape)}",
                "mend the merge: `tensor` returns what it is given in shape",
            )
        if self.compute == torch.float64 and merged.dtype != torch.float64:
            raise RecipeError(f"{_name(self.method)} computes in {_word(merged.dtype)}", "leave float64 out")
        return merged

    def _write(self, name: str, start: int, merged: torch.Tensor, out: torch.Tensor, data: memoryview) -> None:
        count = merged.numel()
        # The sum is finite if all are, unless it overflows: one pass instead of three, while the piece is in the cache.
        if not math.isfinite(merged.sum().item()) and not bool(merged.isfinite().all()):
            self._explain(name)
        out[:count].copy_(merged)
        if out.dtype == torch.float16 and not bool(out[:count].isfinite().all()):
            raise RecipeError(f"{name} has values that float16 cannot hold", "ask for bfloat16 or float32")
        self.writer.write(name, data[: count * out.element_size()], start * out.element_size())

    def _explain(self, name: str) -> None:
        """Say whose fault a number is that is none."""
        for label, model in [*self.parents.items(), *([("base", self.base)] if self.base is not None else [])]:
            if not finite(model[name]):
                raise IntegrityError(f"parent '{label}' has non-finite values in {name}", "leave it out of the merge")
        raise RecipeError(
            f"{_name(self.method)} gives non-finite values in {name}, of parents that are finite",
            "look at its settings: weights that add up to 0, or that are too large",
        )

    def _buffers(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, memoryview]:
        """This thread's: one for each model, one for the result and the bytes of that."""
        own = self._own
        if not hasattr(own, "outs"):
            own.inputs = [torch.empty(PIECE, dtype=self.compute) for _ in self.models if self.method.elementwise]
            own.outs = {}
        if dtype not in own.outs:
            out = torch.empty(PIECE, dtype=dtype)
            own.outs[dtype] = out, memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        return own.inputs, *own.outs[dtype]

    def _bytes(self, unit: Unit) -> int:
        """What a whole tensor takes: the inputs, the result, and as much again as a method may want for itself."""
        return (len(self.models) + 2) * (unit.stop - unit.start) * self.compute.itemsize


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


def _name(method: MergeMethod) -> str:
    return f"the merge {type(method).__name__}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
