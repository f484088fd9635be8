"""Ensembles of models that know different classes: the union, by name; weights of a mixture; heads cut to the data's
classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import helpers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy import optimize
from transformers import AutoModelForImageClassification, ViTImageProcessor

from kt_hf import Data, Ensemble, Evaluate, Model, Recipe, Train, ensembling, inference, registry, run
from kt_hf.errors import RecipeError
from kt_hf.facts import load_frozen
from kt_hf.functional.mixing import mixture_weights, output_weights, place, weighted_outputs

DATA = ["owl", "cat", "bear", "dog"]
MEMBERS = {"pets": ["cat", "dog"], "wild": ["Owl", "dog", "bear", "emu"]}
"""The second one has a class that the data lack, shares one with the first, and writes another one differently."""
UNION = ["cat", "dog", "Owl", "bear", "emu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two members, and data of four classes."""
    root, task = tmp_path_factory.mktemp("union"), helpers.ImageClassification()
    info = helpers.image_info(40, 21, DATA)
    for number, (name, labels) in enumerate(MEMBERS.items()):
        torch.manual_seed(number)
        task.save(task.load(helpers.config("image"), dataclasses.replace(info, labels=labels)), root / name)
    (root / "data").mkdir()
    import datasets

    for split, rows in info.splits.items():
        named = rows.remove_columns("index").cast_column("label", datasets.ClassLabel(names=DATA))
        named.to_parquet(str(root / "data" / f"{split}.parquet"))
    return root


def members(made: Path) -> list[str]:
    return [str(made / name) for name in MEMBERS]


def chances(made: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities_KNU of every member over the union, by plain transformers; true names_N)."""
    import datasets

    rows = datasets.Dataset.from_parquet(str(made / "data" / f"{split}.parquet"))
    found = np.zeros((len(MEMBERS), len(rows), len(UNION)))
    for k, name in enumerate(MEMBERS):
        model = AutoModelForImageClassification.from_pretrained(made / name).eval()
        pixels = ViTImageProcessor.from_pretrained(made / name)(list(rows["image"]), return_tensors="pt")
        with torch.no_grad():
            probabilities_NC = model(**pixels).logits.double().softmax(-1).numpy()
        for c, label in model.config.id2label.items():
            found[k, :, UNION.index(label)] = probabilities_NC[:, c]
    return found, np.array([DATA[y] for y in rows["label"]])


@pytest.fixture(scope="module")
def report(made) -> dict:
    stages = [
        Ensemble("equal", models=members(made)),
        Ensemble("fitted", {"mean": {"weights": "fit"}}, models=members(made), compare=["majority", "@equal"]),
        Evaluate("again", model="@fitted", compare=["@fitted"]),
    ]
    return run(Recipe(stages, data=Data(str(made / "data"))), made / "out")


def test_outputs_are_added_by_name_over_the_union(made, report):
    found_KNU, names_N = chances(made, "test")
    for stage in report["stages"]:
        weights_K = stage["summary"].get("weights") or ([0.5, 0.5] if stage["name"] == "equal" else None)
        weights_K = weights_K or report["stages"][1]["summary"]["weights"]
        mixed_NU = np.einsum("k,knu->nu", np.asarray(weights_K), found_KNU)
        table = pq.read_table(made / "out" / stage["name"] / "predictions.parquet").to_pydict()
        np.testing.assert_allclose(np.exp(np.array(table["scores"])), mixed_NU, atol=1e-5)
        assert table["label"] == [UNION[[u.lower() for u in UNION].index(name)] for name in names_N]
        assert table["prediction"] == [UNION[i] for i in mixed_NU.argmax(1)]


def test_weights_minimise_the_cross_entropy_of_the_mixture(made, report):
    found_KNU, names_N = chances(made, "validation")
    right = [[u.lower() for u in UNION].index(name) for name in names_N]
    right_KN = found_KNU[:, np.arange(len(right)), right]
    assert (right_KN == 0).any(), "a member does not know some of the classes"
    best = optimize.minimize_scalar(
        lambda w: -np.log(w * right_KN[0] + (1 - w) * right_KN[1]).mean(), bounds=(1e-9, 1 - 1e-9), method="bounded"
    ).x
    assert report["stages"][1]["summary"]["weights"] == pytest.approx([best, 1 - best], abs=1e-4)


def test_members_without_a_class_in_common_are_weighed_by_their_share_of_the_rows():
    chances_KN = torch.tensor([[0.9, 0.3, 0.6, 0.0, 0.0], [0.0, 0.0, 0.0, 0.2, 0.99]])
    torch.testing.assert_close(mixture_weights(chances_KN), torch.tensor([0.6, 0.4], dtype=torch.float64))
    impossible = torch.cat([chances_KN, torch.zeros(2, 3)], 1)
    torch.testing.assert_close(mixture_weights(impossible), mixture_weights(chances_KN))
    assert mixture_weights(torch.zeros(2, 0)).tolist() == [0.5, 0.5]


# --- weighted logits --------------------------------------------------------------------------------------------------


def strangers(seed: int = 0, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores_KNC, labels_N) of two members that know two of four classes each. They are as sure of rows that are not
    theirs as of their own, but say it less loudly."""
    draw = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(rows) % 4
    scores_KNC = torch.full((2, rows, 4), float("-inf"))
    for k in (0, 1):
        own = labels_N // 2 == k
        noise_N2 = torch.randn(rows, 2, generator=draw)
        signal_N2 = 8.0 * torch.nn.functional.one_hot(labels_N % 2, 2) * own[:, None]
        scores_KNC[k, :, 2 * k : 2 * k + 2] = signal_N2 + 3.0 * noise_N2 - 8.0 * ~own[:, None]
    return scores_KNC, labels_N


def cross_entropy(
    scores_KNC: torch.Tensor, labels_N: torch.Tensor, weights: list[float], offsets: list[float]
) -> float:
    return float(torch.nn.functional.nll_loss(weighted_outputs(scores_KNC, weights, offsets), labels_N))


def test_logits_are_added_by_those_who_know_the_class():
    inf = float("-inf")
    scores_KNC = torch.tensor([[[1.0, 2.0, inf, inf]], [[inf, 0.5, -1.0, inf]]])
    found = weighted_outputs(scores_KNC, [2.0, 3.0], [0.1, -0.2])
    by_hand = torch.tensor([[2.0 + 0.1, 4.0 + 0.1 + 1.5 - 0.2, -3.0 - 0.2, inf]]).log_softmax(-1)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(
        weighted_outputs(scores_KNC[:1, :, :2], [1.0], [5.0]), scores_KNC[0, :, :2].log_softmax(-1)
    )


def test_fitted_weights_are_the_best_and_offsets_have_no_sum():
    scores_KNC, labels_N = strangers()
    weights, offsets = output_weights(scores_KNC, labels_N)

    def objective(x: list[float]) -> float:
        """With the ridge, which is small."""
        ridge = 1e-4 * sum((a - b) ** 2 for a, b in zip(x, [0.5, 0.5, 0.0, 0.0], strict=True))
        return cross_entropy(scores_KNC, labels_N, x[:2], x[2:]) + ridge

    best = objective([*weights, *offsets])
    assert best < cross_entropy(scores_KNC, labels_N, [0.5, 0.5], [0.0, 0.0]) - 0.01
    assert sum(offsets) == pytest.approx(0, abs=1e-9) and min(weights) >= 0
    for i in range(4):
        for step in (-0.05, 0.05):
            moved = [*weights, *offsets]
            moved[i] += step
            assert objective(moved) > best
    wrong_1NC = torch.where(scores_KNC[:1].isinf(), scores_KNC[:1], -scores_KNC[:1])[:, labels_N < 2]
    assert output_weights(wrong_1NC, labels_N[labels_N < 2])[0] == [0.0], "never negative"
    assert output_weights(scores_KNC[:, :0], labels_N[:0]) == ([0.5, 0.5], [0.0, 0.0])


def test_strangers_are_told_apart_by_logits_and_not_by_probabilities():
    scores_KNC, labels_N = strangers()
    fresh_KNC, fresh_N = strangers(1)
    shares = {}
    for name in ("mean", "weighted"):
        method = registry.load("ensemble", name)(weights="fit")
        method.fit(scores_KNC, torch.cat([labels_N[:-4], torch.full((4,), -100)]))
        shares[name] = float((method.combine(fresh_KNC).argmax(-1) == fresh_N).float().mean())
    assert shares["weighted"] > 0.93 > 0.85 > shares["mean"], shares


def test_weights_that_cannot_be_right_are_refused():
    weighted = registry.load("ensemble", "weighted")
    for given, told in (
        ({"weights": "equal"}, "got 'equal'"),
        ({"offsets": [0.0]}, "offsets without weights"),
        ({"weights": [1.0]}, "for 2 members"),
        ({"weights": [1.0, -1.0]}, "no weight negative"),
        ({"weights": [1.0, 1.0], "offsets": [0.0]}, "for 2 members"),
    ):
        with pytest.raises(RecipeError, match=told):
            weighted(**given).combine(strangers()[0])


def test_columns_are_placed():
    scores_NC = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert place(scores_NC, None) is scores_NC
    inf = float("inf")
    assert place(scores_NC, [1, -1, 0]).tolist() == [[2.0, -inf, 1.0], [4.0, -inf, 3.0]]


def test_the_folder_is_evaluated_and_predicts_as_the_stage_did(made, report):
    folder = made / "out" / "fitted"
    assert json.loads((folder / "model" / "ensemble.json").read_text())["labels"] == UNION
    stage = next(s for s in report["stages"] if s["name"] == "fitted")
    evaluated = inference.evaluate(str(folder), str(made / "data"))
    for name, found in stage["metrics"].items():
        assert evaluated["metrics"][name]["value"] == pytest.approx(found["value"], abs=1e-9)
    table = inference.predict(str(folder), [str(made / "data")])
    stored = pq.read_table(folder / "predictions.parquet").to_pydict()
    assert table["prediction"] == stored["prediction"]
    assert table["probability"] == pytest.approx([np.exp(max(row)) for row in stored["scores"]], abs=1e-5)
    again = next(s for s in report["stages"] if s["name"] == "again")
    assert [g["value"] for g in again["gains"]] == [0.0] * len(again["gains"])


def test_a_fusion_teaches_a_student_of_all_classes(made, report, tmp_path):
    info = dataclasses.replace(helpers.image_info(9, 7, UNION), labels=UNION[::-1])
    task = helpers.ImageClassification()
    student = task.load(helpers.config("image"), info)
    frozen = load_frozen(
        Model(path=str(made / "out" / "fitted" / "model")), task, info, torch.device("cpu"), student, "f"
    )
    pixels = torch.randn(3, 3, 8, 8)
    found_NU = frozen.scores({"pixel_values": pixels, "index": torch.arange(3)}).exp()
    weights = report["stages"][1]["summary"]["weights"]
    expected_NU = torch.zeros(3, len(UNION))
    for weight, name in zip(weights, MEMBERS, strict=True):
        model = AutoModelForImageClassification.from_pretrained(made / name).eval()
        with torch.no_grad():
            probabilities_NC = model(pixel_values=pixels).logits.softmax(-1)
        for c, label in model.config.id2label.items():
            expected_NU[:, UNION[::-1].index(label)] += weight * probabilities_NC[:, c]
    torch.testing.assert_close(found_NU, expected_NU, atol=1e-5, rtol=1e-4)
    fewer = task.load(helpers.config("image"), helpers.image_info(9, 7, ["cat", "dog"]))
    with pytest.raises(RecipeError, match="do not have the same labels"):
        folder = Model(path=str(made / "out" / "fitted" / "model"))
        load_frozen(folder, task, helpers.image_info(9, 7, ["cat", "dog"]), torch.device("cpu"), fewer, "f")


def test_a_class_that_nobody_knows_is_refused(made):
    task, info = helpers.ImageClassification(), helpers.image_info(9, 7, ["cat", "dog", "fish"])
    with pytest.raises(RecipeError, match="no member of the ensemble knows fish"):
        ensembling.load([Model(path=folder) for folder in members(made)], task, info)
    alone = helpers.image_info(9, 7, ["fish"])
    with pytest.raises(RecipeError, match="fish unknown to the model"):
        ensembling.load([Model(path=folder) for folder in members(made)], task, alone)


def test_members_that_see_other_images_are_refused(made, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(made / "pets", other)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1] * 3).save_pretrained(other)
    with pytest.raises(RecipeError, match="differ in normalisation"):
        ensembling.load(
            [Model(path=str(other)), Model(path=str(made / "pets"))],
            helpers.ImageClassification(),
            helpers.image_info(9, 7, ["cat", "dog"]),
        )


# --- heads cut to the data's classes ----------------------------------------------------------------------------------


def test_a_cut_head_gives_the_logits_of_the_classes_that_are_left(made, tmp_path):
    task, info = helpers.ImageClassification(), helpers.image_info(9, 7, ["bear", "owl"])
    whole = AutoModelForImageClassification.from_pretrained(made / "wild").eval()
    loaded = task.load(Model(path=str(made / "wild"), cut_head=True), info)
    assert loaded.labels == ["bear", "Owl"] and loaded.label_ids == [0, 1] and not loaded.new_parameters
    task.save(loaded, tmp_path / "cut")
    cut = AutoModelForImageClassification.from_pretrained(tmp_path / "cut").eval()
    assert cut.config.id2label == {0: "bear", 1: "Owl"} and cut.num_labels == 2
    pixels = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(cut(pixels).logits, whole(pixels).logits[:, [2, 0]])
    same = task.load(Model(path=str(made / "wild"), cut_head=True), helpers.image_info(9, 7, MEMBERS["wild"]))
    assert same.labels == MEMBERS["wild"]


def test_a_model_of_more_classes_is_compared_on_the_rows_of_fewer(made, tmp_path):
    pets = {"data": Data(str(made / "data"), labels=["cat", "dog"])}
    stages = [
        Evaluate("alone", model=members(made)[0]),
        Train("trained", model=Model(config="vit", config_overrides=helpers.VIT), training={"max_steps": 2}),
        Evaluate("cut", model=Model(str(made / "out-four"), cut_head=True), compare=["@alone", "@trained"]),
    ]
    task = helpers.ImageClassification()
    torch.manual_seed(5)
    task.save(task.load(helpers.config("image"), helpers.image_info(9, 7, DATA)), made / "out-four")
    report = run(Recipe(stages, **pets), tmp_path / "out")
    assert [s["confusion"]["labels"] for s in report["stages"]] == [["cat", "dog"]] * 3
    assert {g["baseline"] for g in report["stages"][2]["gains"]} == {"@alone", "@trained"}


def test_a_head_that_cannot_be_cut_is_refused(made):
    from test_recipe import mistakes

    task, info = helpers.ImageClassification(), helpers.image_info(9, 7, ["bear", "owl"])
    loaded = task.load(Model(path=str(made / "wild")), info)
    loaded.model.classifier = torch.nn.Bilinear(2, 2, 4)
    from kt_hf.loading import _cut_head

    with pytest.raises(RecipeError, match="no linear layer with an output for each of 4 classes"):
        _cut_head(loaded, "it")
    both = Recipe([Evaluate("e", model=Model("DIR", cut_head=True, replace_head=True))], data="digits")
    assert ["contradict" in m.cause for m in mistakes(both)] == [True]
