"""The set loss of DETR and its kin, unreduced: every true box is matched with one query, which is to say its class and
where it is; all others are to say that there is nothing.

Boxes are (centre x, centre y, width, height) in shares of the picture. Models are of two kinds: with a background, one
more output than classes, under a softmax (DETR, YOLOS); without, every class a yes or no of its own (all that came
after).

Shapes: B images, Q queries, M true boxes of the image with most, K outputs, C classes.

Sources: Carion et al. 2020, "End-to-End Object Detection with Transformers", arXiv:2005.12872, equations 1 and 2;
Zhu et al. 2021, "Deformable DETR", arXiv:2010.04159; Lin et al. 2017, "Focal Loss for Dense Object Detection",
arXiv:1708.02002. The matchers are those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

_SCHEMA = "(Tensor logits, Tensor boxes, Tensor labels, Tensor truth, float[] costs, bool background) -> Tensor"


# An operator of its own, since it looks at numbers: where a step is played on tensors without content, its result has
# none either.
@torch.library.custom_op("kt_hf::match_boxes", mutates_args=(), schema=_SCHEMA)
def _match(logits, boxes, labels, truth, costs, background):  # type: ignore[no-untyped-def]
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    query_BM, real_BM = torch.full_like(labels, -1), labels >= 0
    if not real_BM.any():
        return query_BM
    matcher = (HungarianMatcher if background else DeformableDetrHungarianMatcher)(*costs)
    each = zip(labels, truth, real_BM, strict=True)
    targets = [{"class_labels": own[real], "boxes": place[real]} for own, place, real in each]
    found = matcher({"logits": logits, "pred_boxes": boxes}, targets)
    for query_M, real_M, (queries, places) in zip(query_BM, real_BM, found, strict=True):
        query_M[real_M.nonzero().squeeze(1)[places.to(labels.device)]] = queries.to(labels.device)
    return query_BM


@_match.register_fake
def _(logits, boxes, labels, truth, costs, background):  # type: ignore[no-untyped-def]
    return torch.empty_like(labels)


def match(
    logits_BQK: torch.Tensor,
    boxes_BQ4: torch.Tensor,
    labels_BM: torch.Tensor,
    truth_BM4: torch.Tensor,
    costs: Sequence[float],
    background: bool,
) -> torch.Tensor:
    """query_BM of every true box, -1 where labels_BM is negative (no box) and where boxes outnumber the queries.

    costs: weights of class, distance and generalized IoU. Numbers that are not finite match somehow; the loss shows
    them.
    """
    logits, boxes = (torch.nan_to_num(x.detach().float()) for x in (logits_BQK, boxes_BQ4))
    return _match(logits, boxes, labels_BM, truth_BM4.float(), [float(cost) for cost in costs], background)


def objectness(logits_BQK: torch.Tensor, background: bool) -> torch.Tensor:
    """How sure a query is that there is something, whatever it is, in the form of logits of a single class."""
    if not background:
        return logits_BQK.amax(-1, keepdim=True)
    return torch.stack([logits_BQK[..., :-1].logsumexp(-1), logits_BQK[..., -1]], -1)


def targets(query_BM: torch.Tensor, labels_BM: torch.Tensor, num_queries: int, num_classes: int) -> torch.Tensor:
    """class_BQ that each query is to say, num_classes for nothing."""
    rows = len(query_BM)
    class_BQ = torch.full((rows, num_queries + 1), num_classes, dtype=torch.int64, device=labels_BM.device)
    places_BM = torch.where(query_BM < 0, num_queries, query_BM)  # one place more, for what has no query
    return class_BQ.scatter(1, places_BM, labels_BM.clamp(min=0))[:, :num_queries]


def class_cross_entropy(
    logits_BQK: torch.Tensor, class_BQ: torch.Tensor, nothing: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """values_B, in float32: the mean of every image over its queries, those that say nothing weighing `nothing`.

    The paper's mean is over the queries of all images at once; it is the same where images have as many boxes.
    """
    logits_BQK = logits_BQK.float()
    weight_K = torch.ones(logits_BQK.shape[-1], device=logits_BQK.device)
    weight_K[-1] = nothing
    values_BQ = F.cross_entropy(
        logits_BQK.transpose(1, 2), class_BQ, weight_K, reduction="none", label_smoothing=label_smoothing
    )
    return values_BQ.sum(1) / weight_K[class_BQ].sum(1)


def class_focal(logits_BQC: torch.Tensor, class_BQ: torch.Tensor, alpha: float, gamma: float = 2.0) -> torch.Tensor:
    """values_BQ, in float32: the focal loss of every query, summed over classes; to be divided by the true boxes."""
    from torchvision.ops import sigmoid_focal_loss

    wanted_BQC = F.one_hot(class_BQ, logits_BQC.shape[-1] + 1)[..., :-1].float()
    return sigmoid_focal_loss(logits_BQC.float(), wanted_BQC, alpha, gamma, reduction="none").sum(-1)


def boxes(
    boxes_BQ4: torch.Tensor, truth_BM4: torch.Tensor, query_BM: torch.Tensor, distance: float, giou: float
) -> torch.Tensor:
    """values_BM, in float32: the weighted sum of distance (L1) and 1 - generalized IoU of every matched box, else 0."""
    places_BM4 = query_BM.clamp(min=0)[..., None].expand(-1, -1, 4)
    found_BM4, truth_BM4 = boxes_BQ4.float().gather(1, places_BM4), truth_BM4.float()
    away_BM = 1 - generalized_iou(corners(found_BM4), corners(truth_BM4))
    values_BM = distance * (found_BM4 - truth_BM4).abs().sum(-1) + giou * away_BM
    return torch.where(query_BM < 0, 0.0, values_BM)


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """(left, top, right, bottom) of (centre x, centre y, width, height)."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def generalized_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU - (hull - union) / hull of boxes in pairs, (left, top, right, bottom); 0 for two without an area.

    Rezatofighi et al. 2019, "Generalized Intersection over Union", arXiv:1902.09630, algorithm 1. Not torchvision's,
    which picks out pairs that overlap: that waits for the device, and cannot be played without content.
    """
    both = _area((torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0))
    hull = _area(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    union = _area(a[..., 2:] - a[..., :2]) + _area(b[..., 2:] - b[..., :2]) - both
    return both / union.clamp(min=1e-12) - (hull - union) / hull.clamp(min=1e-12)


def _area(sides: torch.Tensor) -> torch.Tensor:
    return sides[..., 0] * sides[..., 1]  # the gradient of `prod` would look for zeros
