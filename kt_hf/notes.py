"""What the training loop writes down on the device while it goes, without waiting for it: sums of the terms of the
loss, the first step that was not finite and its terms, the number of skipped updates. It is read at log, evaluation and
save points only. A step costs it a few operations on single numbers; they are added up many steps at a time.

Shapes: K terms of the loss, the last of which is their total; S steps that were not yet added up.
"""

from __future__ import annotations

import math
from typing import Any

import torch

TOTAL = "loss"
KEPT = 256
"""Steps that may wait to be added up."""


class Notes:
    """skip: whether steps that are not finite are left out and counted; else the first one is kept."""

    def __init__(self, device: torch.device, world: int = 1, skip: bool = False):
        self.device, self.world, self.skip = device, world, skip
        self.names: list[str] = []
        self.sums_K = torch.zeros(0, device=device)
        self._now: dict[str, torch.Tensor] = {}
        self._rows: list[torch.Tensor] = []  # of the steps that wait: K values each, one after another
        self._bad: list[torch.Tensor] = []
        self._zero = torch.zeros((), device=device)
        self.dead = self._dead_before = torch.zeros((), dtype=torch.bool, device=device)
        self.lived = torch.zeros((), dtype=torch.int64, device=device)  # steps until then
        self.last_K = torch.zeros(0, device=device)  # of the last of them, or of the one that was bad
        self.first_step: int | None = None
        self._skipped = torch.zeros((), device=device)
        self.skipped_before = 0.0
        self.norm: torch.Tensor | None = None

    def add(self, terms: dict[str, torch.Tensor], total: torch.Tensor) -> None:
        """The terms of a micro-batch."""
        for name, value in (*terms.items(), (TOTAL, total)):
            value = value.detach()
            self._now[name] = self._now[name] + value if name in self._now else value

    def close(self, step: int, norm: torch.Tensor, overflow_is_bad: bool = True) -> torch.Tensor:
        """End a step whose gradients have this norm; returns 1.0 where its update is not to be made, else 0.0.

        With the policy "stop" that holds for every step from the first bad one on: nothing later means anything.
        """
        if not self._now.keys() <= set(self.names):
            self._extend([name for name in self._now if name not in self.names])
        self._rows += [self._now.get(name, self._zero) for name in self.names]
        watched = self._now[TOTAL] + norm if overflow_is_bad else self._now[TOTAL]
        self._now, self.norm = {}, norm
        self.first_step = step if self.first_step is None else self.first_step
        difference = watched - watched  # 0, or not a number: cheaper than isfinite
        bad = difference != difference
        if not self.skip:
            bad = self.dead = self.dead | bad
        elif self.world > 1:  # the loss of one rank alone may be bad; all skip, or their weights part
            flag = bad.float()
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            bad = flag > 0
        self._bad.append(bad)
        if len(self._bad) == KEPT:
            self._settle()
        return bad.float()

    def _settle(self) -> None:
        """Add up the steps that wait, on the device: one after another, so how many they are does not matter."""
        if not self._bad:
            return
        rows_SK = torch.stack([value.float() for value in self._rows]).view(len(self._bad), -1)
        bad_S = torch.stack(self._bad)
        if self.skip:
            self._skipped = self._skipped + bad_S.sum()
            rows_SK = torch.where(bad_S[:, None], 0.0, rows_SK)
        else:
            lived = (~bad_S).sum()  # the first of those that are bad stands behind them
            last_K = rows_SK.index_select(0, lived.clamp(max=len(bad_S) - 1).view(1))[0]
            self.last_K = torch.where(self._dead_before, self.last_K, last_K)
            self.lived, self._dead_before = self.lived + lived, self.dead
        for row_K in rows_SK.unbind():
            self.sums_K = self.sums_K + row_K
        self._rows, self._bad = [], []

    def _extend(self, new: list[str]) -> None:
        """Terms may come in mid-run (and stay away again, which counts as 0); the total stays last."""
        self._settle()
        names = [name for name in (*self.names, *new) if name != TOTAL] + [TOTAL]
        for attribute in ("sums_K", "last_K"):
            old = dict(zip(self.names, getattr(self, attribute).unbind(), strict=True))
            setattr(self, attribute, torch.stack([old.get(name, self._zero) for name in names]))
        self.names = names

    # --- reading: these wait for the device ---

    @property
    def skipped(self) -> int:
        """Updates that were left out since the training began."""
        self._settle()
        return int(self._skipped)

    def first_bad(self) -> tuple[int, list[str]] | None:
        """(the first step that was not finite on any rank, the terms that were not, on this rank)."""
        self._settle()
        never = torch.iinfo(torch.int64).max
        lived = torch.where(self.dead, self.lived, never)
        if self.world > 1:
            torch.distributed.all_reduce(lived, torch.distributed.ReduceOp.MIN)
        if int(lived) == never:
            return None
        values = dict(zip(self.names, self.last_K.tolist(), strict=True)) if bool(self.dead) else {}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        return (self.first_step or 0) + int(lived), wrong

    def means(self, steps: int) -> dict[str, float]:
        """Means of the terms over the steps since the last call and over ranks; the sums start anew."""
        skipped, sums_K = float(self.skipped), self.sums_K
        if self.world > 1:
            sums_K = sums_K / self.world
            torch.distributed.all_reduce(sums_K)
        counted = steps - (skipped - self.skipped_before)
        self.skipped_before = skipped
        values = (sums_K / max(counted, 1)).tolist()
        self.sums_K = torch.zeros_like(self.sums_K)
        return dict(zip(self.names, values, strict=True))

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the sums of every rank as they are, so that going on from it adds up to the same bits."""
        skipped, sums_RK = float(self.skipped), [self.sums_K]
        if self.world > 1:
            sums_RK = [torch.empty_like(self.sums_K) for _ in range(self.world)]
            torch.distributed.all_gather(sums_RK, self.sums_K)
        return {
            "names": self.names,
            "sums": [sums_K.tolist() for sums_K in sums_RK],
            "skipped": [skipped, self.skipped_before],
        }

    def restore(self, state: dict[str, Any], rank: int) -> None:
        """On another number of ranks each takes the mean, which adds up to the same up to rounding."""
        self.names = list(state["names"])
        sums_RK = torch.tensor(state["sums"], dtype=torch.float32, device=self.device)
        self.sums_K = sums_RK[rank].clone() if len(sums_RK) == self.world else sums_RK.mean(0)
        self.last_K = torch.zeros_like(self.sums_K)
        skipped, self.skipped_before = state["skipped"]
        self._skipped = torch.full((), skipped, device=self.device)
