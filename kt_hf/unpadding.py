"""Layers that compute real tokens only, while the rows of a batch stay rows.

Every layer of a transformer gets its padded rows put into a few bins and gives padded rows back, so that whatever lies
around the layers (embeddings, poolers, heads, hidden states) sees rows as always. Attention is kept within a row by
blocks of the mask that the model made itself. What a batch is computed as depends on its mask alone.

A model does so from `begin`, which tries whether it can, to `end`; any other runs padded. Its layers are all that lies
in a `ModuleList` and to which it hands its keyword arguments on.

Shapes: B rows of a batch, L tokens of the longest row, D width; N bins of C slots; T real tokens; H heads or 1.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import torch
from torch import nn

from kt_hf import evaluation, loading, packing
from kt_hf.errors import RecipeError
from kt_hf.loader import Collate

if TYPE_CHECKING:
    from kt_hf.facts import Run
    from kt_hf.task import Batch, Task

logger = logging.getLogger(__name__)

WORTH = 0.9
"""Share of the padded batch that bins may take; where they take more, the batch runs as it is."""

_unpadding: WeakSet[nn.Module] = WeakSet()
"""Models whose layers were found to do this."""


class Bins:
    """Where the tokens of a batch's rows lie in its bins.

    bins: the rows of every bin. starts_B, ends_B: the real tokens of every row.
    """

    def __init__(self, bins: list[list[int]], capacity: int, starts_B: np.ndarray, ends_B: np.ndarray, width: int):
        self.rows, self.width, self.num_bins, self.capacity = len(starts_B), width, len(bins), capacity
        self.blocks: list[tuple[int, int, int, int, int]] = []
        """(row, its first token, bin, its first slot there, its length)"""
        self.ends_N: list[int] = []
        for number, rows in enumerate(bins):
            slot = 0
            for row in rows:
                length = int(ends_B[row] - starts_B[row])
                self.blocks.append((row, int(starts_B[row]), number, slot, length))
                slot += length
            self.ends_N.append(slot)
        spans = [(b * width + start, n * capacity + slot, length) for b, start, n, slot, length in self.blocks]
        self._places_T = torch.from_numpy(np.concatenate([np.arange(place, place + k) for place, _, k in spans]))
        self._slots_T = torch.from_numpy(np.concatenate([np.arange(slot, slot + k) for _, slot, k in spans]))
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masked = False

    def around(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer's forward on bins, in and out as padded rows."""
        args = tuple(self._enter(value, keep=i > 0) for i, value in enumerate(args))
        kwargs = {key: self._enter(value, keep=key != "hidden_states") for key, value in kwargs.items()}
        if not self._masked:
            raise RecipeError(
                "training.packing: the attention gets no mask that could keep packed rows apart",
                "set model.attn_implementation=sdpa, or leave packing out",
            )
        return self._leave(forward(*args, **kwargs))

    def _enter(self, value: Any, keep: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(self._enter(part, keep) for part in value)
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[0] not in (1, self.rows):
            return value
        if keep and id(value) in self._kept:  # the same mask and positions come to every layer
            return self._kept[id(value)][1]
        if value.dim() == 4 and value.shape[3] == self.width and value.shape[2] in (1, self.width):
            found = self._mask(value)
        elif value.dim() < 4 and value.shape[1] == self.width:
            found = self._to_bins(value.expand(self.rows, *value.shape[1:]))
        else:
            return value
        if keep and not found.requires_grad:
            self._kept[id(value)] = value, found
        return found

    def _leave(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._leave(part) for part in value)
        if not isinstance(value, torch.Tensor) or value.shape[:2] != (self.num_bins, self.capacity):
            return value
        return self._move(value, self._slots_T, self._places_T, self.rows, self.width)

    def _to_bins(self, x_BL: torch.Tensor) -> torch.Tensor:
        return self._move(x_BL, self._places_T, self._slots_T, self.num_bins, self.capacity)

    @staticmethod
    def _move(x: torch.Tensor, take_T: torch.Tensor, put_T: torch.Tensor, rows: int, width: int) -> torch.Tensor:
        """Real tokens to where they belong, zeros elsewhere. No index comes twice, so that no sum has an order."""
        take_T, put_T = take_T.to(x.device, non_blocking=True), put_T.to(x.device, non_blocking=True)
        taken = x.flatten(0, 1).index_select(0, take_T)
        moved = taken.new_zeros(rows * width, *x.shape[2:]).index_copy(0, put_T, taken)
        return moved.unflatten(0, (rows, width))

    def _mask(self, mask_BHLL: torch.Tensor) -> torch.Tensor:
        """The model's own mask within rows, nothing across. What is no token sees itself, lest its softmax be empty."""
        x, size = mask_BHLL, self.capacity
        self._masked = True
        outside: Any = torch.finfo(x.dtype).min if x.is_floating_point() else 0
        found_NHCC = x.new_full((self.num_bins, x.shape[1], size, size), outside)
        for row, start, number, slot, length in self.blocks:
            to, tokens = slice(slot, slot + length), slice(start, start + length)
            own_HLL = x[row if x.shape[0] > 1 else 0]
            found_NHCC[number, :, to, to] = own_HLL[:, tokens if x.shape[2] > 1 else slice(None), tokens]
        diagonal_NHC = found_NHCC.diagonal(dim1=2, dim2=3)
        for number, end in enumerate(self.ends_N):
            diagonal_NHC[number, :, end:] = 0 if x.is_floating_point() else 1
        return found_NHCC


def bins_of(mask_BL: torch.Tensor | None) -> Bins | None:
    """The bins of a batch by its attention mask, if they save enough. Waits for the device of the mask."""
    if mask_BL is None or mask_BL.dim() != 2 or len(mask_BL) < 2:
        return None
    real_BL = mask_BL.detach().cpu().numpy() != 0
    width = real_BL.shape[1]
    starts_B, ends_B = real_BL.argmax(1), width - real_BL[:, ::-1].argmax(1)  # a row without tokens is one of L
    lengths_B = ends_B - starts_B
    bins, capacity = smallest(lengths_B)
    if len(bins) * capacity > WORTH * real_BL.size:
        return None
    return Bins(bins, capacity, starts_B, ends_B, width)


def smallest(lengths_B: np.ndarray) -> tuple[list[list[int]], int]:
    """Bins and their capacity such that all of them together are about as small as can be."""
    longest, total = int(lengths_B.max()), int(lengths_B.sum())
    found: tuple[list[list[int]], int] | None = None
    for capacity in range(longest, longest + longest // 3 + 1, max(1, longest // 48)):
        bins = packing.best_fit(lengths_B, capacity)
        filled = max(sum(int(lengths_B[row]) for row in rows) for rows in bins)
        if found is None or len(bins) * filled < len(found[0]) * found[1]:
            found = bins, filled
        if total >= 0.99 * len(found[0]) * found[1]:
            break
    assert found is not None
    return found


def _forward(self: nn.Module, *args: Any, packed_rows: Bins | None = None, **kwargs: Any) -> Any:
    """The forward of a layer that may be given bins. A bound method, so that a copy of the layer is bound to itself."""
    if packed_rows is None:
        return type(self).forward(self, *args, **kwargs)
    return packed_rows.around(partial(type(self).forward, self), args, kwargs)


def _listed(model: nn.Module) -> list[nn.Module]:
    return [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]


def install(model: nn.Module) -> None:
    """Which of these layers get bins is up to the model: it hands the argument on to them, or to none."""
    for layer in _listed(model):
        if "forward" not in layer.__dict__:
            layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    _unpadding.add(model)


def release(model: nn.Module) -> None:
    for layer in _listed(model):
        if getattr(layer.__dict__.get("forward"), "__func__", None) is _forward:
            del layer.__dict__["forward"]
    _unpadding.discard(model)


def arguments(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a task adds to its call of a model, for that to leave padding out where `begin` has found that it can."""
    bins = bins_of(batch.get("attention_mask")) if model in _unpadding else None
    return {} if bins is None else {"packed_rows": bins}


def begin(model: nn.Module, run: Run, rows: Any) -> None:
    """Let the model leave padding out until `end`, and the frozen ones that can do so. Tried on rows of these.

    Raises `RecipeError` where the model cannot.
    """
    batch = sample(rows, run.device)
    check(model, run.task, batch)
    for name, frozen in run.all_frozen():
        try:
            check(frozen, run.task, batch)
        except RecipeError as error:
            logger.warning("%s runs with padding. %s", name, error.cause)


def end(model: nn.Module, run: Run) -> None:
    for one in (model, *(frozen for _, frozen in run.all_frozen())):
        if one in _unpadding:
            release(one)


def sample(rows: Any, device: torch.device) -> Batch:
    """A batch of eight rows from the longest to the shortest, cut by the mask where that makes lengths differ more."""
    lengths_N = rows.lengths()
    chosen = np.argsort(-lengths_N, kind="stable")[np.linspace(0, len(lengths_N) - 1, 8).astype(int)]
    batch = Collate(rows.task, rows.loaded)(rows.__getitems__([(0, int(row)) for row in chosen]))
    mask_BL = batch["attention_mask"]
    limits_B = (lengths_N.max() * torch.arange(8, 0, -1)).div(8).ceil()
    batch["attention_mask"] = mask_BL * (mask_BL.cumsum(1) <= limits_B[:, None])
    return evaluation.to_device(batch, device)


@torch.no_grad()
def check(model: nn.Module, task: Task, batch: Batch) -> None:
    """Let a model leave padding out if it then gives the same scores.

    Raises `RecipeError`.
    """
    if bins_of(batch["attention_mask"]) is None:  # rows of one or two tokens have no padding to speak of
        return
    was_training, reached, works = model.training, [False], False
    heard = [layer.register_forward_pre_hook(partial(_note, reached), with_kwargs=True) for layer in _listed(model)]
    model.eval()
    try:
        alone_NC = packing.counted(task, model, batch)
        install(model)
        with packing.running(model):
            found_NC = packing.counted(task, model, batch)
        if not any(reached):
            raise RecipeError(
                f"training.packing: {type(loading.unwrap(model)).__name__} hands nothing on to its layers that would "
                "tell them which tokens are real",
                packing.INSTEAD,
            )
        packing.compare(model, found_NC, alone_NC)
        works = True
    finally:
        model.train(was_training)
        for hook in heard:
            hook.remove()
        if not works:
            release(model)


def _note(reached: list[bool], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    reached.append("packed_rows" in kwargs)
