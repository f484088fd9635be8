"""What tasks with a loss per token share: where tokens are learnt, judging them, sums per example, perplexity.

Shapes: N scored tokens of a batch (of `measure`: N examples), B rows, L positions, K of them, C entries of the
vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from kt_hf.errors import DataError
from kt_hf.task import Part, Scores

IGNORED = -100
"""Label of a token that is not learnt."""
PLACES = "places"
"""Column of a batch: the positions at which a row's tokens are learnt, -1 where it has fewer than others."""
CHUNK = 2048
"""Positions whose logits are made float32 at a time in evaluation; a vocabulary of 128k takes 1 GB."""


def places(labels_BL: torch.Tensor) -> torch.Tensor:
    """places_BK of the labels that count, for `collate`: K is known on the host alone, and a GPU that is asked for it
    has to be waited for."""
    real_BL = labels_BL != IGNORED
    counts_B1 = real_BL.sum(1, keepdim=True)
    width = int(counts_B1.max()) if len(counts_B1) else 0
    places_BK = real_BL.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return places_BK.masked_fill(torch.arange(width) >= counts_B1, -1)


def learnt(
    logits_BLC: torch.Tensor, labels_BL: torch.Tensor, places_BK: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits_NC in float32, targets_N) at these places, row by row; the target is IGNORED where a row has no further
    one. Without places these are all positions, and so they are where places are most of a row: picking would copy as
    much."""
    if places_BK is None or 4 * places_BK.shape[1] > 3 * labels_BL.shape[1]:
        return logits_BLC.float().flatten(0, 1), labels_BL.flatten()
    rows_B1, at_BK = torch.arange(len(labels_BL), device=labels_BL.device)[:, None], places_BK.clamp(min=0)
    targets_BK = torch.where(places_BK < 0, IGNORED, labels_BL.gather(1, at_BK))
    return logits_BLC[rows_B1, at_BK].float().flatten(0, 1), targets_BK.flatten()


def loss(logits_NC: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float) -> Part:
    """-log p(target) in nats: values_N, of weight 1 where the target counts, else 0."""
    values_N = F.cross_entropy(
        logits_NC, targets_N, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORED
    )
    return values_N, weights(targets_N), "token"


def weights(targets_N: torch.Tensor) -> torch.Tensor:
    return (targets_N != IGNORED).float()


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


def judge_scores(scores_NC: torch.Tensor, weight_N: torch.Tensor, labels_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same from scores, row by row, of which those that weigh something are at the places that have a label."""
    real_BL = labels_BL != IGNORED
    judged = judge(scores_NC[weight_N > 0], labels_BL[real_BL])
    return per_example(*judged, real_BL.nonzero()[:, 0], len(labels_BL))


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
