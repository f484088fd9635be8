"""Masked language modelling: what is hidden, when it is drawn, numbers, and filling masks. Models are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_grid
import torch
from datasets import Dataset
from helpers import counted
from kt_hf_plugins.fill_mask import FillMask
from torch.nn import functional as F

from kt_hf import Data, Loaded, Model, Strategy, inference, loading, testing
from kt_hf.bundle import Bundle, Position
from kt_hf.data import DataInfo
from kt_hf.errors import DataError, IntegrityError, RecipeError
from kt_hf.language import IGNORED
from kt_hf.loader import Rows
from kt_hf.roles import fitting_tasks

BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
KINDS = {"bert": BERT, "roberta": BERT}
COLOURS, THINGS = ("red", "green", "blue", "pale"), ("stonework", "river", "household", "lamp", "cloud")
TEXTS = [
    f"the {c} {t} is near the {u} of the {d} {t}" for c in COLOURS for d in COLOURS[:2] for t in THINGS for u in THINGS
]


def info(texts: list[str] = TEXTS) -> DataInfo:
    splits = {
        name: Dataset.from_dict({"text": texts[:n], "index": np.arange(n)}) for name, n in (("train", 40), ("test", 7))
    }
    return DataInfo("colours", splits, {"text": "text"}, None, f"texts-{len(texts)}")


def model(kind: str = "bert") -> Model:
    return Model(config=kind, config_overrides=KINDS[kind], processor_overrides={"vocab_size": 80})


def fresh(kind: str = "bert", **settings: Any) -> tuple[Any, Loaded]:
    torch.manual_seed(0)
    task = FillMask(**settings)
    loaded = task.load(model(kind), info())
    loaded.model.eval()
    return task, loaded


def plain(loaded: Loaded, text: str) -> list[int]:
    return loaded.processor(text)["input_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("texts")
    for name, part in (("train", TEXTS[:40]), ("validation", TEXTS[40:50]), ("test", TEXTS[50:57])):
        Dataset.from_dict({"sentence": part}).to_parquet(found / f"{name}.parquet")
    return found


# --- what is hidden --------------------------------------------------------------------------------------------------


def test_shares_of_what_is_hidden() -> None:
    task, loaded = fresh()
    np.random.seed(0)
    columns = task.preprocess({"text": TEXTS * 20}, loaded, train=True)
    tokenizer, kinds = loaded.processor, {"mask": 0, "same": 0, "other": 0}
    for text, ids, labels in zip(TEXTS * 20, columns["input_ids"], columns["labels"], strict=True):
        whole = plain(loaded, text)
        assert labels[0] == labels[-1] == IGNORED, "special tokens are not to be found"
        assert sum(y != IGNORED for y in labels) == max(
            1, round(0.15 * len([i for i in whole if i not in loaded.processor.all_special_ids]))
        )
        for token, label, original in zip(ids, labels, whole, strict=True):
            assert token == original if label == IGNORED else label == original
            if label != IGNORED:
                assert token == tokenizer.mask_token_id or token not in tokenizer.all_special_ids
                kinds["mask" if token == tokenizer.mask_token_id else "same" if token == label else "other"] += 1
    share = {kind: count / sum(kinds.values()) for kind, count in kinds.items()}
    assert share["mask"] == pytest.approx(0.8, abs=0.02) and share["same"] == pytest.approx(0.1, abs=0.02)
    short = task.preprocess({"text": ["lamp", ""]}, loaded, train=True)["labels"]
    assert sum(y != IGNORED for y in short[0]) >= 1 and all(y == IGNORED for y in short[1])


def test_whole_words() -> None:
    task, loaded = fresh(whole_words=True, mask_share=1.0, random_share=0.0)
    encoded = loaded.processor(TEXTS)
    assert any(len(ids) > len(set(encoded.word_ids(i))) for i, ids in enumerate(encoded["input_ids"])), (
        "words of pieces"
    )
    columns = task.preprocess({"text": TEXTS}, loaded, train=False)
    for i, labels in enumerate(columns["labels"]):
        words = encoded.word_ids(i)
        hidden = {word for word, label in zip(words, labels, strict=True) if label != IGNORED}
        assert all((label != IGNORED) == (word in hidden) for word, label in zip(words, labels, strict=True))


def test_drawn_per_row_and_epoch_in_training_and_once_in_evaluation() -> None:
    task, loaded = fresh()
    given = info()
    train, test = Rows(given, "train", task, loaded, train=True), Rows(given, "test", task, loaded)
    first, again, next_epoch = (train.__getitems__([(e, 3), (e, 1)]) for e in (0, 0, 1))
    assert first == again and first[0]["labels"] != next_epoch[0]["labels"]
    assert train.__getitems__([(0, 1)])[0] == first[1], "whatever it is batched with"
    other_seed = Rows(given, "train", task, loaded, seed=1, train=True)
    assert other_seed.__getitems__([(0, 3)])[0]["labels"] != first[0]["labels"]
    np.random.seed(5)
    shuffled = task.preprocess({"text": TEXTS[6::-1]}, loaded, train=False)["labels"]
    assert [list(test[(0, i)]["labels"]) for i in range(7)] == shuffled[::-1], "the text alone decides"


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_a_plain_loop(kind: str) -> None:
    task, loaded = fresh(kind)
    columns = task.preprocess({"text": [*TEXTS[:4], "lamp"]}, loaded, train=False)
    batch = task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(5)], loaded)
    nll, hits = [], []
    with torch.no_grad():
        for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True):
            logits_LC, target_L = loaded.model(input_ids=torch.tensor([ids])).logits[0], torch.tensor(labels)
            nll.append(float(F.cross_entropy(logits_LC, target_L, reduction="sum")))
            hits.append(int((logits_LC.argmax(-1) == target_L).sum()))
        found = {k: v.numpy() for k, v in task.predict(loaded.model, batch, {}).items()}
        values_N, weight_N, unit = task.loss(task.forward(loaded.model, batch), batch)
        values_N = values_N[weight_N > 0]
        own = loaded.model(**{k: v for k, v in batch.items() if k != "index"}).loss
    np.testing.assert_allclose(found["nll"], nll, rtol=1e-4, atol=1e-5)
    assert found["correct"].tolist() == hits and found["tokens"].sum() == len(values_N) == int(
        task.units(batch)["token"]
    )
    torch.testing.assert_close(values_N.mean(), own, rtol=1e-5, atol=1e-5)
    scores = task.measure(found, loaded, None)
    assert scores.metrics["perplexity"] == pytest.approx(np.exp(sum(nll) / len(values_N)), rel=1e-4) and unit == "token"
    scores_NC = counted(task.scores(task.forward(loaded.model, batch), batch))
    assert scores_NC.shape == (len(values_N), len(loaded.processor))


class LearnsTheRest(Strategy):
    """Puts other labels into the batch: what is not hidden."""

    def batch(self, batch: Any, model: Any, progress: float) -> Any:
        hidden_BL, real_BL = batch["labels"] != IGNORED, batch["attention_mask"].bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(hidden_BL | ~real_BL, IGNORED)}


@pytest.mark.parametrize("chunk", [0, 1])
def test_other_labels_are_learnt_where_they_are(chunk: int) -> None:
    """The places that `collate` found are of the labels that it saw."""
    task, loaded = fresh()
    columns = task.preprocess({"text": TEXTS[:3]}, loaded, train=False)
    batch = task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(3)], loaded)
    changer = LearnsTheRest()
    other = changer.batch(batch, None, 0.0)
    counts = {"train": task.units(other)}
    bundle = Bundle(loaded, task, {"rest": changer}, chunk=chunk).eval()
    terms = bundle("loss", batch, {}, Position(0, 0.0, 0, 1, 0, 0, 1, counts, {"train": [3]}))
    with torch.no_grad():
        logits_BLC = task.forward(loaded.model, batch).logits
    expected = F.cross_entropy(logits_BLC.flatten(0, 1), other["labels"].flatten())
    assert counts["train"]["token"] > batch["places"].numel()
    torch.testing.assert_close(terms["task"], expected, rtol=1e-5, atol=1e-5)
    assert task.current({**batch, "index": batch["index"] + 1}, batch)["places"] is batch["places"]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_filled_as_the_pipeline_does(kind: str, tmp_path: Path) -> None:
    from transformers import pipeline

    task, loaded = fresh(kind)
    task.save(loaded, tmp_path)
    mask = loaded.processor.mask_token
    texts = [f"the {mask} river is near", f"a {mask} lamp", f"the red {mask} is near the {mask}"]
    table = inference.predict(str(tmp_path), texts)
    ask: Any = pipeline("fill-mask", model=str(tmp_path))
    for i, text in enumerate(texts[:2]):
        best = ask(text)[0]
        assert table["prediction"][i] == best["token_str"] and table["text"][i] == best["sequence"]
        assert table["probability"][i] == pytest.approx(best["score"], rel=1e-4)
    both = [found[0] for found in ask(texts[2])]
    assert table["prediction"][2] == " ".join(found["token_str"] for found in both)
    assert table["probability"][2] == pytest.approx(both[0]["score"] * both[1]["score"], rel=1e-4)
    with pytest.raises(DataError, match=r"row 0 has no \[MASK\]"):
        inference.predict(str(tmp_path), ["the red river"])
    assert loading.places(loaded.model) == {"bert": 40, "roberta": 39}[kind] == loaded.processor.model_max_length
    batch = task.collate(
        [{**{k: v[0] for k, v in task.preprocess({"text": ["river " * 99]}, loaded, True).items()}, "index": 0}], loaded
    )
    assert task.forward(loaded.model, batch).logits.shape[1] == loaded.processor.model_max_length


def test_a_checkpoint_without_a_head(tmp_path: Path) -> None:
    task, loaded = fresh()
    loaded.model.bert.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    with pytest.raises(IntegrityError, match="no masked-language-model head") as error:
        task.load(Model(path=str(tmp_path)), info())
    assert "replace_head=true" in error.value.remedy
    renewed = task.load(Model(path=str(tmp_path), replace_head=True), info())
    assert renewed.new_parameters and torch.equal(
        renewed.model.bert.encoder.layer[0].output.dense.weight, loaded.model.bert.encoder.layer[0].output.dense.weight
    )
    causal = tmp_path / "causal"
    loading.train_tokenizer(TEXTS, causal=True, vocab_size=300).save_pretrained(causal)
    with pytest.raises(RecipeError, match="no mask token"):
        task.load(Model(config="bert", config_overrides=BERT, processor=str(causal)), info())
    with pytest.raises(RecipeError, match="add up"):
        FillMask(mask_share=0.8, random_share=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_what_embeddings_do_not_share(kind: str) -> None:
    task, loaded = fresh(kind)
    head = tuple(f"{name}." for name in task.head(loaded.model))
    shared = loaded.model.get_input_embeddings().weight
    named = dict(loaded.model.named_parameters(remove_duplicate=False))
    assert head and all(named[n] is not shared for n in named if n.startswith(head))


def test_plain_texts_alone_do_not_ask_for_it() -> None:
    features = Dataset.from_list([{"text": "a"}]).features
    assert [name for name, _ in fitting_tasks(features)] == ["text-generation"]


# --- in recipes ------------------------------------------------------------------------------------------------------


def test_it_conforms() -> None:
    testing.check_task("fill-mask")
    testing.check_strategy("lora", task="fill-mask")


@pytest.mark.slow
def test_every_strategy(folder: Path, tmp_path: Path) -> None:
    from kt_hf import Train

    probe = [Train("probe", model={"path": "@teacher"}, strategies=[{"finetune": {"linear_probe": True}}])]
    report = task_grid.run_grid(
        tmp_path / "out", Data(str(folder)), model(), {"fill-mask": {"mask_probability": 0.3}}, more=probe
    )
    for name in ("mixed", "probe", "together"):
        figure = report[name]["metrics"]["perplexity"]
        assert figure["low"] < figure["value"] < figure["high"]
    assert report["uniform"]["metrics"]["loss"]["value"] == report["again"]["metrics"]["loss"]["value"]
    settings = ["task.fill-mask.mask_probability=0.3"]
    one = inference.evaluate(str(tmp_path / "out" / "adapted"), str(folder), settings, task="fill-mask")
    expected = report["adapted"]["metrics"]["perplexity"]["value"]
    assert one["metrics"]["perplexity"]["value"] == pytest.approx(expected, rel=1e-4), "the merged adapter, saved"
    table = inference.predict(str(tmp_path / "out" / "together" / "model"), ["the [MASK] river"])
    assert len(table["prediction"]) == 1 and 0 < table["probability"][0] < 1
