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

from kt_hf import Loaded, Role, Task, audio, classification, loading
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
        "model": {
            "config": "wav2vec2",
            "config_overrides": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "conv_dim": [8, 8],
                "conv_kernel": [10, 8],
                "conv_stride": [8, 5],
                "num_conv_pos_embeddings": 8,
                "num_conv_pos_embedding_groups": 2,
                "classifier_proj_size": 8,
                "feat_extract_norm": "layer",
                "do_stable_layer_norm": True,
                "apply_spec_augment": False,
                "initializer_range": 0.2,
                "layerdrop": 0.0,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
                "activation_dropout": 0.0,
                "feat_proj_dropout": 0.0,
                "final_dropout": 0.0,
            },
            "processor_overrides": {"sampling_rate": 8000},
        },
    }
    roles = (
        Role("audio", ("audio",), aliases=("sound", "file", "speech")),
        Role("label", ("class", "classes", "number"), aliases=("labels", "target", "category")),
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
            sound = {"bytes": audio.encode(tone + random.normal(0, 0.05, 800), 8000), "path": None}
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
        extractor = loaded.processor
        rate, limit = extractor.sampling_rate, round(self.max_seconds * extractor.sampling_rate)
        waves = [audio.decode(value, rate, place)[:limit] for place, value in enumerate(rows["audio"])]
        if augment is not None:
            waves = [augment(one) for one in waves]
        given = {"sampling_rate": rate, "return_tensors": "np"}
        if extractor.model_input_names[0] == "input_values" and not hasattr(extractor, "num_mel_bins"):
            given |= {"padding": "max_length", "max_length": limit, "truncation": True}
        columns = extractor(waves, **given)
        return {**{k: list(torch.from_numpy(np.asarray(v))) for k, v in columns.items()}, **self.labels(rows, loaded)}

    def collate(self, rows: Any, loaded: Loaded) -> dict[str, Any]:
        tensors = {k: torch.stack([row[k] for row in rows]) for k, v in rows[0].items() if isinstance(v, torch.Tensor)}
        return {**tensors, **self.label_tensor(rows), **classification.columns(rows, ("index",))}

    def forward(self, model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Any:
        inputs = ("input_values", "input_features", "attention_mask")
        return model(**{k: batch[k] for k in inputs if k in batch}, **kwargs)

    def features(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        return outputs.hidden_states[-1].mean(1)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        known = loaded.processor.to_dict()
        fields = ("sampling_rate", "do_normalize", "num_mel_bins", "mean", "std", "feature_size", "max_length")
        return {"labels": loaded.labels, "normalisation": {k: known[k] for k in fields if known.get(k) is not None}}
