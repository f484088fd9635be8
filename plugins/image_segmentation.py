"""Semantic segmentation: a class for every pixel of an image.

Shapes: B rows of a batch, H x W pixels of the largest picture of the batch, h x w of the model's output, C classes, N
pixels of the whole batch, R rows of a split.
"""

from __future__ import annotations

from typing import Annotated, Any

import datasets
import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from kt_hf import Loaded, Role, Task, images, loading
from kt_hf.errors import LEAVE_OUT, DataError, RecipeError, RowError
from kt_hf.functional import scoring
from kt_hf.task import FILL, Batch, Scores

IGNORED = -100
"""Label of a pixel that does not count."""


class ImageSegmentation(Task):
    """A class for every pixel of an image (`AutoModelForSemanticSegmentation`).

    The data give images with masks of the same size, in which a pixel's value is its class. classes: their names, from
    value 0 on; by default those of the checkpoint. ignore_index: the value of pixels that do not count. Training is on
    pictures of the model's size, masks resized to the nearest pixel; what is reported is measured on the masks as they
    are. `data.augment` changes image and mask together; what comes in from outside does not count.
    """

    auto_class = "AutoModelForSemanticSegmentation"
    classes_from = "model"
    derived = {"extents": ("size",)}
    augments = "image"
    cache_rows = False
    conformance = {
        "settings": {"classes": ["ground", "circle", "square"]},
        "model": {
            "config": "segformer",
            "config_overrides": {
                "num_encoder_blocks": 2,
                "depths": [1, 1],
                "sr_ratios": [2, 1],
                "hidden_sizes": [8, 16],
                "patch_sizes": [3, 3],
                "strides": [2, 2],
                "num_attention_heads": [1, 2],
                "mlp_ratios": [2, 2],
                "decoder_hidden_size": 16,
                "initializer_range": 0.2,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "classifier_dropout_prob": 0.0,
                "drop_path_rate": 0.0,
            },
            "processor_overrides": {"size": {"height": 16, "width": 16}},
        },
    }
    unit = "pixel"
    metric = "mean_iou"
    metrics = ("mean_iou", "pixel_accuracy", "mean_accuracy")
    roles = (
        Role("image", ("image",), aliases=("img", "pixel_values")),
        Role("mask", ("image",), aliases=("annotation", "segmentation_mask", "label", "labels"), predicted=True),
    )

    def __init__(self, *, classes: list[str] | None = None, ignore_index: Annotated[int, Field(ge=0, le=65535)] = 255):
        self.classes, self.ignore_index = classes, ignore_index

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> datasets.Dataset:
        """Bright squares and dark discs on noise."""
        pictures, masks = [], []
        rows, columns = np.mgrid[:20, :24]
        for i in range(count):
            mask = np.zeros((20, 24), np.uint8)
            mask[2 : 9 + i % 3, 3:11] = 2
            mask[(rows - 13) ** 2 + (columns - 17) ** 2 < 20] = 1
            mask[0] = 255
            shade = np.array([120, 30, 220])[np.minimum(mask, 2)][..., None] + random.normal(0, 10, (20, 24, 3))
            pictures.append(Image.fromarray(shade.clip(0, 255).astype(np.uint8)))
            masks.append(Image.fromarray(mask))
        features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
        return datasets.Dataset.from_dict({"image": pictures, "mask": masks}, features=features)

    # `fits` stays False: two images in a row could be anything.

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` for a fresh model without names of classes, and for a processor that crops."""
        from transformers import AutoModelForSemanticSegmentation

        names = self.classes or info.labels
        if names is None and ref.path is not None:
            names = loading.list_labels(loading.config_of(ref))
        if names is None:
            raise RecipeError(
                "masks do not say what their classes are called",
                "name them: task.image-segmentation.classes=[sky, road, ...]",
            )
        loaded = loading.load_model(AutoModelForSemanticSegmentation, ref, names)
        loaded.processor = loading.load_image_processor_by_kind(ref, loaded.model.config)
        if getattr(loaded.processor, "do_center_crop", False):
            raise RecipeError(
                "the model's image processor crops, and masks would not fit",
                "set model.processor_overrides.do_center_crop=false",
            )
        return loaded

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {"labels": loaded.labels, **loading.image_signature(loaded.processor)}

    def layers(self, model: nn.Module) -> list[list[str]]:
        return loading.backbone_layers(model)

    def head(self, model: nn.Module) -> list[str]:
        return loading.head_modules(model)

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """pixel_values, `size` (height, width) that is scored, and `labels` of that size where there are masks."""
        pictures = [images.rgb(image) for image in rows["image"]]
        masks: list[Any] = [None] * len(pictures)
        if "mask" in rows:
            masks = [self._mask(i, *both, loaded) for i, both in enumerate(zip(pictures, rows["mask"], strict=True))]
            if augment is not None:
                changed = [together(augment, *both) for both in zip(pictures, masks, strict=True)]
                pictures, masks = [picture for picture, _ in changed], [mask for _, mask in changed]
        sizes = [(picture.height, picture.width) for picture in pictures]
        plain = {"do_reduce_labels": False} if hasattr(loaded.processor, "do_reduce_labels") else {}
        pixels_BCHW = loaded.processor(pictures, return_tensors="pt", **plain)["pixel_values"]
        if train:
            sizes = [tuple(pixels_BCHW.shape[2:])] * len(pictures)
            masks = [None if mask is None else resized(mask, sizes[0]) for mask in masks]
        columns: dict[str, Any] = {"pixel_values": pixels_BCHW, "size": sizes}
        return columns if "mask" not in rows else {**columns, "labels": [torch.from_numpy(mask) for mask in masks]}

    def _mask(self, place: int, picture: Image.Image, mask: Image.Image, loaded: Loaded) -> np.ndarray:
        """The model's class of every pixel, IGNORED where it does not count."""
        ids = np.asarray(loaded.label_ids)
        values, counts = self._values(place, picture, mask, len(ids))
        return np.where(counts, ids[np.where(counts, values, 0)], IGNORED).astype(np.int64)

    def _values(
        self, place: int, picture: Image.Image, mask: Image.Image, num_classes: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(values_HW, which of them count). Raises `RowError`. num_classes: None where they are not known yet."""
        if mask.size != picture.size:
            raise RowError(
                place,
                f"the image has {picture.width} x {picture.height} pixels, its mask {mask.width} x {mask.height}",
                f"make masks as large as their images, {LEAVE_OUT}",
            )
        values = np.asarray(mask)
        if values.ndim != 2:
            raise RowError(
                place,
                f"the mask has {values.shape[-1]} channels",
                f"save masks with one channel of class numbers, {LEAVE_OUT}",
            )
        counts = values != self.ignore_index
        if num_classes is not None and (values[counts] >= num_classes).any():
            odd = int(values[counts].max())
            raise RowError(
                place,
                f"the mask has the value {odd}, the classes go from 0 to {num_classes - 1}",
                "name all classes, or say which value does not count: task.image-segmentation.ignore_index",
            )
        return values, counts

    def check(self, row: dict[str, Any]) -> None:
        if row.get("mask") is not None:
            self._values(0, row["image"], row["mask"], len(self.classes) if self.classes else None)

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        """Masks of several sizes lie in the upper left corner."""
        batch: Batch = {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "size": torch.tensor([list(row["size"]) for row in rows]),
            "extents": [tuple(map(int, row["size"])) for row in rows],
            "index": torch.tensor([int(row["index"]) for row in rows]),
        }
        if "labels" in rows[0]:
            height, width = batch["size"].amax(0).tolist()
            labels_BHW = torch.full((len(rows), height, width), IGNORED)
            for mine, row in zip(labels_BHW, rows, strict=True):
                mine[: row["size"][0], : row["size"][1]] = row["labels"]
            batch["labels"] = labels_BHW
        return batch

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        return model(pixel_values=batch["pixel_values"], **kwargs)

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """Cross-entropy of every pixel, in float32."""
        labels_BHW = batch["labels"]
        logits_BCHW = enlarged(outputs.logits, batch)
        values_BHW = F.cross_entropy(logits_BCHW, labels_BHW, reduction="none", label_smoothing=label_smoothing)
        return values_BHW.flatten(), (labels_BHW != IGNORED).float().flatten(), "pixel"

    def class_counts(self, rows: datasets.Dataset, loaded: Loaded) -> np.ndarray | None:
        """Pixels of every class; decodes every mask."""
        counts_C = np.zeros(len(loaded.labels or []), dtype=np.int64)
        for place, row in enumerate(rows):
            if row.get("mask") is not None:  # type: ignore[attr-defined]
                mask = self._mask(place, row["image"], row["mask"], loaded)  # type: ignore[index]
                counts_C += np.bincount(mask[mask >= 0], minlength=len(counts_C))
        return counts_C

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        """Rows, and pixels that count; without masks, all of them."""
        pixels = (batch["labels"] != IGNORED).sum() if "labels" in batch else batch["size"].prod(1).sum()
        return {"example": len(batch["index"]), "pixel": pixels}

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every pixel of the batch's largest picture; weight 0 outside of a picture and where nothing counts."""
        logits_BCHW = enlarged(outputs.logits, batch)
        counted = "labels" in batch
        weight_BHW = batch["labels"] != IGNORED if counted else inside(batch, *logits_BCHW.shape[2:])
        return logits_BCHW.movedim(1, -1).flatten(0, 2), weight_BHW.float().flatten()

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        hidden = outputs.hidden_states[-1]
        return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.from_scores(*self.scores(self.forward(model, batch), batch), batch)

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """`confusion` of every row, C x C counts of (true, predicted) pixels; without masks the classes themselves."""
        rows, (height, width) = len(batch["index"]), batch["size"].amax(0).tolist()
        guess_BP = scores_NC.argmax(-1).reshape(rows, height * width)
        if "labels" not in batch:
            outside_BP = ~inside(batch, height, width).flatten(1)
            return {"classes": guess_BP.masked_fill(outside_BP, FILL), "size": batch["size"]}
        num, truth_BP = scores_NC.shape[-1], batch["labels"].flatten(1)
        counts = [
            torch.bincount((truth * num + guess)[truth != IGNORED], minlength=num * num)
            for truth, guess in zip(truth_BP, guess_BP, strict=True)
        ]
        return {"confusion": torch.stack(counts)}

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """mean_iou: over the classes that occur, intersection over union of all pixels of the split; with that of every
        class. mean_accuracy: over the classes that occur in the masks, the share of their pixels that is found."""
        flat = predictions["confusion"]
        num = round(flat.shape[1] ** 0.5)
        counts_RCC = flat.reshape(-1, num, num).astype(np.float64)
        total_R, right_R = counts_RCC.sum((1, 2)), counts_RCC.trace(axis1=1, axis2=2)
        if not total_R.any():
            raise DataError("no pixel of these masks counts", "look at the masks and at ignore_index")
        ones = np.ones(len(counts_RCC))
        found = Scores(
            {
                "mean_iou": scoring.mean_iou(counts_RCC, ones),
                "pixel_accuracy": float(right_R.sum() / total_R.sum()),
                "mean_accuracy": scoring.mean_recall(counts_RCC, ones),
            }
        )
        found.examples["pixel_accuracy"] = (right_R / np.maximum(total_R, 1), total_R)
        found.statistics["mean_iou"] = lambda w: scoring.mean_iou(counts_RCC, w)
        found.statistics["mean_accuracy"] = lambda w: scoring.mean_recall(counts_RCC, w)
        of_all_C, occurs_C = scoring.iou(counts_RCC.sum(0))
        for name, value, occurs in zip(loaded.labels or [], of_all_C, occurs_C, strict=True):
            if occurs:
                found.metrics[f"iou_{name}"] = float(value)
        return found

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        """Of every row the counts of (true, predicted) pixels, row by row of the C x C matrix."""
        return {"confusion": list(predictions["confusion"])}

    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """The classes of every image with their share of the pixels, the largest first, and the mask as a picture."""
        names = predictor.loaded.labels or []
        said, masks = [], []
        found = predictor.scores(info, "test", batch_size=1)
        for flat, (height, width) in zip(found["classes"], found["size"], strict=True):
            mask_HW = flat[flat != FILL].reshape(height, width)
            share_C = np.bincount(mask_HW.ravel(), minlength=len(names)) / mask_HW.size
            order = [int(i) for i in np.argsort(-share_C, kind="stable") if share_C[i] > 0]
            said.append(", ".join(f"{names[i]} {share_C[i]:.1%}" for i in order))
            masks.append(Image.fromarray(mask_HW.astype(np.uint8 if len(names) < 256 else np.int32)))
        return {"prediction": said, "mask": masks}


# --- pictures --------------------------------------------------------------------------------------------------------


def together(augment: Any, picture: Image.Image, mask_HW: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Image and mask under one draw of the changes. Classes are moved up by one meanwhile, since changes fill with 0
    what comes in from outside."""
    from torchvision import tv_tensors

    moved = torch.from_numpy(np.where(mask_HW == IGNORED, 0, mask_HW + 1))
    changed, mask = augment(picture, tv_tensors.Mask(moved))
    values = mask.numpy()
    return changed, np.where(values == 0, IGNORED, values - 1).astype(np.int64)


def resized(mask_HW: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """To the nearest pixel."""
    rows = ((np.arange(size[0]) + 0.5) * mask_HW.shape[0] / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * mask_HW.shape[1] / size[1]).astype(int)
    return mask_HW[rows][:, columns]


def enlarged(logits_BChw: torch.Tensor, batch: Batch) -> torch.Tensor:
    """logits_BCHW in float32, each row's brought to its own size, in the upper left corner."""
    logits_BChw, sizes = logits_BChw.float(), batch.get("extents") or [tuple(size) for size in batch["size"].tolist()]
    if len(set(sizes)) == 1:
        return F.interpolate(logits_BChw, sizes[0], mode="bilinear", align_corners=False)
    height, width = (max(size[i] for size in sizes) for i in (0, 1))
    parts = []
    for one_Chw, (h, w) in zip(logits_BChw, sizes, strict=True):
        part = F.interpolate(one_Chw[None], (h, w), mode="bilinear", align_corners=False)
        parts.append(F.pad(part, (0, width - w, 0, height - h)))
    return torch.cat(parts)


def inside(batch: Batch, height: int, width: int) -> torch.Tensor:
    """mask_BHW of the pixels that lie in their picture."""
    sizes_B2 = batch["size"]
    rows_H, columns_W = torch.arange(height, device=sizes_B2.device), torch.arange(width, device=sizes_B2.device)
    return (rows_H[None, :, None] < sizes_B2[:, :1, None]) & (columns_W[None, None, :] < sizes_B2[:, 1:, None])
