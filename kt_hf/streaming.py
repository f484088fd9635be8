"""Training rows that are read as they are used, in an order that follows from the seed, and resumed by their position.

An epoch reads the shards in random order. Rows are read in blocks; within a block they are permuted and become batches.
A place is where a batch ended: the data library's state at the beginning of the block, and how many rows of the block
are used. So nothing but the block is read twice by a run that goes on. Every process reads all rows and takes its share
of a batch: the batches are the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from kt_hf.errors import DataError, KtError, RecipeError
from kt_hf.loader import Rows, make_rows

if TYPE_CHECKING:
    import datasets

    from kt_hf.recipe import Data, Training
    from kt_hf.strategy import Strategy
    from kt_hf.task import Loaded, Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A place in the rows: block `block` of an epoch, of which `used` rows are used. The block begins with row `row` of
    the epoch's shard number `ordinal`; `state` is the data library's there, None at a shard's beginning."""

    epoch: int = 0
    block: int = 0
    used: int = 0
    ordinal: int = 0
    row: int = 0
    state: dict[str, Any] | None = None


@dataclass
class Source:
    """The training rows of a data set. opened: the rows as they are in the files; refine: (rows, their numbers) ->
    those that are to be trained on, as the task sees them, not decoded; block_size: rows that are read at a time.

    A row's number is shard * 2^32 + its place in the shard.
    """

    opened: datasets.IterableDataset
    refine: Callable[[list[Row], Sequence[int]], list[Row]]
    block_size: int

    def blocks(self, seed: int, place: Place) -> Generator[tuple[Place, list[Row]], None, None]:
        """(where it begins, its rows in their order) of every block from a place's on, epoch after epoch."""
        while True:
            for start, numbers, raw in self._read(seed, place):
                rows = self.refine(raw, numbers)
                order = np.random.default_rng([seed, start.epoch, 1, start.block]).permutation(len(rows))
                yield start, [rows[i] for i in order]
            place = Place(place.epoch + 1)

    def _read(self, seed: int, start: Place) -> Iterator[tuple[Place, list[int], list[Row]]]:
        """The blocks of the rest of an epoch, as they are in the files."""
        shards = np.random.default_rng([seed, start.epoch, 0]).permutation(self.opened.num_shards)
        numbers: list[int] = []
        rows: list[Row] = []
        at, state = start.row, start.state
        for ordinal in range(start.ordinal, len(shards)):
            shard = self.opened.shard(num_shards=len(shards), index=int(shards[ordinal]))
            if state is not None:
                shard.load_state_dict(state)
            with closing(iter(shard)) as found:
                for row in _readable(found, at):
                    numbers.append((int(shards[ordinal]) << 32) + at)
                    rows.append(row)
                    at += 1
                    if len(rows) == self.block_size:
                        yield start, numbers, rows
                        start = Place(start.epoch, start.block + 1, 0, ordinal, at, shard.state_dict())
                        numbers, rows = [], []
            at, state = 0, None
        if rows:
            yield start, numbers, rows


def _readable(rows: Iterator[Row], number: int) -> Iterator[Row]:
    """Rows as long as they can be read; what the library says of those that cannot is `DataError`."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except KtError:
            raise
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            cause = f"streamed training rows cannot be read on after row {number} of a file: {what}"
            raise DataError(cause, "mend the file; the run then goes on from its last checkpoint") from error
        number += 1
        yield row


@dataclass
class StreamPlan:
    """How streamed rows become batches: as they come, the last one of an epoch with what is left. `places`: where the
    steps begin that were reached."""

    source: Source
    global_batch: int
    seed: int
    drop_last: bool = False
    places: dict[int, Place] = field(default_factory=lambda: {0: Place()})

    steps_per_epoch = 0  # unknown

    def reached(self, step: int, place: Place) -> None:
        """Remember where a step begins, in the place of what was remembered before."""
        self.places = {0: Place(), step: place}

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, list[Row], Place]]:
        """(epoch, rows, place after them) of the global batch of every step. Read from the nearest place that is known.

        Raises `DataError` where an epoch does not fill a batch.
        """
        nearest = max(step for step in self.places if step <= start)
        with closing(self._batches(self.places[nearest])) as batches:
            for step in range(nearest, stop):
                found = next(batches)
                if step >= start:
                    yield found

    def _batches(self, place: Place) -> Generator[tuple[int, list[Row], Place], None, None]:
        rows: list[Row] = []
        epoch, used = place.epoch, place.used
        fruitless = place == Place(epoch)
        with closing(self.source.blocks(self.seed, place)) as blocks:
            for start, block in blocks:
                if start.epoch != epoch:
                    if rows and not self.drop_last:
                        yield epoch, rows, start
                    elif fruitless:
                        raise DataError(
                            f"the streamed training rows of an epoch do not fill a batch of {self.global_batch}",
                            "lower the batch size, or loosen data.where, data.labels or data.drop",
                        )
                    rows, epoch, fruitless = [], start.epoch, True
                while used < len(block):
                    until = min(used + self.global_batch - len(rows), len(block))
                    rows, used = rows + block[used:until], until
                    if len(rows) == self.global_batch:
                        fruitless = False
                        yield epoch, rows, replace(start, used=used)
                        rows = []
                used = 0


class StreamedRows(Dataset):
    """Streamed rows, preprocessed. An item is the row itself: (epoch, row). `head`: the first ones, to look at them."""

    def __init__(self, head: Rows):
        self.head, self.task = head, head.task
        self.features = head.source.features

    @property
    def random(self) -> bool:
        return self.head.random

    @property
    def loaded(self) -> Loaded:
        return self.head.loaded

    @loaded.setter
    def loaded(self, value: Loaded) -> None:
        self.head.loaded = value

    def index_of(self, rows: Sequence[Row]) -> np.ndarray:
        return np.asarray([row["index"] for row in rows])

    def __getitems__(self, items: Sequence[tuple[int, Row]]) -> list[Row]:
        decoded = [self._decoded(row) for _, row in items]
        columns = {key: [row[key] for row in decoded] for key in decoded[0]}
        return make_rows(self.head, columns, [epoch for epoch, _ in items])

    def _decoded(self, row: Row) -> Row:
        try:
            return self.features.decode_example(row)
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(
                f"streamed row {row['index']} cannot be read: {what}", "mend it, or leave it out"
            ) from error

    def __getitem__(self, item: tuple[int, Row]) -> Row:
        return self.__getitems__([item])[0]


def check(data: Data, training: Training, strategies: dict[str, Strategy], task: Task | None, where: str) -> None:
    """Refuse what needs to know all rows beforehand. task: None where the data have still to tell it. Raises
    `RecipeError`, naming both."""
    if not data.streaming:
        return
    if training.max_steps <= 0:
        raise RecipeError(
            f"{where}: data.streaming: nobody knows how many rows there are",
            "say how many steps to train: training.max_steps=1000",
        )
    reasons = {
        "training.packing": training.packing and task is not None and task.packs == "bins",
        f"training.train_sampling_strategy={training.train_sampling_strategy}": (
            training.train_sampling_strategy != "random"
        ),
        "training.cache_frozen": bool(training.cache_frozen),
    }
    for name, strategy in strategies.items():
        reasons[f"'{name}', which makes the batches"] = strategy.batches is not None
    for what, holds in reasons.items():
        if holds:
            raise RecipeError(
                f"{where}: data.streaming and {what} exclude each other: one of them needs all rows at hand",
                "leave one of them out",
            )
