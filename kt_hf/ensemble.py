"""The ensemble contract: output space.

Shapes: K members, N scored units, C classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch


class EnsembleMethod:
    """Base of every ensemble. Its settings are the constructor's keyword arguments."""

    api_version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    needs_validation: ClassVar[bool] = False

    def fit(self, scores_KNC: torch.Tensor, labels_N: torch.Tensor) -> None:
        """Choose what `combine` needs on validation data; called where `needs_validation`. labels_N: negative for none.
        Scores as `combine` has them."""

    def combine(self, scores_KNC: torch.Tensor) -> torch.Tensor:
        """Log-probabilities scores_NC from the members' logits, which are -inf for a class that a member does not
        know."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Constructor settings that make an equal, fitted ensemble; what the folder of members records."""
        return {}
