"""Text classification: a class, several classes or a number for a text or a pair of texts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from kt_hf import Loaded, Role, Task, classification, loading, tiny, unpadding


class TextClassification(classification.Classification, Task):
    """One class for a text or a pair of texts, several, or a number (`AutoModelForSequenceClassification`).

    max_length: tokens per example; longer ones are cut. label_kind: read the column of labels as a `class`, as a list
    of `classes` or as a `number`, where it does not look like that (whole numbers look like classes). metrics: of one
    class accuracy, macro_f1, matthews_correlation, calibration_error, or the name of one on the Hub; of several
    micro_f1, macro_f1, subset_accuracy; of a number pearson, spearman, mean_squared_error. The first decides.
    """

    auto_class = "AutoModelForSequenceClassification"
    adapter_type = "SEQ_CLS"
    classes_from = "model"
    conformance = {
        "model": tiny.BERT,
    }
    augments = "text"
    length_column = "input_ids"
    packs = "rows"
    roles = (
        Role("text", ("string",), aliases=("sentence", "sentence1", "premise", "question", "content", "review")),
        Role("text_pair", ("string",), required=False, aliases=("sentence2", "hypothesis", "text2")),
        Role("label", ("class", "classes", "number"), aliases=("labels", "target", "category", "score")),
    )

    def __init__(
        self,
        *,
        max_length: int = 128,
        label_kind: Literal["class", "classes", "number"] | None = None,
        metrics: list[str] | None = None,
    ):
        self.max_length, self.label_kind = max_length, label_kind
        self.choose_metrics(metrics)

    def fits(self, roles: dict[str, str]) -> bool:
        return {"text", "label"} <= set(roles) and "image" not in roles

    def load(self, ref: Any, info: Any) -> Loaded:
        from transformers import AutoModelForSequenceClassification

        self.settle(info)
        tokenizer = loading.load_tokenizer(ref, info.texts())
        fresh = {} if ref.path or "vocab_size" in (ref.config_overrides or {}) else {"vocab_size": len(tokenizer)}
        loaded = loading.load_model(
            AutoModelForSequenceClassification, ref, info.labels, **self.head_fields(info), **fresh
        )
        self.settle_by_model(loaded.model.config)
        loaded.processor = tokenizer
        config: Any = loaded.model.config
        if config.model_type != "xlnet":  # positions count from the left, so padding there would move them
            tokenizer.padding_side = "right"
        if config.pad_token_id is None:  # decoders find the last real token by it
            config.pad_token_id = tokenizer.pad_token_id
        return loaded

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        limit = min(self.max_length, loaded.processor.model_max_length)
        texts, pairs = rows["text"], rows.get("text_pair")
        if augment is not None:
            texts = [augment(text) for text in texts]
            pairs = [augment(text) for text in pairs] if pairs is not None else None
        encoded = loading.encode(loaded.processor, texts, pairs, max_length=limit)
        return {**encoded, **self.labels(rows, loaded)}

    def collate(self, rows: Any, loaded: Loaded) -> dict[str, Any]:
        tokens = {k: [row[k] for row in rows] for k in rows[0] if k not in ("index", "labels")}
        batch = dict(loaded.processor.pad(tokens, return_tensors="pt"))
        return {**batch, **self.label_tensor(rows), **classification.columns(rows, ("index",))}

    def forward(self, model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Any:
        inputs = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "position_ids")
        given = {k: batch[k] for k in inputs if k in batch}
        return model(**given, **unpadding.arguments(model, batch), **kwargs)

    def features(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        mask_BL1 = batch["attention_mask"].unsqueeze(-1).to(outputs.hidden_states[-1].dtype)
        return (outputs.hidden_states[-1] * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {"labels": loaded.labels, **loading.tokenizer_signature(loaded.processor)}
