"""Semantic segmentation: masks that stay beside their images, loss and metrics by pixel, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from kt_hf import Data, Ensemble, Merge, Recipe, Train, augmenting, inference, randomness, registry, run
from kt_hf.data import prepare
from kt_hf.errors import DataError, RecipeError
from kt_hf.functional import scoring
from kt_hf.recipe import Model

Segmentation = registry.load("task", "image-segmentation")
KIT = Segmentation.conformance
CLASSES = KIT["settings"]["classes"]
TASK = {"image-segmentation": KIT["settings"]}
QUICK = {
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "num_threads": 1,
    "learning_rate": 1e-2,
}


def folder(path: Path, **counts: int) -> Path:
    path.mkdir(exist_ok=True)
    for i, (split, count) in enumerate((counts or {"train": 12, "validation": 5, "test": 7}).items()):
        Segmentation.sample(count, np.random.default_rng(i)).to_parquet(path / f"{split}.parquet")
    return path


def loaded(path: Path, **settings: Any) -> tuple[Any, Any, Any]:
    task = Segmentation(**{**KIT["settings"], **settings})
    info = prepare("d", Data(str(path)), task)
    torch.manual_seed(0)
    return task, info, task.load(Model(**KIT["model"]), info)


def batch_of(task: Any, info: Any, made: Any, train: bool, count: int = 4) -> dict[str, Any]:
    columns = task.preprocess(info.splits["test"][:count], made, train)
    return task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(count)], made)


def test_a_recipe_with_all_that_makes_sense(tmp_path):
    path = folder(tmp_path / "data")
    stages = [
        Train("first", seeds=2, strategies=["finetune"]),
        Train("frozen", strategies=[{"finetune": {"freeze_layers": 1}}, "ema"]),
        Train("student", strategies=["lora", {"distill": {"teacher": "@frozen"}}]),
        Merge("soup", "greedy_soup", models=["@first"]),
        Ensemble("both", "mean", models=["@frozen", "@student"]),
    ]
    recipe = Recipe(data=Data(str(path)), task=TASK, model=KIT["model"], training=QUICK, stages=stages)
    report = run(recipe, tmp_path / "out")
    assert [stage["metric"] for stage in report["stages"]] == ["mean_iou"] * 5
    first = report["stages"][0]["metrics"]
    assert {"mean_iou", "pixel_accuracy", "mean_accuracy", "iou_circle"} <= set(first)
    assert first["mean_iou"]["low"] < first["mean_iou"]["value"] < first["mean_iou"]["high"]
    shown = inference.evaluate(str(tmp_path / "out" / "frozen"), str(path))["metrics"]["mean_iou"]["value"]
    assert shown == pytest.approx(report["stages"][1]["metrics"]["mean_iou"]["value"], abs=1e-6)
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "out/first/predictions.parquet"), split="train")
    counts = np.asarray(table.filter(lambda row: row["seed"] == 0)["confusion"][:]).reshape(-1, 3, 3)
    assert scoring.mean_iou(counts, np.ones(7)) == pytest.approx(first["mean_iou"]["per_seed"][0])


def test_the_pipeline_of_transformers_gives_the_same_masks(tmp_path):
    from transformers import pipeline

    path = folder(tmp_path / "data")
    run(
        Recipe(data=Data(str(path)), task=TASK, model=KIT["model"], training=QUICK, stages=[Train("one")]),
        tmp_path / "out",
    )
    saved = str(tmp_path / "out" / "one" / "model")
    picture = prepare("d", Data(str(path)), Segmentation(**KIT["settings"])).splits["test"][0]["image"]
    picture.save(tmp_path / "x.png")
    assert inference.infer_task(saved) == "image-segmentation"
    ours = inference.predict(saved, [str(tmp_path / "x.png")])
    mask = np.asarray(ours["mask"][0])
    assert mask.shape == (picture.height, picture.width)
    theirs = pipeline("image-segmentation", model=saved)(picture)
    for found in theirs:
        np.testing.assert_array_equal(np.asarray(found["mask"]) > 0, mask == CLASSES.index(found["label"]))
    assert sum((np.asarray(found["mask"]) > 0).sum() for found in theirs) == mask.size
    inference.write(ours, str(tmp_path / "said.parquet"))
    again = datasets.load_dataset("parquet", data_files=str(tmp_path / "said.parquet"), split="train")
    np.testing.assert_array_equal(np.asarray(again[0]["mask"]), mask)


def test_the_loss_is_that_of_transformers(tmp_path):
    task, info, made = loaded(folder(tmp_path))
    batch = batch_of(task, info, made, train=True)
    values, weight, unit = task.loss(task.forward(made.model.eval(), batch), batch)
    assert float(weight.sum()) == float(task.units(batch)[unit])
    made.model.config.semantic_loss_ignore_index = -100
    expected = made.model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
    torch.testing.assert_close((values * weight).sum() / weight.sum(), expected, rtol=1e-5, atol=1e-6)


def test_figures_are_of_the_masks_as_they_are_and_known_by_hand(tmp_path):
    task, info, made = loaded(folder(tmp_path))
    raw = [np.asarray(mask).astype(int) for mask in info.splits["test"]["mask"]]
    columns = task.preprocess(info.splits["test"][:], made, False)
    for mask, labels in zip(raw, columns["labels"], strict=True):
        np.testing.assert_array_equal(np.where(mask == 255, -100, mask), labels.numpy())
    truth, guess = np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]])
    counts = np.zeros((1, 3, 3))
    np.add.at(counts[0], (truth[0], guess[0]), 1)
    assert scoring.mean_iou(counts, np.ones(1)) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scoring.mean_recall(counts, np.ones(1)) == pytest.approx((1 / 2 + 1) / 2)


def test_a_prediction_does_not_depend_on_pictures_beside_it(tmp_path):
    """Pictures of several sizes in one batch are scored as each alone."""
    task, info, made = loaded(folder(tmp_path))
    rows = info.splits["test"][:3]
    rows["image"][1], rows["mask"][1] = (
        picture.crop((0, 0, 15, 11)) for picture in (rows["image"][1], rows["mask"][1])
    )
    columns = task.preprocess(rows, made, False)
    listed = [{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(3)]
    model = made.model.eval()
    with torch.no_grad():
        together = task.predict(model, task.collate(listed, made), {})["confusion"]
        apart = torch.cat([task.predict(model, task.collate([row], made), {})["confusion"] for row in listed])
    assert torch.equal(together, apart) and together[1].sum() <= 15 * 11


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {"RandomHorizontalFlip": {"p": 1.0}},
        {"RandomRotation": {"degrees": [90, 90], "expand": True}},
        {"RandomResizedCrop": {"size": [20, 20], "scale": [0.5, 0.9]}},
        {"RandomAffine": {"degrees": 20, "translate": [0.3, 0.3]}},
        {"ColorJitter": {"brightness": 0.5}},
    ],
    ids=lambda spec: next(iter(spec)),
)
def test_masks_go_where_their_images_go(spec, tmp_path):
    """The image shows its own mask: after the change it still does, away from edges that were interpolated."""
    task, _, made = loaded(folder(tmp_path))
    mask = np.zeros((24, 24), np.uint8)
    mask[3:12, 2:15], mask[14:22, 12:20] = 1, 2
    picture = Image.fromarray(np.stack([mask * 100] * 3, -1))
    change = augmenting.transforms([spec], "image")
    from kt_hf_plugins.image_segmentation import together

    randomness.seed_all(3)
    changed, found = together(change, picture, mask.astype(np.int64))
    shown = np.asarray(changed)[..., 0]
    assert found.shape == shown.shape and set(np.unique(found)) <= {-100, 0, 1, 2}
    known = found >= 0
    if next(iter(spec)) == "ColorJitter":
        np.testing.assert_array_equal(found, mask)
        return
    near = np.abs(shown.astype(int) - 100 * np.maximum(found, 0)) <= 50
    assert near[known].mean() > 0.9
    if next(iter(spec)) == "RandomAffine":
        assert (~known).any(), "what came in from outside does not count"
    columns = task.preprocess({"image": [picture], "mask": [Image.fromarray(mask)]}, made, True, change)
    assert columns["labels"][0].shape == (16, 16)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            Image.fromarray(np.full((20, 24), 7, np.uint8)),
            "row 2: the mask has the value 7, the classes go from 0 to 2",
        ),
        (Image.fromarray(np.zeros((10, 24), np.uint8)), "row 2: the image has 24 x 20 pixels, its mask 24 x 10"),
        (Image.fromarray(np.zeros((20, 24, 3), np.uint8)), "row 2: the mask has 3 channels"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, message, tmp_path):
    path = folder(tmp_path / "data")
    rows = Segmentation.sample(4, np.random.default_rng(0))
    masks = rows["mask"][:]
    masks[2] = mask
    columns = {"image": rows["image"][:], "mask": masks}
    datasets.Dataset.from_dict(columns, features=rows.features).to_parquet(path / "train.parquet")
    recipe = Recipe(data=Data(str(path)), task=TASK, model=KIT["model"], training=QUICK, stages=[Train("one")])
    with pytest.raises(DataError, match=message):
        run(recipe, tmp_path / "out")


def test_a_fresh_model_is_told_its_classes_and_a_checkpoint_knows_them(tmp_path):
    path = folder(tmp_path / "data")
    task, info, made = loaded(path)
    task.save(made, tmp_path / "model")
    plain = Segmentation()
    with pytest.raises(RecipeError, match="masks do not say"):
        plain.load(Model(**KIT["model"]), info)
    assert plain.load(Model(path=str(tmp_path / "model")), info).labels == CLASSES
    other = Segmentation(classes=["square", "ground", "circle"])
    assert other.load(Model(path=str(tmp_path / "model")), info).label_ids == [2, 0, 1]


def test_soft_scores_are_those_of_the_enlarged_logits(tmp_path):
    task, info, made = loaded(folder(tmp_path))
    batch = batch_of(task, info, made, train=False)
    with torch.no_grad():
        outputs = task.forward(made.model.eval(), batch)
    scores_NC, weight_N = task.scores(outputs, batch)
    wide = F.interpolate(outputs.logits, (20, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores_NC.reshape(4, 20, 24, 3), wide.movedim(1, -1))
    assert weight_N.sum() == task.units(batch)["pixel"]
