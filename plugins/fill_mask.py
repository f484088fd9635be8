"""Masked language modelling: words are hidden in a text and found again; continued pre-training of encoders.

Shapes: B rows of a batch, L tokens of the longest row, C entries of the vocabulary, D width of features, N places
of the whole batch, row by row: its hidden tokens, and what fills up rows that have fewer than others.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from kt_hf import Loaded, Role, Task, language, loading, tiny
from kt_hf.errors import DataError, IntegrityError, RecipeError
from kt_hf.language import IGNORED
from kt_hf.task import Batch, Scores

Share = Annotated[float, Field(ge=0, le=1)]


class FillMask(Task):
    """Finds hidden tokens of a text (`AutoModelForMaskedLM`), as BERT is pre-trained (Devlin et al. 2018,
    arXiv:1810.04805).

    max_length: tokens per text; longer ones are cut. mask_probability: share of a text's tokens that is to be found,
    but one at least. Of these, mask_share become the mask token, random_share some other token, and the rest stay as
    they are. whole_words: hide all tokens of a word together. In training, tokens are drawn anew in every epoch; in
    evaluation the draw depends on the text alone, so that all models with one tokenizer are asked the same. A
    checkpoint without a head for this is refused, unless `model.replace_head=true` asks for a new one.
    """

    auto_class = "AutoModelForMaskedLM"
    conformance = {
        "model": tiny.BERT,
    }
    roles = (Role("text", ("string",), aliases=("sentence", "content", "document")),)
    unit = "token"
    metric = "perplexity"
    greater_is_better = False
    lower_metrics = ("loss",)
    random_rows = True
    derived = {language.PLACES: ("labels",)}

    def __init__(
        self,
        *,
        max_length: Annotated[int, Field(ge=3)] = 128,
        mask_probability: Annotated[float, Field(gt=0, le=1)] = 0.15,
        mask_share: Share = 0.8,
        random_share: Share = 0.1,
        whole_words: bool = False,
    ):
        if mask_share + random_share > 1:
            raise RecipeError(
                f"mask_share + random_share: got {mask_share:g} + {random_share:g}",
                "give shares that add up to 1 at most",
            )
        self.max_length, self.mask_probability, self.whole_words = max_length, mask_probability, whole_words
        self.mask_share, self.random_share = mask_share, random_share

    # `fits` stays False: what is to be done with plain texts has to be said.

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` for a tokenizer without a mask token and for a model with too few embeddings,
        `IntegrityError` for a checkpoint without a head unless a new one is asked for."""
        from transformers import AutoModelForMaskedLM

        tokenizer = loading.load_tokenizer(ref, info.texts())
        name = tokenizer.name_or_path or "trained here"
        if tokenizer.mask_token_id is None:
            raise RecipeError(f"the tokenizer {name} has no mask token", "take a model that was pre-trained with one")
        if self.whole_words and not tokenizer.is_fast:
            raise RecipeError(f"whole_words: the tokenizer {name} does not tell words", "set whole_words=false")
        loaded = loading.load_model(
            AutoModelForMaskedLM, ref, None, **({} if ref.path else fresh_fields(ref, tokenizer))
        )
        loaded.processor = tokenizer
        if ref.path and loaded.new_parameters and not ref.replace_head:
            raise IntegrityError(
                f"model '{ref.path}' has no masked-language-model head ({loaded.new_parameters[0]} is new, for one)",
                "set model.replace_head=true for a new one that is trained, or take another checkpoint",
            )
        num_tokens = max(tokenizer.get_vocab().values()) + 1
        num_rows = loaded.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        if num_tokens > num_rows:
            raise RecipeError(
                f"the tokenizer has {num_tokens} tokens, the model embeddings for {num_rows}",
                "give the model its own tokenizer (model.processor), or a fresh one a larger vocab_size",
            )
        tokenizer.model_max_length = min(tokenizer.model_max_length, loading.places(loaded.model))
        return loaded

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        tokenizer = loaded.processor
        rules = {"mask_token": tokenizer.mask_token, "longest": tokenizer.model_max_length}
        return {**loading.tokenizer_signature(tokenizer), "num_scores": len(tokenizer), "preprocessing": rules}

    def layers(self, model: nn.Module) -> list[list[str]]:
        return loading.backbone_layers(model)

    def head(self, model: nn.Module) -> list[str]:
        """What is not shared with the embeddings: a copy of that, trained apart, would not survive saving."""
        inner: Any = loading.unwrap(model)
        shared = {id(p) for p in inner.get_input_embeddings().parameters()}
        return [name for root in loading.head_modules(model) for name in own_modules(root, inner, shared)]

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """input_ids with hidden tokens, and labels: the token where one is to be found, -100 elsewhere."""
        tokenizer = loaded.processor
        encoded = self._encode(rows["text"], tokenizer)
        special, labels = set(tokenizer.all_special_ids), []
        for i, ids in enumerate(encoded["input_ids"]):
            seed = np.random.randint(2**62) if train else _number(rows["text"][i])  # the core has seeded the former
            words = encoded.word_ids(i) if self.whole_words else range(len(ids))
            hidden = self._draw(ids, words, special, np.random.default_rng(seed), tokenizer)
            labels.append([token if at in hidden else IGNORED for at, token in enumerate(ids)])
            encoded["input_ids"][i] = [hidden.get(at, token) for at, token in enumerate(ids)]
        return {**encoded, "labels": labels}

    def _encode(self, texts: list[str], tokenizer: Any) -> Any:
        return loading.encode(tokenizer, texts, max_length=min(self.max_length, tokenizer.model_max_length))

    def _draw(self, ids: list[int], words: Any, special: set[int], random: Any, tokenizer: Any) -> dict[int, int]:
        """position of a hidden token -> what stands there instead."""
        groups: dict[int, list[int]] = {}
        for at, (token, word) in enumerate(zip(ids, words, strict=True)):
            if token not in special and word is not None:
                groups.setdefault(word, []).append(at)
        wanted = max(1, round(self.mask_probability * sum(map(len, groups.values()))))
        hidden: dict[int, int] = {}
        order = list(groups)
        for n in random.permutation(len(order)):
            if len(hidden) >= wanted:
                break
            kind = random.random()
            for at in groups[order[n]]:
                hidden[at] = ids[at]
                if kind < self.mask_share:
                    hidden[at] = tokenizer.mask_token_id
                elif kind < self.mask_share + self.random_share:
                    hidden[at] = other_token(len(tokenizer), special, random)
        return hidden

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        tokens = {k: [list(row[k]) for row in rows] for k in rows[0] if k not in ("index", "labels")}
        batch: Batch = dict(loaded.processor.pad(tokens, padding_side="right", return_tensors="pt"))
        width = batch["input_ids"].shape[1]
        labels_BL = torch.tensor([list(row["labels"]) + [IGNORED] * (width - len(row["labels"])) for row in rows])
        batch |= {"labels": labels_BL, language.PLACES: language.places(labels_BL)}
        return {**batch, "index": torch.tensor([int(row["index"]) for row in rows])}

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        inputs = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "position_ids")
        return model(**{k: batch[k] for k in inputs if k in batch}, **kwargs)

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """-log p(token | the text with what is hidden), in nats: values_N, of weight 1 for the hidden tokens."""
        return language.loss(*self._at_hidden(outputs, batch), label_smoothing)

    def _at_hidden(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return language.learnt(outputs.logits, batch["labels"], batch.get(language.PLACES))

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        return {"example": len(batch["index"]), "token": (batch["labels"] != IGNORED).sum()}

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits over the vocabulary for every hidden token."""
        logits_NC, targets_N = self._at_hidden(outputs, batch)
        return logits_NC, language.weights(targets_N)

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean of the last hidden states over the real tokens."""
        mask_BL1 = batch["attention_mask"].bool().unsqueeze(-1)
        return outputs.hidden_states[-1].masked_fill(~mask_BL1, 0.0).sum(1) / mask_BL1.sum(1).clamp(min=1)

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Per example: `nll` (nats, summed over its hidden tokens), `tokens`, `correct` (of the likeliest)."""
        return language.judge_labels(self.forward(model, batch).logits, batch["labels"])

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return language.judge_scores(scores_NC, weight_N, batch["labels"])

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """Perplexity and its logarithm, and accuracy, of hidden tokens."""
        return language.measure(predictions, "look at the column of the texts, and at how long they are")

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        return {name: predictions[name] for name in ("nll", "tokens", "correct")}

    @torch.no_grad()
    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """The likeliest token of every mask in a text, each by itself as transformers' pipeline has it; where there
        are several, with spaces between. probability: their product. text: with them filled in."""
        tokenizer = predictor.members[0].processor
        found: dict[str, list[Any]] = {"prediction": [], "probability": [], "text": []}
        for number, text in enumerate(info.splits["test"]["text"]):
            ids = self._encode([text], tokenizer)["input_ids"][0]
            places_N = [at for at, token in enumerate(ids) if token == tokenizer.mask_token_id]
            if not places_N:
                raise DataError(
                    f"row {number} has no {tokenizer.mask_token} ('{text[:40]}')", "put one where a word is to be found"
                )
            chance_N, token_N = self._likeliest(predictor, ids, places_N)
            for at, token in zip(places_N, token_N, strict=True):
                ids[at] = token
            found["prediction"].append(" ".join(tokenizer.decode([token]) for token in token_N))
            found["probability"].append(float(np.prod(chance_N)))
            found["text"].append(tokenizer.decode(ids, skip_special_tokens=True))
        return found

    def _likeliest(self, predictor: Any, ids: list[int], places_N: list[int]) -> tuple[list[float], list[int]]:
        """(probability, token) of the best at each place; one row at a time, so that no padding takes part."""
        scores = []
        for member in predictor.members:
            device = next(member.model.parameters()).device
            row_1L = torch.tensor([ids], device=device)
            batch = {"input_ids": row_1L, "attention_mask": torch.ones_like(row_1L)}
            scores.append(self.forward(member.model, batch).logits[0, places_N].float())
        combined_NC = scores[0] if predictor.combine is None else predictor.combine(torch.stack(scores))
        best = combined_NC.softmax(-1).max(-1)
        return best.values.tolist(), best.indices.tolist()


def fresh_fields(ref: Any, tokenizer: Any) -> dict[str, Any]:
    """Fields of a fresh configuration that follow from the tokenizer; those that the user set stay."""
    wanted = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return {k: v for k, v in wanted.items() if k not in (ref.config_overrides or {})}


def own_modules(name: str, model: nn.Module, shared: set[int]) -> list[str]:
    """Names of the largest modules within `name` that hold parameters, and none of the shared ones."""
    module = model.get_submodule(name)
    parameters = {id(p) for p in module.parameters()}
    if not parameters & shared:
        return [name] if parameters else []
    return [n for child, _ in module.named_children() for n in own_modules(f"{name}.{child}", model, shared)]


def other_token(count: int, special: set[int], random: Any) -> int:
    while (token := int(random.integers(count))) in special:
        pass
    return token


def _number(text: str) -> int:
    """A seed that the text alone decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
