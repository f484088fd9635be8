"""Object detection: COCO's metric and its resampling, the set loss, boxes that stay on their images, exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import task_grid
import torch
from PIL import Image
from test_estimate import context_of

from kt_hf import Data, Ensemble, Recipe, Train, augmenting, estimate, inference, metrics, registry, run
from kt_hf.bundle import Bundle
from kt_hf.data import prepare
from kt_hf.errors import DataError, RecipeError
from kt_hf.facts import load_frozen
from kt_hf.functional import detection, set_loss
from kt_hf.recipe import Model

Detection = registry.load("task", "object-detection")
YOLOS = Detection.conformance["model"]
CLASSES = ["red", "green", "blue"]
_SMALL = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_SMALL |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 7, "dropout": 0.0}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12],
    "depths": [1, 1],
    "layer_type": "basic",
}
_SIZE = {"processor_overrides": {"size": {"height": 32, "width": 40}}}


def detr(kind: str = "detr", out: Any = ("stage2",), **more: Any) -> dict[str, Any]:
    backbone = {**_RESNET, "out_features": list(out)}
    return {"config": kind, "config_overrides": {**_SMALL, "backbone_config": backbone, **more}, **_SIZE}


def rt_detr() -> dict[str, Any]:
    backbone = {
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
    }
    backbone |= {"layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}
    own = {**_SMALL, "backbone_config": backbone, "encoder_hidden_dim": 16, "encoder_in_channels": [8, 8, 8]}
    own |= {"decoder_in_channels": [16, 16, 16], "num_denoising": 5}
    return {"config": "rt_detr", "config_overrides": own, "processor_overrides": {"size": {"height": 64, "width": 64}}}


MODELS = {
    "yolos": YOLOS,
    "detr": detr(),
    "conditional_detr": detr("conditional_detr", num_queries=100),
    "deformable_detr": detr("deformable_detr", ("stage1", "stage2"), num_feature_levels=2, d_model=32, num_queries=100),
    "rt_detr": rt_detr(),
}
QUICK = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": "none", "num_threads": 1, "learning_rate": 1e-3}


def folder(path: Path, **counts: int) -> Path:
    path.mkdir(exist_ok=True)
    for i, (split, count) in enumerate((counts or {"train": 12, "validation": 5, "test": 7}).items()):
        Detection.sample(count, np.random.default_rng(i)).to_parquet(path / f"{split}.parquet")
    return path


def loaded(path: Path, model: dict[str, Any] = YOLOS, **settings: Any) -> tuple[Any, Any, Any]:
    task = Detection(**settings)
    info = prepare("d", Data(str(path)), task)
    torch.manual_seed(0)
    return task, info, task.load(Model(**model), info)


def batch_of(task: Any, info: Any, made: Any, count: int = 4) -> dict[str, Any]:
    columns = task.preprocess(info.splits["test"][:count], made, True)
    return task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(count)], made)


def total(task: Any, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss with the batch as the whole step."""
    counts = task.units(batch)
    parts = [(v if w is None else v * w).sum() / max(int(counts[unit]), 1) for v, w, unit in task.loss(outputs, batch)]
    return sum(parts[1:], parts[0])


# --- the metric -------------------------------------------------------------------------------------------------------


def random_rows(seed: int, count: int = 12, num_classes: int = 4) -> list[Any]:
    """Detections around true boxes and elsewhere; images without boxes or detections, a class that is never true."""
    random, rows = np.random.default_rng(seed), []
    for _ in range(count):
        num_true, num_said = int(random.integers(0, 5)), int(random.integers(0, 12))
        low = random.uniform(0, 60, (num_true, 2))
        true = np.concatenate([low, low + random.uniform(5, 40, (num_true, 2))], 1)
        kinds = random.integers(0, num_classes - 1, num_true)
        said = np.sort(random.uniform(0, 100, (num_said, 4)), axis=1)[:, [0, 1, 2, 3]]
        said = np.concatenate([said[:, :2], said[:, 2:] + 1], 1)
        guess = random.integers(0, num_classes, num_said)
        for i in range(num_said):
            if num_true and random.random() < 0.7:
                target = int(random.integers(num_true))
                said[i] = true[target] + random.normal(0, 3, 4) * [1, 1, 0.3, 0.3]
                guess[i] = kinds[target] if random.random() < 0.8 else guess[i]
        said[:, 2:] = np.maximum(said[:, 2:], said[:, :2] + 1)
        scores = np.sort(random.uniform(0, 1, num_said).round(1 if seed % 2 else 6))[::-1].copy()  # ties, or none
        row = {"scores": scores, "classes": guess, "boxes": said, "true_classes": kinds, "true_boxes": true}
        rows.append(SimpleNamespace(**row))
    return rows


def judged(rows: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """(figures, rankings) of all classes."""
    metric = metrics.BoxPrecision(keep_in_memory=True)
    judge = metric.judge(
        [{"boxes": r.boxes, "labels": r.classes, "scores": r.scores} for r in rows],
        [{"boxes": r.true_boxes, "labels": r.true_classes} for r in rows],
    )
    return metric.figures(judge), metric.rankings(judge)


@pytest.mark.parametrize("seed", range(8))
def test_weights_of_one_give_the_figures_of_pycocotools(seed):
    rows = random_rows(seed)
    (figures, ranked), ones = judged(rows), np.ones(len(rows))
    by_class = figures.pop("by_class")
    ours = {
        "mean_average_precision": detection.mean_average_precision(ranked, ones),
        "average_precision_50": detection.mean_average_precision(ranked, ones, [0]),
        "average_precision_75": detection.mean_average_precision(ranked, ones, [5]),
        "mean_average_recall": detection.mean_recall(ranked, ones),
    }
    assert ours == pytest.approx(figures, abs=1e-9)
    assert 0.05 < ours["mean_average_precision"] < 0.95
    assert [detection.average_precision(r, ones).mean() for r in ranked] == pytest.approx(list(by_class.values()))
    assert coco(rows) == pytest.approx(list(ours.values()), abs=1e-9)
    lists = ("boxes", "classes", "scores", "true_boxes", "true_classes")
    listed = [SimpleNamespace(**{name: getattr(row, name).tolist() for name in lists}) for row in rows]
    again = metrics.BoxPrecision(keep_in_memory=True).compute(
        predictions=[{"boxes": r.boxes, "labels": r.classes, "scores": r.scores} for r in listed],
        references=[{"boxes": r.true_boxes, "labels": r.true_classes} for r in listed],
    )
    assert {name: again[name] for name in figures} == pytest.approx(figures)


def coco(rows: list[Any]) -> list[float]:
    """What `COCOeval` says: AP, AP50, AP75, AR at 100."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def listed(i: int, boxes: Any, classes: Any, **more: Any) -> list[dict[str, Any]]:
        sides = [[b[0], b[1], b[2] - b[0], b[3] - b[1]] for b in boxes.tolist()]
        return [
            {"image_id": i + 1, "category_id": int(c) + 1, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            | {key: float(v[j]) for key, v in more.items()}
            for j, (b, c) in enumerate(zip(sides, classes, strict=True))
        ]

    with contextlib.redirect_stdout(io.StringIO()):
        true, said = COCO(), COCO()
        for data, lists in (
            (true, [listed(i, r.true_boxes, r.true_classes) for i, r in enumerate(rows)]),
            (said, [listed(i, r.boxes, r.classes, score=r.scores) for i, r in enumerate(rows)]),
        ):
            flat = [{**one, "id": n + 1} for n, one in enumerate(one for each in lists for one in each)]
            kinds = [{"id": c + 1} for c in range(4)]
            data.dataset = {
                "images": [{"id": i + 1} for i in range(len(rows))],
                "annotations": flat,
                "categories": kinds,
            }
            data.createIndex()
        judge = COCOeval(true, said, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [float(judge.stats[i]) for i in (0, 1, 2, 8)]


@pytest.mark.parametrize("seed", [0, 2, 4, 6])
def test_an_image_that_counts_twice_counts_as_two(seed):
    """Where scores differ: which of equal ones comes first is nobody's business."""
    rows = random_rows(seed)
    weights = np.random.default_rng(seed).multinomial(len(rows), [1 / len(rows)] * len(rows)).astype(float)
    copies = [row for row, times in zip(rows, weights, strict=True) for _ in range(int(times))]
    once, several, ones = judged(rows)[1], judged(copies)[1], np.ones(len(copies))
    for statistic in (detection.mean_average_precision, detection.mean_recall):
        assert statistic(once, weights) == pytest.approx(statistic(several, ones), abs=1e-9)
    assert (weights == 0).any() and (weights > 1).any()


def test_average_precision_by_hand():
    """Two true boxes, three detections: right, wrong, right. Precision is 1 up to half of recall, then 2 / 3."""
    true = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], float)
    said = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 29]], float)
    kinds = {"true_classes": np.zeros(2, int), "classes": np.zeros(3, int), "scores": np.array([0.9, 0.8, 0.7])}
    (ranked,) = judged([SimpleNamespace(true_boxes=true, boxes=said, **kinds)])[1]
    found = detection.average_precision(ranked, np.ones(1))
    assert found[0] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)  # 0.9 of the second overlap
    assert found[-1] == pytest.approx(51 / 101)
    assert detection.average_precision(ranked, np.zeros(1)) is None


def test_without_its_libraries_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pycocotools, which is not installed") as error:
        metrics.BoxPrecision(keep_in_memory=True).judge([], [])
    assert "kt_hf[detection]" in error.value.remedy


# --- the loss ---------------------------------------------------------------------------------------------------------


def theirs(made: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss that the model computes itself."""
    targets = [
        {"class_labels": labels[labels >= 0], "boxes": boxes[labels >= 0]}
        for labels, boxes in zip(batch["labels"], batch["boxes"], strict=True)
    ]
    return made.model(pixel_values=batch["pixel_values"], labels=targets).loss


@pytest.mark.parametrize("name", ["yolos", "detr", "conditional_detr", "deformable_detr"])
def test_the_loss_is_that_of_transformers(name, tmp_path):
    """Of models with an output for nothing, image by image: there the paper's mean is over all queries of a batch."""
    task, info, made = loaded(folder(tmp_path), MODELS[name])
    made.model.eval()
    batch = batch_of(task, info, made)
    rows = [task.part(batch, i, i + 1) for i in range(4)] if name in ("yolos", "detr") else [batch]
    assert task.units(batch)["box"] == 6
    for row in rows:
        ours = total(task, task.forward(made.model, row), row)
        if int(task.units(row)["box"]):
            torch.testing.assert_close(ours, theirs(made, row), rtol=2e-4, atol=1e-5)
        ours.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.model.parameters() if p.requires_grad)


def test_rt_detr_learns_in_all_layers_and_proposals(tmp_path):
    task, info, made = loaded(folder(tmp_path), MODELS["rt_detr"])
    batch = batch_of(task, info, made)
    outputs = task.forward(made.model.train(), batch)
    assert len(outputs.others) == 2 and len(task.loss(outputs, batch)) == 6
    total(task, outputs, batch).backward()
    assert not [n for n, p in made.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not any(p.requires_grad for n, p in made.model.named_parameters() if "denoising" in n)


def test_rows_without_boxes_and_more_boxes_than_queries(tmp_path):
    task, info, made = loaded(folder(tmp_path))
    batch = batch_of(task, info, made, 5)
    assert (batch["labels"] >= 0).sum(1).tolist() == [1, 2, 3, 0, 1]
    empty = task.part(batch, 3, 4)
    with torch.no_grad():
        (values, _, _), (none, weight, _) = task.loss(task.forward(made.model, empty), empty)
    assert values.shape == (1,) and float(values) > 0 and float(none.sum()) == float(weight.sum()) == 0
    scores_NC, weight_N = task.scores(task.forward(made.model, batch), batch)
    assert (
        scores_NC.shape == (15, 3) and weight_N.sum() == 7 and weight_N.reshape(5, 3).sum(1).tolist() == [1, 2, 3, 0, 1]
    )
    many = {"labels": torch.zeros(1, 9, dtype=torch.int64), "boxes": torch.rand(1, 9, 4) / 2 + 0.25}
    query = set_loss.match(torch.zeros(1, 6, 4), torch.rand(1, 6, 4), many["labels"], many["boxes"], [1, 5, 2], True)
    assert sorted(query[query >= 0].tolist()) == list(range(6)) and (query < 0).sum() == 3


def test_numbers_that_are_not_finite_reach_the_loss(tmp_path):
    task, info, made = loaded(folder(tmp_path))
    batch = batch_of(task, info, made)
    outputs = task.forward(made.model, batch)
    outputs.pred_boxes = outputs.pred_boxes * float("nan")
    assert total(task, outputs, batch).isnan()


def test_chunks_of_a_batch_give_the_loss_of_the_batch(tmp_path):
    task, info, made = loaded(folder(tmp_path), MODELS["rt_detr"])
    batch = batch_of(task, info, made)
    made.model.eval()
    whole = total(task, Bundle(made, task, {}).encode(batch), batch)
    chunked = total(task, Bundle(made, task, {}, chunk=2).encode(batch), batch)
    torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5)


def test_teacher_and_student_are_lined_up_by_true_boxes(tmp_path):
    """A teacher of another kind, with other queries and another order of classes."""
    path = folder(tmp_path / "data")
    task, info, student = loaded(path, MODELS["detr"])
    other = Detection(classes=["blue", "red", "green"])
    named = SimpleNamespace(splits={}, labels=other.classes)
    torch.manual_seed(1)
    teacher = other.load(Model(**detr("conditional_detr", num_queries=9)), named)
    other.save(teacher, tmp_path / "teacher")
    frozen = load_frozen(Model(path=str(tmp_path / "teacher")), task, info, torch.device("cpu"), student, "teacher")
    assert frozen.classes == [[1, 2, 0]]
    batch = batch_of(task, info, student)
    scores_NC = frozen.scores(batch)
    own_NC, weight_N = task.scores(task.forward(student.model, batch), batch)
    assert scores_NC.shape == own_NC.shape == (4 * 3, 3)
    with torch.no_grad():
        outputs = task.forward(frozen.members[0].model, batch)
    for place in (weight_N > 0).nonzero().squeeze(1).tolist():
        logits = outputs.logits[place // 3][:, [1, 2, 0]]
        assert (logits == scores_NC[place]).all(1).any()


def test_a_query_is_chosen_by_its_box_and_by_whether_there_is_something(tmp_path):
    task, info, made = loaded(folder(tmp_path))
    batch = task.part(batch_of(task, info, made), 0, 1)
    outputs = task.forward(made.model, batch)
    truth = batch["boxes"][0, 0]
    outputs.pred_boxes = torch.full((1, 6, 4), 0.1).index_copy(1, torch.tensor([2, 4]), truth.expand(1, 2, 4))
    outputs.logits = torch.zeros(1, 6, 4)
    outputs.logits[0, 2, -1] = 5.0  # one of the two that fit says that there is nothing
    outputs.logits[0, 4, :3] = torch.tensor([0.0, 1.0, 2.0])
    scores_NC, weight_N = task.scores(outputs, batch)
    assert scores_NC[weight_N > 0].tolist() == [[0.0, 1.0, 2.0]]


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_what_a_recipe_measures_is_what_is_written(tmp_path):
    path = folder(tmp_path / "data", train=32, validation=5, test=7)
    training = {**QUICK, "max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    recipe = Recipe(data=Data(str(path)), model=YOLOS, training=training, stages=[Train("one")])
    stage = run(recipe, tmp_path / "out")["stages"][0]
    assert stage["task"] == "object-detection" and stage["metric"] == "mean_average_precision"
    figures = stage["metrics"]
    assert set(Detection.metrics) <= set(figures) and {f"average_precision_{c}" for c in CLASSES} <= set(figures)
    assert figures["mean_average_recall"]["low"] < figures["mean_average_recall"]["high"]
    written = datasets.load_dataset("parquet", data_files=str(tmp_path / "out/one/predictions.parquet"), split="train")
    rows = [
        SimpleNamespace(
            scores=np.array(row["score"]),
            classes=np.array([CLASSES.index(c) for c in row["class"]]),
            boxes=np.array(row["box"]).reshape(-1, 4),
            true_classes=np.array([CLASSES.index(c) for c in row["true_class"]], int),
            true_boxes=np.array(row["true_box"]).reshape(-1, 4),
        )
        for row in written
    ]
    again = judged(rows)[0]["mean_average_precision"]
    assert again == pytest.approx(figures["mean_average_precision"]["value"], abs=1e-6)
    saved = str(tmp_path / "out" / "one")
    shown = inference.evaluate(saved, str(path))["metrics"]["mean_average_precision"]
    assert shown["value"] == pytest.approx(again, abs=1e-6)


def same_as_pipeline(pipe: Any, saved: str, path: Path, tmp_path: Path) -> None:
    from kt_hf_plugins.object_detection import ObjectDetection

    assert inference.infer_task(saved) == "object-detection"
    pictures = prepare("d", Data(str(path)), ObjectDetection()).splits["test"]["image"][:3]
    pictures[1] = pictures[1].resize((31, 45))
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    expected = [pipe(picture, threshold=0.5) for picture in pictures]
    ours = inference.predict(saved, [str(tmp_path / f"{i}.png") for i in range(3)])
    for i, found in enumerate(expected):
        assert len(found) == len(ours["scores"][i])
        found = sorted(found, key=lambda one: -one["score"])
        for j, one in enumerate(found):
            assert one["label"] == ours["labels"][i][j]
            assert one["score"] == pytest.approx(ours["scores"][i][j], abs=1e-5)
            box = [int(x) for x in ours["boxes"][i][j]]
            np.testing.assert_allclose(list(one["box"].values()), box, atol=1)
    assert ours["prediction"][0] and sum(len(found) for found in expected) > 0


@pytest.mark.parametrize("name", MODELS)
def test_pipelines_say_the_same(name, tmp_path):
    """Of models that have learned nothing; all of their outputs are moved up, so that some pass the threshold."""
    from transformers import pipeline

    path = folder(tmp_path / "data")
    task, _, made = loaded(path, MODELS[name])
    made.model.eval()
    with torch.no_grad():
        for n, p in made.model.named_parameters():
            if n.startswith(tuple(task.head(made.model))) and "class" in n:
                p.mul_(3) if p.dim() > 1 else p.add_(torch.tensor([9.0, 3, 0, -3])[: len(p)]) if len(p) < 5 else None
    task.save(made, tmp_path / "model")
    pipe = pipeline("object-detection", model=str(tmp_path / "model"))
    same_as_pipeline(pipe, str(tmp_path / "model"), path, tmp_path)


def test_a_prediction_does_not_depend_on_pictures_beside_it(tmp_path):
    """Pictures of several extents, as a processor makes them that keeps proportions."""
    own = {"processor_overrides": {"size": {"shortest_edge": 32, "longest_edge": 64}}}
    task, info, made = loaded(folder(tmp_path), {**MODELS["detr"], **own})
    rows = info.splits["test"][:4]
    rows["image"][1] = rows["image"][1].resize((31, 45))
    columns = task.preprocess(rows, made, False)
    listed = [{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(4)]
    batch = task.collate(listed, made)
    assert len(set(map(tuple, batch["extent"].tolist()))) == 2 and (batch["pixel_mask"] == 0).any()
    model = made.model.eval()
    with torch.no_grad():
        together = task.predict(model, batch, {})
        for i, row in enumerate(listed):
            alone = task.predict(model, task.collate([row], made), {})
            for key in ("scores", "boxes"):
                torch.testing.assert_close(together[key][i], alone[key][0], rtol=1e-4, atol=1e-5)
    found = task.forward(model, batch)  # in training, what is padded is masked
    assert found.pred_boxes.isfinite().all()


def test_an_ensemble_is_refused_in_the_plan(tmp_path):
    path = folder(tmp_path / "data")
    stages = [Train("one"), Train("two"), Ensemble("both", "mean", models=["@one", "@two"])]
    with pytest.raises(RecipeError, match=r"stages\.both: ObjectDetection has no output ensembles"):
        run(Recipe(data=Data(str(path)), model=YOLOS, training=QUICK, stages=stages), tmp_path / "out")
    assert not (tmp_path / "out" / "one" / "model").exists()


def test_the_plan_plays_a_step_without_content(tmp_path):
    """Where matching has no numbers to look at."""
    recipe = Recipe(data=Data(str(folder(tmp_path / "data"))), model=YOLOS, training=QUICK, stages=[Train("a")])
    context = context_of(recipe, tmp_path / "out")
    stage = context.stage("a")
    found = estimate.memory(context, stage, context.setups["a"])
    assert not found.why and found.activations > 0 and found.peak > found.activations


@pytest.mark.slow
def test_every_strategy(tmp_path):
    path = folder(tmp_path / "data", train=16, validation=5, test=7)
    entries = task_grid.run_grid(tmp_path / "out", Data(str(path)), YOLOS, {"object-detection": {}}, ensemble=False)
    assert all(entry["metric"] == "mean_average_precision" for entry in entries.values())


@pytest.mark.slow
def test_two_processes_train_and_report_as_one(tmp_path):
    """Boxes are counted over both, whose shares have unequally many."""
    path = folder(tmp_path / "data")
    training = {**QUICK, "logging_steps": 1, "per_device_train_batch_size": 4}
    content = {"data": {"path": str(path)}, "model": YOLOS, "training": training, "stages": [{"train": "a"}]}
    content["stages"] += [{"train": "b", "strategies": [{"distill": {"teacher": "@a"}}]}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    reports = []
    for world in (1, 2):
        out = tmp_path / f"out{world}"
        command = [
            *launch,
            str(world),
            "-m",
            "kt_hf.cli",
            "run",
            str(tmp_path / "recipe.yaml"),
            "--output-dir",
            str(out),
        ]
        command += [f"training.per_device_train_batch_size={4 // world}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        reports.append(json.loads((out / "report.json").read_text())["stages"])
    for one, two in zip(*reports, strict=True):
        losses = [[point["loss"] for point in stage["curves"][0]["training"]] for stage in (one, two)]
        assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-5)
        for name, figure in one["metrics"].items():
            assert figure["value"] == pytest.approx(two["metrics"][name]["value"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "rt_detr"])
def test_strategies_on_other_kinds(name, tmp_path):
    path = folder(tmp_path / "data")
    stages = task_grid.stages(ensemble=False)
    recipe = Recipe(stages, data=Data(str(path)), model=MODELS[name], training={**QUICK, "max_steps": 2})
    report = run(recipe, tmp_path / "out")
    assert len(report["stages"]) == len(stages)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_layers_go_from_the_input_and_the_head_is_apart(name, tmp_path):
    task, _, made = loaded(folder(tmp_path), MODELS[name])
    groups, head = task.layers(made.model), tuple(f"{module}." for module in task.head(made.model))
    flat = [parameter for group in groups for parameter in group]
    assert len(flat) == len(set(flat)) and not [n for n in flat if n.startswith(head)]
    names = [n for n, _ in made.model.named_parameters()]
    assert set(flat) | {n for n in names if n.startswith(head)} == set(names)
    if name == "detr":
        kinds = [
            {next(k for k in ("backbone", "encoder.", "decoder.", "proj", "query") if k in n) for n in g}
            for g in groups
        ]
        assert kinds[:3] == [{"backbone"}] * 3 and "encoder." in kinds[3] and kinds[4] == kinds[5] == {"decoder."}
    assert all(p.requires_grad for n, p in made.model.named_parameters() if "denoising" not in n), "also of backbones"


def test_new_classes_leave_the_head_of_boxes_as_it_is(tmp_path):
    path = folder(tmp_path / "data")
    task, info, made = loaded(path, MODELS["rt_detr"])
    task.save(made, tmp_path / "model")
    for classes in (["a", "b", "c"], ["a", "b", "c", "d"]):
        other = Detection(classes=classes)
        with pytest.raises(RecipeError, match="unknown to the model"):
            other.load(Model(path=str(tmp_path / "model")), info)
        again = other.load(Model(path=str(tmp_path / "model"), replace_head=True), info)
        assert again.labels == classes and again.new_parameters
        assert all("class_embed" in n or "score_head" in n for n in again.new_parameters)
        before, after = made.model.state_dict(), again.model.state_dict()
        changed = {n for n in before if before[n].shape != after[n].shape or not torch.equal(before[n], after[n])}
        assert changed <= {*again.new_parameters, "model.denoising_class_embed.weight"} and len(changed) >= 6


def test_a_checkpoint_whose_unused_classes_share_a_name(tmp_path):
    path = folder(tmp_path / "data")
    task, info, made = loaded(path, classes=["red", "green", "blue", "N/A", "N/A"])
    task.save(made, tmp_path / "model")
    again = Detection()
    assert again.load(Model(path=str(tmp_path / "model")), info).label_ids == [0, 1, 2]
    made.model.config.id2label = {0: "blue", 1: "N/A", 2: "red", 3: "N/A", 4: "green"}
    task.save(made, tmp_path / "other")
    assert again.load(Model(path=str(tmp_path / "other")), info).label_ids == [2, 4, 0]
    info.splits["test"][0]["image"].save(tmp_path / "x.png")
    assert len(inference.predict(str(tmp_path / "other"), [str(tmp_path / "x.png")])["prediction"]) == 1


# --- rows -------------------------------------------------------------------------------------------------------------


def written(path: Path, objects: list[Any], features: Any = None) -> Path:
    path.mkdir(exist_ok=True)
    pictures = [Image.new("RGB", (40, 20), (i, i, i)) for i in range(len(objects))]
    rows = datasets.Dataset.from_dict({"image": pictures, "objects": objects}).cast_column("image", datasets.Image())
    for split in ("train", "validation", "test"):
        rows.to_parquet(path / f"{split}.parquet")
    return path


@pytest.mark.parametrize(
    ("objects", "settings", "names"),
    [
        ({"bbox": [[10, 5, 20, 10]], "category": ["cat"]}, {}, ["cat", "dog"]),
        ([{"boxes": [10, 5, 30, 15], "label": "cat"}], {"box_format": "xyxy"}, ["cat", "dog"]),
        ({"bbox": [[0.5, 0.5, 0.5, 0.5]], "category_id": [3]}, {"box_format": "yolo"}, ["3", "7"]),
        ({"bbox": [[10, 5, 20, 10]], "classes": [0]}, {"classes": ["owl", "elk"]}, ["owl", "elk"]),
    ],
)
def test_boxes_come_in_several_forms(objects, settings, names, tmp_path):
    second = {"cat": "dog", 3: 7, 0: 1}
    swap = lambda v: second.get(v, v) if not isinstance(v, list) else [swap(x) for x in v]  # noqa: E731
    is_list = isinstance(objects, list)
    other = (
        [{k: swap(v) for k, v in objects[0].items()}]
        if is_list
        else {k: v if k == "bbox" else swap(v) for k, v in objects.items()}
    )
    task, info, made = loaded(written(tmp_path / "data", [objects, other]), **settings)
    columns = task.preprocess({k: v for k, v in info.splits["test"][:].items() if k != "index"}, made, False)
    for boxes in columns["boxes"]:
        torch.testing.assert_close(boxes, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    assert made.labels == names and [x.tolist() for x in columns["labels"]] == [[0], [1]]


def test_columns_tell_the_task(tmp_path):
    rows = written(tmp_path / "data", [{"bbox": [[1, 1, 5, 5]], "category": ["a"], "area": [25.0], "id": [0]}] * 4)
    found = datasets.load_dataset("parquet", data_files=str(rows / "train.parquet"), split="train")
    found = found.add_column("image_id", list(range(4))).add_column("width", [40] * 4)
    from kt_hf.roles import fitting_tasks

    assert [name for name, _ in fitting_tasks(found.features)] == ["object-detection"]
    other = found.rename_column("objects", "answers")
    assert "object-detection" not in [name for name, _ in fitting_tasks(other.features)]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [[1, 1, 0, 5]], "category": ["a"]}, r"row 1: the box \[1.*\] has no width or no height"),
        ({"bbox": [[1, 1, 5]], "category": ["a"]}, r"row 1: the box .* is not four numbers"),
        ({"bbox": [[1, 1, float("nan"), 5]], "category": ["a"]}, r"row 1: the box .* is not four numbers"),
        ({"bbox": [[30, 10, 39, 19]], "category": ["a"]}, r"row 1: more than half of the box .* 40 x 20 pixels"),
        ({"bbox": [[1, 1, 5, 5]], "category": ["a", "a"]}, r"row 1: it has 1 boxes and 2 classes"),
        ({"bbox": [[1, 1, 5, 5]], "category": [None]}, r"row 1: a box has the class None"),
    ],
)
def test_bad_boxes_are_named_by_their_row(objects, message, tmp_path):
    path = written(tmp_path / "data", [{"bbox": [[1.0, 1, 5, 5]], "category": ["a"]}, objects])
    with pytest.raises(DataError, match=message):
        run(Recipe(data=Data(str(path)), model=YOLOS, training=QUICK, stages=[Train("one")]), tmp_path / "out")


def test_boxes_are_cut_at_the_edge_and_crowds_left_out(tmp_path):
    given = {
        "bbox": [[-2, 4, 12, 8], [30, 0, 11, 21], [0, 0, 40, 20]],
        "category": ["a", "b", "b"],
        "iscrowd": [0, 0, 1],
    }
    none = {"bbox": [], "category": [], "iscrowd": []}
    task, info, made = loaded(written(tmp_path / "data", [given, none]))
    columns = task.preprocess({k: v for k, v in info.splits["test"][:].items() if k != "index"}, made, False)
    expected = torch.tensor([[5 / 40, 8 / 20, 10 / 40, 8 / 20], [35 / 40, 0.5, 10 / 40, 1.0]])
    torch.testing.assert_close(columns["boxes"][0], expected)
    assert columns["boxes"][1].shape == (0, 4) and columns["labels"][1].shape == (0,)


def test_objects_without_boxes_or_names_are_refused(tmp_path):
    path = written(tmp_path / "a", [{"area": [3.0], "category": ["a"]}] * 2)
    with pytest.raises(RecipeError, match="the objects have area, category: no field of boxes"):
        loaded(path)
    path = written(tmp_path / "b", [{"bbox": [[1, 1, 2, 2]], "category": [4]}] * 2)
    with pytest.raises(RecipeError, match="names 2 classes, the data have 5"):
        loaded(path, classes=["x", "y"])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"RandomHorizontalFlip": {"p": 1.0}}, [[0.875, 0.5, 0.25, 0.5], [0.375, 0.2, 0.05, 0.1]]),
        ({"RandomVerticalFlip": {"p": 1.0}}, [[0.125, 0.5, 0.25, 0.5], [0.625, 0.8, 0.05, 0.1]]),
        ({"Resize": {"size": [40, 40]}}, [[0.125, 0.5, 0.25, 0.5], [0.625, 0.2, 0.05, 0.1]]),
        ({"CenterCrop": {"size": [20, 20]}}, [[0.75, 0.2, 0.1, 0.1]]),
        ({"Pad": {"padding": [20, 0, 20, 0]}}, [[0.3125, 0.5, 0.125, 0.5], [0.5625, 0.2, 0.025, 0.1]]),
        ("RandomPhotometricDistort", [[0.125, 0.5, 0.25, 0.5], [0.625, 0.2, 0.05, 0.1]]),
        ("SanitizeBoundingBoxes", [[0.125, 0.5, 0.25, 0.5], [0.625, 0.2, 0.05, 0.1]]),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)) if isinstance(value, dict) else "",
)
def test_boxes_go_where_their_images_go(spec, expected, tmp_path):
    """One at the left edge, which a crop leaves out, and a small one."""
    given = {"bbox": [[0, 5, 10, 10], [24, 3, 2, 2]], "category": ["a", "b"]}
    task, info, made = loaded(written(tmp_path / "data", [given, given]))
    rows = {k: v for k, v in info.splits["train"][:].items() if k != "index"}
    columns = task.preprocess(rows, made, True, augmenting.transforms([spec], "image"))
    torch.testing.assert_close(columns["boxes"][0], torch.tensor(expected))
    assert columns["labels"][0].tolist() == ([0, 1] if len(expected) == 2 else [1])


def test_augmented_trainings_learn_where_things_are(tmp_path):
    path = folder(tmp_path / "data")
    augment = [
        {"RandomHorizontalFlip": {"p": 0.5}},
        "RandomPhotometricDistort",
        "RandomIoUCrop",
        {"Resize": {"size": [20, 24]}},
    ]
    recipe = Recipe(data=Data(str(path), augment=augment), model=YOLOS, training=QUICK, stages=[Train("one")])
    assert run(recipe, tmp_path / "out")["stages"][0]["metric"] == "mean_average_precision"
