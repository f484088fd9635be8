"""Greedy model soup."""

from __future__ import annotations

from typing import Any, Literal

import torch

from kt_hf import MergeMethod
from kt_hf.functional.averaging import weighted_mean


class GreedySoup(MergeMethod):
    """Parents in the order of their validation score; each joins the mean if the mean does not get worse on validation
    data.

    Of K parents it scores each alone, but for those whose stage has measured it at the end of its training, and then at
    most K - 1 soups. Test data are never looked at.

    order: by their `score`, best first, as in the paper; or as `given`, which begins with the first model and scores at
    most K models in all: that one alone, and soups.
    """

    paper = "Wortsman et al. 2022, Model soups, recipe 1, arXiv:2203.05482"
    needs_validation = True
    elementwise = True

    def __init__(self, *, order: Literal["score", "given"] = "score") -> None:
        self.order = order
        self.chosen: list[str] = []
        self.weights_M: list[float] = []
        self.alone: dict[str, float] = {}
        self.steps: list[dict[str, Any]] = []

    @property
    def order_matters(self) -> bool:  # type: ignore[override]
        return self.order == "given"

    def fit(self, run: Any) -> None:
        def only(members: list[int]) -> list[float]:
            return [1.0 if i in members else 0.0 for i in range(run.num_parents)]

        order = list(range(run.num_parents))
        alone = [run.alone(i) for i in (order if self.order == "score" else order[:1])]
        if self.order == "score":
            order.sort(key=lambda i: alone[i], reverse=run.higher_is_better)
        self.alone = dict(zip(run.names, alone, strict=False))
        chosen, best = [order[0]], alone[order[0]]
        for i in order[1:]:
            value = run.score(only([*chosen, i]))
            kept = run.better(value, best)
            self.steps.append({"candidate": run.names[i], "score": value, "kept": kept})
            if kept:
                chosen, best = [*chosen, i], value
        self.weights_M = only(chosen)
        self.chosen = [run.names[i] for i in chosen]

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        used = [(t, w) for t, w in zip(tensors_M, self.weights_M, strict=True) if w]
        return weighted_mean([t for t, _ in used], [w for _, w in used])

    def summary(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "alone": self.alone, "steps": self.steps}
