"""Tags of words: pieces and words, figures against seqeval, bad rows, and the same answers as transformers."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import counted
from kt_hf_plugins import token_classification as tokens
from kt_hf_plugins.token_classification import TokenClassification
from seqeval.metrics import f1_score, precision_score, recall_score
from test_data import write

from kt_hf import Data, Ensemble, Merge, Model, Recipe, Train, inference, metrics
from kt_hf.data import prepare
from kt_hf.errors import DataError, RecipeError
from kt_hf.loader import Collate, Rows
from kt_hf.roles import fitting_tasks
from kt_hf.runner import run
from kt_hf.task import FILL, Loaded
from kt_hf.testing.bench import Bench, fresh_model

NAME = "token-classification"
TAGS = ["O", "B-stone", "I-stone", "B-lamp", "I-lamp"]
FEATURES = datasets.Features(
    tokens=datasets.List(datasets.Value("string")), ner_tags=datasets.List(datasets.ClassLabel(names=TAGS))
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(NAME, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def loaded(bench: Bench) -> Loaded:
    found = bench.load(bench.saved("start"))
    found.model.eval()
    return found


def rows_of(bench: Bench, split: str = "test") -> dict[str, list[Any]]:
    return {"tokens": bench.info.splits[split]["tokens"][:], "label": bench.info.splits[split]["label"][:]}


# --- pieces ---


def test_a_tag_is_learnt_on_the_first_piece_of_its_word(loaded: Loaded):
    rows = {"tokens": [["redstone0", "stonelampred", "oldlamp1"]], "label": [[1, 0, 4]]}
    found = TokenClassification().preprocess(rows, loaded, train=True)
    expected = loaded.processor(rows["tokens"], is_split_into_words=True)
    words = expected.word_ids(0)
    assert found["input_ids"] == expected["input_ids"] and words.count(1) > 1
    firsts = [i for i, word in enumerate(words) if word is not None and word not in words[:i]]
    assert [found["labels"][0][i] for i in firsts] == [1, 0, 4]
    assert sum(value != -100 for value in found["labels"][0]) == 3 and found["tags"] == [[1, 0, 4]]


def test_all_pieces_of_a_word_can_be_learnt(loaded: Loaded):
    rows = {"tokens": [["stonelampred", "stonelampred"]], "label": [[1, 0]]}
    task = TokenClassification(label_all_pieces=True)
    found = task.preprocess(rows, loaded, train=True)
    words = loaded.processor(rows["tokens"], is_split_into_words=True).word_ids(0)
    count = words.count(0)
    assert [y for y in found["labels"][0] if y != -100] == [1] + [2] * (count - 1) + [0] * count  # I-stone after B-
    batch = task.collate([{**{k: v[0] for k, v in found.items()}, "index": 0}], loaded)
    scores_NC, weight_N = task.scores(task.forward(loaded.model, batch), batch)
    assert len(counted((scores_NC, weight_N))) == weight_N.sum() == task.units(batch)["word"] == 2 * count
    assert task.from_scores(scores_NC, weight_N, batch)["prediction"].shape == (1, 2)


def test_scores_are_those_of_words_and_padding_changes_nothing(bench: Bench, loaded: Loaded):
    rows = Rows(bench.info, "test", bench.task, loaded)
    whole = Collate(bench.task, loaded)(rows.__getitems__([(0, i) for i in range(9)]))
    scores_NC, weight_N = bench.task.scores(bench.task.forward(loaded.model, whole), whole)
    together = counted((scores_NC, weight_N))
    alone = []
    for i in range(9):
        batch = Collate(bench.task, loaded)(rows.__getitems__([(0, i)]))
        alone.append(counted(bench.task.scores(bench.task.forward(loaded.model, batch), batch)))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert weight_N.sum() == sum(len(row) for row in rows_of(bench)["tokens"])


def test_words_that_are_cut_count_as_wrong_and_are_told(loaded: Loaded, caplog: pytest.LogCaptureFixture):
    task = TokenClassification(max_length=6)
    rows = {"tokens": [["redstone0"] * 7, ["river0"]], "label": [[0] * 5 + [1, 2], [0]]}
    found = task.preprocess(rows, loaded, train=False)
    batch = task.collate([{**{k: v[i] for k, v in found.items()}, "index": i} for i in range(2)], loaded)
    with torch.no_grad():
        out = {k: v.numpy() for k, v in task.predict(loaded.model, batch, {}).items()}
    seen = int((out["prediction"][0] >= 0).sum())
    assert 0 < seen < 5 and out["label"][0].tolist() == [0] * 5 + [1, 2]
    out["prediction"] = np.where(out["prediction"] >= 0, 0, out["prediction"])  # as if all that is seen were right
    tokens.note_unseen.cache_clear()
    with caplog.at_level(logging.WARNING):
        scores = task.measure(out, loaded, None)
        task.measure(out, loaded, None)
    assert scores.metrics["token_accuracy"] == pytest.approx((seen + 1) / 8)
    assert scores.metrics["entity_recall"] == 0 and scores.metrics["entity_f1"] == 0
    told = [r.getMessage() for r in caplog.records if "count as wrong" in r.getMessage()]
    assert len(told) == 1 and f"{7 - seen} of 8 words" in told[0] and "max_length=6" in told[0]
    table = task.table(out, loaded, None)
    assert table["prediction"][0] == ["O"] * seen + [None] * (7 - seen) and table["label"][1] == ["O"]


# --- figures ---


def made_up(rows: int = 40) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    label = random.integers(0, 5, (rows, 9))
    guess = np.where(random.random((rows, 9)) < 0.7, label, random.integers(0, 5, (rows, 9)))
    for row, count in enumerate(random.integers(1, 10, rows)):
        label[row, count:] = guess[row, count:] = FILL
    return {"label": label, "prediction": guess, "index": np.arange(rows)}


def test_figures_are_seqevals():
    found, loaded = made_up(), Loaded(None, None, TAGS)  # type: ignore[arg-type]
    scores = TokenClassification().measure(found, loaded, None)
    table = TokenClassification().table(found, loaded, None)
    truth, guess = table["label"], table["prediction"]
    for name, function in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert 0 < scores.metrics[f"entity_{name}"] < 1
        assert scores.metrics[f"entity_{name}"] == pytest.approx(function(truth, guess))
    per_type = f1_score(truth, guess, average=None)
    assert [scores.metrics["f1_lamp"], scores.metrics["f1_stone"]] == pytest.approx(per_type.tolist())
    ones, weights = np.ones(len(truth)), np.random.default_rng(1).integers(0, 4, len(truth))
    drawn = np.repeat(np.arange(len(truth)), weights)
    for name, statistic in scores.statistics.items():
        assert statistic(ones) == pytest.approx(scores.metrics[name])
    assert scores.statistics["entity_f1"](weights) == pytest.approx(
        f1_score([truth[i] for i in drawn], [guess[i] for i in drawn])
    )
    values_R, weights_R = scores.examples["token_accuracy"]
    assert (values_R * weights_R).sum() / weights_R.sum() == pytest.approx(scores.metrics["token_accuracy"])


def test_words_without_a_tag_are_left_out():
    found, loaded = made_up(), Loaded(None, None, TAGS)  # type: ignore[arg-type]
    more = {k: np.concatenate([v, v[:1]]) for k, v in found.items()}
    more["label"][-1] = np.where(more["label"][-1] == FILL, FILL, -1)
    task = TokenClassification()
    assert task.measure(more, loaded, None).metrics == task.measure(found, loaded, None).metrics


def test_rows_without_any_tag_are_not_measured(loaded: Loaded):
    found = made_up()
    found["label"] = np.where(found["label"] == FILL, FILL, -1)
    with pytest.raises(DataError, match="no word of these rows has a tag"):
        TokenClassification().measure(found, loaded, None)


def test_the_majority_tag_finds_no_entities(bench: Bench, loaded: Loaded):
    found = {**made_up(), "probability": np.zeros(1)}
    scores = bench.task.majority({"label": [[0, 0, 1], [], [0, None]]}, found, loaded, bench.info)
    assert scores.metrics["entity_f1"] == 0
    assert scores.metrics["token_accuracy"] == pytest.approx((found["label"] == 0).sum() / (found["label"] >= 0).sum())


# --- data ---


def test_columns_are_found_and_the_task_follows(tmp_path: Path):
    rows = {"tokens": [["redstone", "river"], ["lamp"]], "ner_tags": [[1, 0], [3]]}
    info = prepare(
        "mine", Data(str(write(tmp_path, features=FEATURES, train=rows, validation=rows))), TokenClassification()
    )
    assert info.roles == {"tokens": "tokens", "label": "ner_tags"} and info.labels == TAGS
    assert [name for name, _ in fitting_tasks(FEATURES)] == [NAME]
    assert set(info.texts()) >= {"redstone", "river", "lamp"}


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        ([["a"], ["b", "c"]], [[0], [0]], "row 1: 2 words with 1 tags"),
        ([["a"], ["b", None]], [[0], [0, 0]], "row 1: None is no word"),
    ],
)
def test_bad_rows_are_named(words: Any, tags: Any, message: str, bench: Bench, loaded: Loaded):
    kinds = datasets.Features(tokens=FEATURES["tokens"], label=FEATURES["ner_tags"], index=datasets.Value("int64"))
    rows = datasets.Dataset.from_dict({"tokens": words, "label": tags, "index": [0, 1]}, features=kinds)
    info = type(bench.info)("bad", {"test": rows}, bench.info.roles, TAGS, f"bad{message}")
    with pytest.raises(DataError, match=message) as caught:
        Rows(info, "test", bench.task, loaded)
    assert "data.drop=[unreadable]" in caught.value.remedy


def test_tags_that_are_no_entities_need_another_metric(bench: Bench):
    info = type(bench.info)("pos", bench.info.splits, bench.info.roles, ["NOUN", "VERB", "O", "X", "Y"], "pos")
    with pytest.raises(RecipeError, match="NOUN, VERB"):
        bench.task.load(fresh_model(NAME), info)
    task = TokenClassification(metrics=["token_accuracy"])
    loaded = task.load(fresh_model(NAME), info)
    scores = task.measure(made_up(), loaded, info)
    assert set(scores.metrics) == {"token_accuracy"} == {task.metric}


def test_seqeval_is_asked_for_before_anything_is_trained(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    with pytest.raises(RecipeError, match="seqeval"):
        bench.task.load(fresh_model(NAME), bench.info)
    with pytest.raises(RecipeError, match="seqeval"):
        metrics.seqeval()


def test_words_in_a_list_must_have_the_pieces_that_they_have_in_a_text(tmp_path: Path):
    from transformers import AutoTokenizer, RobertaTokenizerFast

    names = ["<s>", "</s>", "<unk>", "<pad>", "<mask>", "a", "\u0120", "\u0120a"]
    given = {"vocab": {name: i for i, name in enumerate(names)}, "merges": [("\u0120", "a")]}
    RobertaTokenizerFast(**given).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="other pieces of words in a list") as caught:
        tokens.check_tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    assert "processor_overrides.add_prefix_space=true" in caught.value.remedy
    tokens.check_tokenizer(AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True))
    with pytest.raises(RecipeError, match="which word"):
        tokens.check_tokenizer(type("Slow", (), {"is_fast": False})())


# --- answers ---


def test_texts_are_answered_as_transformers_pipeline_does(bench: Bench):
    from transformers import pipeline

    folder, texts = bench.saved("start"), ["redstone0 stony1 river2, oldlamp0!", "stonelampred"]
    table = inference.predict(folder, texts)
    expected = pipeline(NAME, model=folder, aggregation_strategy="first")(texts)
    assert any(expected)
    for ours, theirs in zip(table["prediction"], expected, strict=True):
        assert [{**e, "score": None} for e in ours] == [{**e, "score": None} for e in theirs]
        np.testing.assert_allclose([e["score"] for e in ours], [e["score"] for e in theirs], rtol=1e-5)


def test_rows_of_words_are_answered_as_plain_model_code_does(bench: Bench, tmp_path: Path):
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    folder, words = bench.saved("start"), rows_of(bench)["tokens"]
    datasets.Dataset.from_dict({"words": words}).to_parquet(tmp_path / "rows.parquet")
    table = inference.predict(folder, [str(tmp_path / "rows.parquet")])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    for row, tags, chances in zip(words, table["prediction"], table["probability"], strict=True):
        inputs = tokenizer(row, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            chances_LC = model(**inputs).logits[0].softmax(-1)
        firsts = [inputs.word_ids().index(i) for i in range(len(row))]
        assert tags == [model.config.id2label[int(i)] for i in chances_LC[firsts].argmax(-1)]
        np.testing.assert_allclose(chances, chances_LC[firsts].max(-1).values.numpy(), rtol=1e-4)


# --- strategies, merges, ensembles, ranks ---


def test_every_strategy_merge_and_ensemble_in_one_recipe(bench: Bench, tmp_path: Path):
    folder = tmp_path / "data"
    for split, rows in bench.info.splits.items():
        folder.mkdir(exist_ok=True)
        rows.select_columns(["tokens", "label"]).to_parquet(folder / f"{split}.parquet")
    frozen = {"finetune": {"freeze_layers": 1}}
    recipe = Recipe(
        data=Data(str(folder)),
        model=Model(path=bench.saved("start")),
        training={"max_steps": 2, "per_device_train_batch_size": 8, "eval_steps": 0},
        stages=[
            Train("tuned", strategies=[frozen, "ema"], seeds=2, compare=["majority"]),
            Train("probe", strategies=[{"finetune": {"linear_probe": True}}]),
            Ensemble("mean", "mean", models=["@tuned"]),
            Train("student", strategies=["lora", {"distill": {"teacher": "@mean"}}], compare=["@tuned"]),
            Merge("soup", "uniform_soup", models=["@tuned"]),
            Merge("greedy", "greedy_soup", models=["@tuned"]),
        ],
    )
    report = run(recipe, tmp_path / "out")
    assert [stage["task"] for stage in report["stages"]] == [NAME] * 6
    for stage in report["stages"]:
        assert stage["metric"] == "entity_f1" and {"f1_stone", "f1_lamp"} <= set(stage["metrics"])
        figure = stage["metrics"]["entity_f1"]
        assert figure["low"] <= figure["value"] <= figure["high"]
    kept = datasets.Dataset.from_parquet(str(tmp_path / "out" / "soup" / "predictions.parquet"))
    pairs = [(row["label"], [tag or "O" for tag in row["prediction"]]) for row in kept]
    value = next(s for s in report["stages"] if s["name"] == "soup")["metrics"]["entity_f1"]["value"]
    assert f1_score(*map(list, zip(*pairs, strict=True)), zero_division=0) == pytest.approx(value)


def test_weights_of_an_ensemble_cannot_be_fitted(bench: Bench, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in bench.info.splits.items():
        rows.select_columns(["tokens", "label"]).to_parquet(folder / f"{split}.parquet")
    models = [Model(path=bench.saved(name)) for name in ("start", "teacher")]
    recipe = Recipe(data=Data(str(folder)), stages=[Ensemble("fit", {"mean": {"weights": "fit"}}, models=models)])
    with pytest.raises(RecipeError, match="one class per example"):
        run(recipe, tmp_path / "out")
