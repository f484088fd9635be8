"""Sentence embeddings: a text encoder, pooled; learnt from pairs with a score, measured by these or by retrieval.

Shapes: B rows of a batch (2B texts where rows are pairs), L tokens of the longest text, D width of embeddings, N
examples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from kt_hf import Loaded, Role, Task, loading, tiny
from kt_hf.errors import DataError, NotMeaningful, RecipeError
from kt_hf.functional import retrieval, scoring
from kt_hf.task import Batch, Scores, auto_classes

AT = (1, 5, 10)
FACT = "sentence_embedding"
"""Under this name a model's configuration keeps how tokens become one vector."""
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
"""Our name of a pooling -> sentence-transformers' in `1_Pooling/config.json`, as all its releases read it."""


@dataclass
class Embedded:
    """text_embeds_BD, pair_embeds_BD or None, and what was asked for of the first texts."""

    text_embeds: torch.Tensor
    pair_embeds: torch.Tensor | None = None
    hidden_states: Any = None
    attentions: Any = None


class FeatureExtraction(Task):
    """One vector for a text (`AutoModel` with pooling).

    Pairs with a score are learnt by regression of the cosine: (cos(a, b) - score)^2, the score brought to [0, 1]
    (Reimers & Gurevych 2019, Sentence-BERT, arXiv:1908.10084, "Regression Objective Function"), and measured by
    Spearman's and Pearson's correlation of cosine and score. Pairs without are measured by retrieval (recall at 1, 5,
    10 both ways); to learn from them takes a strategy with an objective of its own. max_length: tokens per text; longer
    ones are cut. pooling: `mean` of all tokens, `cls` for the first, `last`; `auto` is the checkpoint's own, as
    sentence-transformers or we have saved it, else mean. score_range: lowest and highest score; by default those of the
    training rows. A pooler (BERT's) takes no part and is left out. The export loads in sentence-transformers, too.
    """

    auto_class = "AutoModel"
    adapter_type = "FEATURE_EXTRACTION"
    conformance = {
        "roles": ("text", "text_pair", "label"),
        "model": tiny.BERT,
    }
    roles = (
        Role("text", ("string",), aliases=("sentence1", "sentence_1", "anchor", "query", "question", "sentence")),
        Role("text_pair", ("string",), False, ("sentence2", "sentence_2", "positive", "answer", "passage")),
        Role("label", ("number",), False, ("score", "similarity", "similarity_score", "labels")),
    )
    label_kind = "number"
    length_column = "input_ids"
    metric = "spearman"

    def __init__(
        self,
        *,
        max_length: Annotated[int, Field(ge=3)] = 128,
        pooling: Literal["auto", "mean", "cls", "last"] = "auto",
        score_range: tuple[float, float] | None = None,
    ):
        if score_range is not None and not score_range[0] < score_range[1]:
            raise RecipeError(f"score_range: got {list(score_range)}", "give the lowest score, then the highest")
        self.max_length, self.pooling, self.score_range = max_length, pooling, score_range

    @classmethod
    def architectures(cls) -> frozenset[str]:
        """Those of text encoders: `AutoModel` loads all that there is."""
        import transformers

        base = transformers.AutoModel._model_mapping._model_mapping
        masked = transformers.AutoModelForMaskedLM._model_mapping._model_mapping
        return auto_classes("AutoModelForTextEncoding") | {
            base[kind] for kind in masked if isinstance(base.get(kind), str)
        }

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> Any:
        """Pairs that share some words, and how many."""
        import datasets

        words = [f"{a}{b}" for a in ("red", "blue", "old") for b in ("stone", "river", "lamp", "cloud")]
        first = [random.choice(words, 5, replace=False) for _ in range(count)]
        same_N = np.arange(count) % 6
        pairs = [[*row[:n], *random.choice(words, 5 - n)] for row, n in zip(first, same_N, strict=True)]
        columns = {"text": [" ".join(row) for row in first], "text_pair": [" ".join(row) for row in pairs]}
        return datasets.Dataset.from_dict({**columns, "label": same_N.astype(np.float32)})

    # `fits` stays False: pairs with a number could as well be for a head on both texts.

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` for an encoder with a decoder, and for one with too few embeddings."""
        from transformers import AutoModel

        self.settle(info)
        tokenizer = loading.load_tokenizer(ref, info.texts())
        fresh = {} if ref.path or "vocab_size" in (ref.config_overrides or {}) else {"vocab_size": len(tokenizer)}
        loaded = loading.load_model(AutoModel, ref, None, **fresh)
        model: Any = loaded.model
        if getattr(model.config, "is_encoder_decoder", False):
            raise RecipeError(
                f"{type(model).__name__} is an encoder with a decoder",
                "take an encoder, or the task text2text-generation",
            )
        num_tokens, num_rows = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().weight.shape[0]
        if num_tokens > num_rows:
            raise RecipeError(
                f"the tokenizer has {num_tokens} tokens, the model embeddings for {num_rows}",
                "give the model its own tokenizer (model.processor), or a fresh one a larger vocab_size",
            )
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None
            loaded.new_parameters = [name for name in loaded.new_parameters if not name.startswith("pooler.")]
        known = getattr(model.config, FACT, None) or saved_pooling(ref)
        setattr(model.config, FACT, known if self.pooling == "auto" else {**known, "pooling": self.pooling})
        tokenizer.model_max_length = min(tokenizer.model_max_length, loading.places(model))
        loaded.processor = tokenizer
        return loaded

    def settle(self, info: Any) -> None:
        """What depends on the data: the deciding metric, whether there is a loss, and the range of scores."""
        self.has_loss = "label" in info.roles and "text_pair" in info.roles
        self.metric = "spearman" if self.has_loss else "text_recall@1"
        if self.has_loss and self.score_range is None and "train" in info.splits:
            scores = [y for y in info.splits["train"]["label"] if y is not None and y == y]
            if min(scores) == max(scores):
                raise DataError(
                    f"all training rows have the score {scores[0]:g}", "name another column: data.columns.label"
                )
            self.score_range = min(scores), max(scores)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        found = loading.tokenizer_signature(loaded.processor)
        return {**found, "preprocessing": {"longest": loaded.processor.model_max_length}}

    def layers(self, model: nn.Module) -> list[list[str]]:
        return loading.backbone_layers(model)

    def save(self, loaded: Loaded, folder: Path) -> None:
        """With the module files of sentence-transformers, but beside an adapter, which has its base's."""
        super().save(loaded, folder)
        config: Any = loaded.model.config
        if not hasattr(loaded.model, "peft_config"):
            longest = min(self.max_length, loaded.processor.model_max_length)
            write_modules(folder, getattr(config, FACT), config.hidden_size, longest)

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """input_ids and pair_input_ids, `labels` (the score as it is, NaN for none), and a number of each text."""
        limit, columns = min(self.max_length, loaded.processor.model_max_length), {}
        for role, name in (("text", "input_ids"), ("text_pair", "pair_input_ids")):
            if role in rows:
                columns[name] = loading.encode(loaded.processor, rows[role], max_length=limit)["input_ids"]
                columns[f"{role}_id"] = [number(text) for text in rows[role]]
        if "label" in rows:
            columns["labels"] = [float("nan") if y is None else float(y) for y in rows["label"]]
        return columns

    def row_limit(self, loaded: Loaded) -> int:
        return min(self.max_length, loaded.processor.model_max_length)

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        """Padded on the right, both texts to one width."""
        names = [name for name in ("input_ids", "pair_input_ids") if name in rows[0]]
        width = max(len(row[name]) for row in rows for name in names)
        pad, batch = loaded.processor.pad_token_id, {}
        for name in names:
            lengths_B1 = torch.tensor([[len(row[name])] for row in rows])
            batch[name] = torch.tensor([list(row[name]) + [pad] * (width - len(row[name])) for row in rows])
            batch[name.replace("input_ids", "attention_mask")] = (torch.arange(width) < lengths_B1).long()
        for name in ("text_id", "text_pair_id", "index"):
            if name in rows[0]:
                batch[name] = torch.tensor([int(row[name]) for row in rows])
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.float32)
        return batch

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Embedded:
        """Both texts of all rows go through the model at once."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        rows = len(ids)
        if "pair_input_ids" in batch:
            ids = torch.cat([ids, batch["pair_input_ids"]])
            mask = torch.cat([mask, batch["pair_attention_mask"]])
        outputs = model(input_ids=ids, attention_mask=mask, **kwargs)
        config: Any = loading.unwrap(model).config
        embeds = pooled(outputs.last_hidden_state, mask, **(getattr(config, FACT, None) or saved_pooling(None)))
        asked = {
            k: tuple(x[:rows] for x in getattr(outputs, k)) for k in ("hidden_states", "attentions") if k in outputs
        }
        return Embedded(embeds[:rows], embeds[rows:] if len(embeds) > rows else None, **asked)

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """(cos(a, b) - score)^2 per pair, the score brought to [0, 1]."""
        assert self.score_range is not None
        low, high = self.score_range
        known_B = ~batch["labels"].isnan()
        wanted_B = (batch["labels"].nan_to_num(low) - low) / (high - low)
        return (cosine(outputs) - wanted_B).square(), known_B.float(), "label"

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        """Rows, and those of them that have a score."""
        known = {"label": (~batch["labels"].isnan()).sum()} if "labels" in batch else {}
        return {"example": len(batch["index"]), **known}

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The embeddings of the first texts."""
        return outputs.text_embeds

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`cosine` and `label` of pairs with a score; else embeddings, and numbers by which equal texts are known."""
        outputs = self.forward(model, batch)
        if "labels" in batch and outputs.pair_embeds is not None:
            return {"cosine": cosine(outputs), "label": batch["labels"]}
        found = {"text_embeds": outputs.text_embeds.float()}
        if outputs.pair_embeds is not None:
            ids = {name: batch[name] for name in ("text_id", "text_pair_id")}
            found |= {"pair_embeds": outputs.pair_embeds.float(), "cosine": cosine(outputs), **ids}
        return found

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """Correlations of cosine and score; without scores, recalls as means over rows: of texts that find their pair
        (`text_recall@k`), and of pairs that find their text."""
        if "label" in predictions:
            return correlations(predictions["cosine"], predictions["label"])
        found = Scores({})
        for name, ranks_N in self._ranks(predictions).items():
            for k in AT:
                hits_N = (ranks_N < k).astype(np.float64)
                found.metrics[f"{name}_recall@{k}"] = float(hits_N.mean())
                found.examples[f"{name}_recall@{k}"] = (hits_N, None)
        return found

    def _ranks(self, predictions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "pair_embeds" not in predictions:
            raise DataError("there is nothing to compare a text with", "name its pair: data.columns.text_pair=COLUMN")
        texts, pairs = (unit(predictions[name]) for name in ("text_embeds", "pair_embeds"))
        return {
            "text": retrieval.ranks(texts, pairs, predictions["text_pair_id"]),
            "pair": retrieval.ranks(pairs, texts, predictions["text_id"]),
        }

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        if "label" in predictions:
            return {name: predictions[name] for name in ("cosine", "label")}
        return {"cosine": predictions["cosine"], **{f"{k}_rank": v for k, v in self._ranks(predictions).items()}}

    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """The embedding of every text; of pairs, the cosine of their embeddings."""
        if predictor.combine is not None:
            raise NotMeaningful("embeddings of several models have no mean", "use one of the ensemble's members")
        found = predictor.scores(info, "test")
        chosen = found["cosine"] if "cosine" in found else found["text_embeds"]
        return {"prediction": chosen.tolist()}


# --- vectors ---------------------------------------------------------------------------------------------------------


def pooled(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor, pooling: str, normalize: bool) -> torch.Tensor:
    """embeds_BD, in float32; of length 1 if asked for."""
    hidden_BLD = hidden_BLD.float()
    if pooling == "mean":
        real_BL1 = mask_BL.unsqueeze(-1).float()
        embeds_BD = (hidden_BLD * real_BL1).sum(1) / real_BL1.sum(1).clamp(min=1)
    elif pooling == "cls":
        embeds_BD = hidden_BLD[:, 0]
    else:
        embeds_BD = hidden_BLD[torch.arange(len(mask_BL), device=mask_BL.device), mask_BL.sum(1).clamp(min=1) - 1]
    return F.normalize(embeds_BD, dim=-1) if normalize else embeds_BD


def cosine(outputs: Embedded) -> torch.Tensor:
    assert outputs.pair_embeds is not None
    return F.cosine_similarity(outputs.text_embeds.float(), outputs.pair_embeds.float(), dim=-1)


def unit(embeds_ND: np.ndarray) -> np.ndarray:
    return embeds_ND / np.maximum(np.linalg.norm(embeds_ND, axis=1, keepdims=True), 1e-12)


def number(text: str) -> int:
    """A 63-bit number of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def correlations(cosine_N: np.ndarray, label_N: np.ndarray) -> Scores:
    """Of the rows that have a score, with equal scores at their mean rank."""
    known = ~np.isnan(label_N)
    x, y = cosine_N[known].astype(np.float64), label_N[known].astype(np.float64)
    x_groups, y_groups = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    statistics = {
        "spearman": lambda weights_N: scoring.spearman(x_groups, y_groups, weights_N[known]),
        "pearson": lambda weights_N: scoring.pearson(x, y, weights_N[known]),
    }
    every = np.ones(len(label_N))
    return Scores({name: statistic(every) for name, statistic in statistics.items()}, statistics=statistics)


# --- sentence-transformers' files ------------------------------------------------------------------------------------


def saved_pooling(ref: Any) -> dict[str, Any]:
    """How a checkpoint of sentence-transformers pools, as its module files say; the mean where there are none."""
    from transformers.utils import cached_file

    found: dict[str, Any] = {"pooling": "mean", "normalize": False}
    if ref is None or ref.path is None:
        return found
    options: dict[str, Any] = {
        f"_raise_exceptions_for_{why}": False for why in ("missing_entries", "connection_errors")
    }
    read = {
        name: json.loads(Path(file).read_text())
        for name in ("modules.json", "1_Pooling/config.json")
        if (file := cached_file(str(ref.path), name, revision=ref.revision, **options))
    }
    modes = read.get("1_Pooling/config.json", {})
    wanted = [mode for mode, on in modes.items() if mode.startswith("pooling_mode") and on is True]
    newer = modes.get("pooling_mode", [])
    wanted += [newer] if isinstance(newer, str) else newer
    names = {theirs: ours for ours, theirs in MODES.items()} | {"mean": "mean", "cls": "cls", "lasttoken": "last"}
    if len(wanted) > 1 or (wanted and wanted[0] not in names):
        raise RecipeError(
            f"'{ref.path}' was pooled by {', '.join(wanted)}",
            "choose one that is known: task.feature-extraction.pooling",
        )
    if wanted:
        found["pooling"] = names[wanted[0]]
    found["normalize"] = any(
        str(module.get("type", "")).endswith("Normalize") for module in read.get("modules.json", [])
    )
    return found


def write_modules(folder: Path, how: dict[str, Any], width: int, longest: int) -> None:
    """What sentence-transformers reads: a transformer, how it is pooled, and whether to length 1."""
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *([("2_Normalize", "Normalize")] if how["normalize"] else []),
    ]
    modules: Sequence[dict[str, Any]] = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    modes = {theirs: ours == how["pooling"] for ours, theirs in MODES.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", {"word_embedding_dimension": width, **modes}),
        ("sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False}),
    ):
        (folder / name).write_text(json.dumps(content, indent=1))
