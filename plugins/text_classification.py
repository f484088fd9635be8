"""Text classification: one label for a text or a pair of texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kt_hf import Loaded, Role, Task, classification, loading


class TextClassification(classification.Classification, Task):
    """One class for a text, or for a pair of texts (`AutoModelForSequenceClassification`).

    max_length: tokens per example; longer ones are cut. metrics: accuracy, macro_f1, matthews_correlation, or the name
    of one on the Hub; the first decides.
    """

    length_column = "input_ids"
    roles = (
        Role("text", ("string",), aliases=("sentence", "sentence1", "premise", "question", "content", "review")),
        Role("text_pair", ("string",), required=False, aliases=("sentence2", "hypothesis", "text2")),
        Role("label", ("class",), aliases=("labels", "target", "category")),
    )

    def __init__(self, *, max_length: int = 128, metrics: list[str] | None = None):
        self.max_length = max_length
        self.choose_metrics(metrics)

    def fits(self, roles: dict[str, str]) -> bool:
        return {"text", "label"} <= set(roles) and "image" not in roles

    def load(self, ref: Any, info: Any) -> Loaded:
        from transformers import AutoModelForSequenceClassification

        tokenizer = loading.load_tokenizer(ref, info.texts())
        fresh = {} if ref.path or "vocab_size" in (ref.config_overrides or {}) else {"vocab_size": len(tokenizer)}
        loaded = loading.load_model(AutoModelForSequenceClassification, ref, info.labels, **fresh)
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
        encoded = loading.encode(loaded.processor, rows["text"], rows.get("text_pair"), max_length=limit)
        return {**encoded, **self.labels(rows, loaded)}

    def collate(self, rows: Any, loaded: Loaded) -> dict[str, Any]:
        tokens = {k: [row[k] for row in rows] for k in rows[0] if k not in ("index", "labels")}
        batch = dict(loaded.processor.pad(tokens, return_tensors="pt"))
        return {**batch, **classification.columns(rows, ("index", "labels"))}

    def forward(self, model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Any:
        inputs = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "position_ids")
        return model(**{k: batch[k] for k in inputs if k in batch}, **kwargs)

    def features(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        mask_BL1 = batch["attention_mask"].unsqueeze(-1).to(outputs.hidden_states[-1].dtype)
        return (outputs.hidden_states[-1] * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {"labels": loaded.labels, **loading.tokenizer_signature(loaded.processor)}
