"""Image classification: one label for an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kt_hf import Loaded, Role, Task, classification, images, loading


class ImageClassification(classification.Classification, Task):
    """One class for an image (`AutoModelForImageClassification`).

    metrics: accuracy, macro_f1, matthews_correlation, or the name of one on the Hub; the first decides.
    """

    roles = (
        Role("image", ("image",), aliases=("img", "pixel_values")),
        Role("label", ("class",), aliases=("labels", "target", "category")),
    )
    cache_rows = False

    def __init__(self, *, metrics: list[str] | None = None):
        self.choose_metrics(metrics)

    def fits(self, roles: dict[str, str]) -> bool:
        return {"image", "label"} <= set(roles)

    def load(self, ref: Any, info: Any) -> Loaded:
        from transformers import AutoModelForImageClassification

        loaded = loading.load_model(AutoModelForImageClassification, ref, info.labels)
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
        return {"pixel_values": pixels_BCHW, **classification.columns(rows, ("index", "labels"))}

    def forward(self, model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Any:
        return model(pixel_values=batch["pixel_values"], **kwargs)

    def features(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        hidden = outputs.hidden_states[-1]
        return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {"labels": loaded.labels, **loading.image_signature(loaded.processor)}
