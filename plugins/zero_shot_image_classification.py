"""Zero-shot image classification and image-text retrieval with dual encoders.

Shapes: B rows of a batch, N rows of a split, C classes, D width of the shared space, M rows of a block.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from kt_hf import Loaded, Role, Task, classification, images, loading, tiny
from kt_hf.errors import DataError, RecipeError
from kt_hf.functional import retrieval
from kt_hf.task import Scores

AT = (1, 5, 10)
_PROMPTS = 256
_OURS = ("index", "labels", "text_id")
Template = Annotated[str, Field(pattern=r"\{\}")]
Metric = Literal["auto", "accuracy", "macro_f1", "text_retrieval_recall@1", "image_retrieval_recall@1"]


class ZeroShotImageClassification(classification.Classification, Task):
    """Images meet texts: zero-shot accuracy over class names, and retrieval both ways.

    Models: CLIP, SigLIP, two towers, open_clip. templates: prompts of a class, `{}` is its name; their embeddings are
    averaged. Where the data have no texts, they are also the captions to train on. max_length: tokens of a text
    (open_clip always takes its context length). captions: of several captions of an image, training takes a random one
    or the first; evaluation takes the first. metric: what decides; `auto` is accuracy where the data have classes, else
    text_retrieval_recall@1.
    """

    auto_class = "AutoModelForZeroShotImageClassification"
    classes_from = "user"
    sketches = False
    conformance = {
        "roles": ("image", "text", "label"),
        "model": {"image": tiny.VIT, "text": tiny.BERT, "projection_dim": 16},
    }
    roles = (
        Role("image", ("image",), aliases=("img", "pixel_values", "jpg", "png")),
        Role(
            "text",
            ("string", "strings"),
            False,
            ("caption", "captions", "sentences", "raw", "description", "prompt", "txt"),
        ),
        Role("label", ("class",), required=False, aliases=("labels", "target", "category")),
    )
    has_loss = False
    cache_rows = False
    augments = "image"

    def __init__(
        self,
        *,
        templates: list[Template] | None = None,
        max_length: Annotated[int, Field(gt=2)] = 77,
        captions: Literal["random", "first"] = "random",
        metric: Metric = "auto",
    ):
        self.templates = templates or ["a photo of a {}"]
        self.max_length, self.captions, self.metric = max_length, captions, metric
        self.auto = metric == "auto"

    @classmethod
    def architectures(cls) -> frozenset[str]:
        return super().architectures() | {"DualEncoderModel", "VisionTextDualEncoderModel"}

    def fits(self, roles: dict[str, str]) -> bool:
        return {"image", "text"} <= set(roles)

    # --- models and rows ---

    def load(self, ref: Any, info: Any) -> Loaded:
        from kt_hf import dual_encoder, open_clip_models

        self.settle(info)
        if ref.image is not None:
            loaded = dual_encoder.load_towers(ref, self._texts(info))
        elif open_clip_models.names_open_clip(ref):
            loaded = open_clip_models.load_open_clip(ref)
        else:
            loaded = dual_encoder.load_transformers(ref, self._texts(info))
        loaded.labels = info.labels
        loaded.label_ids = None if info.labels is None else list(range(len(info.labels)))
        return loaded

    def settle(self, info: Any) -> None:
        """What depends on the data: the deciding metric, and whether training rows are drawn."""
        if "text" not in info.roles and info.labels is None:
            raise DataError(
                "the data have neither texts nor classes",
                "name one: data.columns.text=COLUMN or data.columns.label=COLUMN",
            )
        if self.auto:
            self.metric = "accuracy" if info.labels is not None else "text_retrieval_recall@1"
        if "text" in info.roles:
            first = next(iter(info.splits.values()))["text"][0]
            several = isinstance(first, list)
        else:
            several = len(self.templates) > 1
        self.random_rows = several and self.captions == "random"

    def _texts(self, info: Any) -> Any:
        yield from info.texts()
        yield from self.templates

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        pictures = [images.rgb(image) for image in rows["image"]]
        if augment is not None:
            pictures = [augment(picture) for picture in pictures]
        columns = {**loaded.processor.images(pictures), **self.labels(rows, loaded)}
        captions = self._captions(rows, loaded, train)
        if captions is not None:
            columns.update(loaded.processor.texts(captions, self.max_length))
            columns["text_id"] = [text_id(caption) for caption in captions]
        return columns

    def _captions(self, rows: dict[str, list[Any]], loaded: Loaded, train: bool) -> list[str] | None:
        """One text per row: its caption, or, for training on classes alone, its class in a template."""
        if "text" in rows:
            listed = [value if isinstance(value, list) else [value] for value in rows["text"]]
        elif train:
            if any(y is None or y < 0 for y in rows["label"]):
                raise DataError(
                    "a training row has neither a text nor a class",
                    "name the texts, data.columns.text, or drop such rows",
                )
            names = [(loaded.labels or [])[y] for y in rows["label"]]
            listed = [self.prompts(name) for name in names]
        else:
            return None
        chosen = []
        for options in listed:
            draw = train and self.random_rows and len(options) > 1
            pick = int(torch.randint(len(options), ())) if draw else 0
            chosen.append(options[pick] or "" if options else "")
        return chosen

    def prompts(self, name: str) -> list[str]:
        return [template.replace("{}", name.replace("_", " ")) for template in self.templates]

    def collate(self, rows: Any, loaded: Loaded) -> dict[str, Any]:
        pixels = {
            k: torch.stack([row[k] for row in rows]) for k in rows[0] if k.startswith("pixel_") or k == "spatial_shapes"
        }
        tokens = {k: [row[k] for row in rows] for k in rows[0] if k not in pixels and k not in _OURS}
        texts = loaded.processor.pad(tokens) if tokens else {}
        return {**pixels, **texts, **classification.columns(rows, _OURS)}

    # --- the model ---

    def forward(self, model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Any:
        """A `DualOutput`: embeddings of length 1, `logit_scale` already exponentiated, `logit_bias` or None."""
        from kt_hf import dual_encoder

        return dual_encoder.encode(model, batch, **kwargs)

    def units(self, batch: dict[str, Any]) -> dict[str, int | torch.Tensor]:
        return {"example": len(batch["index"])}

    def loss(self, outputs: Any, batch: dict[str, Any], label_smoothing: float = 0.0) -> Any:
        raise RecipeError("zero-shot-image-classification has no loss of its own", "add the strategy 'contrastive'")

    # none: other rows of a batch are no classes, and class names are embedded for evaluation alone
    scores, from_scores = Task.scores, Task.from_scores

    def features(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The image embeddings, of length 1."""
        return outputs.image_embeds

    def context(self, model: nn.Module, loaded: Loaded, info: Any, device: torch.device) -> dict[str, torch.Tensor]:
        """class_embeds_CD: of each class the mean over the templates' embeddings, brought to length 1."""
        if loaded.labels is None:
            return {}
        prompts = [prompt for name in loaded.labels for prompt in self.prompts(name)]
        parts = []
        for start in range(0, len(prompts), _PROMPTS):
            tokens = loaded.processor.pad(loaded.processor.texts(prompts[start : start + _PROMPTS], self.max_length))
            parts.append(self.forward(model, {k: v.to(device) for k, v in tokens.items()}).text_embeds)
        embeds_CTD = torch.cat(parts).unflatten(0, (len(loaded.labels), len(self.templates)))
        return {"class_embeds": F.normalize(embeds_CTD.mean(1), dim=-1)}

    def predict(
        self, model: nn.Module, batch: dict[str, Any], context: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        outputs = self.forward(model, batch)
        found = {"image_embeds": outputs.image_embeds}
        if outputs.text_embeds is not None:
            found.update(text_embeds=outputs.text_embeds, text_id=batch["text_id"])
        if "class_embeds" in context:
            with torch.autocast(outputs.image_embeds.device.type, enabled=False):  # ranks deserve float32
                cosine_BC = outputs.image_embeds @ context["class_embeds"].T
            found["scores"] = outputs.logit_scale * cosine_BC + (
                0.0 if outputs.logit_bias is None else outputs.logit_bias
            )
        if "labels" in batch:
            found["label"] = batch["labels"]
        return found

    # --- measuring ---

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """Recalls are means over all rows: of images that find their text, and of texts that find their image."""
        found = Scores({})
        if "label" in predictions and "scores" in predictions and (predictions["label"] >= 0).any():
            found = super().measure(predictions, loaded, info)
        for name, ranks_N in self.ranks(predictions).items():
            for k in AT:
                hits_N = (ranks_N < k).astype(np.float64)
                found.metrics[f"{name}_recall@{k}"] = float(hits_N.mean())
                found.examples[f"{name}_recall@{k}"] = (hits_N, None)
        return found

    def ranks(self, predictions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """How many wrong candidates stand before the first right one, per row, in both directions."""
        if "text_embeds" not in predictions:
            return {}
        images, texts, ids = predictions["image_embeds"], predictions["text_embeds"], predictions["text_id"]
        return {
            "text_retrieval": retrieval.ranks(images, texts, ids),
            "image_retrieval": retrieval.ranks(texts, images, ids),
        }

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        if "scores" in predictions:
            columns.update(super().table(predictions, loaded, info))
        if "text_id" in predictions:
            columns["text_id"] = predictions["text_id"]
        return {**columns, **{f"{name}_rank": ranks_N for name, ranks_N in self.ranks(predictions).items()}}

    def majority(
        self, train: dict[str, Any], predictions: dict[str, np.ndarray], loaded: Loaded, info: Any
    ) -> Scores | None:
        """Of the accuracy alone: there is no constant answer to retrieval."""
        if not self.metric.startswith(("accuracy", "macro")) or "label" not in train or "scores" not in predictions:
            return None
        classes: dict[str, Any] = {k: predictions[k] for k in ("scores", "label") if k in predictions}
        return super().majority(train, classes, loaded, info) if "label" in classes else None

    # --- parts ---

    def towers(self, model: nn.Module) -> dict[str, list[list[str]]]:
        """Parameter names of the `image` and the `text` tower by layer from the input, without their projections."""
        from kt_hf import dual_encoder

        return dual_encoder.towers(model)

    def layers(self, model: nn.Module) -> list[list[str]]:
        """Both towers' layers as one sequence, by relative depth."""
        from kt_hf import towers

        return towers.by_depth(list(self.towers(model).values()))

    def head(self, model: nn.Module) -> list[str]:
        """The projections into the shared space, where they are modules (some of open_clip's are bare parameters)."""
        from kt_hf import dual_encoder

        inner = loading.unwrap(model)
        modules = {name for name, _ in inner.named_modules()}
        return [name for name in dual_encoder.heads(model) if name in modules]

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {"labels": loaded.labels, **loaded.processor.signature()}

    def save(self, loaded: Loaded, folder: Any) -> None:
        from kt_hf import open_clip_models

        if loaded.kind == "open_clip":
            open_clip_models.save_open_clip(loaded, folder)
        else:
            super().save(loaded, folder)


def text_id(text: str) -> int:
    """A 63-bit number of a text; case and the width of blanks do not count, as they do not for CLIP's tokenizers."""
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little") >> 1
