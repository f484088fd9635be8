"""Text generation: a causal language model on texts, on prompts with completions, or on chats.

Shapes: B rows of a batch, L tokens of the longest row, C entries of the vocabulary, D width of features, N places
of the whole batch, row by row: its predicted tokens, and what fills up rows that have fewer than others.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from kt_hf import Loaded, Role, Task, language, loading, packing, tiny
from kt_hf.errors import DataError, IntegrityError, RecipeError
from kt_hf.language import IGNORED
from kt_hf.task import Batch, Scores

logger = logging.getLogger(__name__)

FORMS = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}
Encoded = Iterator[tuple[list[int], list[bool]]]
"""For each row, its token ids and whether each token is an answer."""


class TextGeneration(Task):
    """A causal language model (`AutoModelForCausalLM`): on texts, on prompts with completions, or on chat messages.

    max_length: tokens per example; longer ones are cut on the tokenizer's truncation_side, and counted. loss_on: learn
    the `answers` (completions, assistant turns with the tokens that end them) or `all` tokens; texts are always learnt
    in full. add_eos: put the end token after texts and completions (a chat template ends turns by itself). form: which
    of `text`, `prompt` (with completion) and `messages` to use where the data have several. chat_template: Jinja text,
    or a file of it, for tokenizers without one, or in place of theirs.
    """

    auto_class = "AutoModelForCausalLM"
    adapter_type = "CAUSAL_LM"
    conformance = {
        "roles": ("text",),
        "model": {
            "config": "llama",
            "config_overrides": {**tiny.SIZES, "max_position_embeddings": 64, "attention_dropout": 0.0},
        },
    }
    roles: ClassVar[tuple[Role, ...]] = (
        Role("messages", ("messages",), required=False, aliases=("conversations", "conversation", "chat")),
        Role("prompt", ("string",), required=False),
        Role("completion", ("string",), required=False, aliases=("response",)),
        Role("text", ("string",), required=False, aliases=("content", "document", "sentence")),
        # Never read: `fits` leaves rows with a class or an image to the tasks that are about these.
        Role(
            "label", ("class", "classes", "number"), required=False, aliases=("labels", "target", "category", "score")
        ),
        Role("image", ("image",), required=False, aliases=("img", "pixel_values")),
    )
    unit = "token"
    length_column = "input_ids"
    packs = "bins"
    derived = {language.PLACES: ("labels", "attention_mask")}
    metric = "perplexity"
    greater_is_better = False
    metrics = ("perplexity", "loss", "token_accuracy")
    lower_metrics = ("loss",)

    def __init__(
        self,
        *,
        max_length: Annotated[int, Field(ge=2)] = 256,
        loss_on: Literal["answers", "all"] = "answers",
        add_eos: bool = True,
        form: Literal["text", "prompt", "messages"] | None = None,
        chat_template: str | None = None,
    ):
        self.max_length, self.loss_on, self.add_eos = max_length, loss_on, add_eos
        self.form, self.chat_template = form, chat_template
        if form is not None:  # nothing else is looked for then, and these must be found
            wanted = [role for role in type(self).roles if role.name in FORMS[form]]
            self.roles = tuple(replace(role, required=True) for role in wanted)  # type: ignore[misc]

    def fits(self, roles: dict[str, str]) -> bool:
        names = set(roles)
        if names & {"label", "image"}:
            return False
        return "messages" in names or {"prompt", "completion"} <= names or names == {"text"}

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` for rows of no form or several, for a tokenizer without what the rows need, for a model
        with too few embeddings for its tokenizer, and for one that sees later tokens; `IntegrityError` for a checkpoint
        without a language-model head."""
        from transformers import AutoModelForCausalLM

        form = self._form(info.roles)
        tokenizer = loading.load_tokenizer(ref, info.texts(), causal=True)
        self._prepare_tokenizer(tokenizer, form)
        fresh = {} if ref.path else fresh_fields(ref, tokenizer)
        loaded = loading.load_model(AutoModelForCausalLM, ref, None, **fresh)
        loaded.processor = tokenizer
        check_model(loaded, fresh=not ref.path)
        fit_together(loaded.model, tokenizer)
        return loaded

    def _form(self, names: Iterable[str]) -> str:
        """The one form that the columns have."""
        present = set(names)
        found = [f for f, columns in FORMS.items() if present & set(columns) and self.form in (None, f)]
        if len(found) == 1 and set(FORMS[found[0]]) <= present:
            return found[0]
        shown = ", ".join(sorted(present & {c for columns in FORMS.values() for c in columns})) or "none"
        remedy = "name the columns, such as data.columns.text=COLUMN"
        raise RecipeError(
            f"text-generation needs exactly one of: text; prompt and completion; messages. The data have: {shown}",
            "choose with task.text-generation.form=text, prompt or messages" if len(found) > 1 else remedy,
        )

    def _prepare_tokenizer(self, tokenizer: Any, form: str) -> None:
        if self.chat_template is not None:
            tokenizer.chat_template = read_template(self.chat_template)
        if form == "messages" and not tokenizer.chat_template:
            raise RecipeError(
                f"the data are messages, the tokenizer {tokenizer.name_or_path or 'trained here'} has no chat template",
                "set the task's chat_template (Jinja text or a file), or model.processor to a tokenizer that has one",
            )
        if form != "messages" and self.add_eos and tokenizer.eos_token_id is None:
            raise RecipeError(
                f"the tokenizer {tokenizer.name_or_path or 'trained here'} has no end token to put after examples",
                "set add_eos=false, or model.processor_overrides.eos_token=TOKEN",
            )

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        """`vocabulary` must be equal for teacher and student; models may pad it to different widths, so that the first
        `num_scores` scores are comparable. `preprocessing` holds what else changes the token ids of a row."""
        tokenizer = loaded.processor
        template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        rules = {
            "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16] if template else None,
            "start": start_tokens(tokenizer),
            "end_token": tokenizer.eos_token,
            "length": min(self.max_length, tokenizer.model_max_length),
            "truncation_side": tokenizer.truncation_side,
        }
        return {**loading.tokenizer_signature(tokenizer), "num_scores": len(tokenizer), "preprocessing": rules}

    def layers(self, model: nn.Module) -> list[list[str]]:
        return loading.backbone_layers(model)

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """input_ids, attention_mask and labels, each as long as the row; -100 on what is not learnt."""
        tokenizer, form = loaded.processor, self._form(rows)
        counts: Counter[str] = Counter()
        encoded = {"text": self._texts, "prompt": self._prompts, "messages": self._chats}[form](rows, tokenizer, counts)
        limit = self.row_limit(loaded)
        out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for ids, answer in encoded:
            learn = answer if self.loss_on == "answers" else [True] * len(ids)
            labels = [token if wanted else IGNORED for token, wanted in zip(ids, learn, strict=True)]
            counts["examples"] += 1
            if len(ids) > limit:
                keep = kept(ids, limit, tokenizer)
                ids, labels = [ids[i] for i in keep], [labels[i] for i in keep]
                counts["cut"] += 1
            if all(label == IGNORED for label in labels[1:]):
                counts["silent"] += 1
            if not ids:  # attention over nothing is not defined
                ids, labels = [tokenizer.pad_token_id], [IGNORED]
            for name, values in zip(out, (ids, [1] * len(ids), labels), strict=True):
                out[name].append(values)
        self._count(counts, limit)
        return out

    def _texts(self, rows: dict[str, list[Any]], tokenizer: Any, counts: Counter[str]) -> Encoded:
        start, end = start_tokens(tokenizer), self._end(tokenizer)
        for ids in encode(tokenizer, rows["text"], "text"):
            ids = start + ids + ([] if ids[-1:] == end else end)
            yield ids, [True] * len(ids)

    def _prompts(self, rows: dict[str, list[Any]], tokenizer: Any, counts: Counter[str]) -> Encoded:
        """The prompt's tokens are those that it has alone, as in generation, and no token spans the boundary.

        Completions take their tokens from the two texts together wherever these begin with the prompt's; else (a merge
        across the boundary, which is counted) they are tokenised apart.
        """
        start, end = start_tokens(tokenizer), self._end(tokenizer)
        prompts = encode(tokenizer, rows["prompt"], "prompt")
        completions = encode(tokenizer, rows["completion"], "completion")
        both = [p + c for p, c in zip(rows["prompt"], rows["completion"], strict=True)]
        for prompt, apart, together in zip(prompts, completions, encode(tokenizer, both, "prompt"), strict=True):
            merged = together[: len(prompt)] != prompt
            counts["apart"] += merged
            completion = apart if merged else together[len(prompt) :]
            completion = completion + ([] if completion[-1:] == end else end)
            first = [*start, *prompt]
            yield first + completion, [False] * len(first) + [True] * len(completion)

    def _chats(self, rows: dict[str, list[Any]], tokenizer: Any, counts: Counter[str]) -> Encoded:
        marked = tokenizer.is_fast and re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template())
        answers = marked_answers if marked else prefix_answers
        for messages in rows["messages"]:
            if not messages:
                raise DataError("a row has no messages", "drop such rows, or set data.drop=[empty]")
            if self.loss_on == "all":
                ids = render(tokenizer, messages)["input_ids"]
                yield ids, [True] * len(ids)
            else:
                yield answers(tokenizer, messages)

    def _end(self, tokenizer: Any) -> list[int]:
        return [tokenizer.eos_token_id] if self.add_eos else []

    def _count(self, counts: Counter[str], limit: int) -> None:
        """Add to this task's tally, and log a count whenever it has doubled."""
        tally = _tallies.setdefault(self, Counter())
        before = tally.copy()
        tally.update(counts)
        for key, text in _NOTES.items():
            if tally[key].bit_length() > before[key].bit_length():
                logger.warning(
                    "text-generation: %d of %d examples so far %s", tally[key], tally["examples"], text % limit
                )

    def row_limit(self, loaded: Loaded) -> int:
        return min(self.max_length, loaded.processor.model_max_length)

    def pack(self, rows: Any) -> dict[str, Any]:
        """The first token of a row is predicted from nothing, as it is alone."""
        return super().pack([{**row, "labels": [IGNORED, *row["labels"][1:]]} for row in rows])

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        """Padded on the right, whichever side the tokenizer pads on; by length: padding may be the end token."""
        fill = {"input_ids": loaded.processor.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        if packing.SEQUENCES in rows[0]:
            fill[packing.SEQUENCES] = 0
        width = max(len(row["input_ids"]) for row in rows)
        batch: Batch = {"index": torch.tensor([int(row["index"]) for row in rows])}
        for name, value in fill.items():
            batch[name] = torch.tensor([list(row[name]) + [value] * (width - len(row[name])) for row in rows])
        return {**batch, language.PLACES: language.places(next_labels(batch))}

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        """Positions count real tokens, so that padding on either side changes nothing."""
        inputs = ("input_ids", "attention_mask", "inputs_embeds", "position_ids")
        given = {k: batch[k] for k in inputs if k in batch}
        inner = loading.unwrap(model)
        kind: Any = type(inner)
        accepted = accepted_arguments(kind)
        if packing.SEQUENCES in batch:
            apart = packing.arguments(inner, batch[packing.SEQUENCES], causal=True)
            given |= {key: value for key, value in apart.items() if key in accepted}
        if "position_ids" in accepted and "position_ids" not in given and "attention_mask" in given:
            given["position_ids"] = (given["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        if "use_cache" in accepted:
            kwargs = {"use_cache": False, **kwargs}
        return model(**given, **kwargs)

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """-log p(token | what precedes it), in nats: values_N, of weight 1 for the predicted tokens."""
        return language.loss(*self._at_predicted(outputs, batch), label_smoothing)

    def _at_predicted(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return language.learnt(outputs.logits, next_labels(batch), batch.get(language.PLACES))

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        return {"example": len(batch["index"]), "token": predicted_mask(batch).sum()}

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits over the vocabulary at the positions whose next token counts."""
        logits_NC, targets_N = self._at_predicted(outputs, batch)
        return logits_NC, language.weights(targets_N)

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean of the last hidden states over the real tokens."""
        hidden_BLD = outputs.hidden_states[-1]
        mask_BL1 = batch["attention_mask"].bool().unsqueeze(-1)
        return hidden_BLD.masked_fill(~mask_BL1, 0.0).sum(1) / mask_BL1.sum(1).clamp(min=1)

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Per example: `nll` (nats, summed over its predicted tokens), `tokens`, `correct` (of greedy choice)."""
        return language.judge_labels(self.forward(model, batch).logits, next_labels(batch))

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return language.judge_scores(scores_NC, weight_N, next_labels(batch))

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        return language.measure(
            predictions, "raise max_length if prompts fill it, check that the rows have answers, or set loss_on=all"
        )

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        return {name: predictions[name] for name in ("nll", "tokens", "correct")}

    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """Greedy continuations, one row at a time, so that no padding takes part, with the geometric mean of their
        tokens' probabilities."""
        if predictor.combine is not None:
            raise RecipeError(
                "an ensemble of language models does not generate", "use kt-hf evaluate, or one of its members"
            )
        loaded: Loaded = predictor.members[0]
        said, chances = [], []
        for row in info.splits["test"]:
            given = next(row[role] for role in ("messages", "prompt", "text") if role in info.roles)
            text, probability = generate(loaded, given, max_new_tokens)
            said.append(text)
            chances.append(probability)
        return {"prediction": said, "probability": chances}


@torch.no_grad()
def generate(loaded: Loaded, given: Any, max_new_tokens: int) -> tuple[str, float]:
    """The greedy continuation of a text or a chat, and the geometric mean of its tokens' probabilities."""
    model, tokenizer = loaded.model.eval(), loaded.processor
    if isinstance(given, list):
        ids = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(given, return_tensors="pt")
    ids = ids["input_ids"].to(next(model.parameters()).device)
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = out.sequences[0, ids.shape[1] :]
    logs = [float(s[0].float().log_softmax(-1)[t]) for s, t in zip(out.scores, new, strict=False)]
    probability = math.exp(sum(logs) / len(logs)) if logs else 1.0
    return tokenizer.decode(new, skip_special_tokens=True), probability


# Counts of rows by task, outside of it: what a task holds is part of the key under which its rows are cached.
_tallies: WeakKeyDictionary[TextGeneration, Counter[str]] = WeakKeyDictionary()
_NOTES = {
    "cut": "were cut to %d tokens",
    "silent": "have nothing to learn and count for nothing%.0s",
    "apart": "have a completion that would merge with the prompt; the two are tokenised apart%.0s",
}


# --- loading ---------------------------------------------------------------------------------------------------------


def read_template(given: str) -> str:
    """Jinja text as it is, or the content of a file."""
    if "{" in given:
        return given
    if not Path(given).is_file():
        raise RecipeError(
            f"chat_template: '{given}' is neither a file nor a template", "give Jinja text or a file of it"
        )
    return Path(given).read_text(encoding="utf-8")


def fresh_fields(ref: Any, tokenizer: Any) -> dict[str, Any]:
    """Fields of a fresh configuration that follow from the tokenizer; those that the user set stay.

    No padding token yet: its embedding would be created as zeros that never change, and it may be the end token.
    """
    wanted = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    return loading.unset_fields(ref, wanted)


def check_model(loaded: Loaded, fresh: bool) -> None:
    """Refuse what would train or score without an error, but wrongly."""
    model, tokenizer = loaded.model, loaded.processor
    if not fresh and loaded.new_parameters:
        raise IntegrityError(
            f"the checkpoint has no language-model head ({', '.join(loaded.new_parameters[:3])} would be random)",
            "take a checkpoint that was saved as a causal language model",
        )
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    num_rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if num_tokens > num_rows:
        raise RecipeError(
            f"the tokenizer has {num_tokens} tokens, the model embeddings for {num_rows}",
            "give the model its own tokenizer (model.processor), or a fresh one a larger vocab_size",
        )
    if getattr(model.config, "is_decoder", None) is False and not is_causal(model):
        raise RecipeError(
            f"{type(model).__name__} sees the tokens that it is to predict",
            "set model.config_overrides.is_decoder=true, or take a causal language model",
        )


@torch.no_grad()
def is_causal(model: nn.Module) -> bool:
    """Whether another last token leaves the earlier logits as they are; asked where the configuration is silent."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits_2LC = model(input_ids=torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]], device=device)).logits
    model.train(was_training)
    return torch.allclose(logits_2LC[0, :3], logits_2LC[1, :3], rtol=1e-3, atol=1e-4)


def fit_together(model: Any, tokenizer: Any) -> None:
    """Record the padding token and the greatest length, so that they are saved."""
    for config in (model.config, getattr(model, "generation_config", None)):
        pad = getattr(config, "pad_token_id", None)
        if config is not None and (pad is None or not 0 <= pad < len(tokenizer)):
            config.pad_token_id = tokenizer.pad_token_id
    embeddings = model.get_input_embeddings()
    if getattr(embeddings, "padding_idx", None) is not None:
        embeddings.padding_idx = None  # padding gets no gradient as it is, and a shared end token must get one
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < tokenizer.model_max_length:
        tokenizer.model_max_length = longest


# --- tokens ----------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, texts: list[Any], role: str) -> list[list[int]]:
    """Token ids of every text, without special tokens around it."""
    for text in texts:
        if not isinstance(text, str):
            raise DataError(
                f"a row has {text!r} for its {role}", "every row needs a text there; drop or fill the others"
            )
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: often the beginning-of-text token, or nothing."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return full[:i]
    return []


def kept(ids: list[int], limit: int, tokenizer: Any) -> list[int]:
    """Positions that stay of an example that is too long. A beginning-of-text token survives a cut on the left."""
    if tokenizer.truncation_side == "right":
        return list(range(limit))
    start = 1 if ids[0] == tokenizer.bos_token_id else 0
    return [*range(start), *range(len(ids) - limit + start, len(ids))]


def render(tokenizer: Any, messages: list[Mapping[str, Any]], **how: Any) -> Any:
    """Token ids of a chat. What the template objects to is the data's fault."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, tokenizer_kwargs={"verbose": False}, **how)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"the chat template refuses a chat (it begins {_excerpt(messages)}): {' '.join(str(error).split())[:200]}",
            "change these rows, or set the task's chat_template",
        ) from error


def marked_answers(tokenizer: Any, messages: list[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """Answers as the template's generation markers have them."""
    found = render(tokenizer, messages, return_assistant_tokens_mask=True)
    return found["input_ids"], [bool(x) for x in found["assistant_masks"]]


def prefix_answers(tokenizer: Any, messages: list[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """Answers as what an assistant turn adds to the chat before it, with the generation prompt.

    Right only if each of those shorter chats is, token by token, the beginning of the whole; else raises `DataError`.
    """
    ids = render(tokenizer, messages)["input_ids"]
    answer = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if turn == 0:
            raise DataError(
                f"a chat opens with the assistant ({_excerpt(messages)}): where its answer starts is not known",
                "put generation markers into the chat_template, drop such rows, or set loss_on=all",
            )
        before = render(tokenizer, messages[:turn], add_generation_prompt=True)["input_ids"]
        after = render(tokenizer, messages[: turn + 1])["input_ids"]
        if ids[: len(before)] != before or ids[: len(after)] != after or len(after) < len(before):
            raise DataError(
                f"the chat template writes what precedes or makes up turn {turn + 1} differently in the whole chat "
                f"(it begins {_excerpt(messages)}): which tokens are the answer cannot be told",
                "put {% generation %} markers around answers in the chat_template, or set loss_on=all",
            )
        answer[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, answer


def _excerpt(messages: list[Mapping[str, Any]]) -> str:
    first = " ".join(str(messages[0].get("content")).split())
    return f"'{first[:40]}{'...' if len(first) > 40 else ''}'"


# --- tensors ---------------------------------------------------------------------------------------------------------


@functools.cache
def accepted_arguments(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def predicted_mask(batch: Batch) -> torch.Tensor:
    """mask_B(L-1): positions whose next token counts. The token after padding on the left is predicted from nothing."""
    mask = batch["labels"][:, 1:] != IGNORED
    return mask & batch["attention_mask"][:, :-1].bool() if "attention_mask" in batch else mask


def next_labels(batch: Batch) -> torch.Tensor:
    """labels_BL: the next token of every position, IGNORED where it does not count."""
    return F.pad(torch.where(predicted_mask(batch), batch["labels"][:, 1:], IGNORED), (0, 1), value=IGNORED)
