"""Text generation: masks, padding, counts, perplexity, saving. Models and tokenizers are made here."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import counted
from kt_hf_plugins.text_generation import IGNORED, TextGeneration, next_labels, predicted_mask
from torch.nn import functional as F

from kt_hf import Loaded, Model, language, loading
from kt_hf.data import find_roles
from kt_hf.errors import DataError, IntegrityError, RecipeError

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.5},
}
COLOURS, THINGS = ("red", "green", "blue", "pale"), ("stone", "river", "house", "lamp", "cloud")
TEXTS = [f"The {c} {t} is near the {u}." for c in COLOURS for t in THINGS for u in THINGS]
PROMPTS = [f"What is near the {t}?" for t in THINGS]
COMPLETIONS = [f" The {c} {t}, of course." for c, t in zip((*COLOURS, "old"), THINGS, strict=True)]
CHATS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Where is the {t}?"},
        {"role": "assistant", "content": f"Near the {u}."},
        {"role": "user", "content": "And its colour?"},
        {"role": "assistant", "content": f"It is {c}."},
    ]
    for c, t, u in zip(COLOURS, THINGS, reversed(THINGS), strict=False)
]
TURN = (
    "{% for m in messages %}<|{{ m.role }}|>{ANSWER}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = TURN.replace("{ANSWER}", "{{ m.content }}{{ eos_token }}")
MARKED = TURN.replace(
    "{ANSWER}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}",
)
THINKING = PLAIN.replace(
    "<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}"
)  # answers do not begin with that
FORGETFUL = PLAIN.replace("{{ m.content }}", "{% if loop.last %}thinking: {% endif %}{{ m.content }}")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the task logs, whatever other tests did to the loggers above it."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("kt_hf_plugins.text_generation", "kt_hf.facts")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def info(**roles: Any) -> Any:
    """As much of the data as `load` reads."""
    columns = {r: r for r in roles or {"text": 0}}
    return SimpleNamespace(roles=columns, labels=None, texts=lambda: iter(TEXTS + PROMPTS), stream=None)


def fresh(kind: str = "llama", given: Any = None, processor: Path | None = None, **settings: Any) -> tuple[Any, Loaded]:
    """(task, a fresh tiny model with a tokenizer)."""
    torch.manual_seed(0)
    task = TextGeneration(**settings)
    source = {"processor": str(processor)} if processor else {"processor_overrides": {"vocab_size": 300}}
    loaded = task.load(Model(config=kind, config_overrides=SIZES[kind], **source), given or info())
    loaded.model.eval()
    return task, loaded


def batch_of(task: Any, loaded: Loaded, **rows: Any) -> dict[str, torch.Tensor]:
    columns = task.preprocess(rows, loaded, train=True)
    count = len(columns["input_ids"])
    return task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(count)], loaded)


def learnt(columns: dict[str, Any], loaded: Loaded) -> list[str]:
    """The text of the labels that are not masked, for each row."""
    return [loaded.processor.decode([y for y in row if y != IGNORED]) for row in columns["labels"]]


def padded_left(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same rows with their padding in front."""
    lengths = batch["attention_mask"].sum(1).tolist()
    width = batch["input_ids"].shape[1]
    moved = {
        k: torch.stack([row.roll(width - n) for row, n in zip(v, lengths, strict=True)])
        for k, v in batch.items()
        if k not in ("index", language.PLACES)
    }
    return {**moved, "index": batch["index"]}


def naive(loaded: Loaded, ids: list[int], labels: list[int]) -> tuple[float, int, int]:
    """(nll, tokens, correct) of one row without padding, token by token."""
    with torch.no_grad():
        logits_LC = loaded.model(input_ids=torch.tensor([ids])).logits[0].double()
    nll, tokens, correct = 0.0, 0, 0
    for position in range(len(ids) - 1):
        target = labels[position + 1]
        if target != IGNORED:
            nll -= float(logits_LC[position].log_softmax(-1)[target])
            tokens += 1
            correct += int(logits_LC[position].argmax() == target)
    return nll, tokens, correct


# --- what is learnt --------------------------------------------------------------------------------------------------


def test_texts_are_learnt_whole_with_an_end_token() -> None:
    task, loaded = fresh()
    columns = task.preprocess({"text": TEXTS[:3]}, loaded, train=True)
    assert learnt(columns, loaded) == [f"{text}<|end|>" for text in TEXTS[:3]]
    without = TextGeneration(add_eos=False).preprocess({"text": TEXTS[:3]}, loaded, train=True)
    assert learnt(without, loaded) == TEXTS[:3]


def test_prompts_are_masked_and_completions_end() -> None:
    task, loaded = fresh(given=info(prompt=0, completion=0))
    rows = {"prompt": PROMPTS, "completion": COMPLETIONS}
    columns = task.preprocess(rows, loaded, train=True)
    assert learnt(columns, loaded) == [f"{c}<|end|>" for c in COMPLETIONS]
    assert [loaded.processor.decode(ids) for ids in columns["input_ids"]] == [
        f"{p}{c}<|end|>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    everything = TextGeneration(loss_on="all").preprocess(rows, loaded, train=True)
    assert everything["labels"] == everything["input_ids"] == columns["input_ids"]


def test_no_token_spans_prompt_and_completion(said: list[str]) -> None:
    task, loaded = fresh(given=info(prompt=0, completion=0))
    tokenizer = loaded.processor
    prompt, completion = "The red sto", "ne is near."
    alone = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + completion)["input_ids"][: len(alone)] != alone, (
        "the example must merge across the boundary"
    )
    columns = task.preprocess({"prompt": [prompt], "completion": [completion]}, loaded, train=True)
    assert columns["input_ids"][0][: len(alone)] == alone
    assert learnt(columns, loaded) == [f"{completion}<|end|>"]
    assert "1 of 1 examples so far have a completion that would merge" in said[0]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "markers"])
def test_answers_of_a_chat(template: str) -> None:
    task, loaded = fresh(given=info(messages=0), chat_template=template)
    columns = task.preprocess({"messages": CHATS}, loaded, train=True)
    expected = ["".join(f"{m['content']}<|end|>" for m in c if m["role"] == "assistant") for c in CHATS]
    assert learnt(columns, loaded) == expected
    assert loaded.processor.decode(columns["input_ids"][0]).startswith("<|system|>Be brief.<|end|><|user|>Where")
    everything = TextGeneration(loss_on="all").preprocess({"messages": CHATS}, loaded, train=True)
    assert everything["labels"] == columns["input_ids"]


@pytest.mark.parametrize("template", [FORGETFUL, THINKING])
def test_a_template_that_rewrites_turns_is_refused(template: str) -> None:
    task, loaded = fresh(given=info(messages=0), chat_template=template)
    with pytest.raises(DataError, match="turn 3 differently") as error:
        task.preprocess({"messages": CHATS}, loaded, train=True)
    assert "generation" in error.value.remedy
    assert TextGeneration(loss_on="all").preprocess({"messages": CHATS}, loaded, train=True)["labels"]


def test_chats_that_cannot_be_rendered(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no chat template"):
        fresh(given=info(messages=0))
    with pytest.raises(RecipeError, match="neither a file nor a template"):
        fresh(given=info(messages=0), chat_template="absent.jinja")
    (tmp_path / "t.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    task, loaded = fresh(given=info(messages=0), chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(DataError, match=r"Where is the stone.*roles must alternate|Be brief.*roles must alternate"):
        task.preprocess({"messages": CHATS}, loaded, train=True)
    loaded.processor.chat_template = PLAIN
    with pytest.raises(DataError, match="opens with the assistant"):
        task.preprocess({"messages": [CHATS[0][2:]]}, loaded, train=True)
    with pytest.raises(DataError, match="no messages"):
        task.preprocess({"messages": [[]]}, loaded, train=True)


def test_exactly_one_form() -> None:
    task = TextGeneration()
    for roles in ({}, {"prompt": "p"}, {"text": "t", "messages": "m"}, {"text": "t", "completion": "c"}):
        with pytest.raises(RecipeError, match="exactly one of"):
            task.load(Model(config="gpt2"), info_of(roles))
    chosen = TextGeneration(form="messages")
    assert [role.name for role in chosen.roles] == ["messages"] and chosen.roles[0].required
    assert chosen._form({"text", "messages"}) == "messages"


def info_of(roles: dict[str, str]) -> Any:
    return SimpleNamespace(roles=roles, labels=None, texts=lambda: iter(TEXTS))


def test_fits() -> None:
    fits = TextGeneration().fits
    assert fits({"text": "a"}) and fits({"prompt": "a", "completion": "b"}) and fits({"messages": "a"})
    assert not fits({"text": "a", "label": "b"}) and not fits({"prompt": "a"}) and not fits({})
    assert not fits({"text": "a", "image": "b"})


def test_roles_of_real_columns() -> None:
    def roles(row: dict[str, Any], task: TextGeneration | None = None, **columns: str) -> dict[str, str]:
        return find_roles(Dataset.from_list([row]).features, (task or TextGeneration()).roles, columns)

    assert roles({"id": 1, "conversations": CHATS[0]}) == {"messages": "conversations"}
    assert roles({"prompt": "a", "response": "b"}) == {"prompt": "prompt", "completion": "response"}
    assert "label" in roles({"text": "a", "label": 1}), "such rows are left to text classification"
    assert roles({"story": "a", "id": 1}, TextGeneration(form="text")) == {"text": "story"}
    assert roles({"text": "a", "messages": CHATS[0]}, TextGeneration(form="messages")) == {"messages": "messages"}
    with pytest.raises(RecipeError, match="several columns could be the prompt"):
        roles({"instruction": "a", "input": "b", "output": "c"}, TextGeneration(form="prompt"))


def test_truncation_is_counted(said: list[str]) -> None:
    _, loaded = fresh()
    task = TextGeneration(max_length=5)
    whole = loaded.processor(TEXTS[0])["input_ids"]
    columns = task.preprocess({"text": [TEXTS[0], "The"]}, loaded, train=True)
    assert columns["input_ids"][0] == whole[:5] == columns["labels"][0], "an example that is cut has no end"
    assert said == ["text-generation: 1 of 2 examples so far were cut to 5 tokens"]
    loaded.processor.truncation_side = "left"
    assert task.preprocess({"text": TEXTS[:1]}, loaded, train=True)["input_ids"][0] == [*whole, 0][-5:]
    loaded.processor.bos_token = "<|pad|>"  # some token that no text has
    begun = task.preprocess({"prompt": ["<|pad|>The red"], "completion": [TEXTS[0]]}, loaded, train=True)["input_ids"][
        0
    ]
    assert begun == [loaded.processor.bos_token_id, *[*whole, 0][-4:]]
    assert "max_length" in vars(task) and len(vars(task)) == 5, (
        "counts are kept elsewhere: settings alone make cache keys"
    )


def test_rows_without_labels_count_for_nothing() -> None:
    """Faults 16: a long prompt leaves no room for the answer; an empty text has no tokens at all."""
    _, loaded = fresh()
    task = TextGeneration(max_length=4, add_eos=False)
    batch = batch_of(task, loaded, prompt=[PROMPTS[0], ""], completion=[COMPLETIONS[0], ""])
    assert int(task.units(batch)["token"]) == 0 and task.units(batch)["example"] == 2
    values, weight, unit = task.loss(task.forward(loaded.model, batch), batch)
    assert values.shape == weight.shape == (0,) and unit == "token"
    values.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in loaded.model.parameters() if p.grad is not None)
    with torch.no_grad():
        found = task.predict(loaded.model, batch, {})
    assert found["tokens"].tolist() == [0, 0] and found["nll"].tolist() == [0.0, 0.0]
    with pytest.raises(DataError, match="none of the 2 examples"):
        task.measure({k: v.numpy() for k, v in found.items()}, loaded, None)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_perplexity_is_that_of_a_plain_loop(kind: str) -> None:
    task, loaded = fresh(kind)
    texts = [*TEXTS[:4], "The", "The red lamp.", ""]
    columns = task.preprocess({"text": texts}, loaded, train=False)
    expected = [naive(loaded, ids, labels) for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)]
    batch = batch_of(task, loaded, text=texts)
    with torch.no_grad():
        found = {k: v.numpy() for k, v in task.predict(loaded.model, batch, {}).items()}
    np.testing.assert_allclose(found["nll"], [e[0] for e in expected], rtol=1e-6, atol=1e-6)
    assert found["tokens"].tolist() == [e[1] for e in expected] and found["correct"].tolist() == [
        e[2] for e in expected
    ]

    scores = task.measure(found, loaded, None)
    loss = sum(e[0] for e in expected) / sum(e[1] for e in expected)
    assert scores.metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert scores.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    for name, (values, weights) in scores.examples.items():
        assert scores.metrics[name] == pytest.approx((values * weights).sum() / weights.sum(), rel=1e-12)
    twice = {k: np.concatenate([v, v[:2]]) for k, v in found.items()}
    weights = np.array([2.0, 2.0, *[1.0] * (len(texts) - 2)])
    assert scores.statistics["perplexity"](weights) == pytest.approx(
        task.measure(twice, loaded, None).metrics["perplexity"]
    )
    assert {len(column) for column in task.table(found, loaded, None).values()} == {len(texts)}


@pytest.mark.parametrize("kind", SIZES)
def test_padding_changes_nothing(kind: str) -> None:
    """Faults 23: padded on the right, on the left, and not at all."""
    task, loaded = fresh(kind)
    texts = [TEXTS[0], "The", "The red lamp."]
    loaded.processor.padding_side = "left"
    right = batch_of(task, loaded, text=texts)
    assert right["attention_mask"][:, 0].all(), "training pads on the right whatever the tokenizer does"
    left = padded_left(right)
    with torch.no_grad():
        outputs = [task.forward(loaded.model, b, output_hidden_states=True) for b in (right, left)]
        scores = [counted(task.scores(o, b)) for o, b in zip(outputs, (right, left), strict=True)]
        vectors = [task.features(o, b) for o, b in zip(outputs, (right, left), strict=True)]
        found = [task.predict(loaded.model, b, {}) for b in (right, left)]
        alone = [task.predict(loaded.model, batch_of(task, loaded, text=[t]), {}) for t in texts]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-5, atol=1e-5)
    assert [int(task.units(b)["token"]) for b in (right, left)] == [len(scores[0])] * 2
    for other in (found[1], {k: torch.cat([a[k] for a in alone]) for k in found[0]}):
        for name, values in found[0].items():
            torch.testing.assert_close(values, other[name], rtol=1e-6, atol=1e-6)


def test_the_loss_is_that_of_transformers_and_units_its_weights() -> None:
    """Faults 17: unequal micro-batches, each divided by the count of the whole, add up to one big batch."""
    task, loaded = fresh(given=info(prompt=0, completion=0))
    rows = {"prompt": PROMPTS, "completion": COMPLETIONS}
    batch = batch_of(task, loaded, **rows)
    outputs = task.forward(loaded.model, batch)
    values, weight, _ = task.loss(outputs, batch)
    assert values.dtype == torch.float32 and float(weight.sum()) == int(task.units(batch)["token"])
    theirs = loaded.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    assert (values * weight).sum().item() / weight.sum().item() == pytest.approx(theirs.item(), rel=1e-6)
    smooth = task.loss(outputs, batch, label_smoothing=0.1)[0]
    logits_NC, _ = task.scores(outputs, batch)
    expected = weight * (0.9 * values + 0.1 * -logits_NC.log_softmax(-1).mean(-1))
    torch.testing.assert_close(smooth, expected, rtol=1e-5, atol=1e-5)

    total = int(task.units(batch)["token"])
    whole = torch.autograd.grad(values.sum() / total, list(loaded.model.parameters()))
    parts = [batch_of(task, loaded, **{k: v[s] for k, v in rows.items()}) for s in (slice(0, 1), slice(1, 5))]
    loss = sum(task.loss(task.forward(loaded.model, part), part)[0].sum() for part in parts) / total
    for one, other in zip(whole, torch.autograd.grad(loss, list(loaded.model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_ensemble_of_one_is_its_member() -> None:
    task, loaded = fresh()
    batch = batch_of(task, loaded, text=TEXTS[:3])
    with torch.no_grad():
        scores_NC, weight_N = task.scores(task.forward(loaded.model, batch), batch)
        found = task.predict(loaded.model, batch, {})
    again = task.from_scores(scores_NC.log_softmax(-1), weight_N, batch)
    for name, values in found.items():
        torch.testing.assert_close(values, again[name], rtol=1e-6, atol=1e-6)


def test_chunks_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    task, loaded = fresh()
    batch = batch_of(task, loaded, text=TEXTS[:3])
    with torch.no_grad():
        whole = task.predict(loaded.model, batch, {})
        monkeypatch.setattr("kt_hf.language.CHUNK", 4)
        assert int(predicted_mask(batch).sum()) > 8
        for name, values in task.predict(loaded.model, batch, {}).items():
            torch.testing.assert_close(values, whole[name])


# --- loading and saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_a_fresh_model_agrees_with_its_tokenizer(kind: str) -> None:
    task, loaded = fresh(kind)
    config, tokenizer = loaded.model.config, loaded.processor
    assert config.vocab_size == len(tokenizer) == task.signature(loaded)["num_scores"]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 0, 1)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer.model_max_length == 128, "no longer than the model has positions"
    names = [name for layer in task.layers(loaded.model) for name in layer]
    assert len(names) == len(set(names)) > 10 and not any("lm_head" in name for name in names)


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("llama", True), ("llama", False)])
def test_saved_models_give_the_same_logits(kind: str, tied: bool, tmp_path: Path) -> None:
    """Faults 30: embeddings that are tied stay so, and those that are not do not become so."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = TextGeneration(chat_template=PLAIN)
    overrides = {**SIZES[kind], "tie_word_embeddings": tied}
    loaded = task.load(Model(config=kind, config_overrides=overrides, processor_overrides={"vocab_size": 300}), info())
    loaded.model.eval()
    assert (loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight) == tied
    task.save(loaded, tmp_path)
    batch = batch_of(task, loaded, text=TEXTS[:3])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = task.load(Model(path=str(tmp_path)), info())
    again.model.eval()
    assert not again.new_parameters and task.signature(again) == task.signature(loaded)
    with torch.no_grad():
        expected = task.forward(loaded.model, batch).logits
        for model in (plain.eval(), again.model):
            assert torch.equal(task.forward(model, batch).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == PLAIN
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied


def test_a_missing_padding_token_is_recorded_and_harmless(tmp_path: Path) -> None:
    """Faults 24: the end token pads, is still learnt as a label, and still gets a gradient as an input."""
    tokenizer = loading.train_tokenizer(TEXTS, causal=True, vocab_size=300)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    task, loaded = fresh(processor=tmp_path / "tokenizer")
    assert loaded.processor.pad_token_id == loaded.processor.eos_token_id == 0
    task.save(loaded, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "model" / name).read_text())["pad_token_id"] == 0
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["pad_token"] == "<|end|>"

    again = task.load(Model(path=str(tmp_path / "model")), info())
    columns = task.preprocess({"text": ["The", TEXTS[0]]}, again, train=True)
    assert [row[-1] for row in columns["labels"]] == [0, 0]
    batch = batch_of(TextGeneration(loss_on="all"), again, prompt=["The<|end|>", TEXTS[0]], completion=[" red", "."])
    values, _, _ = task.loss(task.forward(again.model, batch), batch)
    gradient = torch.autograd.grad(values.sum(), again.model.get_input_embeddings().weight)[0]
    assert gradient[0].abs().sum() > 0


def test_models_that_would_be_silently_wrong_are_refused(tmp_path: Path) -> None:
    task, loaded = fresh()
    loaded.processor.save_pretrained(tmp_path / "tokenizer")
    loaded.model.model.save_pretrained(tmp_path / "headless")
    loaded.processor.save_pretrained(tmp_path / "headless")
    with pytest.raises(IntegrityError, match="no language-model head"):
        task.load(Model(path=str(tmp_path / "headless")), info())
    small = {**SIZES["llama"], "vocab_size": 100}
    with pytest.raises(RecipeError, match=r"\d+ tokens, the model embeddings for 100"):
        task.load(Model(config="llama", config_overrides=small, processor=str(tmp_path / "tokenizer")), info())
    bert: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    source = {"processor": str(tmp_path / "tokenizer")}
    with pytest.raises(RecipeError, match="sees the tokens") as error:
        task.load(Model(config="bert", config_overrides=bert, **source), info())
    assert "is_decoder=true" in error.value.remedy
    assert task.load(Model(config="bert", config_overrides={**bert, "is_decoder": True}, **source), info()).model
    with pytest.raises(DataError, match="None for its text"):
        task.preprocess({"text": ["a", None]}, loaded, train=True)


def test_padded_vocabularies_are_compared_on_the_tokenizer(tmp_path: Path, said: list[str]) -> None:
    """Faults 26: a teacher with more rows than tokens has the same signature, and more scores."""
    task, loaded = fresh()
    loaded.processor.save_pretrained(tmp_path)
    wide = {**SIZES["llama"], "vocab_size": 384}
    teacher = task.load(Model(config="llama", config_overrides=wide, processor=str(tmp_path)), info())
    assert task.signature(teacher) == task.signature(loaded)
    batch = batch_of(task, loaded, text=TEXTS[:2])
    widths = [task.scores(task.forward(m.model, batch), batch)[0].shape for m in (loaded, teacher)]
    assert widths[0][0] == widths[1][0] and (widths[0][1], widths[1][1]) == (len(loaded.processor), 384)
    from kt_hf import facts

    teacher.model.save_pretrained(tmp_path)
    frozen = facts.load_frozen(Model(path=str(tmp_path)), task, info(), torch.device("cpu"), loaded, "wide")
    assert frozen.scores(batch).shape[1] == len(loaded.processor)
    assert any(f"has 384 scores and the student {widths[0][1]}" in text for text in said)
    loaded.processor.chat_template = PLAIN
    mine, theirs = task.signature(loaded), task.signature(teacher)
    assert [k for k in mine if mine[k] != theirs[k]] == ["preprocessing"], "cached rows know the template"


def test_a_training_set_with_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    """Faults 16: all labels are masked, because every prompt fills its row."""
    import helpers

    long = ["The red stone is near the old river and the tall tree " * 3] * 9
    rows = {"prompt": long, "completion": ["yes"] * 9}
    given = info(prompt=0, completion=0)
    given.fingerprint = "masked"
    given.splits = {"train": Dataset.from_dict({**rows, "index": list(range(9))})}
    small = Model(config="llama", config_overrides=SIZES["llama"])

    def start(**settings: Any) -> None:
        task = TextGeneration(**settings)
        helpers.make_trainer(tmp_path, task=task, info=given, model=small, max_steps=1).run()

    with pytest.raises(DataError, match="9 training rows hold no token to learn from") as caught:
        start(max_length=16)
    assert caught.value.exit_code == 3
    start(max_length=16, loss_on="all")


def test_positions_that_do_not_count_are_never_float32() -> None:
    """Half-precision logits: as many positions of every row are converted as the row with most has."""
    task = TextGeneration()
    logits_BLC = torch.randn(2, 6, 11, dtype=torch.bfloat16, requires_grad=True)
    labels_BL = torch.full((2, 6), IGNORED)
    labels_BL[0, 3], labels_BL[1, 0] = 4, 2  # the second is at the start: nothing predicts it
    batch = {"labels": labels_BL, "attention_mask": torch.ones(2, 6, dtype=torch.long), "index": torch.arange(2)}
    batch[language.PLACES] = language.places(next_labels(batch))
    assert batch[language.PLACES].tolist() == [[2], [-1]] and task.part(batch, 1, 2)[language.PLACES].shape == (1, 1)
    values, weight, _ = task.loss(SimpleNamespace(logits=logits_BLC), batch)
    assert values.dtype == torch.float32 and int(task.units(batch)["token"]) == 1
    assert weight.tolist() == [1.0, 0.0] and values[1] == 0
    torch.testing.assert_close(values[0], F.cross_entropy(logits_BLC[0, 2].float(), torch.tensor(4)))
    values.sum().backward()
    assert logits_BLC.grad is not None and int((logits_BLC.grad.abs().sum(-1) > 0).sum()) == 1
    del batch[language.PLACES]
    everywhere, weight, _ = task.loss(SimpleNamespace(logits=logits_BLC), batch)
    assert len(everywhere) == 12 and float(weight.sum()) == 1 and everywhere.sum() == values.sum()
