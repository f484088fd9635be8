"""Audio classification: a class, several classes or a number for a piece of sound.

Shapes: B rows, L samples of a wave.
"""

from __future__ import annotations

from typing import Annotated, Any

import datasets
import numpy as np
import torch
from pydantic import Field
from torch import nn

from kt_hf import Loaded, Role, Task, audio, classification, loading, tiny
from kt_hf.reading import in_memory


class AudioClassification(classification.Classification, Task):
    """One class for a piece of sound, several, or a number (`AutoModelForAudioClassification`).

    max_seconds: longer pieces are cut, shorter ones padded, so that a prediction does not depend on what else is in its
    batch. metrics: as of image-classification; the first decides.
    """

    auto_class = "AutoModelForAudioClassification"
    classes_from = "model"
    augments = "audio"
    cache_rows = False
    conformance = {
        "settings": {"max_seconds": 0.1},
        "model": tiny.WAV2VEC,
    }
    roles = (
        Role("audio", ("audio",), aliases=("sound", "file", "speech")),
        classification.LABEL,
    )

    def __init__(self, *, max_seconds: Annotated[float, Field(gt=0, le=600)] = 5.0, metrics: list[str] | None = None):
        self.max_seconds = max_seconds
        self.choose_metrics(metrics)

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> datasets.Dataset:
        """Tones of three heights."""
        rows = []
        for i in range(count):
            time = np.arange(800) / 8000
            tone = np.sin(2 * np.pi * (300, 800, 2000)[i % 3] * time + random.random()) * 0.5
            sound = {"bytes": audio.wav(tone + random.normal(0, 0.05, 800), 8000), "path": None}
            rows.append({"audio": sound, "label": i % 3})
        features = datasets.Features({"audio": datasets.Audio(decode=False), "label": datasets.Value("int64")})
        return in_memory(rows, features)

    def fits(self, roles: dict[str, str]) -> bool:
        return {"audio", "label"} <= set(roles)

    def load(self, ref: Any, info: Any) -> Loaded:
        from transformers import AutoModelForAudioClassification

        self.settle(info)
        loaded = loading.load_model(AutoModelForAudioClassification, ref, info.labels, **self.head_fields(info))
        self.settle_by_model(loaded.model.config)
        loaded.processor = audio.load_extractor(ref, loaded.model.config)
        return loaded

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        columns = audio.encode(loaded.processor, rows["audio"], self.max_seconds, augment)
        return {**columns, **self.labels(rows, loaded)}

    def collate(self, rows: Any, loaded: Loaded) -> dict[str, Any]:
        tensors = {k: torch.stack([row[k] for row in rows]) for k, v in rows[0].items() if isinstance(v, torch.Tensor)}
        return {**tensors, **self.label_tensor(rows), **classification.columns(rows, ("index",))}

    def forward(self, model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Any:
        inputs = ("input_values", "input_features", "attention_mask")
        return model(**{k: batch[k] for k in inputs if k in batch}, **kwargs)

    def features(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        return outputs.hidden_states[-1].mean(1)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {"labels": loaded.labels, "normalisation": audio.signature(loaded.processor)}
