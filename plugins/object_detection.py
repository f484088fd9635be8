"""Object detection: boxes around things in an image, and what they are.

Shapes: B rows of a batch, H x W pixels of its largest picture, Q queries, C classes, K outputs of a query (C, or one
more for nothing), M true boxes of the row with most, D width of features, T boxes that are kept of a row's predictions,
R rows of a split, N = B M places for true boxes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import nn

from kt_hf import Loaded, Role, Task, images, loading, tiny
from kt_hf.errors import LEAVE_OUT, DataError, RecipeError, RowError
from kt_hf.functional import detection, set_loss
from kt_hf.task import FILL, Batch, Part, Scores

BOXES = ("bbox", "bboxes", "boxes", "box")
CLASSES = ("category", "categories", "category_id", "label", "labels", "class", "classes")
COLUMNS = ("objects", "annotations", "annotation", "targets", "target", "faces")
"""Usual names, of fields and of the column that has them."""
HEAD = re.compile(r"(^|\.)(class_labels_classifier|class_embed|enc_score_head|bbox_predictor|bbox_embed|enc_bbox_head)")
BY_CLASS = re.compile(r"(^|\.)(class_labels_classifier|class_embed|enc_score_head)")
UNUSED = "denoising_class_embed"
"""Learns from labels inside of the model, which it is not given."""


class ObjectDetection(Task):
    """Boxes and their classes (`AutoModelForObjectDetection`: DETR and its kin, YOLOS).

    The data give an image and `objects`, a struct of lists (or a list of structs) with a box and a class for each; a
    row may have none. box_format: `coco` (left, top, width, height in pixels), `xyxy` (left, top, right, bottom in
    pixels), `yolo` (centre, width, height in shares of the picture). classes: the names of class numbers, where the
    data do not give them. top_k: the predictions that are kept of an image. threshold: the least score of what
    `kt-hf predict` shows. Boxes are cut at the picture's edge; what is marked `iscrowd` is left out.

    Every model learns by DETR's set loss, with the costs and coefficients of its configuration: cross-entropy where it
    has an output for nothing (a mean over the queries of each image, then over images; the paper's is over all queries
    at once), else the focal loss; distance and generalized IoU by the number of boxes in the whole step. Of earlier
    layers only RT-DETR's learn by losses of their own, and its proposals (focal in place of its varifocal loss, without
    its denoising); `auxiliary_loss` of other configurations is not heeded. Scores, for `distill`, are of the classes at
    the query that fits each true box: teacher and student are lined up by these boxes, whatever the number of their
    queries. `data.augment` moves boxes with their image; those that leave it are dropped.
    """

    auto_class = "AutoModelForObjectDetection"
    classes_from = "model"
    augments = "image"
    cache_rows = False
    conformance = {
        "model": {
            "config": "yolos",
            "config_overrides": {**tiny.ENCODER, "image_size": [16, 16], "patch_size": 4, "num_detection_tokens": 6},
        }
    }
    unit = "box"
    metric = "mean_average_precision"
    metrics = ("mean_average_precision", "average_precision_50", "average_precision_75", "mean_average_recall")
    roles = (
        Role("image", ("image",), aliases=("img", "pixel_values")),
        Role("objects", ("struct",), aliases=COLUMNS[1:], predicted=True),
    )

    waits = {"kt_hf::match_boxes": "which query fits which true box is found on the host (`scipy`)"}

    def __init__(
        self,
        *,
        box_format: Literal["coco", "xyxy", "yolo"] = "coco",
        classes: list[str] | None = None,
        top_k: Annotated[int, Field(ge=1, le=100)] = 100,
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.5,
    ):
        self.box_format, self.classes, self.top_k, self.threshold = box_format, classes, top_k, threshold
        self.names: list[str] | None = None
        self.places: dict[Any, int] = {}

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> datasets.Dataset:
        """Coloured rectangles on noise, none to three in a picture."""
        pictures, objects = [], []
        for i in range(count):
            pixels, boxes, classes = random.normal(90, 10, (20, 24, 3)), [], []
            for _ in range((i + 1) % 4):
                width, height = random.integers(5, 11, 2).tolist()
                left, top = int(random.integers(0, 24 - width)), int(random.integers(0, 20 - height))
                kind = int(random.integers(0, 3))
                pixels[top : top + height, left : left + width] = np.eye(3)[kind] * 220
                boxes.append([left, top, width, height])
                classes.append(kind)
            pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
            objects.append({"bbox": boxes, "category": classes})
        box = datasets.List(datasets.List(datasets.Value("float64")))
        kind = datasets.List(datasets.ClassLabel(names=["red", "green", "blue"]))
        features = datasets.Features({"image": datasets.Image(), "objects": {"bbox": box, "category": kind}})
        return datasets.Dataset.from_dict({"image": pictures, "objects": objects}, features=features)

    def fits(self, roles: dict[str, str]) -> bool:
        """By the column's name, since structs may be anything."""
        return "image" in roles and roles.get("objects") in COLUMNS

    def settle(self, info: Any) -> None:
        """The classes of the data. Raises `RecipeError` for a struct without boxes or classes."""
        splits = [rows for rows in info.splits.values() if "objects" in rows.column_names]
        if splits:
            self.names, self.places = class_names(splits, self.classes)

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` for a processor that crops, and for models that learn by groups of queries."""
        from transformers import AutoModelForObjectDetection

        self.settle(info)
        loaded = loading.load_model(AutoModelForObjectDetection, ref, self.names or info.labels, by_class)
        config: Any = loaded.model.config
        if (getattr(config, "group_detr", None) or 1) > 1:
            raise RecipeError(
                f"{type(loaded.model).__name__} trains {config.group_detr} groups of queries, the task's loss one",
                "set model.config_overrides.group_detr=1",
            )
        # transformers freezes lower layers of a backbone, even of one that has learned nothing; that is `finetune`'s
        for name, parameter in loaded.model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and UNUSED not in name)
        loaded.processor = loading.load_image_processor_by_kind(ref, config)
        if getattr(loaded.processor, "do_center_crop", False):
            raise RecipeError(
                "the model's image processor crops, and boxes would not fit",
                "set model.processor_overrides.do_center_crop=false",
            )
        return loaded

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        padded = getattr(loaded.processor, "pad_size", None)
        found = loading.image_signature(loaded.processor)
        found["normalisation"] |= {"pad_size": str(padded)} if padded else {}
        return {"labels": loaded.labels, **found}

    def layers(self, model: nn.Module) -> list[list[str]]:
        return layers(model)

    def head(self, model: nn.Module) -> list[str]:
        return matching(model, HEAD)

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """pixel_values, pixel_mask, `size` (height, width) of the picture; boxes (centre, width, height in shares of
        it) and labels where there are objects. Pictures are made ready one by one: the model sees each as a pipeline
        would."""
        columns: dict[str, list[Any]] = {"pixel_values": [], "pixel_mask": [], "size": []}
        columns |= {"boxes": [], "labels": []} if "objects" in rows else {}
        for place, image in enumerate(rows["image"]):
            picture = images.rgb(image)
            if "objects" in rows:
                boxes_M4, labels_M = self._objects(place, rows["objects"][place], picture, loaded)
                if augment is not None:
                    picture, boxes_M4, labels_M = together(augment, picture, boxes_M4, labels_M)
                low, high = boxes_M4[:, :2], boxes_M4[:, 2:]
                shares = np.concatenate([(low + high) / 2, high - low], 1) / (2 * picture.size)
                columns["boxes"].append(torch.from_numpy(shares).float())
                columns["labels"].append(torch.from_numpy(labels_M))
            elif augment is not None:
                picture = augment(picture)
            encoded = loaded.processor([picture], return_tensors="pt")
            pixels_CHW = encoded["pixel_values"][0]
            mask = encoded["pixel_mask"][0] if "pixel_mask" in encoded else torch.ones(pixels_CHW.shape[1:])
            columns["pixel_values"].append(pixels_CHW)
            columns["pixel_mask"].append(mask.long())
            columns["size"].append((picture.height, picture.width))
        return columns

    def _objects(self, place: int, given: Any, picture: Image.Image, loaded: Loaded) -> tuple[np.ndarray, np.ndarray]:
        """(boxes_M4 as left, top, right, bottom in pixels, labels_M as the model numbers classes) of a row."""
        boxes, classes = self._kept(place, given, picture)
        odd = [one for one in classes if one not in self.places]
        if odd:
            known = ", ".join(list(self.names or [])[:8])
            raise RowError(place, f"a box has the class {odd[0]!r}, the classes are {known}", "mend or name it")
        ids = loaded.label_ids or []
        labels = [ids[self.places[one]] for one in classes]
        return np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64)

    def _kept(self, place: int, given: Any, picture: Image.Image) -> tuple[list[list[float]], list[Any]]:
        """Boxes and their classes, as the data have these, but for crowds."""
        columns = as_lists(given)
        boxes, classes = (next((columns[n] or [] for n in names if n in columns), []) for names in (BOXES, CLASSES))
        if len(boxes) != len(classes):
            cause = f"it has {len(boxes)} boxes and {len(classes)} classes"
            raise RowError(place, cause, f"give every box one class, {LEAVE_OUT}")
        crowd = columns.get("iscrowd") or [0] * len(boxes)
        kept = [i for i in range(len(boxes)) if not crowd[i]]
        return [self._box(place, boxes[i], picture) for i in kept], [classes[i] for i in kept]

    def check(self, row: dict[str, Any]) -> None:
        if "objects" in row:
            self._kept(0, row["objects"], row["image"])

    def _box(self, place: int, box: Any, picture: Image.Image) -> list[float]:
        """Cut at the picture's edge. Raises `RowError` for a box that cannot be meant so."""
        try:
            a, b, c, d = (float(x) for x in box)
        except (TypeError, ValueError):
            a = b = c = d = float("nan")
        width, height = picture.size
        ends = {
            "coco": (a, b, a + c, b + d),
            "xyxy": (a, b, c, d),
            "yolo": ((a - c / 2) * width, (b - d / 2) * height, (a + c / 2) * width, (b + d / 2) * height),
        }[self.box_format]
        left, top, right, bottom = ends
        if not (np.isfinite(ends).all() and right > left and bottom > top):
            cause = "is not four numbers" if not np.isfinite(ends).all() else "has no width or no height"
            raise RowError(
                place,
                f"the box {box} {cause}",
                f"mend it, {LEAVE_OUT}; boxes are read as {self.box_format} (box_format)",
            )
        inside = [max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)]
        area = max(inside[2] - inside[0], 0) * max(inside[3] - inside[1], 0)
        if area < (right - left) * (bottom - top) / 2:
            raise RowError(
                place,
                f"more than half of the box {box} is outside of the picture of {width} x {height} pixels",
                f"mend it, {LEAVE_OUT}; boxes are read as {self.box_format} (task.object-detection.box_format)",
            )
        return [float(x) for x in inside]

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        """Smaller pictures lie in the upper left corner, masked; rows with fewer boxes are filled up."""
        extents = [tuple(row["pixel_values"].shape[1:]) for row in rows]
        height, width = (max(extent[i] for extent in extents) for i in (0, 1))
        batch: Batch = {
            "pixel_values": torch.zeros(len(rows), len(rows[0]["pixel_values"]), height, width),
            "pixel_mask": torch.zeros(len(rows), height, width, dtype=torch.int64),
            "extent": torch.tensor(extents),
            "size": torch.tensor([list(row["size"]) for row in rows]),
            "index": torch.tensor([int(row["index"]) for row in rows]),
        }
        for i, (row, (h, w)) in enumerate(zip(rows, extents, strict=True)):
            batch["pixel_values"][i, :, :h, :w] = row["pixel_values"]
            batch["pixel_mask"][i, :h, :w] = row["pixel_mask"]
        if "labels" in rows[0]:
            most = max(1, *(len(row["labels"]) for row in rows))
            batch["labels"] = torch.full((len(rows), most), FILL)
            batch["boxes"] = torch.zeros(len(rows), most, 4)
            for i, row in enumerate(rows):
                batch["labels"][i, : len(row["labels"])] = row["labels"]
                batch["boxes"][i, : len(row["labels"])] = row["boxes"]
        return batch

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Found:
        inner: Any = loading.unwrap(model)
        if "pixel_mask" in inspect.signature(inner.forward).parameters:
            kwargs["pixel_mask"] = batch["pixel_mask"]
        return read_outputs(model(pixel_values=batch["pixel_values"], **kwargs), inner.config)

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> list[Part]:
        """Class and place of every layer that says something, each by a matching of its own."""
        if label_smoothing and not outputs.background:
            raise RecipeError(
                "training.label_smoothing_factor: this model says of each class yes or no", "leave it out"
            )
        said = [(outputs.logits, outputs.pred_boxes), *outputs.others]
        return [part for logits, boxes in said for part in layer_loss(logits, boxes, outputs, batch, label_smoothing)]

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        """Rows and true boxes."""
        return {"example": len(batch["index"]), "box": (batch["labels"] >= 0).sum() if "labels" in batch else 0}

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the classes, without that for nothing, at the query that fits each true box; weight 0 where a row
        has no further box. Which query fits is told by its box and by how sure it is that there is something: what it
        takes that for must not decide, and a teacher may number classes in its own way."""
        if "labels" not in batch:
            raise RecipeError("detections have scores at true boxes, and these rows have none", "give rows with boxes")
        sure = set_loss.objectness(outputs.logits, outputs.background)
        labels_BM = batch["labels"].clamp(max=0)
        query_BM = set_loss.match(
            sure, outputs.pred_boxes, labels_BM, batch["boxes"], outputs.costs, outputs.background
        )
        logits_BQC = outputs.logits[..., :-1] if outputs.background else outputs.logits
        places_BMC = query_BM.clamp(min=0)[..., None].expand(-1, -1, logits_BQC.shape[-1])
        return logits_BQC.gather(1, places_BMC).flatten(0, 1), (query_BM >= 0).float().flatten()

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The mean of what the last layer holds of a picture."""
        return outputs.last_hidden_state.mean(dim=1)

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The `top_k` detections of every row. Pictures of one extent at a time, so that none is padded: what is said
        of one does not depend on those beside it."""
        extents = [tuple(extent) for extent in batch["extent"].tolist()]
        found: dict[str, torch.Tensor] = {}
        for h, w in dict.fromkeys(extents):
            rows = torch.tensor([i for i, extent in enumerate(extents) if extent == (h, w)])
            rows = rows.to(batch["extent"].device)
            part = {
                "pixel_values": batch["pixel_values"][rows, :, :h, :w],
                "pixel_mask": batch["pixel_mask"][rows, :h, :w],
            }
            for key, value in best(self.forward(model, part), self.top_k).items():
                if key not in found:
                    found[key] = value.new_zeros((len(extents), *value.shape[1:]))
                found[key][rows] = value
        found["size"] = batch["size"]
        if "labels" in batch:
            found |= {"true_classes": batch["labels"], "true_boxes": set_loss.corners(batch["boxes"]).flatten(1)}
        return found

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """mean_average_precision: over classes and over thresholds of overlap from 0.5 to 0.95, COCO's metric, with
        that of every class; average_precision_50 and _75: at one threshold; mean_average_recall: the share of true
        boxes that are found, over the same thresholds."""
        from kt_hf import metrics

        rows = list(unpack(predictions))
        if not any(len(row.true_classes) for row in rows):
            raise DataError("no image of these has a box", "look at the objects and at iscrowd")
        metric = metrics.BoxPrecision(keep_in_memory=True)
        judge = metric.judge(
            [{"boxes": row.boxes, "labels": row.classes, "scores": row.scores} for row in rows],
            [{"boxes": row.true_boxes, "labels": row.true_classes} for row in rows],
        )
        found, rankings = Scores(metric.figures(judge)), metric.rankings(judge)
        for number, value in found.metrics.pop("by_class").items():  # type: ignore[attr-defined]
            found.metrics[f"average_precision_{(loaded.labels or [])[number]}"] = value
        for name, where in (("average_precision_50", [0]), ("average_precision_75", [5]), (self.metric, None)):
            found.statistics[name] = lambda w, at=where: detection.mean_average_precision(rankings, w, at)
        found.statistics["mean_average_recall"] = lambda w: detection.mean_recall(rankings, w)
        return found

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        """Of every row its detections and its true boxes (left, top, right, bottom in pixels)."""
        rows = list(unpack(predictions))
        names = loaded.labels or []
        columns: dict[str, list[Any]] = {
            "score": [row.scores.tolist() for row in rows],
            "class": [[names[c] for c in row.classes] for row in rows],
            "box": [row.boxes.tolist() for row in rows],
        }
        if "true_classes" in predictions:
            columns["true_class"] = [[names[c] for c in row.true_classes] for row in rows]
            columns["true_box"] = [row.true_boxes.tolist() for row in rows]
        return columns

    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """How many of which class; their labels, scores and boxes (left, top, right, bottom in pixels), the surest
        first."""
        if predictor.combine is not None:
            self.from_scores(torch.empty(0), torch.empty(0), {})  # raises: there are no ensembles
        names = predictor.members[0].labels or []
        columns: dict[str, list[Any]] = {"prediction": [], "labels": [], "scores": [], "boxes": []}
        for row in unpack(predictor.scores(info, "test", batch_size=8)):
            kept = row.scores > self.threshold
            labels = [names[c] for c in row.classes[kept]]
            counts = [f"{labels.count(name)} {name}" for name in dict.fromkeys(labels)]
            columns["prediction"].append(", ".join(counts) or "nothing")
            columns["labels"].append(labels)
            columns["scores"].append(row.scores[kept].tolist())
            columns["boxes"].append(row.boxes[kept].tolist())
        return columns


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a model says, in the words that all have in common. background: whether it has an output for nothing.
    others: (logits, boxes) of earlier layers that are to learn the same. costs: of class, distance and generalized IoU
    in the matching; place: coefficients of the latter two in the loss; nothing, alpha: what the loss of classes takes.
    """

    logits: torch.Tensor
    pred_boxes: torch.Tensor
    last_hidden_state: torch.Tensor
    others: list[tuple[torch.Tensor, torch.Tensor]]
    background: bool
    costs: list[float]
    place: list[float]
    nothing: float
    alpha: float


def read_outputs(outputs: Any, config: Any) -> Found:
    """Raises `RecipeError` for a model that gives no boxes."""
    if getattr(outputs, "pred_boxes", None) is None or getattr(outputs, "logits", None) is None:
        raise RecipeError(f"models of type '{config.model_type}' give no boxes by queries", "choose another model")

    def setting(default: float, *names: str) -> float:
        return float(next((getattr(config, n) for n in names if getattr(config, n, None) is not None), default))

    others = []
    if getattr(outputs, "enc_topk_logits", None) is not None:  # RT-DETR: proposals, and all layers but the last
        earlier = outputs.intermediate_logits.shape[1] - 1
        layers_ = (outputs.intermediate_logits, outputs.intermediate_reference_points)
        others = [(layers_[0][:, i], layers_[1][:, i]) for i in range(earlier)]
        others.append((outputs.enc_topk_logits, outputs.enc_topk_bboxes))
    return Found(
        outputs.logits,
        outputs.pred_boxes,
        outputs.last_hidden_state,
        others,
        outputs.logits.shape[-1] > config.num_labels,
        [setting(cost, f"{n}_cost", f"matcher_{n}_cost") for n, cost in (("class", 1), ("bbox", 5), ("giou", 2))],
        [setting(weight, f"{n}_loss_coefficient", f"weight_loss_{n}") for n, weight in (("bbox", 5), ("giou", 2))],
        setting(0.1, "eos_coefficient"),
        setting(0.25, "focal_alpha", "focal_loss_alpha"),
    )


def layer_loss(
    logits_BQK: torch.Tensor, boxes_BQ4: torch.Tensor, found: Found, batch: Batch, label_smoothing: float
) -> list[Part]:
    """Of one layer: that of classes, and that of boxes."""
    labels_BM, truth_BM4 = batch["labels"], batch["boxes"]
    query_BM = set_loss.match(logits_BQK, boxes_BQ4, labels_BM, truth_BM4, found.costs, found.background)
    num_classes = logits_BQK.shape[-1] - found.background
    class_BQ = set_loss.targets(query_BM, labels_BM, logits_BQK.shape[1], num_classes)
    values_BM = set_loss.boxes(boxes_BQ4, truth_BM4, query_BM, *found.place)
    of_boxes: Part = (values_BM.flatten(), (labels_BM >= 0).float().flatten(), "box")
    if found.background:
        values_B = set_loss.class_cross_entropy(logits_BQK, class_BQ, found.nothing, label_smoothing)
        return [(values_B, None, "example"), of_boxes]
    return [(set_loss.class_focal(logits_BQK, class_BQ, found.alpha).flatten(), None, "box"), of_boxes]


def best(found: Found, top_k: int) -> dict[str, torch.Tensor]:
    """scores_BT, classes_BT and boxes (corners in shares of the picture), the surest first, as the image processors of
    transformers choose them: of each query its best class, or of models without an output for nothing any pairs of a
    query and a class, as many as there are queries."""
    logits_BQK = found.logits.float()
    if found.background:
        each_BQ, kind_BQ = logits_BQK.softmax(-1)[..., :-1].max(-1)
        scores, query = each_BQ.topk(min(top_k, each_BQ.shape[1]))
        kind = kind_BQ.gather(1, query)
    else:
        flat = logits_BQK.sigmoid().flatten(1)
        scores, place = flat.topk(min(top_k, logits_BQK.shape[1]))
        query, kind = place // logits_BQK.shape[-1], place % logits_BQK.shape[-1]
    boxes = set_loss.corners(found.pred_boxes.float()).gather(1, query[..., None].expand(-1, -1, 4))
    return {"scores": scores, "classes": kind, "boxes": boxes.flatten(1)}


def matching(model: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    """Names of the outermost modules that a pattern finds, the members of a list for the list."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and pattern.search(name) and not inside and not isinstance(module, nn.ModuleList):
            found.append(name)
    return found


def by_class(model: nn.Module) -> list[str]:
    return matching(model, BY_CLASS)


def layers(model: nn.Module) -> list[list[str]]:
    """Parameter names by layer: what precedes the backbone's first stage, its stages, the encoder's layers, the
    decoder's. A layer is a member of an outermost list of modules; what stands between two lists (projections, the
    queries) goes with the layer that follows, what comes last with the last."""
    inner: Any = loading.unwrap(model)
    root = getattr(inner, getattr(inner, "base_model_prefix", ""), inner)
    owner: dict[int, str] = {}
    lists: list[str] = []
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in lists):
            lists.append(name)
            owner |= {id(p): f"{name}.{i}" for i, child in enumerate(module) for p in child.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    heads = tuple(f"{name}." for name in matching(model, HEAD))
    groups: dict[str, list[str]] = {"": []}
    waiting: list[str] = []
    for parameter in root.parameters():
        name = names.get(id(parameter))
        if name is None or name.startswith(heads):
            continue
        layer = owner.get(id(parameter))
        if layer is None:
            (groups[""] if len(groups) == 1 else waiting).append(name)
            continue
        groups.setdefault(layer, []).extend(waiting)
        groups[layer].append(name)
        waiting = []
    groups[list(groups)[-1]].extend(waiting)
    return [group for group in groups.values() if group]


# --- the data --------------------------------------------------------------------------------------------------------


def as_lists(given: Any) -> dict[str, list[Any]]:
    """A struct of lists, as it is or from a list of structs."""
    if isinstance(given, list):
        return {key: [one[key] for one in given] for key in (given[0] if given else {})}
    return given or {}


def class_names(splits: Sequence[datasets.Dataset], given: list[str] | None) -> tuple[list[str], dict[Any, int]]:
    """(names of the classes, value in the data -> number of its class). Named classes keep their order, others are
    sorted; numbers have the names that are given.

    Raises `RecipeError` for a struct that has no boxes or no classes, and for names that are too few.
    """
    feature = splits[0].features["objects"]
    inner = feature if isinstance(feature, dict) else getattr(feature, "feature", None) or feature[0]
    fields = [next((n for n in usual if n in inner), None) for usual in (BOXES, CLASSES)]
    for found, what, usual in zip(fields, ("boxes", "classes"), (BOXES, CLASSES), strict=True):
        if found is None:
            raise RecipeError(
                f"the objects have {', '.join(inner)}: no field of {what}", f"call it {usual[0]} (or {usual[2]})"
            )
    kind = inner[fields[1]]
    kind = getattr(kind, "feature", kind[0] if isinstance(kind, list) else kind) if inner is feature else kind
    if isinstance(kind, datasets.ClassLabel):
        names = given or list(kind.names)
        values: list[Any] = list(range(kind.num_classes))
    else:
        values = sorted({v for rows in splits for v in field_values(rows, str(fields[1]))} - {None})
        numbers = bool(values) and isinstance(values[0], int)
        if given is None:
            names = [str(value) for value in values]
        elif numbers:
            names, values = given, list(range(max(len(given), max(values) + 1)))
        else:
            names, values = given, list(given)
    if len(names) < len(values):
        raise RecipeError(
            f"task.object-detection.classes names {len(names)} classes, the data have {len(values)}",
            "name all of them, from number 0 on",
        )
    return names, {value: i for i, value in enumerate(values)}


def field_values(rows: datasets.Dataset, name: str) -> list[Any]:
    """The distinct values of a field of all objects."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from kt_hf.reading import arrow

    column = arrow(rows, "objects")
    if pa.types.is_struct(column.type):
        flat = pc.list_flatten(pc.struct_field(column, name))
    else:
        flat = pc.struct_field(pc.list_flatten(column), name)
    return pc.unique(flat).to_pylist()


def together(
    augment: Any, picture: Image.Image, boxes_M4: np.ndarray, labels_M: np.ndarray
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Image and boxes under one draw of the changes; boxes of which less than a pixel is left are dropped."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    kind, canvas = tv_tensors.BoundingBoxFormat.XYXY, (picture.height, picture.width)
    moved = tv_tensors.BoundingBoxes(torch.from_numpy(boxes_M4), format=kind, canvas_size=canvas)
    given = {"image": picture, "boxes": moved, "labels": torch.from_numpy(labels_M)}
    changed = augment(given)
    boxes, kept = functional.sanitize_bounding_boxes(functional.clamp_bounding_boxes(changed["boxes"]))
    return changed["image"], boxes.as_subclass(torch.Tensor).numpy(), changed["labels"][kept].numpy()


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Detections of an image, the surest first, and its true boxes; (left, top, right, bottom) in pixels."""

    scores: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    true_classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    true_boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))


def unpack(predictions: dict[str, np.ndarray]) -> Iterator[Row]:
    """Gathered predictions, row by row."""
    for i, (height, width) in enumerate(predictions["size"]):
        scale = np.array([width, height, width, height], np.float64)
        row = Row(
            predictions["scores"][i].astype(np.float64),
            predictions["classes"][i],
            predictions["boxes"][i].reshape(-1, 4) * scale,
        )
        if "true_classes" in predictions:
            real = predictions["true_classes"][i] >= 0
            row.true_classes = predictions["true_classes"][i][real]
            row.true_boxes = predictions["true_boxes"][i].reshape(-1, 4)[real] * scale
        yield row
