"""Average precision of detected boxes as a function of how often every image counts, for resampling.

As COCO's evaluation computes it: in every image the detections of a class, best first, take the free true box that
they overlap most; over all images, ranked by score, that gives precision at 101 levels of recall. What takes what does
not depend on which images were drawn, so it is settled once; a draw costs a sum over ranks.

Shapes: N images, D detections of a class (of one image, then of all), T thresholds of overlap, H detections that hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Of intersection over union."""
RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Ranking:
    """The detections of one class in all images, best first.

    images_D: in which image each is. hits_T: for every threshold, which of them hit (ranks_H). counts_N: true boxes of
    the class in every image.
    """

    images_D: np.ndarray
    hits_T: list[np.ndarray]
    counts_N: np.ndarray


def rank(
    scores: Sequence[np.ndarray], hits_N: Sequence[np.ndarray], counts_N: np.ndarray, num_thresholds: int = 10
) -> Ranking:
    """One class in all images. scores: scores_D of every image, best first; hits_N: its hit_TD, which of them took a
    true box. Of equal scores those of earlier images come first."""
    scores_D = np.concatenate([np.zeros(0), *scores])
    order_D = np.argsort(-scores_D, kind="stable")
    images_D = np.repeat(np.arange(len(scores)), [len(s) for s in scores])[order_D]
    hit_TD = np.concatenate([np.zeros((num_thresholds, 0), bool), *hits_N], 1)[:, order_D]
    last = max(np.flatnonzero(hit_TD.any(0)), default=-1)  # what comes after the last hit changes nothing
    return Ranking(images_D[: last + 1], [np.flatnonzero(hit_D) for hit_D in hit_TD], np.asarray(counts_N))


def average_precision(
    ranking: Ranking, weights_N: np.ndarray, places: Sequence[int] | None = None
) -> np.ndarray | None:
    """ap_T of a class, at the thresholds in these places (by default all): the mean over 101 levels of recall of the
    best precision at that recall or a higher one. None where there are no true boxes.

    Lin et al. 2014, "Microsoft COCO: Common Objects in Context", arXiv:1405.0312, and its `COCOeval.accumulate`; equal
    to it where every image counts once. Precision matters only where recall rises, at hits.
    """
    total = float(weights_N @ ranking.counts_N)
    if not total:
        return None
    weight_D = weights_N[ranking.images_D]
    seen_D = np.cumsum(weight_D)
    found = []
    for place in range(len(ranking.hits_T)) if places is None else places:
        ranks_H = ranking.hits_T[place]
        right_H = np.cumsum(weight_D[ranks_H])
        precision_H = right_H / np.maximum(seen_D[ranks_H], 1e-12)
        best_H = np.maximum.accumulate(precision_H[::-1])[::-1]
        levels = np.searchsorted(right_H / total, RECALLS, side="left")
        found.append(best_H[levels[levels < len(best_H)]].sum() / len(RECALLS))
    return np.array(found)


def mean_average_precision(
    rankings: Sequence[Ranking], weights_N: np.ndarray, places: Sequence[int] | None = None
) -> float:
    """Mean over thresholds and over the classes that there are; 0 without any."""
    found = [average_precision(ranking, weights_N, places) for ranking in rankings]
    there = [ap_T for ap_T in found if ap_T is not None]
    return float(np.mean(there)) if there else 0.0


def mean_recall(rankings: Sequence[Ranking], weights_N: np.ndarray) -> float:
    """Mean over thresholds and over the classes that there are of the share of true boxes that are hit."""
    found = []
    for ranking in rankings:
        total = float(weights_N @ ranking.counts_N)
        if total:
            weight_D = weights_N[ranking.images_D]
            found.append(np.mean([weight_D[ranks_H].sum() / total for ranks_H in ranking.hits_T]))
    return float(np.mean(found)) if found else 0.0
