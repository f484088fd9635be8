"""Image-text matching: pairs that belong together and pairs that do not, hard ones among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import task_grid
import torch
from kt_hf_plugins.image_text_matching import drawn, others, wrong_texts
from PIL import Image
from sklearn import metrics as sklearn_metrics
from torch.nn import functional as F

from kt_hf import Data, Recipe, Train, inference, loader, registry, run, testing
from kt_hf.bundle import Bundle, Position
from kt_hf.data import DataInfo, prepare
from kt_hf.errors import DataError, RecipeError, RowError
from kt_hf.functional import scoring
from kt_hf.recipe import Model

NAME = "image-text-matching"
Matching = registry.load("task", NAME)
MODEL = Matching.conformance["model"]
COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}
QUICK = {"max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none", "num_threads": 1, "eval_steps": 0}


def pairs(count: int, seed: int = 0) -> dict[str, list[Any]]:
    """Squares of two colours, and what these are."""
    random = np.random.default_rng(seed)
    names = [random.choice(list(COLORS), 2) for _ in range(count)]
    pixels = random.integers(0, 15, (count, 8, 8, 3)).astype(np.uint8)
    for picture, (left, right) in zip(pixels, names, strict=True):
        picture[:, :4] += np.array(COLORS[left], np.uint8)
        picture[:, 4:] += np.array(COLORS[right], np.uint8)
    texts = [f"{left} and {right}, {i}" for i, (left, right) in enumerate(names)]
    return {"image": [Image.fromarray(p) for p in pixels], "text": texts}


def rows_of(columns: dict[str, list[Any]]) -> datasets.Dataset:
    kinds: dict[str, Any] = {"image": datasets.Image(), "label": datasets.Value("int64")}
    several = isinstance(columns["text"][0], list)
    text = datasets.List(datasets.Value("string")) if several else datasets.Value("string")
    kinds |= {"text": text, "wrong_text": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({k: kinds[k] for k in columns}))


def folder(path: Path, change: Any = None, **counts: int) -> Path:
    """7 rows of test, which two do not divide."""
    path.mkdir(exist_ok=True)
    for i, (split, count) in enumerate((counts or {"train": 18, "validation": 6, "test": 7}).items()):
        columns = pairs(count, i)
        rows_of(columns if change is None else change(columns)).to_parquet(path / f"{split}.parquet")
    return path


def loaded(path: Path, **settings: Any) -> tuple[Any, Any, Any]:
    task = Matching(**settings)
    info = prepare("d", Data(str(path)), task)
    torch.manual_seed(0)
    found = task.load(Model(**MODEL), info)
    found.model.eval()
    return task, info, found


def batch_of(task: Any, rows: dict[str, Any], made: Any, train: bool = True) -> dict[str, Any]:
    columns = task.preprocess({k: v for k, v in rows.items() if k != "index"}, made, train)
    count = len(rows["image"])
    return task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(count)], made)


def texts_of(made: Any, ids_BL: torch.Tensor) -> list[str]:
    return [made.processor.processor.tokenizer.decode(row, skip_special_tokens=True) for row in ids_BL]


def terms_of(stage: Path) -> dict[str, float]:
    """Of the first step."""
    return json.loads((stage / "stage.json").read_text())["curve"][0]["terms"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("pairs"))


def test_it_conforms() -> None:
    testing.check_task(NAME)
    testing.check_strategy("ema", task=NAME)


# --- wrong texts ------------------------------------------------------------------------------------------------------


def test_every_text_is_wrong_once_in_an_evaluation(plain: Path) -> None:
    task, info, _ = loaded(plain)
    test = info.splits["test"]
    assert sorted(test["wrong_text"]) == sorted(test["text"]), "so the text alone tells nothing"
    assert all(wrong != own for wrong, own in zip(test["wrong_text"], test["text"], strict=True))
    before = list(test["wrong_text"])
    task.settle(info)
    assert list(info.splits["test"]["wrong_text"]) == before and "wrong_text" not in info.splits["train"].column_names
    again = loaded(plain)[1].splits
    assert list(again["test"]["wrong_text"]) == before


def test_what_is_the_same_is_not_wrong() -> None:
    """Neither a text that the image has, too, nor another text of the same image."""
    columns = pairs(6)
    columns["text"][1] = f"  {columns['text'][0].upper()} "
    columns["image"][3] = columns["image"][2]
    found = wrong_texts(rows_of(columns), "test")
    assert found[0] not in columns["text"][:2] and found[1] not in columns["text"][:2]
    assert found[2] not in columns["text"][2:4] and found[3] not in columns["text"][2:4]
    same = {"image": [columns["image"][0]] * 3, "text": columns["text"][:3]}
    assert wrong_texts(rows_of(same), "test") == [None] * 3 and wrong_texts(rows_of(pairs(1)), "test") == [None]


def test_wrong_texts_in_training_are_any_others(tmp_path: Path) -> None:
    """Of all training rows, but not a text that the row has, too, nor one of the same image."""

    def some_alike(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        columns["text"][1], columns["image"][3] = columns["text"][0], columns["image"][2]
        return columns

    task, info, made = loaded(folder(tmp_path, some_alike, train=6, validation=4))
    rows = loader.Rows(info, "train", task, made, train=True)
    texts = list(info.splits["train"]["text"])
    ids = {tuple(made.processor.texts([text], 77)["input_ids"][0]): text for text in texts}
    seen = [
        {ids[tuple(row["wrong_input_ids"])] for row in rows.__getitems__([(e, i) for e in range(80)])} for i in range(6)
    ]
    for i, found in enumerate(seen):
        same = {0: {0, 1}, 1: {0, 1}, 2: {2, 3}, 3: {2, 3}}.get(i, {i})
        assert found == {texts[j] for j in set(range(6)) - same}
    batch = task.collate(rows.__getitems__([(0, i) for i in range(6)]), made)
    assert batch["has_wrong"].all() and int(task.units(batch)["pair"]) == 12


def test_a_row_without_any_other_counts_once(tmp_path: Path) -> None:
    task, info, made = loaded(folder(tmp_path, train=1, validation=1))
    batch = task.collate(loader.Rows(info, "train", task, made, train=True).__getitems__([(0, 0)]), made)
    assert not batch["has_wrong"].any() and int(task.units(batch)["pair"]) == 1
    values, weight, unit = task.loss(task.forward(made.model, batch), batch)
    assert float(weight.sum()) == 1 and values.isfinite().all() and unit == "pair"


def test_training_rows_draw_by_seed_epoch_and_index(tmp_path: Path) -> None:
    """A random caption and a random place in [0, 1), whatever else is drawn before and in whatever order."""

    def several(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**columns, "text": [[text, f"{text} again", f"{text} once more"] for text in columns["text"]]}

    _, info, made = loaded(folder(tmp_path, several))
    task = Matching()
    task.settle(info)
    rows = loader.Rows(info, "train", task, made, seed=3, train=True)
    first = rows.__getitems__([(0, 4), (1, 4), (0, 5)])
    torch.rand(5)
    again = rows.__getitems__([(0, 5), (0, 4)])
    assert [row["draw"] for row in (again[1], again[0])] == [first[0]["draw"], first[2]["draw"]]
    assert again[1]["input_ids"] == first[0]["input_ids"] and first[0]["draw"] != first[1]["draw"]
    assert again[1]["wrong_input_ids"] == first[0]["wrong_input_ids"]
    lengths = {len(row["input_ids"]) for row in rows.__getitems__([(epoch, 4) for epoch in range(12)])}
    assert len(lengths) == 3
    fixed = loader.Rows(info, "test", task, made)
    assert {len(row["input_ids"]) for row in fixed.__getitems__([(0, i) for i in range(7)])} < lengths


def test_hard_ones_are_drawn_in_proportion(plain: Path) -> None:
    """ALBEF's distribution: a softmax of the similarities over the texts that are wrong."""
    task, _, made = loaded(plain, negatives="hard", temperature=0.5)
    columns = pairs(5)
    columns["text"][1] = columns["text"][0]
    batch = batch_of(task, columns, made)
    with torch.no_grad():
        outputs = task.forward(made.model, batch)
        near_BB = outputs.image_embeds @ outputs.text_embeds.T / 0.5
        expected = near_BB.masked_fill(~others(batch), -torch.inf).softmax(1)
        steps = 600
        counts = torch.zeros(5, 5)
        for i in range(steps):
            chosen = task.choose(made.model, {**batch, "draw": torch.full((5,), (i + 0.5) / steps)})
            same = (chosen["wrong_input_ids"][:, None] == batch["input_ids"][None]).all(-1).float()
            counts += same / same.sum(1, keepdim=True)
    expected[:, :2] = expected[:, :2].mean(1, keepdim=True)  # two texts that are the same cannot be told apart
    torch.testing.assert_close(counts / steps, expected, atol=4e-3, rtol=0)
    assert Matching().choose(made.model, batch) is batch
    alone = task.part(batch, 2, 3)
    assert torch.equal(task.choose(made.model, alone)["wrong_input_ids"], alone["wrong_input_ids"])
    assert torch.equal(chosen["has_wrong"], batch["has_wrong"]), "what is counted stays"


def test_training_is_on_the_hard_ones(plain: Path) -> None:
    """The loss of a step is that of the pairs that the model chose."""
    task, _, made = loaded(plain, negatives="hard")
    batch = batch_of(task, pairs(6), made)
    counts = {"train": {name: int(count) for name, count in task.units(batch).items()}}
    position = Position(0, 0.0, 0, 1, 42, 0, 1, counts, {"train": (6,)})
    with torch.no_grad():
        found = Bundle(made, task, {}).eval()("loss", batch, {}, position)["task"]
        chosen = task.choose(made.model, batch)
        hard, easy = (task.loss(task.forward(made.model, b), b)[0].mean() for b in (chosen, batch))
    assert not torch.equal(chosen["wrong_input_ids"], batch["wrong_input_ids"])
    torch.testing.assert_close(found, hard)
    assert abs(float(found - easy)) > 1e-4


def test_a_draw_finds_its_place() -> None:
    weights_BB = torch.tensor([[0.0, 1.0, 1.0, 0.0]] * 4)
    assert drawn(weights_BB, torch.tensor([0.0, 0.49, 0.51, 0.999])).tolist() == [1, 1, 2, 2]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["cross_attention", "concatenation"])
def test_pairs_are_judged_one_by_one(fusion: str, plain: Path) -> None:
    """Loss and scores of a batch are those of a plain call of the model for each pair."""
    task, _, made = loaded(plain, fusion=fusion, negatives="hard")
    batch = task.choose(made.model, batch_of(task, pairs(4), made))
    with torch.no_grad():
        outputs = task.forward(made.model, batch)
        names, values = ("input_ids", "attention_mask"), []
        for i in range(4):
            for prefix, answer in (("", 1), ("wrong_", 0)):
                text = {name: batch[f"{prefix}{name}"][i : i + 1] for name in names}
                text = {name: ids[:, text["attention_mask"][0].bool()] for name, ids in text.items()}
                logits = made.model(pixel_values=batch["pixel_values"][i : i + 1], **text).logits
                values.append(F.cross_entropy(logits, torch.tensor([answer])))
        found, weight, _ = task.loss(outputs, batch)
        torch.testing.assert_close(found, torch.stack(values), rtol=1e-4, atol=1e-5)
        assert weight.tolist() == [1.0] * 8
        part = task.forward(made.model, task.part(batch, 1, 3))
        torch.testing.assert_close(part.logits, outputs.logits[1:3], rtol=1e-4, atol=1e-5)


def test_metrics_are_scikit_learns(plain: Path) -> None:
    task, info, made = loaded(plain)
    random = np.random.default_rng(0)
    odds = random.normal(size=(30, 2)).round(1)
    label = np.tile([1, 0], (30, 1))
    label[random.integers(0, 30, 6), 1] = -100
    scores = task.measure({"scores": odds, "label": label}, made, info)
    known = label != -100
    truth, guess = label[known], (odds > 0)[known].astype(int)
    assert scores.metrics["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, guess))
    assert scores.metrics["f1"] == pytest.approx(sklearn_metrics.f1_score(truth, guess))
    assert scores.metrics["roc_auc"] == pytest.approx(sklearn_metrics.roc_auc_score(truth, odds[known]))
    counts = random.integers(0, 3, 30).astype(float)
    weights = np.repeat(counts[:, None], 2, 1)[known]
    expected = sklearn_metrics.roc_auc_score(truth, odds[known], sample_weight=weights)
    assert scores.statistics["roc_auc"](counts) == pytest.approx(expected)
    assert scores.statistics["f1"](counts) == pytest.approx(
        sklearn_metrics.f1_score(truth, guess, sample_weight=weights)
    )
    values, pairs_N = scores.examples["accuracy"]
    assert (values * pairs_N).sum() / pairs_N.sum() == pytest.approx(scores.metrics["accuracy"])
    assert scoring.roc_auc(np.array([0, 1]), np.array([True, True]), np.ones(2)) == 0.5


def test_predict_is_what_plain_code_says(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForNextSentencePrediction, AutoTokenizer

    task, info, made = loaded(plain)
    task.save(made, tmp_path)
    model = AutoModelForNextSentencePrediction.from_pretrained(tmp_path).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    rows = info.splits["test"][:]
    pixels = processor(rows["image"], return_tensors="pt")["pixel_values"]
    chances = {}
    with torch.no_grad():
        for name in ("text", "wrong_text"):
            tokens = tokenizer(rows[name], padding=True, return_tensors="pt")
            chances[name] = model(pixel_values=pixels, **tokens).logits.softmax(-1)[:, 1].numpy()
    assert inference.infer_task(str(tmp_path)) == NAME
    said = inference.predict(str(tmp_path), [str(plain / "test.parquet")])
    np.testing.assert_allclose(said["probability"], chances["text"], rtol=1e-4)
    assert said["prediction"] == ["match" if p > 0.5 else "mismatch" for p in chances["text"]]
    shown = inference.evaluate(str(tmp_path), str(plain), task=NAME)["metrics"]
    right = np.concatenate([chances["text"] > 0.5, chances["wrong_text"] <= 0.5])
    assert shown["accuracy"]["value"] == pytest.approx(right.mean())
    assert shown["accuracy"]["low"] <= shown["accuracy"]["value"] <= shown["accuracy"]["high"]


# --- given pairs ------------------------------------------------------------------------------------------------------


def test_pairs_with_labels_are_taken_as_they_are(tmp_path: Path) -> None:
    def labelled(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        shifted = columns["text"][1:] + columns["text"][:1]
        texts = [own if i % 2 else other for i, (own, other) in enumerate(zip(columns["text"], shifted, strict=True))]
        return {**columns, "text": texts, "label": [i % 2 for i in range(len(texts))]}

    path = folder(tmp_path / "data", labelled)
    recipe = Recipe([Train("one", training=QUICK, compare=["majority"])], data=Data(str(path)), task=NAME, model=MODEL)
    found = run(recipe, tmp_path / "out")["stages"][0]
    assert set(found["metrics"]) == {"accuracy", "f1", "roc_auc"}
    task, info, made = loaded(path)
    batch = batch_of(task, info.splits["train"][:5], made)
    assert batch["labels"].tolist() == [0, 1, 0, 1, 0] and "wrong_input_ids" not in batch
    assert int(task.units(batch)["pair"]) == 5 and not task.random_rows
    rows = {**info.splits["train"][:2], "label": [0.0, 0.5]}
    with pytest.raises(RowError, match=r"the label is 0\.5"):
        batch_of(task, rows, made)


def test_given_wrong_texts_are_used(tmp_path: Path) -> None:
    def with_foils(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**columns, "wrong_text": ["white and white and white"] * (len(columns["text"]) - 1) + [None]}

    task, info, made = loaded(folder(tmp_path / "data", with_foils))
    batch = batch_of(task, info.splits["train"][16:18], made)
    assert texts_of(made, batch["wrong_input_ids"])[0] == "white and white and white"
    assert batch["has_wrong"].tolist() == [True, False] and int(task.units(batch)["pair"]) == 3
    assert task.choose(made.model, batch) is batch and not task.random_rows


def test_models_and_rows_that_do_not_fit(plain: Path, tmp_path: Path) -> None:
    task, info, made = loaded(plain)
    with pytest.raises(RecipeError, match="a tower for each"):
        task.load(Model(image=MODEL["image"]), info)
    with pytest.raises(RecipeError, match="does not fuse several media"):
        task.load(Model(config="vilt"), info)
    rows = {k: v[:2] for k, v in pairs(2).items()}
    with pytest.raises(RowError, match="there is no text"):
        batch_of(task, {**rows, "text": ["a", " "]}, made)
    with pytest.raises(RowError, match="there is no image"):
        batch_of(task, {**rows, "image": [None, None]}, made)
    one = DataInfo("one", {"test": info.splits["test"].select([0])}, info.roles, None, "one")
    with pytest.raises(DataError, match="no row has a wrong text"):
        task.measure({"scores": np.ones((1, 2)), "label": np.full((1, 2), -100)}, made, one)


# --- in recipes -------------------------------------------------------------------------------------------------------


def test_a_model_taught_by_itself_has_nothing_to_learn(plain: Path, tmp_path: Path) -> None:
    """The teacher sees the pairs that the student has chosen: the divergence is 0."""
    task, _, made = loaded(plain)
    task.save(made, tmp_path / "model")
    one = {**QUICK, "max_steps": 1, "logging_steps": 1}
    distill = {"distill": {"teacher": str(tmp_path / "model"), "alpha": 1.0}}
    recipe = Recipe(
        [Train("one", strategies=[distill], model=str(tmp_path / "model"), training=one)],
        data=Data(str(plain)),
        task={NAME: {"negatives": "hard"}},
    )
    run(recipe, tmp_path / "out")
    assert terms_of(tmp_path / "out" / "one")["distill/kl"] == pytest.approx(0.0, abs=1e-6)


def test_similarity_is_learnt_beside(plain: Path, tmp_path: Path) -> None:
    """`contrastive` with an alpha below 1 adds its loss to the task's own."""
    stages = [
        Train("both", strategies=["finetune", {"contrastive": {"alpha": 0.4}}], training={"logging_steps": 1}),
    ]
    task = {NAME: {"negatives": "hard"}}
    recipe = Recipe(stages, data=Data(str(plain)), task=task, model=MODEL, training=QUICK)
    run(recipe, tmp_path / "out")
    terms = terms_of(tmp_path / "out" / "both")
    assert {"task", "contrastive/clip"} <= set(terms) and terms["task"] > 0 and terms["contrastive/clip"] > 0


@pytest.mark.slow
def test_it_learns_what_belongs_together(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", train=400, validation=60, test=100)
    training = {**QUICK, "max_steps": 400, "per_device_train_batch_size": 32, "learning_rate": 3e-3}
    strategies = ["finetune", {"contrastive": {"alpha": 0.5}}]
    recipe = Recipe(
        [Train("one", strategies=strategies, training=training)],
        data=Data(str(path)),
        task={NAME: {"negatives": "hard"}},
        model={**MODEL, "projection_dim": 32},
    )
    assert run(recipe, tmp_path / "out")["stages"][0]["metrics"]["accuracy"]["value"] > 0.75


@pytest.mark.slow
def test_every_strategy(plain: Path, tmp_path: Path) -> None:
    report = task_grid.run_grid(tmp_path / "out", Data(str(plain)), MODEL, {NAME: {}})
    assert report["uniform"]["metrics"]["accuracy"]["value"] == report["again"]["metrics"]["accuracy"]["value"]
    trained = str(tmp_path / "out" / "frozen" / "model")
    one = inference.evaluate(trained, str(plain), [], task=NAME)
    assert one["metrics"]["roc_auc"]["value"] == pytest.approx(report["frozen"]["metrics"]["roc_auc"]["value"])
