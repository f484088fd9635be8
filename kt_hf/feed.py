"""What one optimizer step eats: its window of micro-batches of `train` and of every extra stream, and how many of
their rows count on every rank."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kt_hf import augmenting, randomness
from kt_hf.errors import DataError, RecipeError
from kt_hf.loader import Collate, Plan, Rows, Windows, load_batches
from kt_hf.packing import Packed
from kt_hf.streaming import Place, StreamedRows, StreamPlan
from kt_hf.task import Batch

if TYPE_CHECKING:
    from kt_hf.data import DataInfo
    from kt_hf.facts import Run
    from kt_hf.recipe import Data, Training
    from kt_hf.strategy import Strategy, Stream

Sizes = dict[str, tuple[int, ...]]
"""stream -> rows of every rank in one micro-batch that count; 0 where a row only keeps ranks in step."""


@dataclass
class _Source:
    """Rows of one stream and the plan by which they become batches."""

    rows: Rows | Packed | StreamedRows
    plan: Plan | StreamPlan


@dataclass
class Feed:
    """Batches of all streams from `start` to `stop`, as functions of the step.

    stream_info: name of another data set of the recipe -> its `DataInfo`.
    """

    run: Run
    training: Training
    data: Data
    strategies: dict[str, Strategy]
    stream_info: Callable[[str], DataInfo] | None
    stop: int
    sources: dict[str, _Source] = field(default_factory=dict)
    places: dict[str, Place | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self._rows(self.run.info, self.data.augment, self.training.seed)
        plan = batch_plan(self.run, self.training, self.strategies, rows)
        self.sources = {"train": _Source(rows, plan)}
        owners: dict[str, tuple[str, Stream]] = {}
        for owner, strategy in self.strategies.items():
            for name, stream in strategy.streams().items():
                if name in owners and owners[name][1] != stream:
                    raise RecipeError(
                        f"'{owners[name][0]}' and '{owner}' ask for different streams '{name}'",
                        "use one of them in this stage",
                    )
                if name not in owners:
                    owners[name] = owner, stream
                    self.sources.update(self._extra(owner, name, stream))

    def _rows(self, info: DataInfo, augment: Any, seed: int) -> Rows | Packed | StreamedRows:
        run = self.run
        return training_rows(run.accelerator, run.task, run.loaded, info, self.training, augment, seed)

    def rows_at_hand(self) -> Rows | Packed:
        """The training rows, where they are not streamed."""
        rows = self.sources["train"].rows
        assert not isinstance(rows, StreamedRows)
        return rows

    def some_rows(self) -> Rows | Packed:
        """Training rows to look at: all of them, or a stream's first."""
        rows = self.sources["train"].rows
        return rows.head if isinstance(rows, StreamedRows) else rows

    def _extra(self, owner: str, name: str, stream: Stream) -> dict[str, _Source]:
        """The sources of an extra stream: as many as it has views, each with draws of its own."""
        seed = randomness.number("stream", owner, name, self.training.seed)
        if stream.data == "train":
            info, plan = self.run.info, self.sources["train"].plan
        else:
            assert self.stream_info is not None
            info = self.stream_info(stream.data)
            size = max(1, round(global_batch(self.training, self.run.world) * stream.ratio))
            if info.stream is not None:
                plan = StreamPlan(info.stream, size, seed % 2**32, drop_last=True)
            else:
                count = len(info.splits["train"])
                if self.training.packing:
                    count = len(self._rows(info, stream.augment, seed))  # type: ignore[arg-type]
                plan = Plan(count, min(size, count), seed % 2**32, drop_last=True)
        keys = [name] if stream.views == 1 else [f"{name}.{view}" for view in range(stream.views)]
        return {key: _Source(self._rows(info, stream.augment, seed + view), plan) for view, key in enumerate(keys)}

    def windows(self, stream: str, start: int, stop: int) -> Windows:
        run = self.run
        return Windows(
            self.sources[stream].plan, start, stop, run.world, run.rank, self.training.gradient_accumulation_steps
        )

    def steps(
        self, start: int, stop: int | None = None
    ) -> Generator[tuple[list[dict[str, Batch]], list[Sizes]], None, None]:
        """For every step its window: the micro-batches by stream, and how many of their rows count."""
        stop = self.stop if stop is None else stop
        pin = self.run.device.type == "cuda"
        workers, micro_batches = self.training.dataloader_num_workers, self.training.gradient_accumulation_steps
        windows = {name: self.windows(name, start, stop) for name in self.sources}
        loaders = {name: load_batches(s.rows, windows[name], workers, pin) for name, s in self.sources.items()}
        try:
            for _ in range(start, stop):
                window = [{name: next(loader) for name, loader in loaders.items()} for _ in range(micro_batches)]
                now = {}
                for name in self.sources:
                    now[name], self.places[name] = windows[name].passed.popleft()
                yield window, [{name: now[name][i] for name in now} for i in range(micro_batches)]
        finally:
            for loader in loaders.values():
                loader.close()

    def first(self, step: int) -> tuple[dict[str, Batch], Sizes]:
        """This rank's first micro-batch of a step, made on the spot."""
        batches, sizes = {}, {}
        for name, source in self.sources.items():
            windows = self.windows(name, step, step + 1)
            collate = Collate(self.run.task, self.run.loaded)
            batches[name] = collate(source.rows.__getitems__(next(iter(windows))))
            sizes[name] = windows.passed[0][0][0]
        return batches, sizes

    def check_learnable(self) -> None:
        """Refuse training rows that hold nothing of some unit of the task's loss. One batch is enough to see that they
        do; only where there is nothing are all of them looked through.

        Raises `DataError`.
        """
        rows, task = self.some_rows(), self.run.task
        collate, found = Collate(task, self.run.loaded), dict[str, int]()
        for start in range(0, len(rows), 64):
            batch = collate(rows.__getitems__([(0, i) for i in range(start, min(start + 64, len(rows)))]))
            for unit, count in task.units(batch).items():
                found[unit] = found.get(unit, 0) + int(count)
            if all(found.values()):
                return
        lacking = next(unit for unit, count in found.items() if not count)
        raise DataError(
            f"the {len(rows)} training rows hold no {lacking} to learn from",
            "look at the columns, at what is masked, and at how long rows are cut",
        )

    def index(self, step: int) -> np.ndarray:
        """`index` of all training rows of a step, for messages."""
        source = self.sources["train"]
        _, rows, _ = next(iter(source.plan.steps(step, step + 1)))
        return source.rows.index_of(rows)  # type: ignore[arg-type]

    def state(self, step: int) -> dict[str, Any]:
        """Where streams stand in front of a step, the next one to be taken; reading begins there if it is asked for."""
        streamed = {name: place for name, place in self.places.items() if place is not None}
        for name, place in streamed.items():
            self.sources[name].plan.reached(step, place)  # type: ignore[union-attr]
        return {name: asdict(place) for name, place in streamed.items()}

    def restore(self, step: int, state: dict[str, Any]) -> None:
        for name, place in state.items():
            plan = self.sources[name].plan
            assert isinstance(plan, StreamPlan)
            plan.reached(step, Place(**place))


def training_rows(
    accelerator: Any, task: Any, loaded: Any, info: DataInfo, training: Training, augment: Any, seed: int
) -> Rows | Packed | StreamedRows:
    """What batches of the training split are made of: its rows, or bins of them."""
    with accelerator.main_process_first():  # the others find what it has preprocessed
        rows = Rows(info, "train", task, loaded, augmenting.transforms(augment, task.augments), seed, train=True)
    if info.stream is not None:
        return StreamedRows(rows)
    return Packed(rows) if training.packing and task.packs != "rows" else rows


def batch_plan(
    run: Run, training: Training, strategies: dict[str, Strategy], rows: Rows | Packed | StreamedRows
) -> Plan | StreamPlan:
    """How training rows become global batches: as `train_sampling_strategy` says, or a strategy's `batches`."""
    size, drop_last = global_batch(training, run.world), training.dataloader_drop_last
    if isinstance(rows, StreamedRows):
        assert run.info.stream is not None
        return StreamPlan(run.info.stream, size, training.seed, drop_last)
    source, order = run.info.splits["train"], training.train_sampling_strategy
    custom = next((s.batches for s in strategies.values() if s.batches is not None), None)
    lengths = rows.lengths() if order == "group_by_length" else None
    return Plan(len(rows), size, training.seed, drop_last, custom, source, order, lengths)


def global_batch(training: Training, world: int) -> int:
    """Rows of an optimizer step on all ranks."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * world
