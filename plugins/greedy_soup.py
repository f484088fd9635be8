"""Greedy model soup."""

from __future__ import annotations

from typing import Any

import torch

from kt_hf import MergeMethod
from kt_hf.functional.averaging import weighted_mean


class GreedySoup(MergeMethod):
    """Parents in the order of their validation score; each joins the mean if the mean does not get worse on validation
    data.

    Costs one evaluation per parent, and one for each candidate soup. Test data are never looked at.
    """

    paper = "Wortsman et al. 2022, Model soups, recipe 1, arXiv:2203.05482"
    needs_validation = True
    elementwise = True

    def __init__(self) -> None:
        self.chosen: list[str] = []
        self.weights_M: list[float] = []
        self.steps: list[dict[str, Any]] = []

    def fit(self, run: Any) -> None:
        def only(members: list[int]) -> list[float]:
            return [1.0 if i in members else 0.0 for i in range(run.num_parents)]

        alone = [run.score(only([i])) for i in range(run.num_parents)]
        order = sorted(range(run.num_parents), key=lambda i: alone[i], reverse=run.higher_is_better)
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
        return {"chosen": self.chosen, "steps": self.steps}
