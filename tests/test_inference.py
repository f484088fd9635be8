"""`kt-hf predict` and `kt-hf evaluate` on models and data that are made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from safetensors.torch import load_file, save_file

from kt_hf import Merge, Recipe, Train, ensembling, inference, registry, run
from kt_hf.errors import DataError, RecipeError
from kt_hf.task import FACTS
from kt_hf.testing.bench import LABELS, Bench


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of every task as parquet files, and images as files."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("image-classification", "text-classification", "zero-shot-image-classification"):
        bench = Bench(name, folder / name)
        for split, rows in bench.info.splits.items():
            (folder / name / "data").mkdir(parents=True, exist_ok=True)
            named = rows.remove_columns(["index", "label"]).add_column("label", [LABELS[i] for i in rows["label"]])
            named.to_parquet(folder / name / "data" / f"{split}.parquet")
    for i, row in enumerate(Bench("image-classification", folder / "i").info.splits["test"].select(range(2))):
        row["image"].save(folder / f"{i}.png")
    return folder


def model(made: Path, task: str, name: str = "start") -> str:
    return Bench(task, made / task).saved(name)


def reference(folder: str, kind: str, **inputs: Any) -> torch.Tensor:
    import transformers

    plain = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        return plain(**inputs).logits.softmax(-1)


def test_texts_are_predicted_as_transformers_does(made: Path):
    from transformers import AutoTokenizer

    folder, texts = model(made, "text-classification"), ["circle redstone", "star newlamp oldriver"]
    table = inference.predict(folder, texts)
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    expected = reference(folder, "AutoModelForSequenceClassification", **inputs)
    assert table["input"] == texts
    assert table["prediction"] == [LABELS[i] for i in expected.argmax(-1)]
    np.testing.assert_allclose(table["probability"], expected.max(-1).values.numpy(), rtol=1e-4)


def test_image_files(made: Path):
    table = inference.predict(model(made, "image-classification"), [str(made / "0.png"), str(made / "1.png")])
    assert table["input"] == [str(made / "0.png"), str(made / "1.png")]
    assert set(table["prediction"]) <= set(LABELS) and all(1 / 3 <= p <= 1 for p in table["probability"])


def test_a_data_folder_gives_a_row_for_each_test_row_and_ignores_labels(made: Path, tmp_path: Path):
    table = inference.predict(model(made, "image-classification"), [str(made / "image-classification" / "data")])
    assert len(table["prediction"]) == 9
    for name, kind in (("a.parquet", "parquet"), ("a.jsonl", "json"), ("a.csv", "csv")):
        inference.write(table, str(tmp_path / name))
        again = load_dataset(kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path))
        assert again["prediction"][:] == table["prediction"]
        np.testing.assert_allclose(again["probability"][:], table["probability"])


def test_a_long_text_is_no_path(made: Path):
    table = inference.predict(model(made, "text-classification"), ["circle " + "q" * 600])
    assert table["prediction"][0] in LABELS


def test_an_unlabelled_file(made: Path, tmp_path: Path):
    Dataset.from_dict({"sentence": ["square bluelamp", "circle"]}).to_parquet(tmp_path / "rows.parquet")
    table = inference.predict(model(made, "text-classification"), [str(tmp_path / "rows.parquet")])
    assert table["input"] == ["square bluelamp", "circle"]


def test_ensembles_predict_the_mean_of_their_members(made: Path, tmp_path: Path):
    members = [model(made, "text-classification", name) for name in ("start", "other")]
    mean = registry.load("ensemble", "mean")()
    ensembling.save(tmp_path / "both", [Path(m) for m in members], "mean", mean, "TextClassification")
    texts = ["circle redstone", "star oldcloud", "square"]
    found = inference.predict(str(tmp_path / "both"), texts)
    assert inference.infer_task(str(tmp_path / "both")) == "text-classification"
    alone = [inference.predict(m, texts) for m in members]
    assert found["probability"] != alone[0]["probability"]
    assert all(
        p <= max(a, b) + 1e-6 for p, a, b in zip(found["probability"], *(t["probability"] for t in alone), strict=True)
    )


def test_generation_continues_a_prompt(made: Path):
    table = inference.predict(model(made, "text-generation"), ["circle redstone"], max_new_tokens=4)
    assert len(table["prediction"]) == 1 and 0 < table["probability"][0] <= 1


def test_a_dual_encoder_is_told_what_to_look_for(made: Path):
    folder = model(made, "zero-shot-image-classification")
    with pytest.raises(RecipeError, match="told what to look for"):
        inference.predict(folder, [str(made / "0.png")])
    table = inference.predict(folder, [str(made / "0.png")], labels=["circle", "star"])
    assert table["prediction"][0] in ("circle", "star")


def test_evaluation_recounts_the_predictions(made: Path):
    folder, data = model(made, "image-classification"), str(made / "image-classification" / "data")
    found = inference.evaluate(folder, data)
    truth = Dataset.from_parquet(f"{data}/test.parquet")["label"][:]
    predicted = inference.predict(folder, [data])["prediction"]
    share = np.mean([a == b for a, b in zip(truth, predicted, strict=True)])
    figure = found["metrics"]["accuracy"]
    assert figure["value"] == pytest.approx(share) and figure["low"] <= share <= figure["high"]
    assert found["primary_metric"] == "accuracy" and found["data"]["num_examples"] == 9
    assert "accuracy" in inference.figures(found)


def test_evaluation_takes_settings_of_the_data(made: Path, tmp_path: Path):
    rows = Dataset.from_parquet(str(made / "text-classification" / "data" / "test.parquet"))
    rows.rename_columns({"text": "first", "label": "second"}).to_csv(str(tmp_path / "test.csv"))
    found = inference.evaluate(
        model(made, "text-classification"), str(tmp_path), ["data.columns.text=first", "data.columns.label=second"]
    )
    assert found["task"] == "text-classification"
    with pytest.raises(RecipeError, match="columms"):
        inference.evaluate(model(made, "text-classification"), str(tmp_path), ["data.columms.text=first"])
    with pytest.raises(RecipeError, match="training"):
        inference.evaluate(model(made, "text-classification"), str(tmp_path), ["training.max_steps=3"])


def test_a_model_without_a_head_is_refused(made: Path, tmp_path: Path):
    folder = Path(model(made, "image-classification"))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))
    state = {
        k.removeprefix("vit."): v for k, v in load_file(folder / "model.safetensors").items() if k.startswith("vit.")
    }
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match="for which task"):
        inference.predict(str(tmp_path), [str(made / "0.png")])
    with pytest.raises(RecipeError, match="no trained head"):
        inference.evaluate(str(tmp_path), str(made / "image-classification" / "data"))


def test_inputs_that_cannot_be_right(made: Path):
    folder = model(made, "image-classification")
    with pytest.raises(DataError, match=r"no file 'missing\.png'"):
        inference.predict(folder, ["missing.png"])
    with pytest.raises(DataError, match="no image file"):
        inference.predict(folder, ["a text"])
    with pytest.raises(RecipeError, match="classes of its own"):
        inference.predict(folder, [str(made / "0.png")], labels=["a", "b"])
    with pytest.raises(RecipeError, match=r"no config\.json"):
        inference.predict(str(made), [str(made / "0.png")])


# --- as in training --------------------------------------------------------------------------------------------------


def test_the_settings_of_training_are_those_of_prediction(tmp_path):
    """They stand in the model's folder, are its soup's, too, and can be changed; paths do not stand there."""
    bench = Bench("question-answering", tmp_path / "bench")
    for split, rows in bench.info.splits.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.remove_columns("index").to_parquet(tmp_path / "data" / f"{split}.parquet")
    given = {"max_length": 20, "doc_stride": 3, "max_question_length": 9, "max_answer_length": 1}
    recipe = Recipe(
        [
            Train("a", model=bench.saved("start"), seeds=2, training={"max_steps": 2, "eval_steps": 0}),
            Merge("soup", "uniform_soup", models=["@a"]),
        ],
        task={"question-answering": given},
        data=str(tmp_path / "data"),
    )
    reported = run(recipe, tmp_path / "out")["stages"]
    name = "task.question-answering"
    for stage in reported:
        model = tmp_path / "out" / stage["name"]
        assert json.loads((model / "model" / FACTS).read_text()) == {"task": "question-answering", "settings": given}
        seeds = stage["metrics"]["f1"]["per_seed"]
        found = inference.evaluate(str(model), str(tmp_path / "data"))["metrics"]["f1"]["value"]
        assert found == pytest.approx(seeds[0])
    one = inference.predict(str(model), [str(tmp_path / "data")])["prediction"]
    other = inference.predict(str(model), [str(tmp_path / "data")], settings=[f"{name}.max_answer_length=5"])
    assert all(len(text.split()) <= 1 for text in one) and any(len(text.split()) > 1 for text in other["prediction"])
    with pytest.raises(RecipeError, match="max_answer_length: got 'x'"):
        inference.predict(str(model), [str(tmp_path / "data")], settings=[f"{name}.max_answer_length=x"])


def test_columns_of_new_rows_can_be_named(tmp_path):
    rows = Dataset.from_dict({"body": ["circle old", "star new"], "title": ["a", "b"]})
    rows.to_parquet(tmp_path / "new.parquet")
    model = Bench("text-classification", tmp_path / "bench").saved("start")
    with pytest.raises(RecipeError, match=r"several columns could be|no column"):
        inference.predict(model, [str(tmp_path / "new.parquet")])
    found = inference.predict(model, [str(tmp_path / "new.parquet")], settings=["data.columns.text=body"])
    assert found["prediction"] == inference.predict(model, ["circle old", "star new"])["prediction"]
