"""What tasks with a loss per token share: judging tokens, sums per example, perplexity.

Shapes: N scored tokens of a batch (of `measure`: N examples), B rows, L positions, C entries of the vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from kt_hf.errors import DataError
from kt_hf.task import Scores

IGNORED = -100
"""Label of a token that is not learnt."""
CHUNK = 2048
"""Positions whose logits are made float32 at a time in evaluation; a vocabulary of 128k takes 1 GB."""


def judge(scores_NC: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(-log p(target)_N, whether the target has the highest score_N), from logits or log-probabilities."""
    scores_NC = scores_NC.float()
    return F.cross_entropy(scores_NC, targets_N, reduction="none"), scores_NC.argmax(-1) == targets_N


def judge_labels(logits_BLC: torch.Tensor, labels_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per example of a model whose output at a position is about the label there: `nll`, `tokens`, `correct`."""
    rows_N, positions_N = (labels_BL != IGNORED).nonzero(as_tuple=True)
    targets_N = labels_BL[rows_N, positions_N]
    parts = zip(rows_N.split(CHUNK), positions_N.split(CHUNK), targets_N.split(CHUNK), strict=True)
    judged = [judge(logits_BLC[row, position], target) for row, position, target in parts]
    nll_N, hit_N = (torch.cat(column) for column in zip(*judged, strict=True))
    return per_example(nll_N, hit_N, rows_N, len(labels_BL))


def judge_scores(scores_NC: torch.Tensor, labels_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same from scores at the places that have a label, row by row."""
    real_BL = labels_BL != IGNORED
    return per_example(*judge(scores_NC, labels_BL[real_BL]), real_BL.nonzero()[:, 0], len(labels_BL))


def per_example(nll_N: torch.Tensor, hit_N: torch.Tensor, rows_N: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """Sums over the tokens of each example; on the CPU, where every device's numbers can be added in float64."""
    rows = rows_N.cpu()
    zeros = torch.zeros(size, dtype=torch.int64)
    return {
        "nll": torch.zeros(size, dtype=torch.float64).index_add_(0, rows, nll_N.cpu().double()),
        "tokens": zeros.index_add(0, rows, torch.ones_like(rows)),
        "correct": zeros.index_add(0, rows, hit_N.cpu().long()),
    }


def perplexity(nll_N: np.ndarray, tokens_N: np.ndarray, weights_N: np.ndarray) -> float:
    """exp(sum w nll / sum w tokens) over N examples; infinite where that overflows, NaN without tokens."""
    tokens = float((weights_N * tokens_N).sum())
    loss = float((weights_N * nll_N).sum()) / tokens if tokens else math.nan
    return math.inf if loss > 709 else math.exp(loss)


def measure(predictions: dict[str, np.ndarray], remedy: str) -> Scores:
    """perplexity = exp(sum of nll / number of tokens); `loss` is its logarithm, in nats per token.

    Raises `DataError` with this remedy where no example has a token to predict.
    """
    nll, tokens = predictions["nll"].astype(np.float64), predictions["tokens"].astype(np.float64)
    correct = predictions["correct"].astype(np.float64)
    if not tokens.sum():
        raise DataError(f"none of the {len(tokens)} examples has a token to predict", remedy)
    return Scores(
        metrics={
            "perplexity": perplexity(nll, tokens, np.ones_like(tokens)),
            "loss": float(nll.sum() / tokens.sum()),
            "token_accuracy": float(correct.sum() / tokens.sum()),
        },
        examples={
            "loss": (nll / np.maximum(tokens, 1), tokens),
            "token_accuracy": (correct / np.maximum(tokens, 1), tokens),
        },
        statistics={"perplexity": lambda weights: perplexity(nll, tokens, weights)},
    )
