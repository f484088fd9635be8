"""Spans of contexts: windows, SQuAD's figures, bad rows, and the same answers as plain model code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from kt_hf_plugins import question_answering as qa
from kt_hf_plugins.distill import Distill
from kt_hf_plugins.finetune import Finetune
from kt_hf_plugins.question_answering import QuestionAnswering

from kt_hf import Data, Ensemble, Evaluate, Merge, Model, Recipe, Train, inference, registry
from kt_hf.data import DataInfo
from kt_hf.errors import DataError, RecipeError
from kt_hf.functional import answers
from kt_hf.loader import Collate, Rows
from kt_hf.roles import fitting_tasks
from kt_hf.runner import run
from kt_hf.task import FILL, Loaded
from kt_hf.testing.bench import Bench, differing

NAME = "question-answering"
SMALL: dict[str, Any] = {"max_length": 20, "doc_stride": 3, "max_question_length": 9}
"""Windows so small that most contexts of the bench need several."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(NAME, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def loaded(bench: Bench) -> Loaded:
    found = bench.load(bench.saved("start"))
    found.model.eval()
    return found


def rows_of(bench: Bench, split: str = "test") -> dict[str, list[Any]]:
    rows = bench.info.splits[split]
    return {name: rows[name][:] for name in ("question", "context", "answers")}


def batch_of(task: QuestionAnswering, bench: Bench, loaded: Loaded, split: str = "test", train: bool = False) -> Any:
    rows = Rows(bench.info, split, task, loaded, train=train)
    return Collate(task, loaded)(rows.__getitems__([(0, i) for i in range(len(rows))]))


# --- windows ---


def test_windows_cover_the_context_and_point_at_the_answer(bench: Bench, loaded: Loaded):
    task, rows = QuestionAnswering(**SMALL), rows_of(bench)
    batch = batch_of(task, bench, loaded)
    owners = batch["row_of"].tolist()
    assert max(owners.count(i) for i in range(9)) > 2 and batch["input_ids"].shape[1] <= 20
    pointed = set()
    for window, row in enumerate(owners):
        context, answer = rows["context"][row], rows["answers"][row]
        first, last = batch["targets"][window].tolist()
        if first == last == batch["null"][window]:
            continue
        begin, finish = batch["begins"][window, first], batch["finishes"][window, last]
        assert context[begin:finish] == answer["text"][0] and int(begin) == answer["answer_start"][0]
        pointed.add(row)
    assert pointed == {row for row in range(9) if rows["answers"][row]["text"]}
    for row in range(9):  # every token of the context is in some window
        mine = [i for i, owner in enumerate(owners) if owner == row]
        seen = {int(b) for i in mine for b in batch["begins"][i] if b >= 0}
        offsets = loaded.processor(rows["context"][row], add_special_tokens=False, return_offsets_mapping=True)
        assert seen == {begin for begin, _ in offsets["offset_mapping"]}


def test_training_rows_may_have_few_windows_but_those_with_the_answer(bench: Bench, loaded: Loaded):
    whole = batch_of(QuestionAnswering(**SMALL), bench, loaded, "train", train=True)
    few = batch_of(QuestionAnswering(**SMALL, max_windows=1), bench, loaded, "train", train=True)
    assert len(few["row_of"]) == 24 < len(whole["row_of"])
    found = (few["targets"] != few["null"][:, None]).any(1)
    assert found.sum() == sum(bool(row["text"]) for row in rows_of(bench, "train")["answers"])
    measured = batch_of(QuestionAnswering(**SMALL, max_windows=1), bench, loaded)
    assert len(measured["row_of"]) > 9  # rows to measure have all


def test_long_questions_are_cut_and_windows_must_move_on(loaded: Loaded, bench: Bench):
    rows = {"question": [" red blue old" * 40], "context": ["redstone oldlamp"]}
    found = QuestionAnswering(max_length=40, doc_stride=8, max_question_length=12).preprocess(rows, loaded, False)
    assert len(found["input_ids"][0]) == 1 and len(found["input_ids"][0][0]) <= 40
    with pytest.raises(RecipeError, match="do not move on"):
        QuestionAnswering(max_length=16, doc_stride=14).load(Model(path=bench.saved("start")), bench.info)


def test_an_empty_context_has_no_answer(loaded: Loaded):
    task = QuestionAnswering()
    found = task.preprocess({"question": ["which?"], "context": [""]}, loaded, False)
    batch = task.collate([{**{k: v[0] for k, v in found.items()}, "index": 0}], loaded)
    with torch.no_grad():
        out = {k: v.numpy() for k, v in task.predict(loaded.model, batch, {}).items()}
    assert task._said(out) == [""]


def test_the_best_span_is_the_best_of_all_pairs():
    torch.manual_seed(0)
    start, end = torch.randn(5, 12), torch.randn(5, 12)
    inside = torch.rand(5, 12) < 0.8
    score, first, last = qa.best_spans(start, end, inside, 4)
    for v in range(5):
        places = [i for i in range(12) if inside[v, i]]
        pairs = [(float(start[v, i] + end[v, j]), i, j) for i in places for j in places if i <= j < i + 4]
        assert (pytest.approx(float(score[v])), int(first[v]), int(last[v])) == max(pairs)


def test_texts_survive_as_numbers():
    texts = ["", "a\nb\r", "Ünïcode \U0001f600 中文", "x"]
    assert qa.read(np.array([*qa.characters(texts), FILL, FILL])) == texts
    one = torch.tensor([qa.characters(["hello world"]), [*qa.characters(["ab"]), *[FILL] * 9]])
    out = qa.cut(one, torch.tensor([[6, 11], [0, 0]]))
    assert [qa.read(row) for row in out.numpy()] == [["world"], [""]]


# --- figures ---


@pytest.mark.parametrize(
    ("guess", "truth", "exact", "f1"),
    [
        ("The Normans!", "normans", 1, 1),
        ("in the  10th century", "10th century", 0, 0.8),
        ("a cat a cat", "cat dog", 0, 0.5),
        ("", "cat", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("Rollo", "dog", 0, 0),
        ("北京市", "北京", 0, 0),  # one token each: nothing in common
        ("der Hund", "Hund", 0, 2 / 3),  # articles of other languages stay
        ("theatre an.d", "theatre and", 1, 1),
    ],
)
def test_figures_are_squads(guess: str, truth: str, exact: float, f1: float):
    assert answers.exact(guess, truth) == exact and answers.f1(guess, truth) == pytest.approx(f1)


def test_the_best_of_several_true_answers_counts_and_none_is_right_where_there_is_none():
    assert answers.best(answers.f1, "red lamp", ["lamp", "a red lamp"]) == 1
    assert answers.best(answers.f1, "", []) == answers.best(answers.exact, "", ["the"]) == 1
    assert answers.best(answers.f1, "lamp", []) == 0


def predictions(texts: list[str], truths: list[list[str]], none: list[float]) -> dict[str, np.ndarray]:
    def rows(found: list[list[int]]) -> np.ndarray:
        return qa.pad(found, FILL).numpy()

    return {
        "text": rows([qa.characters([text]) for text in texts]),
        "truths": rows([qa.characters(row) for row in truths]),
        "score": np.zeros(len(texts)),
        "null": np.array(none),
        "span": np.zeros((len(texts), 2), dtype=np.int64),
        "index": np.arange(len(texts)),
    }


def test_no_answer_is_given_where_it_is_more_probable_by_more_than_the_threshold(caplog: pytest.LogCaptureFixture):
    found = predictions(["lamp", "lamp", "red"], [["lamp"], [], []], [-1.0, 2.0, 0.5])
    loaded: Any = None
    qa.note_unanswerable.cache_clear()
    always = QuestionAnswering().measure(found, loaded, None)
    assert always.metrics["unanswerable_accuracy"] == 0 and "2 of 3 questions have no answer" in caplog.text
    some = QuestionAnswering(null_threshold=1.0).measure(found, loaded, None)
    assert some.metrics == {
        "f1": pytest.approx(2 / 3),
        "exact_match": pytest.approx(2 / 3),
        "unanswerable_accuracy": 0.5,
        "answerable_f1": 1.0,
    }
    for name, (values_R, weights_R) in some.examples.items():
        assert np.average(values_R, weights=weights_R) == pytest.approx(some.metrics[name])
    table = QuestionAnswering(null_threshold=1.0).table(found, loaded, None)
    assert table["prediction"] == ["lamp", "", "red"] and table["text"] == ["lamp", "lamp", "red"]
    assert table["answers"] == [["lamp"], [], []]


# --- data ---


def test_the_task_follows_from_the_columns(bench: Bench):
    assert [name for name, _ in fitting_tasks(bench.info.splits["train"].features)] == [NAME]
    listed = datasets.Features(
        question=datasets.Value("string"),
        context=datasets.Value("string"),
        answers=datasets.List({"text": datasets.Value("string"), "answer_start": datasets.Value("int64")}),
    )
    assert [name for name, _ in fitting_tasks(listed)] == [NAME]
    expected = [("b", 2, 3), ("c", 4, 5)]
    assert qa.spans(0, [{"text": "b", "answer_start": 2}, {"text": "c", "answer_start": 4}], "a b c") == expected
    assert qa.spans(0, {"text": ["b", "c"], "answer_start": [2, 4]}, "a b c") == expected
    assert qa.spans(0, {"text": "b", "answer_start": 2}, "a b c") == expected[:1]
    assert qa.spans(0, None, "a") == qa.spans(0, {"text": [], "answer_start": []}, "a") == []


def test_an_answer_that_is_not_there_is_named(bench: Bench, loaded: Loaded):
    rows = bench.info.splits["test"].select(range(3)).to_list()
    rows[2]["answers"] = {"text": ["oldlamp"], "answer_start": [1]}
    made = datasets.Dataset.from_list(rows, features=bench.info.splits["test"].features)
    info = DataInfo("bad", {"test": made}, bench.info.roles, None, "bad")
    with pytest.raises(DataError, match="row 2: the answer 'oldlamp' is not at character 1") as caught:
        Rows(info, "test", QuestionAnswering(), loaded)
    assert "answer_start" in caught.value.remedy


def test_rows_without_answers_are_neither_learnt_nor_measured(bench: Bench, loaded: Loaded):
    task = QuestionAnswering()
    found = predictions(["lamp"], [["lamp"]], [0.0])
    del found["truths"]
    with pytest.raises(DataError, match="have no answers"):
        task.measure(found, loaded, None)
    batch = batch_of(task, bench, loaded)
    del batch["targets"]
    with pytest.raises(DataError, match="have no answers"):
        task.loss(task.forward(loaded.model, batch), batch)


# --- answers ---


def test_rows_are_answered_as_plain_model_code_does(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    folder, rows = bench.saved("start"), rows_of(bench)
    datasets.Dataset.from_dict({k: rows[k] for k in ("question", "context")}).to_parquet(tmp_path / "rows.parquet")
    load = registry.load
    small = type("Small", (QuestionAnswering,), {"__init__": lambda self: QuestionAnswering.__init__(self, **SMALL)})
    monkeypatch.setattr(registry, "load", lambda kind, name: small if name == NAME else load(kind, name))
    table = inference.predict(folder, [str(tmp_path / "rows.parquet")], task=NAME)
    assert table["input"] == rows["question"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    for i, (question, context) in enumerate(zip(rows["question"], rows["context"], strict=True)):
        inputs = tokenizer(
            question, context, truncation="only_second", max_length=20, stride=3, padding=True, return_tensors="pt",
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        offsets = inputs.pop("offset_mapping")
        inputs.pop("overflow_to_sample_mapping")
        with torch.no_grad():
            out = model(**inputs)
        best = (-np.inf, "", 0)
        for w in range(len(offsets)):
            inside = [k for k, part in enumerate(inputs.sequence_ids(w)) if part == 1]
            places = [0, *inside]
            start, end = (x[w, places].log_softmax(-1).tolist() for x in (out.start_logits, out.end_logits))
            for a in range(1, len(places)):
                for b in range(a, min(a + 30, len(places))):
                    span = int(offsets[w, places[a], 0]), int(offsets[w, places[b], 1])
                    best = max(best, (start[a] + end[b], context[slice(*span)], span[0]), key=lambda found: found[0])
        assert (table["prediction"][i], table["start"][i]) == best[1:]
        assert table["probability"][i] == pytest.approx(np.exp(best[0]), rel=1e-4)


# --- strategies, merges, ensembles, ranks ---


def trained(bench: Bench, folder: Path, strategies: Any = None, **training: Any) -> Any:
    return bench.train(
        strategies or {"finetune": Finetune()}, folder, task=QuestionAnswering(**SMALL), max_steps=3, **training
    )


def test_chunks_of_rows_with_several_windows_train_as_the_whole(bench: Bench, tmp_path: Path):
    whole = trained(bench, tmp_path / "whole", adam_epsilon=1e-4)
    chunks = trained(bench, tmp_path / "chunks", forward_chunk_size=2, adam_epsilon=1e-4)
    assert not differing(whole.weights, chunks.weights, rtol=1e-4, atol=1e-5)


def test_frozen_layers_of_rows_with_several_windows_are_not_cached(bench: Bench, tmp_path: Path):
    frozen = {"finetune": Finetune(linear_probe=True)}
    with pytest.raises(RecipeError, match="several rows for one"):
        bench.train(frozen, tmp_path, task=QuestionAnswering(**SMALL), max_steps=20, cache_frozen=True)


def test_distilling_from_oneself_is_nothing_and_from_another_is_something(bench: Bench, tmp_path: Path):
    for name, low, high in (("start", -1e-6, 1e-6), ("teacher", 1e-3, 1e3)):
        strategy = Distill(teacher=bench.saved(name))
        found = trained(bench, tmp_path / name, {"distill": strategy}, learning_rate=1e-9)
        found_kl = [point["terms"]["distill/kl"] for point in found.result.curve]
        assert low <= min(found_kl) and max(found_kl) <= high, found_kl


def test_every_strategy_merge_and_ensemble_in_one_recipe(bench: Bench, tmp_path: Path):
    folder = tmp_path / "data"
    for split, rows in bench.info.splits.items():
        folder.mkdir(exist_ok=True)
        rows.remove_columns("index").to_parquet(folder / f"{split}.parquet")
    frozen = {"finetune": {"freeze_layers": 1}}
    recipe = Recipe(
        task={NAME: {**SMALL, "null_threshold": 0.0}},
        data=Data(str(folder)),
        model=Model(path=bench.saved("start")),
        training={"max_steps": 2, "per_device_train_batch_size": 8, "eval_steps": 0},
        stages=[
            Train("tuned", strategies=[frozen, "ema"], seeds=2),
            Train("probe", strategies=[{"finetune": {"linear_probe": True}}]),
            Ensemble("mean", "mean", models=["@tuned"]),
            Train("student", strategies=["lora", {"distill": {"teacher": "@mean"}}], compare=["@tuned"]),
            Merge("soup", "uniform_soup", models=["@tuned"]),
            Merge("greedy", "greedy_soup", models=["@tuned"]),
            Evaluate("alone", model="@probe"),
            Ensemble("twice", "mean", models=["@probe", "@probe"]),
        ],
    )
    report = run(recipe, tmp_path / "out")
    figures = {stage["name"]: stage["metrics"] for stage in report["stages"]}
    for found in figures.values():
        assert {"f1", "exact_match", "unanswerable_accuracy"} <= set(found)
        assert found["f1"]["low"] <= found["f1"]["value"] <= found["f1"]["high"]
    assert figures["twice"]["f1"]["value"] == figures["alone"]["f1"]["value"]  # a model beside itself
    kept = datasets.Dataset.from_parquet(str(tmp_path / "out" / "soup" / "predictions.parquet"))
    again = np.mean([answers.best(answers.f1, row["prediction"], row["answers"]) for row in kept])
    assert again == pytest.approx(figures["soup"]["f1"]["value"])
