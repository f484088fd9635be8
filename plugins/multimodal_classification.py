"""Classification of rows that hold several media: an image, a text, a sound, a table of numbers.

Shapes: B rows, K numbers of a table.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import nn

from kt_hf import Loaded, Role, Task, audio, classification, images, loading, tiny
from kt_hf.errors import DataError, RecipeError, RowError

Medium = Literal["image", "text", "audio", "table"]
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


class MultimodalClassification(classification.Classification, Task):
    """One class for several media together, several classes, or a number.

    Models: a tower for each of `model.image`, `model.text`, `model.audio`, with projections of width
    `model.projection_dim` and a fusion. media: those to use; by default all that there are towers for, and the table
    where the data have one (a column with lists of numbers, standardised by the training rows). fusion: `sum`,
    `concatenation`, `gate` (gated multimodal units) or `cross_attention` of all positions, fusion_layers times;
    shared_layers: layers between projection and fusion with the same weights for all media. These three are of fresh
    models, checkpoints keep their own. max_length: tokens of a text. max_seconds: longer sounds are cut, shorter ones
    padded. metrics: as of image-classification; the first decides. `data.augment` changes the images.
    """

    classes_from = "model"
    conformance = {
        "model": {
            "image": tiny.VIT,
            "text": tiny.BERT,
            "projection_dim": 16,
        },
        "settings": {"fusion": "gate", "shared_layers": 1},
    }
    roles = (
        Role("image", ("image",), False, ("img", "pixel_values")),
        Role("text", ("string",), False, ("sentence", "caption", "description", "title")),
        Role("audio", ("audio",), False, ("sound", "speech")),
        Role("table", ("numbers",), False, ("numbers", "features", "tabular")),
        classification.LABEL,
    )
    cache_rows = False
    augments = "image"

    def __init__(
        self,
        *,
        media: list[Medium] | None = None,
        fusion: Literal["sum", "concatenation", "gate", "cross_attention"] = "concatenation",
        fusion_layers: Annotated[int, Field(ge=1, le=24)] = 1,
        shared_layers: Annotated[int, Field(ge=0, le=24)] = 0,
        max_length: Annotated[int, Field(ge=3)] = 128,
        max_seconds: Annotated[float, Field(gt=0, le=600)] = 5.0,
        metrics: list[str] | None = None,
    ):
        if media is not None and (not media or len(set(media)) < len(media)):
            raise RecipeError(f"media: got {media}", "name each medium once, or leave it out for all")
        if fusion == "cross_attention" and media is not None and len(media) < 2:
            raise RecipeError(f"fusion: cross_attention of {media[0]} alone", "give two media, or another fusion")
        self.media = media
        self.fusion, self.fusion_layers, self.shared_layers = fusion, fusion_layers, shared_layers
        self.max_length, self.max_seconds = max_length, max_seconds
        self.choose_metrics(metrics)

    @classmethod
    def architectures(cls) -> frozenset[str]:
        return frozenset({"FusionForClassification"})

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> datasets.Dataset:
        """Shades, words and numbers of three classes."""
        classes_N, words = np.arange(count) % 3, ("circle", "square", "star")
        pixels = random.normal(0, 40, (count, 8, 8, 3)) + 60 + 60 * classes_N[:, None, None, None]
        others = ("redstone", "bluelamp", "oldriver", "newcloud")
        columns = {
            "image": [Image.fromarray(p) for p in pixels.clip(0, 255).astype(np.uint8)],
            "text": [" ".join([words[c], *random.choice(others, 3)]) for c in classes_N],
            "table": (random.normal(0, 1, (count, 5)) + 10 * classes_N[:, None]).tolist(),
            "label": classes_N,
        }
        kinds = {"image": datasets.Image(), "table": datasets.List(datasets.Value("float64"))}
        names = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(words))}
        return datasets.Dataset.from_dict(columns, features=datasets.Features({**kinds, **names}))

    # `fits` stays False: what has an image, a text and a class may be for one of them alone.

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        from transformers import AutoModelForSequenceClassification

        from kt_hf import fusion_model

        self.settle(info)
        loaded = fusion_model.load(
            AutoModelForSequenceClassification,
            ref,
            info,
            info.labels,
            self._wanted(ref, info),
            max_seconds=self.max_seconds,
            fields={
                "fusion": self.fusion,
                "fusion_layers": self.fusion_layers,
                "shared_layers": self.shared_layers,
            },
            **self.head_fields(info),
        )
        config: Any = loading.unwrap(loaded.model).config
        self.settle_by_model(config)
        names = fusion_model.media(config)
        if self.fusion == "cross_attention" and len(names) < 2 and ref.path is None:
            raise RecipeError(f"fusion: cross_attention of {names[0]} alone", "give two media, or another fusion")
        lacking = [name for name in names if name not in info.roles]
        if lacking:
            raise DataError(
                f"the model takes {', '.join(names)}; the data have no {lacking[0]}",
                f"name its column: data.columns.{lacking[0]}=COLUMN",
            )
        return loaded

    def _wanted(self, ref: Any, info: Any) -> list[str]:
        """The media of a fresh model."""
        given = [name for name in ("image", "text", "audio") if getattr(ref, name) is not None]
        if self.media is None:
            return [*given, *(["table"] if "table" in info.roles else [])]
        lacking = [name for name in self.media if name not in (*given, "table")]
        if given and lacking:
            raise RecipeError(f"media: there is no tower for {lacking[0]}", f"give one: model.{lacking[0]}")
        if "table" in self.media and "table" not in info.roles:
            raise DataError("the data have no table", "name its column: data.columns.table=COLUMN")
        return list(self.media)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        own = {"media": media_of(loaded), "table_columns": loaded.processor.processor.table_columns}
        return {"labels": loaded.labels, **own, **loaded.processor.signature()}

    def layers(self, model: nn.Module) -> list[list[str]]:
        """Those of all towers as one sequence, by relative depth; the table's is a part of the head."""
        from kt_hf import fusion_model, towers

        return towers.by_depth(list(fusion_model.layers(model).values()))

    def head(self, model: nn.Module) -> list[str]:
        """All beside the towers: projections, shared layers, fusion, classifier."""
        from kt_hf import fusion_model

        return fusion_model.heads(model)

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        processor, media = loaded.processor, media_of(loaded)
        for name in media:
            for place, value in enumerate(rows[name]):
                if value is None or (name == "text" and not value.strip()):
                    raise RowError(place, f"there is no {name}", "leave such rows out: data.drop=[empty]")
        columns = self.labels(rows, loaded)
        if augment is not None and "image" not in media:
            raise RecipeError("data.augment changes images, which this model does not take", "leave it out")
        if "image" in media:
            pictures = [images.rgb(image) for image in rows["image"]]
            pictures = pictures if augment is None else [augment(picture) for picture in pictures]
            columns |= processor.images(pictures)
        if "text" in media:
            columns |= processor.texts(rows["text"], self.max_length)
        if "audio" in media:
            sounds = audio.encode(processor.processor.feature_extractor, rows["audio"], self.max_seconds)
            columns |= {f"audio_{name}": values for name, values in sounds.items()}
        if "table" in media:
            columns["table"] = [
                _numbers(place, row, processor.processor.table_columns) for place, row in enumerate(rows["table"])
            ]
        return columns

    def collate(self, rows: Any, loaded: Loaded) -> dict[str, Any]:
        names = [name for name in rows[0] if name not in ("index", "labels", *_TOKENS)]
        batch = {name: torch.stack([row[name] for row in rows]) for name in names}
        tokens = {name: [row[name] for row in rows] for name in _TOKENS if name in rows[0]}
        if tokens:
            batch |= loaded.processor.pad(tokens)
        return {**batch, **self.label_tensor(rows), **classification.columns(rows, ("index",))}

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Any:
        return model(**{name: value for name, value in batch.items() if name not in ("index", "labels")})

    def features(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        """What is fused."""
        return outputs.pooler_output


def media_of(loaded: Loaded) -> list[str]:
    """The media that a model takes, as its processors show; workers of the loader have no model."""
    parts = loaded.processor.processor
    there = {"image": parts.image_processor, "text": parts.tokenizer, "audio": parts.feature_extractor}
    names = [name for name, part in there.items() if part is not None]
    return [*names, *(["table"] if parts.table_columns else [])]


def _numbers(place: int, row: list[float], columns: int) -> torch.Tensor:
    if len(row) != columns:
        raise RowError(
            place, f"the table has {len(row)} numbers, the model takes {columns}", "give all rows as many numbers"
        )
    odd = next((i for i, value in enumerate(row) if value is None or not math.isfinite(value)), None)
    if odd is not None:
        raise RowError(place, f"number {odd} of the table is {row[odd]}", "fill it in, or leave the row out")
    return torch.tensor(row, dtype=torch.float32)
