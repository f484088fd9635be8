"""Several short rows in one long one, without one seeing another.

Rows are put into bins once per training, by best fit of the longest first (Johnson 1974): which rows share a bin is a
function of their lengths alone, epochs differ in the order of the bins. Attention is kept within a row by a mask, and
positions start again with every row; whether a model heeds that is tried before it is trained.

Shapes: B rows of a batch, L tokens, N rows of the data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from kt_hf import evaluation
from kt_hf.errors import RecipeError
from kt_hf.loader import Collate, Rows

if TYPE_CHECKING:
    from kt_hf.task import Batch, Loaded, Task

SEQUENCES = "sequence_ids"
"""Which row of the bin every token is of, from 1; 0 where there is none."""
INSTEAD = "leave packing out; train_sampling_strategy=group_by_length pads little, too"


def bins(lengths_N: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Rows of every bin, so that no bin holds more than `capacity` tokens.

    Raises `ValueError` for a row that is longer than that.
    """
    return _bins(np.asarray(lengths_N, dtype=np.int64).tobytes(), capacity)


@functools.lru_cache(maxsize=8)
def _bins(lengths: bytes, capacity: int) -> list[np.ndarray]:
    return [np.asarray(rows) for rows in best_fit(np.frombuffer(lengths, dtype=np.int64), capacity)]


def best_fit(lengths_N: np.ndarray, capacity: int) -> list[list[int]]:
    """See `bins`; not kept."""
    if len(lengths_N) and lengths_N.max() > capacity:
        raise ValueError(f"a row of {lengths_N.max()} tokens does not fit into {capacity}")
    found: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    rooms = 0  # bit r: there is a bin with room for r tokens
    for row in np.argsort(-lengths_N, kind="stable").tolist():
        length = int(lengths_N[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = open_bins[room].pop()
            if not open_bins[room]:
                rooms &= ~(1 << room)
        else:
            room, number = capacity, len(found)
            found.append([])
        found[number].append(row)
        open_bins[room - length].append(number)
        rooms |= 1 << (room - length)
    return found


class Packed(Dataset):
    """Rows of a split in bins. An item is a bin, asked for as (epoch, position); its `index` is its first row's."""

    random = False

    def __init__(self, rows: Rows):
        task = rows.task
        if not task.packs:
            raise RecipeError(
                f"training.packing: {type(task).__name__} does not pack rows",
                "leave packing out; group_by_length pads little",
            )
        self.rows, self.task = rows, task
        self.lengths_N = rows.lengths()
        self.bins = bins(self.lengths_N, max(task.row_limit(rows.loaded), int(self.lengths_N.max(initial=1))))

        self.index = rows.index_of([members[0] for members in self.bins])

    @property
    def loaded(self) -> Loaded:
        return self.rows.loaded

    @loaded.setter
    def loaded(self, value: Loaded) -> None:
        self.rows.loaded = value

    def __len__(self) -> int:
        return len(self.bins)

    def index_of(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """`index` of all rows in these bins."""
        return self.rows.index_of(np.concatenate([self.bins[i] for i in positions]))

    def lengths(self) -> np.ndarray:
        """Tokens of every bin."""
        return np.asarray([self.lengths_N[rows].sum() for rows in self.bins])

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        wanted = [(epoch, int(row)) for epoch, position in items for row in self.bins[position]]
        found = iter(self.rows.__getitems__(wanted))
        return [self.task.pack([next(found) for _ in self.bins[position]]) for _, position in items]

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([item])[0]


def arguments(model: nn.Module, sequence_ids_BL: torch.Tensor, causal: bool) -> dict[str, Any]:
    """What a transformers model needs to keep packed rows apart: `position_ids`, and a mask of its attention's kind.

    Nothing here waits for the device. Raises `RecipeError` where its attention takes no such mask.
    """
    sequences_BL, num_places = sequence_ids_BL, sequence_ids_BL.shape[1]
    places_L = torch.arange(num_places, device=sequences_BL.device)
    starts_BL = torch.ones_like(sequences_BL, dtype=torch.bool)
    starts_BL[:, 1:] = sequences_BL[:, 1:] != sequences_BL[:, :-1]
    given: dict[str, Any] = {"position_ids": places_L - torch.where(starts_BL, places_L, 0).cummax(dim=1).values}
    kind = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    if kind.startswith("flash_attention"):  # tells rows apart by their positions
        return {**given, "attention_mask": None}
    allowed_B1LL = (sequences_BL[:, :, None] == sequences_BL[:, None, :])[:, None]
    if causal:
        allowed_B1LL = allowed_B1LL & (places_L[:, None] >= places_L[None, :])
    if kind == "sdpa":
        return {**given, "attention_mask": allowed_B1LL}
    if kind == "eager":  # adds its mask to the scores
        dtype = next(model.parameters()).dtype
        mask_B1LL = torch.zeros_like(allowed_B1LL, dtype=dtype).masked_fill(~allowed_B1LL, torch.finfo(dtype).min)
        return {**given, "attention_mask": mask_B1LL}
    raise RecipeError(
        f"training.packing: attention by '{kind}' takes no mask that keeps packed rows apart",
        "set model.attn_implementation=sdpa, or leave packing out",
    )


@torch.no_grad()
def check(model: nn.Module, task: Task, packed: Packed, device: torch.device) -> None:
    """Refuse a model that gives packed rows other scores than it gives each alone: tried on the bin with the longest
    row and on the one with the most rows.

    Raises `RecipeError`.
    """
    longest = next(i for i, rows in enumerate(packed.bins) if int(packed.lengths_N.argmax()) in rows)
    fullest = max(range(len(packed)), key=lambda i: len(packed.bins[i]))
    collate, was_training = Collate(task, packed.loaded), model.training

    def scores_NC(rows: list[dict[str, Any]]) -> torch.Tensor:
        batch: Batch = evaluation.to_device(collate(rows), device)
        return counted(task, model, batch)

    model.eval()
    try:
        for number in {longest, fullest}:
            alone = [packed.rows.__getitems__([(0, int(row))]) for row in packed.bins[number]]
            alone_NC = torch.cat([scores_NC(rows) for rows in alone])
            with running(model):
                found_NC = scores_NC([packed[0, number]])
            compare(model, found_NC, alone_NC)
    finally:
        model.train(was_training)


def counted(task: Task, model: nn.Module, batch: Batch) -> torch.Tensor:
    """scores_NC that have a weight, which are the same with other padding."""
    scores_NC, weight_N = task.scores(task.forward(model, batch), batch)
    return scores_NC[weight_N > 0]


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Turns what goes wrong on packed rows into a `RecipeError`."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"training.packing: {type(model).__name__} does not run on packed rows: "
            f"{' '.join(str(error).split())[:200]}",
            INSTEAD,
        ) from error


def compare(model: nn.Module, packed_NC: torch.Tensor, alone_NC: torch.Tensor) -> None:
    """Raises `RecipeError` where packed rows have other scores than they have alone."""
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    apart = (packed_NC - alone_NC).abs().max() / alone_NC.std().clamp(min=1e-12) if len(alone_NC) else 0.0
    if not apart <= tolerance:
        raise RecipeError(
            f"training.packing: {type(model).__name__} gives packed rows scores that are off by {apart:.2g} "
            f"standard deviations from those it gives each alone: it reaches over the rows' ends",
            INSTEAD,
        )
