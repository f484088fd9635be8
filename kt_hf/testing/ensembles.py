"""Rules for ensembles: on random scores.

Shapes: K members, N examples, C classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kt_hf.testing.plugin import Case
from kt_hf.testing.rules import NotApplicable, demand, rule

K, N, C = 3, 40, 5


class EnsembleCase(Case):
    """An ensemble method with scores of members that are better than chance."""

    def __init__(self, name: str, cls: type, given: dict[str, Any], folder: Path):
        super().__init__("ensemble", name, cls, given, folder)
        generator = torch.Generator().manual_seed(0)
        self.labels_N = torch.arange(N) % C
        signal_NC = 2.0 * torch.nn.functional.one_hot(self.labels_N, C)
        self.scores_KNC = signal_NC + 1.5 * torch.randn(K, N, C, generator=generator)

    def fitted(self, scores_KNC: torch.Tensor) -> Any:
        method = self.build()
        if method.needs_validation:
            method.fit(scores_KNC, self.labels_N)
        return method

    def combine(self, scores_KNC: torch.Tensor) -> torch.Tensor:
        return self.fitted(scores_KNC).combine(scores_KNC.clone())


@rule("ensemble", "log-probabilities-add-up", needs=("builds",))
def log_probabilities_add_up(case: EnsembleCase) -> None:
    """`combine` gives log-probabilities of N rows and C classes, and each row's probabilities add up to 1."""
    found_NC = case.combine(case.scores_KNC)
    demand(found_NC.shape == (N, C), f"shape {tuple(found_NC.shape)}, expected {(N, C)}")
    demand(
        not found_NC.isnan().any() and bool((found_NC <= 1e-5).all()),
        "there are positive or undefined log-probabilities",
    )
    sums_N = found_NC.exp().sum(-1)
    demand(
        torch.allclose(sums_N, torch.ones(N), atol=1e-4),
        f"probabilities add up to {sums_N.min():.4g} ... {sums_N.max():.4g}",
    )


@rule("ensemble", "classes-that-a-member-does-not-know", needs=("log-probabilities-add-up",))
def unknown_classes(case: EnsembleCase) -> None:
    """Members may have -inf for classes that they do not know; probabilities still add up to 1."""
    scores_KNC = case.scores_KNC.clone()
    scores_KNC[0, :, :2] = float("-inf")
    scores_KNC[1, :, 2:] = float("-inf")
    found_NC = case.combine(scores_KNC)
    demand(not found_NC.isnan().any(), "there are undefined log-probabilities")
    demand(torch.allclose(found_NC.exp().sum(-1), torch.ones(N), atol=1e-4), "probabilities do not add up to 1")


@rule("ensemble", "one-member-is-the-member", needs=("log-probabilities-add-up",))
def one_member_is_the_member(case: EnsembleCase) -> None:
    """One member, or copies of it, predict what it predicts; with its probabilities, unless `probabilities = False`."""
    for count in (1, K):
        alone_KNC = case.scores_KNC[:1].expand(count, N, C)
        found_NC = case.combine(alone_KNC)
        demand(torch.equal(found_NC.argmax(-1), alone_KNC[0].argmax(-1)), f"{count} copies predict other classes")
        if getattr(case.cls, "probabilities", True):
            demand(
                torch.allclose(found_NC.exp(), alone_KNC[0].softmax(-1), atol=1e-4),
                f"{count} copies have other probabilities",
            )


@rule("ensemble", "order-does-not-matter", needs=("log-probabilities-add-up",))
def order_does_not_matter(case: EnsembleCase) -> None:
    """Members in another order, fitted anew, give the same, unless the class says `order_matters = True`."""
    if getattr(case.cls, "order_matters", False):
        raise NotApplicable("it says that the order matters")
    turned_NC = case.combine(case.scores_KNC.flip(0))
    demand(
        torch.allclose(case.combine(case.scores_KNC).exp(), turned_NC.exp(), atol=1e-3),
        "other probabilities in another order",
    )


@rule("ensemble", "state-rebuilds-it", needs=("log-probabilities-add-up",))
def state_rebuilds_it(case: EnsembleCase) -> None:
    """`state` is what JSON can hold and builds an equal, fitted ensemble, without validation data."""
    method = case.fitted(case.scores_KNC)
    state = json.loads(json.dumps(method.state(), allow_nan=False))
    again = type(method)(**state)
    demand(not again.needs_validation, "the rebuilt ensemble asks for validation data again")
    same = torch.allclose(method.combine(case.scores_KNC).exp(), again.combine(case.scores_KNC).exp(), atol=1e-6)
    demand(same, "the rebuilt ensemble gives other probabilities")
