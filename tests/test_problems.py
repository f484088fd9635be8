"""Rows with one class, several classes or a number: losses, metrics, exports, whole trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import BERT, VIT
from PIL import Image
from test_data import write

from kt_hf import Data, Ensemble, Recipe, Train, inference, registry, run
from kt_hf.data import prepare
from kt_hf.errors import RecipeError
from kt_hf.functional import scoring
from kt_hf.problems import IGNORED, PROBLEMS
from kt_hf.recipe import Model

QUICK = {"max_steps": 8, "per_device_train_batch_size": 8, "report_to": "none", "num_threads": 1, "learning_rate": 5e-3}
TINY = {"config": "bert", "config_overrides": BERT}


def text_task(**settings: Any) -> Any:
    return registry.load("task", "text-classification")(**settings)


def texts(count: int, kind: str, seed: int = 0) -> dict[str, list[Any]]:
    """Texts of which the words `red` and `big` decide the labels."""
    random = np.random.default_rng(seed)
    words = [[w for w in ("red", "big") if random.random() < 0.5] for _ in range(count)]
    rows = [" ".join([*ws, *random.choice(["sea", "hill", "road"], 3)]) for ws in words]
    labels = {"classes": words, "number": [float(len(ws)) + 0.5 for ws in words], "class": [str(len(w)) for w in words]}
    return {"text": rows, "label": labels[kind]}


def folder(path: Path, kind: str) -> Path:
    return write(path, train=texts(48, kind), validation=texts(15, kind, 1), test=texts(19, kind, 2))


@pytest.mark.parametrize(("kind", "metric"), [("classes", "micro_f1"), ("number", "pearson"), ("class", "accuracy")])
def test_a_recipe_on_each_kind_of_label(kind, metric, tmp_path):
    data = folder(tmp_path / "data", kind)
    stages: list[Any] = [
        Train("first", compare=["majority"], strategies=["finetune"]),
        Train("second", strategies=["lora", "ema"]),
    ]
    if kind != "number":
        stages += [Train("student", strategies=[{"distill": {"teacher": "@first"}}])]
        stages += [Ensemble("both", "mean", models=["@first", "@second"])]
    report = run(Recipe(data=Data(str(data)), model=TINY, training=QUICK, stages=stages), tmp_path / "out")
    first = report["stages"][0]
    assert first["metric"] == metric and first["metrics"][metric]["low"] is not None
    assert [gain["metric"] for gain in first["gains"]][:1] == [metric]
    table = load_dataset("parquet", data_files=str(tmp_path / "out/first/predictions.parquet"), split="train")
    assert len(table) == 19 and {"label", "prediction"} <= set(table.column_names)
    # an export says itself what it predicts
    said = inference.predict(str(tmp_path / "out" / "first"), ["red sea", "big red hill"])
    shown = inference.evaluate(str(tmp_path / "out" / "first"), str(data))
    assert shown["metrics"][metric]["value"] == pytest.approx(first["metrics"][metric]["value"], abs=1e-5)
    kinds = {"classes": list, "number": float, "class": str}
    assert [type(value) for value in said["prediction"]] == [kinds[kind]] * 2


@pytest.mark.parametrize("kind", ["classes", "number"])
def test_pipelines_of_transformers_give_the_same(kind, tmp_path):
    from transformers import pipeline

    data = folder(tmp_path / "data", kind)
    recipe = Recipe(data=Data(str(data)), model=TINY, training=QUICK, stages=[Train("one")])
    run(recipe, tmp_path / "out")
    model = str(tmp_path / "out" / "one" / "model")
    given = ["red sea", "big red hill"]
    ours = inference.predict(model, given)
    theirs = pipeline("text-classification", model=model, top_k=None)(given)
    for i, found in enumerate(theirs):
        if kind == "number":
            assert found[0]["score"] == pytest.approx(ours["prediction"][i], abs=1e-5)
        else:
            scores = {entry["label"]: entry["score"] for entry in found}
            assert [scores[name] for name in ("big", "red")] == pytest.approx(ours["probability"][i], abs=1e-5)


def test_losses_are_those_of_transformers(tmp_path):
    """`model(labels=...)` with the same problem_type has the mean of our values."""
    for kind in ("classes", "number"):
        task = text_task()
        info = prepare("mine", Data(str(folder(tmp_path / kind, kind))), task)
        loaded = task.load(Model(**TINY), info)
        rows = task.preprocess(info.splits["train"][:6], loaded, True)
        rows = [{**{k: v[i] for k, v in rows.items()}, "index": i} for i in range(6)]
        batch = task.collate(rows, loaded)
        values, weight, unit = task.loss(task.forward(loaded.model.eval(), batch), batch)
        assert float(weight.sum()) == float(task.units(batch)[unit]) == values.numel()
        given = {k: v for k, v in batch.items() if k != "index"}
        expected = loaded.model(**{**given, "labels": batch["labels"].float()}).loss
        assert float(values.detach().mean()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_missing_labels_count_for_nothing():
    several, number = PROBLEMS["classes"], PROBLEMS["number"]
    labels = torch.tensor([[1, 0], [IGNORED, IGNORED]])
    values, weight = several.loss(torch.zeros(2, 2), labels, 0.0)
    assert weight.tolist() == [[1.0, 1.0], [0.0, 0.0]] and int(several.count(labels)) == 2 and values.isfinite().all()
    labels = number.tensor(number.labels([2.0, None], None))  # type: ignore[arg-type]
    values, weight = number.loss(torch.ones(2, 1), labels, 0.0)
    assert weight.tolist() == [1.0, 0.0] and values[0] == 1.0 and values.isfinite().all()


def test_scores_of_several_classes_are_those_of_yes_and_no():
    logits = torch.randn(3, 4)
    scores_NC, weight_N = PROBLEMS["classes"].scores(logits)
    assert scores_NC.shape == (12, 2) and weight_N.sum() == 12
    torch.testing.assert_close(scores_NC.softmax(-1)[:, 1].reshape(3, 4), logits.sigmoid())
    torch.testing.assert_close(PROBLEMS["classes"].from_scores(scores_NC.log_softmax(-1)).reshape(3, 4), logits)


def test_numbers_have_no_classes_to_distil(tmp_path):
    stages = [Train("one"), Train("two", strategies=[{"distill": {"teacher": "@one"}}])]
    recipe = Recipe(data=Data(str(folder(tmp_path / "d", "number"))), model=TINY, training=QUICK, stages=stages)
    with pytest.raises(RecipeError, match="numbers for labels"):
        run(recipe, tmp_path / "out")


def test_a_head_of_another_size_is_replaced_only_when_asked(tmp_path):
    task, info = text_task(), None
    info = prepare("mine", Data(str(folder(tmp_path / "a", "class"))), task)
    loaded = task.load(Model(**TINY), info)
    task.save(loaded, tmp_path / "model")
    other = text_task()
    numbers = prepare("mine", Data(str(folder(tmp_path / "b", "number"))), other)
    with pytest.raises(RecipeError, match="head of 3 outputs, the data ask for 1"):
        other.load(Model(path=str(tmp_path / "model")), numbers)
    again = other.load(Model(path=str(tmp_path / "model"), replace_head=True), numbers)
    assert again.model.config.num_labels == 1 and "classifier.weight" in again.new_parameters


def test_whole_numbers_are_numbers_where_the_task_says_so(tmp_path):
    rows = {"text": ["a", "b", "c d"], "label": [1, 2, 5]}
    info = prepare("mine", Data(str(write(tmp_path, train=rows, validation=rows))), text_task(label_kind="number"))
    assert info.labels is None and info.splits["train"]["label"][2] == 5.0


def test_metrics_that_the_labels_have_not_are_refused(tmp_path):
    info = prepare("mine", Data(str(folder(tmp_path, "number"))), text_task())
    with pytest.raises(RecipeError, match="'accuracy' is none for regression"):
        text_task(metrics=["accuracy"]).settle(info)


# --- metrics against libraries ----------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_libraries():
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, top_k_accuracy_score

    random = np.random.default_rng(0)
    x, y = random.normal(size=60).round(1), random.normal(size=60).round(1)
    weights = random.integers(0, 4, 60)
    repeated = [np.repeat(v, weights) for v in (x, y)]
    assert scoring.pearson(x, y, weights) == pytest.approx(pearsonr(*repeated)[0])
    groups = [np.unique(values, return_inverse=True)[1] for values in (x, y)]
    assert scoring.spearman(*groups, weights) == pytest.approx(spearmanr(*repeated)[0])
    guess, truth = random.random((60, 4)) > 0.5, random.random((60, 4)) > 0.4
    found = {"scores": np.where(guess, 1.0, -1.0), "label": truth.astype(int)}
    scores = PROBLEMS["classes"].measure(found, ["micro_f1", "macro_f1"])
    for average in ("micro", "macro"):
        assert scores.metrics[f"{average}_f1"] == pytest.approx(f1_score(truth, guess, average=average))
        expected = f1_score(np.repeat(truth, weights, 0), np.repeat(guess, weights, 0), average=average)
        assert scores.statistics[f"{average}_f1"](weights) == pytest.approx(expected)
    assert scores.metrics["subset_accuracy"] == pytest.approx((truth == guess).all(1).mean())
    logits, classes = random.normal(size=(60, 9)), random.integers(0, 9, 60)
    best = scoring.among_best(logits, classes, 5)
    assert best.mean() == pytest.approx(top_k_accuracy_score(classes, logits, k=5, labels=range(9)))


def test_calibration_error_in_a_case_that_is_known():
    """Eight rows with confidence 0.75, of which four are right: off by a quarter; certain and right: not at all."""
    logits = np.log(np.array([[0.75, 0.25]] * 8 + [[1.0, 1e-12]] * 8))
    truth = np.array([0] * 4 + [1] * 4 + [0] * 8)
    bins = scoring.confidence_bins(logits, truth)
    assert scoring.calibration_error(bins, np.ones(16)) == pytest.approx(0.125, abs=1e-9)
    assert scoring.calibration_error(bins, np.repeat([1.0, 0.0], 8)) == pytest.approx(0.25, abs=1e-9)


def test_images_may_have_several_classes_and_calibration_is_reported(tmp_path):
    random = np.random.default_rng(0)

    def rows(count: int) -> Dataset:
        pixels = random.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
        labels = [[n for n in ("dark", "plain") if random.random() < 0.5] for _ in range(count)]
        return Dataset.from_dict(
            {"image": [Image.fromarray(p) for p in pixels], "label": labels, "one": ["a", "b"] * (count // 2)}
        )

    for split, count in (("train", 24), ("validation", 8), ("test", 8)):
        rows(count).to_parquet(tmp_path / f"{split}.parquet")
    model = {"config": "vit", "config_overrides": VIT}
    several = Recipe(
        data=Data(str(tmp_path), columns={"label": "label"}),
        task="image-classification",
        model=model,
        training=QUICK,
        stages=[Train("one")],
    )
    assert run(several, tmp_path / "a")["stages"][0]["metric"] == "micro_f1"
    metrics = ["calibration_error", "accuracy", "top5_accuracy"]
    one = Recipe(
        data=Data(str(tmp_path), columns={"label": "one"}),
        task={"image-classification": {"metrics": metrics}},
        model=model,
        training=QUICK,
        stages=[Train("one")],
    )
    found = run(one, tmp_path / "b")["stages"][0]
    assert found["metric"] == "calibration_error" and not found["higher_is_better"]
    assert (
        found["metrics"]["top5_accuracy"]["value"] == 1.0 and found["metrics"]["calibration_error"]["low"] is not None
    )


def test_what_a_task_keeps_must_be_the_same_in_another_process(tmp_path):
    """A place in memory in the key of preprocessed rows would make every process compute them anew."""
    from kt_hf.loader import preprocessing_key

    info = prepare("mine", Data(str(folder(tmp_path, "classes"))), text_task())
    task = text_task()
    loaded = task.load(Model(**TINY), info)
    assert preprocessing_key(info, "train", task, loaded, True) == preprocessing_key(info, "train", task, loaded, True)
    task.kept = object()
    with pytest.raises(RecipeError, match="keeps an object without a text of its own"):
        preprocessing_key(info, "train", task, loaded, True)
