"""Text-to-text generation: translation, summarisation, whatever writes one text from another.

Shapes: B rows of a batch, S tokens of the longest source, L of the longest target, W tokens written, C entries of the
vocabulary, D width of features, N places of the targets of the whole batch, row by row, or examples.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from kt_hf import Loaded, Role, Task, language, loading, writing
from kt_hf.errors import RecipeError, nearest
from kt_hf.language import IGNORED
from kt_hf.task import Batch, Scores
from kt_hf.writing import (
    check_model,
    ended,
    fresh_fields,
    from_bytes,
    generate,
    padding,
    positions,
    shifted,
    start_fresh,
    to_bytes,
)

logger = logging.getLogger(__name__)

OF_TEXTS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL")
OF_TOKENS = ("perplexity", "loss", "token_accuracy")
PREFIX = "source_prefix"
"""Where the tokenizer's configuration keeps the prefix, so that it is saved with the model."""


class Text2TextGeneration(Task):
    """A text from another, by an encoder and a decoder (`AutoModelForSeq2SeqLM`): translation, summarisation.

    max_source_length, max_target_length: tokens per text; longer ones are cut, and as many are written at most. prefix:
    put before every source ("translate English to German: "); by default the one that the model was trained with here,
    else none. num_beams: 1 is greedy; all else of writing is as the model's generation_config has it. metrics: `bleu`
    and `chrf` (as sacreBLEU computes them, divided by 100), `rouge1`, `rouge2`, `rougeL`, which take writing; and
    `perplexity`, `loss`, `token_accuracy` of the targets given what precedes each token, which are always there. The
    first decides. Without one of the former nothing is written in evaluations, which then are much faster.
    bleu_tokenizer: sacreBLEU's.
    """

    auto_class = "AutoModelForSeq2SeqLM"
    adapter_type = "SEQ_2_SEQ_LM"
    conformance = {
        "model": {
            "config": "bart",
            "config_overrides": {
                "d_model": 16,
                "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "init_std": 0.2,
                "max_position_embeddings": 64,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "activation_dropout": 0.0,
            },
        },
    }
    roles: ClassVar[tuple[Role, ...]] = (
        Role("source", ("string",), aliases=("src", "source_text", "input_text", "document", "article", "dialogue")),
        Role("target", ("string",), aliases=("tgt", "target_text", "summary", "highlights"), predicted=True),
    )
    unit = "token"
    length_column = "input_ids"
    lower_metrics = ("perplexity", "loss")

    def __init__(
        self,
        *,
        max_source_length: Annotated[int, Field(ge=1)] = 128,
        max_target_length: Annotated[int, Field(ge=2)] = 128,
        prefix: str | None = None,
        num_beams: Annotated[int, Field(ge=1)] = 1,
        metrics: Sequence[str] = ("bleu", "chrf", "rouge1", "rouge2", "rougeL"),
        bleu_tokenizer: Literal["13a", "intl", "zh", "char", "none"] = "13a",
    ):
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.prefix, self.num_beams = prefix, num_beams
        for name in metrics:
            if name not in OF_TEXTS + OF_TOKENS:
                raise RecipeError(f"metrics: there is no '{name}'", nearest(name, OF_TEXTS + OF_TOKENS))
        self.bleu_tokenizer = bleu_tokenizer
        self.of_texts = tuple(name for name in dict.fromkeys(metrics) if name in OF_TEXTS)
        self.metric = metrics[0] if metrics else "perplexity"
        self.greater_is_better = self.metric not in ("perplexity", "loss")
        self.writes = bool(self.of_texts)

    def fits(self, roles: dict[str, str]) -> bool:
        return {"source", "target"} <= set(roles) and roles["target"] not in ("label", "labels", "category")

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` for metrics whose library is absent, for a model with too few embeddings for its
        tokenizer, and for one that does not say what its decoder starts with; `IntegrityError` for a checkpoint without
        a language-model head."""
        from transformers import AutoModelForSeq2SeqLM

        for name in self.of_texts:
            self._metric(name)
        tokenizer = loading.load_tokenizer(ref, info.texts(), causal=True)
        if tokenizer.eos_token_id is None:
            raise RecipeError(
                f"the tokenizer {tokenizer.name_or_path} has no end token, so that writing would not end",
                "set model.processor_overrides.eos_token=TOKEN",
            )
        if self.prefix is not None:
            tokenizer.init_kwargs[PREFIX] = self.prefix
        fresh = {} if ref.path else fresh_fields(ref, tokenizer)
        loaded = loading.load_model(AutoModelForSeq2SeqLM, ref, None, **fresh)
        loaded.processor = tokenizer
        if ref.path is None:
            start_fresh(loaded.model, tokenizer)
        check_model(loaded, tokenizer, fresh=ref.path is None)
        longest = positions(loaded.model)
        if longest is not None and longest < tokenizer.model_max_length:
            tokenizer.model_max_length = longest
        return loaded

    def _metric(self, name: str) -> Any:
        from kt_hf import metrics

        return metrics.of_texts(name, self.bleu_tokenizer if name == "bleu" else "default")

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        """As for language models: `vocabulary` must be equal for teacher and student, `num_scores` scores are
        comparable, `preprocessing` is what else changes the token ids of a row. What a decoder starts with is each
        model's own matter."""
        tokenizer = loaded.processor
        rules = {"prefix": tokenizer.init_kwargs.get(PREFIX), "longest": tokenizer.model_max_length}
        rules |= {name: tokenizer.init_kwargs.get(name) for name in ("src_lang", "tgt_lang")}
        return {**loading.tokenizer_signature(tokenizer), "num_scores": len(tokenizer), "preprocessing": rules}

    def layers(self, model: nn.Module) -> list[list[str]]:
        """Embeddings, the encoder's layers, the decoder's."""
        return writing.layers(model)

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """input_ids of the sources, and labels that end with the end token, also where a target is cut."""
        tokenizer = loaded.processor
        prefix, end = tokenizer.init_kwargs.get(PREFIX) or "", tokenizer.eos_token_id
        sources = [prefix + text for text in rows["source"]]
        limit = min(self.max_source_length, tokenizer.model_max_length)
        found = loading.encode(tokenizer, sources, max_length=limit)["input_ids"] if sources else []
        columns = {"input_ids": [ids or [end] for ids in found]}  # attention over nothing is not defined
        if "target" in rows:
            limit = min(self.max_target_length, tokenizer.model_max_length)
            found = loading.encode(tokenizer, rows["target"], max_length=limit, target=True)["input_ids"]
            columns["labels"] = [ended(ids, end, limit) for ids in found]
        return columns

    def row_limit(self, loaded: Loaded) -> int:
        return min(self.max_source_length, loaded.processor.model_max_length)

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        """Padded on the right; by length: padding may be the end token."""
        batch: Batch = {"index": torch.tensor([int(row["index"]) for row in rows])}
        for name, fill in (("input_ids", loaded.processor.pad_token_id), ("labels", IGNORED)):
            if name in rows[0]:
                width = max(len(row[name]) for row in rows)
                batch[name] = torch.tensor([list(row[name]) + [fill] * (width - len(row[name])) for row in rows])
        lengths_B1 = torch.tensor([[len(row["input_ids"])] for row in rows])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths_B1).long()
        return batch

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        """The decoder reads the labels, one place later; no loss is computed by the model."""
        names = ("input_ids", "attention_mask", "inputs_embeds", "decoder_input_ids")
        given = {name: batch[name] for name in names if name in batch}
        if "decoder_input_ids" not in given:
            given["decoder_input_ids"] = shifted(batch["labels"], loading.unwrap(model))
        return model(**given, **{"use_cache": False, **kwargs})

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """-log p(token | source, what precedes it), in nats: values_N, of weight 1 for the target tokens."""
        return language.loss(*language.learnt(outputs.logits, batch["labels"], None), label_smoothing)

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        return {"example": len(batch["index"]), "token": (batch["labels"] != IGNORED).sum()}

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits over the vocabulary for every place of a target; weight 0 behind its end."""
        logits_NC, targets_N = language.learnt(outputs.logits, batch["labels"], None)
        return logits_NC, language.weights(targets_N)

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean of the encoder's last hidden states over the real tokens of the source."""
        mask_BS1 = batch["attention_mask"].bool().unsqueeze(-1)
        return outputs.encoder_last_hidden_state.masked_fill(~mask_BS1, 0.0).sum(1) / mask_BS1.sum(1).clamp(min=1)

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Per example: `nll` (nats, summed over its target tokens), `tokens`, `correct` (of greedy choice, given the
        target before it), and `written`, the token ids that the model writes by itself, padded to a fixed width."""
        found = {}
        if "labels" in batch:
            found = language.judge_labels(self.forward(model, batch).logits, batch["labels"])
        if self.writes:
            found["written"] = self.write(loading.unwrap(model), batch)
        return found

    def write(self, model: Any, batch: Batch) -> torch.Tensor:
        """written_BW: what `generate` gives after the decoder's start token."""
        width = min(self.max_target_length, positions(model) or self.max_target_length)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        out_BW = generate(model, width, self.num_beams, **given)[:, 1:]
        return F.pad(out_BW, (0, width - out_BW.shape[1]), value=padding(model))

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Raises `RecipeError` where texts are to be written: members would have to agree token by token."""
        if self.writes:
            raise RecipeError(
                "an ensemble of text-to-text models scores given targets, but does not write",
                "set task.text2text-generation.metrics=[perplexity], or merge in weight space instead",
            )
        return language.judge_scores(scores_NC, weight_N, batch["labels"])

    def finish(self, predictions: dict[str, np.ndarray], loaded: Loaded, rows: Any) -> dict[str, np.ndarray]:
        """Texts in place of token ids, and for every metric of texts its counts of each example; references are the
        rows' own texts, neither cut nor changed by the tokenizer."""
        found = dict(predictions)
        if "written" not in found:
            return found
        texts = loaded.processor.batch_decode(found.pop("written"), skip_special_tokens=True)
        found["prediction"] = to_bytes(texts)
        if "target" in rows.column_names:
            references = list(rows["target"])
            found["reference"] = to_bytes(references)
            found |= {name: self._metric(name).counts(texts, references) for name in self.of_texts}
        return found

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """See the class; of texts, BLEU and chrF are about the corpus, ROUGE is a mean over examples."""
        found = language.measure(predictions, "look at the column of the targets")
        for name in self.of_texts:
            metric, counts_NK = self._metric(name), predictions[name].astype(np.float64)
            found.metrics[name] = metric.score(counts_NK.sum(0))
            if name.startswith("rouge"):
                found.examples[name] = counts_NK[:, 0], counts_NK[:, 1]
            else:
                found.statistics[name] = lambda weights_N, m=metric, c=counts_NK: m.score(weights_N @ c)
                found.notes[name] = f"sacreBLEU / 100; {metric.signature()}"
        return found

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        texts = ("prediction", "reference")
        found: dict[str, Any] = {name: from_bytes(predictions[name]) for name in texts if name in predictions}
        return found | {name: predictions[name] for name in ("nll", "tokens", "correct")}

    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """What the model writes from every source."""
        if predictor.combine is not None:
            raise RecipeError(
                "an ensemble of text-to-text models does not write", "use kt-hf evaluate, or one of its members"
            )
        task = copy.copy(self)
        task.max_target_length, task.writes = max_new_tokens, True
        return {"prediction": from_bytes(replace(predictor, task=task).scores(info, "test")["prediction"])}
