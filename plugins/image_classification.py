"""Image classification: one label for an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kt_hf import Loaded, Role, Task, classification, images, loading, tiny


class ImageClassification(classification.Classification, Task):
    """One class for an image, several, or a number (`AutoModelForImageClassification`).

    metrics: of one class accuracy, macro_f1, matthews_correlation, top5_accuracy, calibration_error, or the name of one
    on the Hub; of several micro_f1, macro_f1, subset_accuracy; of a number pearson, spearman, mean_squared_error. The
    first decides.
    """

    auto_class = "AutoModelForImageClassification"
    classes_from = "model"
    conformance = {"model": tiny.VIT}
    roles = (
        Role("image", ("image",), aliases=("img", "pixel_values")),
        classification.LABEL,
    )
    cache_rows = False
    augments = "image"

    def __init__(self, *, metrics: list[str] | None = None):
        self.choose_metrics(metrics)

    def fits(self, roles: dict[str, str]) -> bool:
        return {"image", "label"} <= set(roles)

    def load(self, ref: Any, info: Any) -> Loaded:
        from transformers import AutoModelForImageClassification

        self.settle(info)
        loaded = loading.load_model(AutoModelForImageClassification, ref, info.labels, **self.head_fields(info))
        self.settle_by_model(loaded.model.config)
        loaded.processor = loading.load_image_processor(ref, loaded.model.config)
        return loaded

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        pictures = [images.rgb(image) for image in rows["image"]]
        if augment is not None:
            pictures = [augment(picture) for picture in pictures]
        pixels = loaded.processor(pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, **self.labels(rows, loaded)}

    def collate(self, rows: Any, loaded: Loaded) -> dict[str, Any]:
        pixels_BCHW = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels_BCHW, **self.label_tensor(rows), **classification.columns(rows, ("index",))}

    def forward(self, model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Any:
        return model(pixel_values=batch["pixel_values"], **kwargs)

    def features(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        hidden = outputs.hidden_states[-1]
        return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {"labels": loaded.labels, **loading.image_signature(loaded.processor)}
