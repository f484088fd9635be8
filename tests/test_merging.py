"""Merges and ensembles through whole recipes: what they select on, what they refuse, what they leave behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import RESNET, VIT
from PIL import Image
from safetensors.torch import load_file, save_file

from kt_hf import Data, Ensemble, Evaluate, Merge, Model, Recipe, Train, run
from kt_hf.errors import IntegrityError, RecipeError

FAST = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "eval_steps": 0, "report_to": "none"}


def shapes(folder: Path, flip: dict[str, bool], seed: int = 0) -> str:
    """Bright and dark images; `flip` swaps the labels of a split."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", 32), ("validation", 24), ("test", 24)):
        y = random.integers(0, 2, n)
        pixels = (random.normal(0, 30, (n, 8, 8, 3)) + 70 + 110 * y[:, None, None, None]).clip(0, 255).astype(np.uint8)
        labels = 1 - y if flip.get(split) else y
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])}
        )
        rows = datasets.Dataset.from_dict(
            {"image": [Image.fromarray(p) for p in pixels], "label": labels}, features=features
        )
        rows.to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, str]:
    """Two models: one that is right about brightness, one that is wrong about it."""
    root = tmp_path_factory.mktemp("parents")
    for name, flip in (("right", {}), ("wrong", {"train": True})):
        data = Data(shapes(root / f"data-{name}", flip))
        run(
            Recipe(
                [
                    Train(
                        "m",
                        data=data,
                        model=Model(config="vit", config_overrides=VIT),
                        training={**FAST, "max_steps": 30},
                    )
                ]
            ),
            root / name,
        )
    return {name: str(root / name / "m" / "model") for name in ("right", "wrong")}


def accuracy(report: dict, stage: str) -> float:
    return next(s for s in report["stages"] if s["name"] == stage)["metrics"]["accuracy"]["value"]


def summary(report: dict, stage: str) -> dict:
    return next(s for s in report["stages"] if s["name"] == stage)["summary"]


def test_the_greedy_soup_selects_on_validation_data_and_never_sees_test_data(tmp_path, trained):
    data = Data(shapes(tmp_path / "data", {"test": True}))  # on the test split the wrong model is right
    recipe = Recipe([Merge("soup", "greedy_soup", models=[trained["wrong"], trained["right"]])], data=data)
    report = run(recipe, tmp_path / "out")
    assert summary(report, "soup")["chosen"] == [trained["right"]]
    assert accuracy(report, "soup") < 0.3  # honest about the test data all the same
    scores = {tuple(s["weights"]): s["score"] for s in summary(report, "soup")["validation_scores"]}
    assert scores[0.0, 1.0] > 0.8 > scores[1.0, 0.0]


def test_a_soup_of_copies_is_the_model(tmp_path, trained):
    data = Data(shapes(tmp_path / "data", {}))
    run(Recipe([Merge("soup", "uniform_soup", models=[trained["right"]] * 3)], data=data), tmp_path / "out")
    merged = load_file(str(tmp_path / "out" / "soup" / "model" / "model.safetensors"))
    parent = load_file(str(Path(trained["right"]) / "model.safetensors"))
    assert merged.keys() == parent.keys() and all(torch.equal(merged[k], parent[k]) for k in merged)


def test_uniform_soup_is_the_mean_and_weights_are_respected(tmp_path, trained):
    data = Data(shapes(tmp_path / "data", {}))
    for weights, name in ((None, "a"), ([3.0, 1.0], "b")):
        recipe = Recipe(
            [Merge("soup", {"uniform_soup": {"weights": weights}}, models=list(trained.values()))], data=data
        )
        run(recipe, tmp_path / name)
        merged = load_file(str(tmp_path / name / "soup" / "model" / "model.safetensors"))
        first, second = (load_file(str(Path(p) / "model.safetensors")) for p in trained.values())
        share = 0.5 if weights is None else 0.75
        for key in merged:
            torch.testing.assert_close(
                merged[key], share * first[key] + (1 - share) * second[key], atol=1e-6, rtol=1e-5
            )


def test_other_weights_of_a_parent_do_not_come_along(tmp_path, trained):
    """The merged folder would hold weights of one parent beside those of all."""
    parent = tmp_path / "parent"
    shutil.copytree(trained["right"], parent)
    for name in ("pytorch_model.bin", "tf_model.h5", "adapter_model.safetensors"):
        (parent / name).write_bytes(b"old")
    data = Data(shapes(tmp_path / "data", {}))
    run(Recipe([Merge("s", "uniform_soup", models=[str(parent), trained["wrong"]], data=data)]), tmp_path / "out")
    left = {path.name for path in (tmp_path / "out" / "s" / "model").iterdir()}
    assert left == {path.name for path in Path(trained["right"]).iterdir()}


def test_parents_that_differ_are_refused_with_both_named(tmp_path, trained):
    data = Data(shapes(tmp_path / "data", {}))
    other = Train("other", model=Model(config="vit", config_overrides={**VIT, "hidden_size": 24}), training=FAST)
    recipe = Recipe([other, Merge("soup", "uniform_soup", models=[trained["right"], "@other"])], data=data)
    with pytest.raises(RecipeError, match="@other"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "soup" / "model").exists()


def test_a_parent_with_nan_is_named(tmp_path, trained):
    import shutil

    sick = tmp_path / "sick"
    shutil.copytree(trained["right"], sick)
    weights = load_file(str(sick / "model.safetensors"))
    weights["classifier.weight"][0, 0] = float("nan")
    save_file(weights, str(sick / "model.safetensors"), {"format": "pt"})
    recipe = Recipe(
        [Merge("soup", "uniform_soup", models=[trained["right"], str(sick)])], data=Data(shapes(tmp_path / "data", {}))
    )
    with pytest.raises(IntegrityError, match="sick"):
        run(recipe, tmp_path / "out")


def test_batch_statistics_are_estimated_again(tmp_path):
    model = Model(config="resnet", config_overrides=RESNET, processor_overrides={"size": {"height": 16, "width": 16}})
    stages = [Train("m", training=FAST, seeds=2), Merge("soup", "uniform_soup", models=["@m"])]
    run(Recipe(stages, data=Data(shapes(tmp_path / "data", {})), model=model), tmp_path / "out")
    files = [tmp_path / "out" / p / "model" / "model.safetensors" for p in ("soup", "m", "m/seeds/1")]
    soup, first, second = (load_file(str(f)) for f in files)
    key = next(k for k in soup if k.endswith("running_mean"))
    assert not torch.allclose(soup[key], (first[key] + second[key]) / 2, atol=1e-4)
    weight = key.replace("running_mean", "weight")
    torch.testing.assert_close(soup[weight], (first[weight] + second[weight]) / 2)


def test_an_ensemble_fits_its_weights_on_validation_data_and_is_a_teacher(tmp_path, trained):
    models = [trained["right"], trained["wrong"]]
    stages = [
        Ensemble("equal", models=models),
        Ensemble("fitted", {"mean": {"weights": "fit"}}, models=models),
        Train(
            "student",
            [{"distill": {"teacher": "@fitted", "alpha": 1.0}}],
            model=Model(config="vit", config_overrides=VIT),
            training={**FAST, "max_steps": 30},
        ),
        Evaluate("again", model="@fitted"),
    ]
    report = run(Recipe(stages, data=Data(shapes(tmp_path / "data", {}))), tmp_path / "out")
    weights = summary(report, "fitted")["weights"]
    assert weights[0] > 0.9 and sum(weights) == pytest.approx(1)
    assert accuracy(report, "fitted") > 0.9
    assert accuracy(report, "again") == accuracy(report, "fitted")
    assert accuracy(report, "student") > 0.8
    facts = json.loads((tmp_path / "out" / "fitted" / "model" / "ensemble.json").read_text())
    assert facts["members"] == ["members/0", "members/1"]
