"""Batches as pure functions of their position: (seed, epoch, step) -> rows, (seed, epoch, row) -> augmentation.

The sequence of global batches is the same for any number of processes; ranks and micro-batches take contiguous slices.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kt_hf import images, randomness, sources
from kt_hf.errors import DataError, KtError, RecipeError, ResourceError, RowError
from kt_hf.task import Batch, Loaded, Task

if TYPE_CHECKING:
    import datasets

    from kt_hf.data import DataInfo
    from kt_hf.packing import Packed
    from kt_hf.streaming import StreamedRows, StreamPlan

_MEMORY_LIMIT = 256 * 2**20
"""Bytes of preprocessed images per split up to which they are kept in memory."""
_prepared: dict[str, Any] = {}


@dataclass(frozen=True)
class Plan:
    """How rows become batches. `custom` is a strategy's `batches` hook; order: a `train_sampling_strategy`, for which
    lengths_N are needed where it groups by length."""

    num_rows: int
    global_batch: int
    seed: int
    drop_last: bool = False
    custom: Callable[..., Any] | None = None
    data: Any = None
    order: str = "random"
    lengths: np.ndarray | None = None

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        if self.custom is not None:
            return len(self._custom(0))
        full, rest = divmod(self.num_rows, self.global_batch)
        return full + (1 if rest and not self.drop_last else 0)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The epoch's global batches as row positions."""
        if self.custom is not None:
            batches = self._custom(epoch)
            if len(batches) != self.steps_per_epoch:
                raise RecipeError(
                    f"`batches` gave {self.steps_per_epoch} batches in epoch 0 and {len(batches)} in epoch {epoch}",
                    "give every epoch as many, so that a step's place follows from its number",
                )
            return batches
        if self.lengths is not None:
            return by_length(self.lengths, self.global_batch, self.seed, epoch, self.drop_last)
        order = np.arange(self.num_rows)
        if self.order == "random":
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return [order[i * self.global_batch : (i + 1) * self.global_batch] for i in range(self.steps_per_epoch)]

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, None]]:
        """(epoch, row positions of the global batch, nothing to remember) of every step.

        Raises `DataError` where an epoch does not fill a batch.
        """
        self.check()
        epoch, found = -1, []
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                found = self.epoch(epoch)
            yield epoch, found[step % self.steps_per_epoch], None

    def check(self) -> None:
        """Raises `DataError` where an epoch does not fill a batch."""
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{self.num_rows} training rows do not fill a batch of {self.global_batch}",
                "lower the batch size, or dataloader_drop_last=false",
            )

    def _custom(self, epoch: int) -> list[np.ndarray]:
        assert self.custom is not None
        found = [
            np.asarray(rows, dtype=np.int64) for rows in self.custom(self.data, self.global_batch, self.seed, epoch)
        ]
        if not found:
            raise RecipeError(f"`batches` gave no batch in epoch {epoch}", "give at least one; a batch may be empty")
        return found


def by_length(lengths_N: np.ndarray, size: int, seed: int, epoch: int, drop_last: bool = False) -> list[np.ndarray]:
    """Batches of rows of about the same length, in random order.

    Rows are permuted, cut into stretches of 100 batches (less than twice that in the last), sorted within, and cut into
    batches: which rows meet differs from epoch to epoch. The batch that is not full takes from the shortest rows.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths_N))
    stretches = np.array_split(order, np.arange(1, max(1, len(order) // (100 * size))) * 100 * size)
    order = np.concatenate([rows[np.argsort(-lengths_N[rows], kind="stable")] for rows in stretches])
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if drop_last and len(batches[-1]) < size:
        batches.pop()
    return [batches[i] for i in random.permutation(len(batches))]


def share(count: int, world: int, micro_batches: int) -> list[tuple[int, ...]]:
    """How many of a global batch's rows each rank has in each micro-batch: sizes that differ by at most one."""
    sizes = _sizes(count, world * micro_batches)
    return [tuple(sizes[rank * micro_batches + i] for rank in range(world)) for i in range(micro_batches)]


def slices(count: int, world: int, rank: int, micro_batches: int) -> list[slice]:
    """Where in a global batch a rank's micro-batches lie: contiguous, as large as `share` says, possibly empty."""
    sizes = _sizes(count, world * micro_batches)
    start, found = sum(sizes[: rank * micro_batches]), []
    for size in sizes[rank * micro_batches : (rank + 1) * micro_batches]:
        found.append(slice(start, start + size))
        start += size
    return found


def _sizes(count: int, parts: int) -> list[int]:
    size, rest = divmod(count, parts)
    return [size + 1] * rest + [size] * (parts - rest)


class Windows:
    """Batch sampler: from `start` on, every micro-batch of every step, as (epoch, row) pairs: rows are positions, or
    what streams hold.

    An empty micro-batch is sent as one row, so that ranks stay in step. `passed`: per step, in front of its first
    micro-batch, (rows of each rank that count in each micro-batch, place after it in a stream).
    """

    def __init__(self, plan: Plan | StreamPlan, start: int, stop: int, world: int, rank: int, micro_batches: int):
        self.plan, self.start, self.stop = plan, start, stop
        self.world, self.rank, self.micro_batches = world, rank, micro_batches
        self.passed: deque[tuple[list[tuple[int, ...]], Any]] = deque()

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        for epoch, rows, place in self.plan.steps(self.start, self.stop):
            self.passed.append((share(len(rows), self.world, self.micro_batches), place))
            listed: list[Any] = rows.tolist() if isinstance(rows, np.ndarray) else rows
            for where in slices(len(rows), self.world, self.rank, self.micro_batches):
                yield [(epoch, row) for row in listed[where] or listed[:1] or [0]]


class Rows(Dataset):
    """One split, preprocessed. Items are asked for as (epoch, position)."""

    def __init__(
        self,
        info: DataInfo,
        split: str,
        task: Task,
        loaded: Loaded,
        augment: Any = None,
        seed: int = 0,
        train: bool = False,
    ):
        self.task, self.loaded, self.augment, self.seed, self.train = task, loaded, augment, seed, train
        self.source, self.split = info.splits[split], split
        self.random = train and (augment is not None or getattr(task, "random_rows", False))
        self.index = np.asarray(self.source["index"][:])  # cut out first: a column is walked row by row
        self.ready: Any = None
        if not self.random:
            self.ready = _deterministic(self.source, info, split, task, loaded, train)

    def __len__(self) -> int:
        return len(self.source)

    def index_of(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """`index` of the rows at these positions."""
        return self.index[positions]

    def lengths(self) -> np.ndarray:
        """Elements of every row in the task's `length_column`.

        Raises `RecipeError` for tasks whose rows are all of one length.
        """
        column = self.task.length_column
        if column is None or not hasattr(self.ready, "select_columns"):
            raise RecipeError(
                f"rows of {type(self.task).__name__} have no lengths to group or pack by",
                "leave train_sampling_strategy and packing out",
            )
        import pyarrow.compute as pc

        values = self.ready.select_columns([column]).with_format("arrow")[:][column]
        return np.asarray(pc.list_value_length(values).to_numpy())

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        positions = [position for _, position in items]
        if isinstance(self.ready, list):
            return [self.ready[p] for p in positions]
        if self.ready is not None:
            return _split_rows(self.ready[positions])
        return make_rows(self, images.fetch(self.source, positions, self.split), [epoch for epoch, _ in items])

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([item])[0]


def make_rows(rows: Rows, raw: dict[str, list[Any]], epochs: Sequence[int]) -> list[dict[str, Any]]:
    """Preprocess raw columns as `rows` does its own; what is random follows from the seed, the epoch and `index`."""
    if not rows.random:
        return _with_index(_preprocess(rows.task, raw, rows.loaded, rows.train, None), raw)
    made = []
    for i, epoch in enumerate(epochs):
        one = {key: [values[i]] for key, values in raw.items()}
        randomness.seed_all("sample", rows.seed, epoch, one["index"][0])
        made += _with_index(_preprocess(rows.task, one, rows.loaded, rows.train, rows.augment), one)
    return made


def _preprocess(task: Task, raw: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any) -> dict[str, Any]:
    try:
        return task.preprocess({k: v for k, v in raw.items() if k != "index"}, loaded, train, augment)
    except RowError as error:
        raise DataError(f"row {raw['index'][error.place]}: {error.cause}", error.remedy) from error


def _split_rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _with_index(columns: dict[str, Any], raw: dict[str, Any]) -> list[dict[str, Any]]:
    return _split_rows({**columns, "index": raw["index"]})


def _deterministic(
    source: datasets.Dataset, info: DataInfo, split: str, task: Task, loaded: Loaded, train: bool
) -> Any:
    """Preprocessed rows that do not depend on the epoch: on disk for text, in memory for small images, else None."""
    key = preprocessing_key(info, split, task, loaded, train)
    if key in _prepared:
        return _prepared[key]
    if task.cache_rows:

        def work(rows: dict[str, list[Any]]) -> dict[str, Any]:
            return dict(_preprocess(task, rows, loaded, train, None))

        drop = [c for c in source.column_names if c != "index"]
        ready: Any = source.map(
            work, batched=True, remove_columns=drop, new_fingerprint=key, desc=None, load_from_cache_file=True
        )
    else:
        ready = _in_memory(source, split, task, loaded, train)
    while len(_prepared) > 32:
        _prepared.pop(next(iter(_prepared)))
    _prepared[key] = ready
    return ready


def _in_memory(
    source: datasets.Dataset, split: str, task: Task, loaded: Loaded, train: bool
) -> list[dict[str, Any]] | None:
    rows: list[dict[str, Any]] = []
    for start in range(0, len(source), 64):
        raw = images.fetch(source, slice(start, start + 64), split)
        rows += _with_index(_preprocess(task, raw, loaded, train, None), raw)
        size = sum(v.numel() * v.element_size() for v in rows[0].values() if isinstance(v, torch.Tensor))
        if size * len(source) > _MEMORY_LIMIT:
            return None
    return rows


def preprocessing_key(info: DataInfo, split: str, task: Task, loaded: Loaded, train: bool) -> str:
    """What preprocessed rows depend on: the rows, the task's code and settings, the processor and the order of
    labels."""
    modules = {cls.__module__ for cls in type(task).__mro__} - {"builtins", "typing"}
    signature = json.dumps([task.signature(loaded), vars(task), loaded.label_ids], default=str, sort_keys=True)
    place = signature.find(" at 0x")
    if place >= 0:
        raise RecipeError(
            f"{type(task).__name__} keeps an object without a text of its own: {signature[max(0, place - 60) : place]}",
            "give its class a __repr__ of what rows depend on; other processes could not find them again",
        )
    holder = sys.modules[type(info.splits[split]).__module__.partition(".")[0]]  # `datasets`, but in benchmarks
    version = getattr(holder, "__version__", "")
    code = sources.digest(modules)
    parts = repr((info.fingerprint, split, train, code, signature, _tokenizer_state(loaded.processor), version))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _tokenizer_state(processor: Any) -> str:
    """All that a fast tokenizer does, not its vocabulary alone; but for the cut and padding of its last call."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return ""
    state = json.loads(backend.to_str())
    return hashlib.sha256(json.dumps({**state, "truncation": None, "padding": None}).encode()).hexdigest()


class Collate:
    """Rows to a batch; a class so that it travels to loader workers."""

    def __init__(self, task: Task, loaded: Loaded):
        self.task = task
        self.loaded = Loaded(None, loaded.processor, loaded.labels, loaded.label_ids)  # type: ignore[arg-type]  # workers need no weights

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        return self.task.collate(rows, self.loaded)


def load_batches(
    rows: Rows | Packed | StreamedRows, batches: Any, num_workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """Batches in the order of `batches`. A worker that dies is a `ResourceError`."""
    collate = Collate(rows.task, rows.loaded)
    if not num_workers and not pin:  # what the loader would do, without its 50 us
        yield from (collate(rows.__getitems__(items)) for items in batches)
        return
    if num_workers:
        rows.loaded = Loaded(None, rows.loaded.processor, rows.loaded.labels, rows.loaded.label_ids)  # type: ignore[arg-type]
    loader = DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # the loader draws a base seed; not from the global generator
        timeout=120 if num_workers else 0,
    )
    try:
        yield from loader
    except KtError as error:  # a worker's: torch has put its traceback before what it says
        said = str(error).rpartition(f"{type(error).__name__}: ")[2].splitlines()
        raise type(error)(*said[:2]) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise ResourceError(
                f"a data worker died: {' '.join(str(error).split())[:200]}",
                "it may have run out of memory; lower dataloader_num_workers",
            ) from error
        raise


def evaluation_batches(num_rows: int, batch_size: int, world: int, rank: int) -> list[list[tuple[int, int]]]:
    """A rank's contiguous share of the rows, in batches. Every rank gets as many batches; a missing row is (-1, 0)."""
    per_rank = -(-num_rows // world)
    first, last = min(rank * per_rank, num_rows), min((rank + 1) * per_rank, num_rows)
    own = [(0, i) for i in range(first, last)]
    own += [(-1, 0)] * (per_rank - len(own))
    return [own[i : i + batch_size] for i in range(0, per_rank, batch_size)]
