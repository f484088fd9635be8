"""Question answering: the span of a context that answers a question, or that there is none.

Shapes: B rows (questions) of a batch, V windows of all of them, row by row, L tokens of the longest window, X
characters of the longest context, W characters of a text, N = 2V ends of spans (all starts, then all ends), D width of
features, R rows of a split.
"""

from __future__ import annotations

import functools
import logging
from typing import Annotated, Any

import datasets
import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from kt_hf import Loaded, Role, Task, loading, tiny
from kt_hf.errors import LEAVE_OUT, DataError, RecipeError, RowError
from kt_hf.functional import answers
from kt_hf.task import FILL, Batch, Scores

logger = logging.getLogger(__name__)

NEVER = -1e4
"""Logit of a place where no answer can start or end: finite, so that two models can be compared there."""
BREAK = -1
"""Between texts in a row of characters."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "position_ids")


class QuestionAnswering(Task):
    """The span of a context that answers a question (`AutoModelForQuestionAnswering`).

    A long context is read in several windows, each with the question. max_length: tokens of a window. doc_stride:
    tokens that neighbouring windows share (as in transformers). max_question_length: longer questions are cut.
    max_answer_length: tokens of an answer. max_windows: windows of a training row, those with its answer first; all by
    default. null_threshold: give no answer where log p(none) exceeds log p(answer) by more than this (SQuAD 2 style);
    by default there is always an answer.
    """

    auto_class = "AutoModelForQuestionAnswering"
    adapter_type = "QUESTION_ANS"
    conformance = {
        "settings": {"max_length": 20, "doc_stride": 3, "max_question_length": 9},
        "model": {"config": "bert", "config_overrides": {**tiny.ENCODER, "max_position_embeddings": 384}},
    }
    unit = "end"
    derived = {"windows": ("row_of",)}
    metric = "f1"
    roles = (
        Role("question", ("string",), aliases=("query",)),
        Role("context", ("string",), aliases=("passage", "document", "paragraph")),
        Role("answers", ("struct",), required=False, aliases=("answer",)),
    )

    def __init__(
        self,
        *,
        max_length: Annotated[int, Field(ge=16)] = 384,
        doc_stride: Annotated[int, Field(ge=0)] = 128,
        max_question_length: Annotated[int, Field(ge=1)] = 64,
        max_answer_length: Annotated[int, Field(ge=1)] = 30,
        max_windows: Annotated[int, Field(ge=1)] | None = None,
        null_threshold: float | None = None,
    ):
        self.max_length, self.doc_stride, self.max_question_length = max_length, doc_stride, max_question_length
        self.max_answer_length, self.max_windows, self.null_threshold = max_answer_length, max_windows, null_threshold

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> datasets.Dataset:
        words = np.array([f"{a}{b}" for a in ("red", "blue", "old") for b in ("stone", "river", "lamp")])
        rows: dict[str, list[Any]] = {"question": [], "context": [], "answers": []}
        for i in range(count):
            said = random.choice(words, random.integers(3, 30)).tolist()
            place = int(random.integers(0, len(said)))
            rows["question"].append(f"which word is {said[place]}?")
            rows["context"].append(" ".join(said))
            found = {"text": [said[place]], "answer_start": [len(" ".join([*said[:place], ""]))]}
            rows["answers"].append({"text": [], "answer_start": []} if i % 4 == 3 else found)
        texts, starts = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("int64"))
        kinds = {"question": datasets.Value("string"), "context": datasets.Value("string")}
        features = datasets.Features({**kinds, "answers": {"text": texts, "answer_start": starts}})
        return datasets.Dataset.from_dict(rows, features=features)

    def fits(self, roles: dict[str, str]) -> bool:
        return {"question", "context", "answers"} <= set(roles)

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` for a tokenizer that does not say where its tokens are, and for windows that do not
        move on."""
        from transformers import AutoModelForQuestionAnswering

        tokenizer = loading.load_tokenizer(ref, info.texts())
        if not tokenizer.is_fast:
            raise RecipeError(
                f"{type(tokenizer).__name__} does not say where in a text its tokens are",
                "take a model with a fast tokenizer (tokenizer.json)",
            )
        fresh = {} if ref.path or "vocab_size" in (ref.config_overrides or {}) else {"vocab_size": len(tokenizer)}
        loaded = loading.load_model(AutoModelForQuestionAnswering, ref, None, **fresh, num_labels=2)
        loaded.processor = tokenizer
        self._room(tokenizer)
        return loaded

    def _room(self, tokenizer: Any) -> int:
        """Tokens of a question so that windows still move on."""
        limit = min(self.max_length, tokenizer.model_max_length)
        room = limit - tokenizer.num_special_tokens_to_add(pair=True) - self.doc_stride - 1
        if room < 1:
            raise RecipeError(
                f"windows of {limit} tokens that share {self.doc_stride} do not move on",
                "raise task.question-answering.max_length, or lower doc_stride",
            )
        return min(self.max_question_length, room)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return loading.tokenizer_signature(loaded.processor)

    def layers(self, model: nn.Module) -> list[list[str]]:
        return loading.backbone_layers(model)

    def head(self, model: nn.Module) -> list[str]:
        return loading.head_modules(model)

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """Of every row its windows: lists of token lists. begins, finishes: characters of the context at which a token
        begins and finishes; -1 for what is no token of it. span: the first true answer as two characters. The texts,
        which only evaluations need, as numbers of their characters."""
        tokenizer = loaded.processor
        limit = min(self.max_length, tokenizer.model_max_length)
        questions = shortened(tokenizer, rows["question"], self._room(tokenizer))
        encoded = loading.encode(
            tokenizer,
            questions,
            rows["context"],
            max_length=limit,
            truncation="only_second",
            stride=self.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        out: dict[str, list[Any]] = {name: [[] for _ in questions] for name in (*encoded, "begins", "finishes")}
        for window, row in enumerate(owners):
            inside = [part == 1 for part in encoded.sequence_ids(window)]
            for name in encoded:
                out[name][row].append(encoded[name][window])
            for end, name in enumerate(("begins", "finishes")):
                places = zip(offsets[window], inside, strict=True)
                out[name][row].append([place[end] if within else -1 for place, within in places])
        if "answers" in rows:
            truths = [spans(i, *pair) for i, pair in enumerate(zip(rows["answers"], rows["context"], strict=True))]
            out["span"] = [[found[0][1], found[0][2]] if found else [-1, -1] for found in truths]
            if train and self.max_windows:
                for row, span in enumerate(out["span"]):
                    self._narrow(out, row, span)
        if not train:
            out["characters"] = [characters([context]) for context in rows["context"]]
            if "answers" in rows:
                out["truths"] = [characters([text for text, _, _ in found]) for found in truths]
        return out

    def _narrow(self, out: dict[str, list[Any]], row: int, span: list[int]) -> None:
        """Keep as many windows of a training row as it may have."""
        names = [name for name in out if name != "span"]
        having = [
            located(*pair, span) is not None for pair in zip(out["begins"][row], out["finishes"][row], strict=True)
        ]
        order = sorted(range(len(having)), key=lambda window: not having[window])
        kept = sorted(order[: self.max_windows])
        for name in names:
            out[name][row] = [out[name][row][window] for window in kept]

    def check(self, row: dict[str, Any]) -> None:
        if row.get("answers") is not None:
            spans(0, row["answers"], row["context"] or "")

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        """Windows of all rows, one after the other; `row_of`: the place of each one's row in the batch. `null`: the
        token that stands for no answer. Padded on the right."""
        tokenizer = loaded.processor
        fill = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
            "begins": -1,
            "finishes": -1,
        }
        batch: Batch = {
            name: pad([window for row in rows for window in row[name]], value)
            for name, value in fill.items()
            if name in rows[0]
        }
        owners = [place for place, row in enumerate(rows) for _ in row["input_ids"]]
        batch["row_of"], batch["windows"] = torch.tensor(owners), [len(row["input_ids"]) for row in rows]
        batch["null"] = torch.tensor([null_token(tokenizer, ids) for row in rows for ids in row["input_ids"]])
        if "span" in rows[0]:
            windows = zip(
                owners, batch["begins"].tolist(), batch["finishes"].tolist(), batch["null"].tolist(), strict=True
            )
            places = [
                located(begins, finishes, rows[i]["span"]) or (null, null) for i, begins, finishes, null in windows
            ]
            batch["targets"] = torch.tensor(places)
        for name in ("characters", "truths"):
            if name in rows[0]:
                batch[name] = pad([row[name] for row in rows], FILL)
        return {**batch, "index": torch.tensor([int(row["index"]) for row in rows])}

    def part(self, batch: Batch, start: int, stop: int) -> Batch:
        """The windows of the rows between."""
        counts = batch.get("windows") or batch["row_of"].bincount(minlength=len(batch["index"])).tolist()
        windows_V = slice(sum(counts[:start]), sum(counts[:stop]))
        by_row = ("index", "characters", "truths", "windows")
        found = {k: v[start:stop] if k in by_row else v[windows_V] for k, v in batch.items()}
        return {**found, "row_of": found["row_of"] - start}

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        return model(**{k: batch[k] for k in INPUTS if k in batch}, **kwargs)

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """Cross-entropy of the start and of the end of the answer in every window, in float32, all of weight 1. A
        window without the answer is to point at the token that stands for none."""
        need_answers("targets" in batch)
        scores_NC, weight_N = self.scores(outputs, batch)
        targets_N = batch["targets"].T.reshape(-1)
        values_N = F.cross_entropy(scores_NC, targets_N, reduction="none")
        if label_smoothing:  # over the places that an answer can have
            allowed_NC = scores_NC > NEVER
            even_N = -(scores_NC.log_softmax(-1) * allowed_NC).sum(-1) / allowed_NC.sum(-1)
            values_N = (1 - label_smoothing) * values_N + label_smoothing * even_N
        return values_N, weight_N, "end"

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        windows = len(batch["row_of"])
        return {"example": len(batch["index"]), "window": windows, "end": 2 * windows}

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits over the places of a window: of the starts in all windows, then of the ends."""
        allowed_VL = allowed(batch)
        logits = (outputs.start_logits, outputs.end_logits)
        scores_NC = torch.cat([logits_VL.float().masked_fill(~allowed_VL, NEVER) for logits_VL in logits])
        return scores_NC, torch.ones(len(scores_NC), device=scores_NC.device)

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean of the last hidden states over the real tokens of all windows of a row."""
        hidden_VLD = outputs.hidden_states[-1]
        mask_VL1 = batch["attention_mask"].unsqueeze(-1).to(hidden_VLD.dtype)
        rows = len(batch["index"])
        total_BD = hidden_VLD.new_zeros((rows, hidden_VLD.shape[-1]))
        total_BD = total_BD.index_add(0, batch["row_of"], (hidden_VLD * mask_VL1).sum(1))
        count_B1 = hidden_VLD.new_zeros((rows, 1)).index_add(0, batch["row_of"], mask_VL1.sum(1))
        return total_BD / count_B1.clamp(min=1)

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.from_scores(*self.scores(self.forward(model, batch), batch), batch)

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Of every row the most probable span of all its windows.

        `score` = log p(start) + log p(end) of it, `null` = the same of no answer, where that is least probable; both
        probabilities over the places of a window. `span`: its characters. `text`, and `truths` where there are any.
        """
        start_VL, end_VL = scores_NC.float().log_softmax(-1).chunk(2)
        score_V, first_V, last_V = best_spans(start_VL, end_VL, batch["begins"] >= 0, self.max_answer_length)
        windows_V = torch.arange(len(score_V), device=score_V.device)
        null_V = start_VL[windows_V, batch["null"]] + end_VL[windows_V, batch["null"]]
        own_BV = batch["row_of"] == torch.arange(len(batch["index"]), device=score_V.device)[:, None]
        score_B, best_B = score_V.masked_fill(~own_BV, -torch.inf).max(1)
        null_B = null_V.masked_fill(~own_BV, torch.inf).min(1).values
        span_B2 = torch.stack([batch["begins"][best_B, first_V[best_B]], batch["finishes"][best_B, last_V[best_B]]], 1)
        span_B2 = torch.where((score_B > NEVER)[:, None], span_B2, 0)  # a context without a token
        found = {"score": score_B, "null": null_B, "span": span_B2, "text": cut(batch["characters"], span_B2)}
        return {**found, "truths": batch["truths"]} if "truths" in batch else found

    def _said(self, predictions: dict[str, np.ndarray]) -> list[str]:
        """What is answered; an empty text for no answer."""
        texts = [read(row)[0] for row in predictions["text"]]
        if self.null_threshold is None:
            return texts
        none_R = predictions["null"] - predictions["score"] > self.null_threshold
        return ["" if none else text for none, text in zip(none_R, texts, strict=True)]

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """exact_match and f1 by SQuAD's definitions (`kt_hf.functional.answers`), means over questions. Where some have
        no answer: f1 of those that have one, and the share of the others that get none."""
        need_answers("truths" in predictions)
        said, truths = self._said(predictions), [read(row) for row in predictions["truths"]]
        values = {
            "f1": np.array([answers.best(answers.f1, *pair) for pair in zip(said, truths, strict=True)]),
            "exact_match": np.array([answers.best(answers.exact, *pair) for pair in zip(said, truths, strict=True)]),
        }
        examples: dict[str, Any] = {name: (values_R, None) for name, values_R in values.items()}
        none_R = np.array([not any(answers.normalise(text) for text in texts) for texts in truths], dtype=np.float64)
        if none_R.any():
            if self.null_threshold is None:
                note_unanswerable(int(none_R.sum()), len(none_R))
            examples["unanswerable_accuracy"] = (values["exact_match"], none_R)
            if not none_R.all():
                examples["answerable_f1"] = (values["f1"], 1 - none_R)
        metrics = {
            name: float(np.average(values_R, weights=weights_R)) for name, (values_R, weights_R) in examples.items()
        }
        return Scores(metrics, examples)

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        """prediction: after the threshold; text: the best span in any case."""
        found: dict[str, Any] = {"prediction": self._said(predictions)}
        found["text"] = [read(row)[0] for row in predictions["text"]]
        found |= {"start": predictions["span"][:, 0], "score": predictions["score"], "null_score": predictions["null"]}
        return {**found, "answers": [read(row) for row in predictions["truths"]]} if "truths" in predictions else found

    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """The answer, the product of the probabilities of its two ends, and its first character's place."""
        found = predictor.scores(info, "test")
        return {
            "prediction": self._said(found),
            "probability": np.exp(found["score"].astype(np.float64)).tolist(),
            "start": found["span"][:, 0].tolist(),
        }


# --- rows ------------------------------------------------------------------------------------------------------------


def shortened(tokenizer: Any, questions: list[str], limit: int) -> list[str]:
    """Questions of at most `limit` tokens, without the spaces around them."""
    short = [question.strip() for question in questions]
    encoded = tokenizer(short, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [offsets[limit - 1][1] if len(offsets) > limit else None for offsets in encoded["offset_mapping"]]
    return [question[:end] for question, end in zip(short, ends, strict=True)]


def spans(place: int, given: Any, context: str) -> list[tuple[str, int, int]]:
    """(text, first character, the one after its last) of every answer. Raises `RowError` for one that is not there."""
    if isinstance(given, list):
        pairs = [(answer.get("text"), answer.get("answer_start")) for answer in given]
    else:
        texts, starts = (given or {}).get("text"), (given or {}).get("answer_start")
        pairs = list(zip(*(([v] if not isinstance(v, list) else v) for v in (texts, starts)), strict=False))
    found = []
    for text, start in pairs:
        if text is None or start is None or not text.strip():
            continue  # by custom, no answer
        if context[start : start + len(text)] != text:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise RowError(
                place,
                f"the answer '{text[:60]}' is not at character {start} of its context (there: '{there[:60]}')",
                f"mend answer_start, which counts characters from 0, {LEAVE_OUT}",
            )
        found.append((text, start, start + len(text)))
    return found


def located(begins: list[int], finishes: list[int], span: list[int]) -> tuple[int, int] | None:
    """(first token, last token) of a window that hold the span; None where it does not lie in the window as a whole."""
    tokens = [i for i, begin in enumerate(begins) if begin >= 0]
    if span[0] < 0 or not tokens or span[0] < begins[tokens[0]] or span[1] > finishes[tokens[-1]]:
        return None
    first = max(i for i in tokens if begins[i] <= span[0])
    last = min(i for i in tokens if finishes[i] >= span[1])
    return (first, last) if first <= last else None


def null_token(tokenizer: Any, ids: list[int]) -> int:
    """The place of the token that stands for no answer: the one for classes, else the first."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)


# --- texts as numbers ------------------------------------------------------------------------------------------------


def characters(texts: list[str]) -> list[int]:
    """Texts as one list of their characters' numbers, `BREAK` after each."""
    return [number for text in texts for number in (*map(ord, text), BREAK)]


def read(row_W: np.ndarray) -> list[str]:
    """The texts again."""
    texts: list[str] = []
    begun: list[str] = []
    for number in row_W[row_W != FILL].tolist():
        if number == BREAK:
            texts.append("".join(begun))
            begun = []
        else:
            begun.append(chr(number))
    return texts


def cut(characters_BX: torch.Tensor, span_B2: torch.Tensor) -> torch.Tensor:
    """text_BW of the characters in the spans, `BREAK` after each."""
    first_B, last_B = span_B2.unbind(1)
    steps_W = torch.arange(int((last_B - first_B).max()) + 1, device=span_B2.device)
    places_BW = first_B[:, None] + steps_W
    text_BW = characters_BX.gather(1, places_BW.clamp(max=characters_BX.shape[1] - 1))
    lengths_B1 = (last_B - first_B)[:, None]
    return torch.where(steps_W < lengths_B1, text_BW, torch.where(steps_W == lengths_B1, BREAK, FILL))


# --- spans -----------------------------------------------------------------------------------------------------------


def allowed(batch: Batch) -> torch.Tensor:
    """mask_VL of the places that an answer can have: tokens of the context, and the one that stands for none."""
    places_L = torch.arange(batch["begins"].shape[1], device=batch["begins"].device)
    return (batch["begins"] >= 0) | (places_L == batch["null"][:, None])


def best_spans(
    start_VL: torch.Tensor, end_VL: torch.Tensor, inside_VL: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(score_V, first_V, last_V) that maximise start[first] + end[last] over first <= last < first + longest within the
    context. One length after the other, so that no table of all pairs is held; of equals the shortest, then first."""
    start_VL = start_VL.masked_fill(~inside_VL, -torch.inf)
    end_VL = end_VL.masked_fill(~inside_VL, -torch.inf)
    length = start_VL.shape[1]
    score_V, first_V = (start_VL + end_VL).max(1)
    last_V = first_V
    for more in range(1, min(longest, length)):
        found_V, at_V = (start_VL[:, : length - more] + end_VL[:, more:]).max(1)
        better_V = found_V > score_V
        score_V = torch.where(better_V, found_V, score_V)
        first_V, last_V = torch.where(better_V, at_V, first_V), torch.where(better_V, at_V + more, last_V)
    return score_V, first_V, last_V


def need_answers(there: bool) -> None:
    if not there:
        raise DataError("these rows have no answers", "name their column: data.columns.answers=COLUMN")


@functools.cache
def note_unanswerable(none: int, rows: int) -> None:
    """Said once, however often the same rows are measured."""
    logger.warning(
        "question-answering: %d of %d questions have no answer, but one is always given; "
        "set task.question-answering.null_threshold=0 to let the model decline",
        none,
        rows,
    )
