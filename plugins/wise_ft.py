"""WiSE-FT: between a model and the one that it was fine-tuned from."""

from __future__ import annotations

from typing import Any

import torch

from kt_hf import MergeMethod
from kt_hf.errors import RecipeError

ELEVEN = [i / 10 for i in range(11)]


class WiseFt(MergeMethod):
    """(1 - alpha) times the base plus alpha times the parent: often as good as the parent on its own data, and better
    than it on others.

    alpha: how far from the base, or `fit` for the best of `curve` on validation data. curve: values of alpha to score
    on validation data, for the report; with `fit` those from 0 to 1 in steps of 0.1 by default.
    """

    paper = "Wortsman et al. 2022, Robust fine-tuning of zero-shot models, equation (1), arXiv:2109.01903"
    needs_base = True
    elementwise = True
    linear = True
    max_parents = 1

    def __init__(self, *, alpha: float | str = 0.5, curve: list[float] | None = None):
        if isinstance(alpha, str) and alpha != "fit":
            raise RecipeError(f"wise_ft.alpha: got '{alpha}'", "a number from 0 to 1, or 'fit'")
        self.curve = curve if curve is not None else ELEVEN if alpha == "fit" else []
        for value in [*self.curve, *([] if isinstance(alpha, str) else [alpha])]:
            if not 0 <= value <= 1:
                raise RecipeError(f"wise_ft: got {value} for alpha", "numbers from 0 to 1")
        if alpha == "fit" and not self.curve:
            raise RecipeError("wise_ft: alpha=fit with an empty curve", "give values to choose from")
        self.chosen = alpha if not isinstance(alpha, str) else 0.0
        self.fits = alpha == "fit"
        self.scores: list[dict[str, float]] = []

    @property
    def needs_validation(self) -> bool:  # type: ignore[override]
        return bool(self.curve)

    def fit(self, run: Any) -> None:
        self.scores = [{"alpha": a, "score": run.score([a], base_weight=1.0 - a)} for a in self.curve]
        if self.fits:
            best = self.scores[0]
            for point in self.scores[1:]:
                if run.better(point["score"], best["score"]):
                    best = point
            self.chosen = best["alpha"]

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        assert base is not None
        return torch.lerp(base, tensors_M[0], self.chosen)

    def summary(self) -> dict[str, Any]:
        return {"alpha": self.chosen, "curve": self.scores}
