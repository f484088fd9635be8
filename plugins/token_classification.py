"""Token classification: a tag for every word, such as the entity that it belongs to.

Shapes: B rows of a batch, L pieces (of the tokenizer) of the longest row, W words of the longest row, C tags, D width
of features, N scored pieces of the whole batch, row by row; R rows of a split, T types of entities.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import datasets
import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from kt_hf import Loaded, Role, Task, loading, tiny
from kt_hf.errors import LEAVE_OUT, DataError, RecipeError, RowError
from kt_hf.task import FILL, Batch, Scores

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a piece that is not learnt."""
UNKNOWN = -1
"""A word without a tag; among predictions, one that the model has not seen."""
ENTITIES = ("entity_f1", "entity_precision", "entity_recall")
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "position_ids")


class TokenClassification(Task):
    """A tag for every word (`AutoModelForTokenClassification`): entities by B- and I- tags, or parts of speech.

    The data give lists of words with lists of tags. A word's tag is learnt on its first piece and read from there.
    max_length: pieces of a row; words beyond are not seen, count as wrong, and as O where entities are looked for.
    label_all_pieces: learn the tag on the other pieces of a word, too (I- there in place of B-). metrics: the first
    decides; token_accuracy alone for tags that are no entities.
    """

    auto_class = "AutoModelForTokenClassification"
    adapter_type = "TOKEN_CLS"
    classes_from = "model"
    conformance = {
        "model": tiny.BERT,
    }
    unit = "word"
    length_column = "input_ids"
    roles = (
        Role("tokens", ("strings",), required=False, aliases=("words",)),
        Role("text", ("string",), required=False, aliases=("sentence",)),  # to predict on
        Role("label", ("classes",), required=False, aliases=("ner_tags", "tags", "labels", "pos_tags")),
    )

    def __init__(
        self,
        *,
        max_length: Annotated[int, Field(ge=4)] = 128,
        label_all_pieces: bool = False,
        metrics: list[Literal["entity_f1", "entity_precision", "entity_recall", "token_accuracy"]] | None = None,
    ):
        self.max_length, self.label_all_pieces = max_length, label_all_pieces
        self.metrics = tuple(metrics or (*ENTITIES, "token_accuracy"))
        self.metric = self.metrics[0]

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> datasets.Dataset:
        names = ["O", "B-stone", "I-stone", "B-lamp", "I-lamp"]
        heads = {1: "redstone", 2: "stony", 3: "oldlamp", 4: "lampish", 0: "river"}
        lengths = 3 + np.arange(count) * 5 // count + random.integers(0, 2, count)  # later rows are longer
        tags = [[int(t) for t in random.integers(0, 5, length)] for length in lengths]
        words = [[f"{heads[t]}{random.integers(0, 3)}" for t in row] for row in tags]
        kinds = {
            "tokens": datasets.List(datasets.Value("string")),
            "label": datasets.List(datasets.ClassLabel(names=names)),
        }
        return datasets.Dataset.from_dict({"tokens": words, "label": tags}, features=datasets.Features(kinds))

    def fits(self, roles: dict[str, str]) -> bool:
        return {"tokens", "label"} <= set(roles)

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` for data without words or with tags that are no entities, and for a tokenizer that does
        not say which word its pieces are of."""
        from transformers import AutoModelForTokenClassification

        if "tokens" not in info.roles and ("label" in info.roles or "text" not in info.roles):
            raise RecipeError("token-classification needs lists of words", "name them: data.columns.tokens=COLUMN")
        if "label" in info.roles:
            self._check_tags(info.labels)
        tokenizer = loading.load_tokenizer(ref, info.texts())
        fresh = {} if ref.path or "vocab_size" in (ref.config_overrides or {}) else {"vocab_size": len(tokenizer)}
        check_tokenizer(tokenizer)
        loaded = loading.load_model(AutoModelForTokenClassification, ref, info.labels, **fresh)
        loaded.processor = tokenizer
        return loaded

    def _check_tags(self, names: list[str]) -> None:
        if not set(self.metrics) & set(ENTITIES):
            return
        from kt_hf import metrics

        metrics.seqeval()
        odd = [name for name in names if name != "O" and name[:2] not in ("B-", "I-", "E-", "S-")]
        if odd:
            raise RecipeError(
                f"{', '.join(odd[:5])}: tags of entities are O, or begin with B- or I-",
                "measure these by task.token-classification.metrics=[token_accuracy]",
            )

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {"labels": loaded.labels, **loading.tokenizer_signature(loaded.processor)}

    def layers(self, model: nn.Module) -> list[list[str]]:
        return loading.backbone_layers(model)

    def head(self, model: nn.Module) -> list[str]:
        return loading.head_modules(model)

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """Pieces with `labels` and `words`: of the first piece of word i, i + 1, of its other pieces -i - 1, 0 of
        special tokens. `tags`: of all words, seen or not."""
        words = [row or [] for row in rows["tokens"]]
        given: list[Any] = rows["label"] if "label" in rows and loaded.label_ids is not None else [None] * len(words)
        tags = [self._tags(i, *pair, loaded) for i, pair in enumerate(zip(words, given, strict=True))]
        limit = min(self.max_length, loaded.processor.model_max_length)
        encoded = loading.encode(loaded.processor, words, max_length=limit, is_split_into_words=True)
        places = [pieces(encoded.word_ids(i)) for i in range(len(words))]
        inner = continued(loaded.labels or []) if self.label_all_pieces else None
        labels = [[label(place, row, inner) for place in found] for found, row in zip(places, tags, strict=True)]
        return {**encoded, "words": places, "labels": labels, "tags": tags}

    def _tags(self, place: int, words: list[str], given: list[int] | None, loaded: Loaded) -> list[int]:
        """The model's number of every word's tag."""
        check_words(place, words, given)
        if not given:
            return [UNKNOWN] * len(words)
        assert loaded.label_ids is not None
        return [UNKNOWN if tag is None or tag < 0 else loaded.label_ids[tag] for tag in given]

    def check(self, row: dict[str, Any]) -> None:
        check_words(0, row["tokens"] or [], row.get("label"))

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        """Padded on the right, whichever side the tokenizer pads on."""
        tokenizer = loaded.processor
        fill = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
            "words": 0,
            "labels": IGNORED,
            "tags": FILL,
        }
        padded = {name: pad([row[name] for row in rows], value) for name, value in fill.items() if name in rows[0]}
        return {**padded, "index": torch.tensor([int(row["index"]) for row in rows])}

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        return model(**{k: batch[k] for k in INPUTS if k in batch}, **kwargs)

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """Cross-entropy of every piece, in float32; of weight 1 where it has a label, else 0."""
        labels_N = batch["labels"].flatten()
        logits_NC = outputs.logits.float().flatten(0, 1)
        values_N = F.cross_entropy(
            logits_NC, labels_N, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORED
        )
        return values_N, (labels_N != IGNORED).float(), "label"

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        return {
            "example": len(batch["index"]),
            "word": self._scored(batch).sum(),
            "label": (batch["labels"] != IGNORED).sum(),
        }

    def _scored(self, batch: Batch) -> torch.Tensor:
        """mask_BL of the pieces by which words are scored: the first of each, or all."""
        return batch["words"] != 0 if self.label_all_pieces else batch["words"] > 0

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of every piece; weight 0 for those by which no word is scored."""
        return outputs.logits.float().flatten(0, 1), self._scored(batch).float().flatten()

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean of the last hidden states over the real pieces."""
        hidden_BLD = outputs.hidden_states[-1]
        mask_BL1 = batch["attention_mask"].unsqueeze(-1).to(hidden_BLD.dtype)
        return (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.from_scores(*self.scores(self.forward(model, batch), batch), batch)

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Of every word of B rows: `label`, `prediction` (-1 where the model has not seen it) and its
        `probability`."""
        chance_N, guess_N = scores_NC[batch["words"].flatten() > 0].softmax(-1).max(-1)
        rows_N, places_N = (batch["words"] > 0).nonzero(as_tuple=True)
        words_N = batch["words"][rows_N, places_N] - 1
        prediction_BW = torch.where(batch["tags"] == FILL, FILL, UNKNOWN)
        prediction_BW[rows_N, words_N] = guess_N
        probability_BW = torch.zeros(batch["tags"].shape, device=chance_N.device)
        probability_BW[rows_N, words_N] = chance_N.float()
        return {"label": batch["tags"], "prediction": prediction_BW, "probability": probability_BW}

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """Entities by seqeval; with the F1 of every type that occurs. token_accuracy: the share of words with a tag
        whose tag is right, and no word is right that the model has not seen. Raises `DataError` without any tag."""
        truth_RW, guess_RW = predictions["label"], predictions["prediction"]
        known_RW = truth_RW >= 0
        if not known_RW.any():
            raise DataError("no word of these rows has a tag", "name the column of tags: data.columns.label=COLUMN")
        unseen = int((known_RW & (guess_RW == UNKNOWN)).sum())
        if unseen:
            note_unseen(unseen, int(known_RW.sum()), self.max_length)
        found = Scores({})
        if set(self.metrics) & set(ENTITIES):
            found = entities(*self._told(predictions, loaded), loaded.labels or [], self.metrics)
        if "token_accuracy" in self.metrics:
            total_R = known_RW.sum(1)
            right_R = (known_RW & (truth_RW == guess_RW)).sum(1)
            found.metrics["token_accuracy"] = float(right_R.sum() / max(total_R.sum(), 1))
            found.examples["token_accuracy"] = (right_R / np.maximum(total_R, 1), total_R.astype(np.float64))
        return found

    def _told(self, predictions: dict[str, np.ndarray], loaded: Loaded) -> tuple[list[list[str]], list[list[str]]]:
        """(true tags, predicted tags) of the words of every row that have a tag; O for words that were not seen."""
        names = np.asarray([*(loaded.labels or []), "O"], dtype=object)  # the last is that of UNKNOWN
        pairs = zip(predictions["label"], predictions["prediction"], strict=True)
        both = [(names[truth[truth >= 0]].tolist(), names[guess[truth >= 0]].tolist()) for truth, guess in pairs]
        return [truth for truth, _ in both], [guess for _, guess in both]

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        """Lists of tags; null for a word without a tag, and for one that the model has not seen."""
        names = np.asarray([*(loaded.labels or []), None], dtype=object)
        return {key: [names[row[row != FILL]].tolist() for row in predictions[key]] for key in ("label", "prediction")}

    def majority(
        self, train: dict[str, Any], predictions: dict[str, np.ndarray], loaded: Loaded, info: Any
    ) -> Scores | None:
        """Always the most frequent tag of the training words."""
        ids = loaded.label_ids or []
        tags = np.fromiter((ids[tag] for row in train["label"] for tag in row if tag is not None and tag >= 0), int)
        most = int(np.bincount(tags).argmax())
        guess_RW = np.where(predictions["prediction"] >= 0, most, predictions["prediction"])
        return self.measure({**predictions, "prediction": guess_RW}, loaded, info)

    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """Of rows with words: their tags, with probabilities. Of texts: entities, as transformers' pipeline has them
        with the aggregation `first`, which reads a word's tag from its first piece, as here."""
        loaded: Loaded = predictor.loaded
        if "tokens" not in info.roles:
            if predictor.combine is not None:
                raise RecipeError("an ensemble tags words, not texts", "give a data file with a column `tokens`")
            return {"prediction": of_texts(loaded, info.splits["test"]["text"])}
        found = predictor.scores(info, "test")
        rows = zip(found["prediction"], found["probability"], strict=True)
        tags = self.table(found, loaded, info)["prediction"]
        return {"prediction": tags, "probability": [chance[guess != FILL].tolist() for guess, chance in rows]}


# --- pieces ----------------------------------------------------------------------------------------------------------


def check_tokenizer(tokenizer: Any) -> None:
    """Whether lists of words can be told apart in what the tokenizer makes of them."""
    if not tokenizer.is_fast:
        raise RecipeError(
            f"{type(tokenizer).__name__} does not say which word its pieces are of",
            "take a model with a fast tokenizer (tokenizer.json)",
        )
    words = tokenizer(["a", "a"], is_split_into_words=True)["input_ids"]
    if words != tokenizer("a a")["input_ids"]:  # byte-level ones, whose pieces hold the space before a word
        raise RecipeError(
            f"{type(tokenizer).__name__} makes other pieces of words in a list than of the same words in a text",
            "set model.processor_overrides.add_prefix_space=true",
        )


def pieces(word_ids: Sequence[int | None]) -> list[int]:
    """i + 1 for the first piece of word i, -i - 1 for its other pieces, 0 for special tokens."""
    places, last = [], None
    for word in word_ids:
        places.append(0 if word is None else -word - 1 if word == last else word + 1)
        last = word
    return places


def label(place: int, tags: list[int], inner: list[int] | None) -> int:
    """What a piece is to learn: its word's tag. inner: tag -> tag of the pieces that go on with the word; None where
    these are not learnt."""
    if place == 0 or (place < 0 and inner is None) or tags[abs(place) - 1] == UNKNOWN:
        return IGNORED
    tag = tags[abs(place) - 1]
    return inner[tag] if place < 0 and inner is not None else tag


def continued(names: list[str]) -> list[int]:
    """Of every tag the number of the one that goes on with it: I-x for B-x, where there is one, else itself."""
    inside = {name[2:]: i for i, name in enumerate(names) if name.startswith("I-")}
    return [inside.get(name[2:], i) if name.startswith("B-") else i for i, name in enumerate(names)]


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)


# --- measuring -------------------------------------------------------------------------------------------------------


def entities(truth: list[list[str]], guess: list[list[str]], names: list[str], wanted: Sequence[str]) -> Scores:
    """The figures of seqeval, with functions of example weights that give the same from counts."""
    from kt_hf import metrics

    types = sorted({name[2:] for name in names if name != "O"})
    right_RT, guessed_RT, true_RT = counts(truth, guess, types)
    found = Scores({})
    for name in wanted:
        if name in ENTITIES:
            found.metrics[name] = metrics.compute([name], predictions=guess, references=truth)[name]  # type: ignore[arg-type]
            found.statistics[name] = functools.partial(
                ratio, name, *(c.sum(1) for c in (right_RT, guessed_RT, true_RT))
            )
    for t, kind in enumerate(types):
        if true_RT[:, t].any():  # those that occur only among guesses would differ from seed to seed
            name = f"f1_{kind}"
            found.statistics[name] = functools.partial(
                ratio, "entity_f1", right_RT[:, t], guessed_RT[:, t], true_RT[:, t]
            )
            found.metrics[name] = found.statistics[name](np.ones(len(truth)))
    return found


def counts(truth: list[list[str]], guess: list[list[str]], types: list[str]) -> tuple[np.ndarray, ...]:
    """Of every row and type the numbers of entities that are right, guessed and true."""
    from kt_hf import metrics

    find, place = metrics.seqeval().get_entities, {kind: t for t, kind in enumerate(types)}
    found = np.zeros((3, len(truth), len(types)))
    for r, (true_tags, guessed_tags) in enumerate(zip(truth, guess, strict=True)):
        true, guessed = set(find(true_tags)), set(find(guessed_tags))
        for i, group in enumerate((true & guessed, guessed, true)):
            for kind, _, _ in group:
                found[i, r, place[kind]] += 1
    return tuple(found)


def ratio(name: str, right_R: np.ndarray, guessed_R: np.ndarray, true_R: np.ndarray, weights_R: np.ndarray) -> float:
    """F1 = 2 right / (guessed + true), precision = right / guessed, recall = right / true; 0 for nothing of nothing."""
    right, guessed, true = (float(weights_R @ counted) for counted in (right_R, guessed_R, true_R))
    above, below = {
        "entity_f1": (2 * right, guessed + true),
        "entity_precision": (right, guessed),
        "entity_recall": (right, true),
    }[name]
    return above / below if below else 0.0


@functools.cache
def note_unseen(unseen: int, words: int, limit: int) -> None:
    """Said once, however often the same rows are measured."""
    logger.warning(
        "token-classification: %d of %d words are beyond the pieces that the model sees (max_length=%d), or have none; "
        "they count as wrong, and as O",
        unseen,
        words,
        limit,
    )


def of_texts(loaded: Loaded, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
    from transformers import pipeline

    model: Any = loaded.model
    tagger = pipeline("token-classification", model=model, tokenizer=loaded.processor, aggregation_strategy="first")
    return [[{**found, "score": float(found["score"])} for found in tagger(text)] for text in texts]


def check_words(place: int, words: list[str], tags: list[int] | None) -> None:
    """Raises `RowError` unless all words are texts and each has a tag, where there are tags."""
    odd = next((word for word in words if not isinstance(word, str)), None)
    if odd is not None or None in words:
        raise RowError(place, f"{odd!r} is no word", f"write a text for every word, {LEAVE_OUT}")
    if tags and len(tags) != len(words):
        raise RowError(place, f"{len(words)} words with {len(tags)} tags", f"give a tag for every word, {LEAVE_OUT}")
