"""Video classification: a class, several classes or a number for a clip.

Shapes: B rows, T frames of a clip, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Annotated, Any

import datasets
import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import nn

from kt_hf import Loaded, Role, Task, classification, loading, tiny, video
from kt_hf.errors import RecipeError


class VideoClassification(classification.Classification, Task):
    """One class for a clip, several, or a number (`AutoModelForVideoClassification`).

    A row is a list of images, or a video file where PyAV is installed. num_frames: taken from a clip at even distances;
    by default as many as the model is made for. `data.augment` changes all frames of a clip alike. metrics: as of
    image-classification; the first decides.
    """

    auto_class = "AutoModelForVideoClassification"
    classes_from = "model"
    augments = "image"
    cache_rows = False
    conformance = {
        "model": {
            "config": "videomae",
            "config_overrides": {**tiny.ENCODER, "image_size": 8, "patch_size": 4, "num_frames": 4},
        }
    }
    roles = (
        Role("video", ("video", "images"), aliases=("frames", "clip", "images", "file")),
        classification.LABEL,
    )

    def __init__(self, *, num_frames: Annotated[int, Field(ge=1)] | None = None, metrics: list[str] | None = None):
        self.num_frames = num_frames
        self.choose_metrics(metrics)

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> datasets.Dataset:
        """Clips of 5 to 7 frames that become lighter, darker or neither."""
        clips = []
        for i in range(count):
            light_T = 128 + np.linspace(-1, 1, 5 + i % 3) * (100, -100, 0)[i % 3]
            pixels = (light_T[:, None, None, None] + random.normal(0, 10, (len(light_T), 8, 8, 3))).clip(0, 255)
            clips.append([Image.fromarray(frame) for frame in pixels.astype(np.uint8)])
        kinds = {"video": datasets.List(datasets.Image()), "label": datasets.Value("int64")}
        columns = {"video": clips, "label": [i % 3 for i in range(count)]}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

    def fits(self, roles: dict[str, str]) -> bool:
        return {"video", "label"} <= set(roles)

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` where a checkpoint takes another number of frames than asked for."""
        from transformers import AutoModelForVideoClassification

        self.settle(info)
        fields = self.head_fields(info)
        if self.num_frames is not None and ref.path is None:
            fields |= loading.unset_fields(ref, dict.fromkeys(_FRAMES, self.num_frames))
        loaded = loading.load_model(AutoModelForVideoClassification, ref, info.labels, **fields)
        if self.num_frames not in (None, frames_of(loaded.model)):
            raise RecipeError(
                f"num_frames={self.num_frames}, but the model takes {frames_of(loaded.model)} frames",
                "leave num_frames out: the model's own number is taken",
            )
        self.settle_by_model(loaded.model.config)
        loaded.processor = load_video_processor(ref, loaded.model)
        loaded.processor.num_frames = frames_of(loaded.model)  # its workers have no model to ask
        return loaded

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        from torchvision import tv_tensors

        processor = loaded.processor
        clips = [video.clip(value, processor.num_frames, place) for place, value in enumerate(rows["video"])]
        if augment is not None:  # one draw for all frames
            clips = [augment(tv_tensors.Video(one)).as_subclass(torch.Tensor) for one in clips]
        found = processor(clips, do_sample_frames=False, return_tensors="pt")
        return {"pixel_values": found[processor.model_input_names[0]], **self.labels(rows, loaded)}

    def check(self, row: dict[str, Any]) -> None:
        video.clip(row["video"], 1, 0)

    def collate(self, rows: Any, loaded: Loaded) -> dict[str, Any]:
        pixels_BTCHW = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels_BTCHW, **self.label_tensor(rows), **classification.columns(rows, ("index",))}

    def forward(self, model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Any:
        inner: Any = loading.unwrap(model)
        return model(**{inner.main_input_name: batch["pixel_values"]}, **kwargs)

    def features(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        return outputs.hidden_states[-1].mean(1)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        frames = {"num_frames": loaded.processor.num_frames}
        return {"labels": loaded.labels, "frames": frames, **loading.image_signature(loaded.processor)}


_FRAMES = ("num_frames", "frames_per_clip")
"""What configurations call it."""


def frames_of(model: Any) -> int:
    """The frames that a model takes."""
    config = model.config
    nested = getattr(config, "vision_config", None)
    found = [getattr(c, name, None) for c in (config, nested) for name in _FRAMES]
    count = next((number for number in found if number), None)
    if count is None:
        raise RecipeError(f"the configuration of {type(model).__name__} has no num_frames", "choose another model")
    return int(count)


def load_video_processor(ref: Any, model: Any) -> Any:
    """The model's video processor, made of its image processor where it has only that; for a fresh model one that
    resizes to the model's size and normalises to [-1, 1]."""
    import transformers
    from transformers import AutoVideoProcessor
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES as KNOWN

    source, given = ref.processor or ref.path, dict(ref.processor_overrides or {})
    if source is not None:
        with loading.loading(f"video processor '{source}'"):
            return AutoVideoProcessor.from_pretrained(source, revision=ref.revision, trust_remote_code=False, **given)
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    name = "VideoMAEVideoProcessor"
    if model.main_input_name != "pixel_values":
        name = next(iter(KNOWN[model.config.model_type].values()))
    fresh = {
        "size": {"height": height, "width": width},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_sample_frames": False,
    }
    return getattr(transformers, name)(**{**fresh, **given})
