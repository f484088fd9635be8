"""Models of timm through transformers: layers, head, labels, and folders as timm itself writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import pipeline

from kt_hf import Data, Ensemble, Merge, Recipe, Train, inference, run
from kt_hf.errors import RecipeError
from kt_hf.recipe import Model
from kt_hf.testing.bench import LABELS, Bench

SIZE = {"size": {"height": 32, "width": 32}}


def fresh(architecture: str) -> dict[str, Any]:
    given = {"model_args": {"img_size": 32}} if "vit" in architecture else {}
    return {
        "config": "timm_wrapper",
        "config_overrides": {"architecture": architecture, **given},
        "processor_overrides": SIZE,
    }


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext"])
def test_layers_from_the_input_without_the_head(architecture: str, tmp_path: Path):
    bench = Bench("image-classification", tmp_path)
    loaded = bench.task.load(Model(**fresh(architecture)), bench.info)
    layers, head = bench.task.layers(loaded.model), bench.task.head(loaded.model)
    names = [name for layer in layers for name in layer]
    assert len(head) == 1 and len(layers) > 3 and len(names) == len(set(names))
    rest = {name for name, _ in loaded.model.named_parameters()} - set(names)
    assert rest == {f"{head[0]}.weight", f"{head[0]}.bias"}
    pixels = torch.randn(2, 3, 32, 32)
    first = dict(loaded.model.named_parameters())[layers[0][0]]
    gradient = torch.autograd.grad(loaded.model(pixel_values=pixels).logits.sum(), first)[0]
    assert gradient.abs().sum() > 0


def test_every_strategy_on_a_resnet(tmp_path: Path):
    start = {"model": "@one"}
    stages = [
        Train("one"),
        Train("frozen", [{"finetune": {"freeze_layers": 2}}], **start),
        Train("probe", [{"finetune": {"linear_probe": True}}], **start),
        Train("lora", ["lora"], **start),
        Train("taught", ["finetune", {"distill": {"teacher": "@one"}}, "ema"], **start),
        Merge("soup", "uniform_soup", models=["@one", "@frozen"]),
        Ensemble("both", models=["@one", "@frozen"]),
    ]
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "eval_steps": 0}
    data = Data("digits", "source", max_examples=40)
    run(Recipe(stages, data=data, model=fresh("test_resnet"), training=training), tmp_path / "out")
    states = {
        name: load_file(tmp_path / "out" / name / "model" / "model.safetensors") for name in ("one", "probe", "frozen")
    }
    moved = {n for n, t in states["one"].items() if not torch.equal(t, states["probe"][n])}
    assert moved == {"timm_model.fc.weight", "timm_model.fc.bias"}
    assert torch.equal(states["one"]["timm_model.conv1.0.weight"], states["frozen"]["timm_model.conv1.0.weight"])


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_the_pipeline_of_transformers_says_the_same(architecture: str, tmp_path: Path):
    bench = Bench("image-classification", tmp_path)
    loaded = bench.task.load(Model(**fresh(architecture)), bench.info)
    (tmp_path / "model").mkdir()
    bench.task.save(loaded, tmp_path / "model")
    pictures = bench.info.splits["test"]["image"][:4]
    files = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    ours = inference.predict(str(tmp_path / "model"), files)
    theirs = [found[0] for found in pipeline("image-classification", model=str(tmp_path / "model"))(pictures)]
    assert ours["prediction"] == [found["label"] for found in theirs]
    np.testing.assert_allclose(ours["probability"], [found["score"] for found in theirs], rtol=1e-4)


def saved_by_timm(folder: Path, labels: list[str], seed: int = 0) -> Any:
    """A model in a folder as those of timm on the Hub are."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", pretrained=False)
    model.reset_classifier(len(labels))
    timm.models.save_for_hf(model, folder, model_config={"label_names": labels}, safe_serialization=True)
    kept = json.loads((folder / "config.json").read_text())
    kept.pop("model_args", None)  # those there have none, and transformers would pass the number of classes twice
    (folder / "config.json").write_text(json.dumps(kept))
    return model


def test_a_folder_as_timm_writes_it(tmp_path: Path):
    """Its configuration is of another form, its weights have no prefix; labels go by name."""
    bench, order = Bench("image-classification", tmp_path), ["star", "circle", "square"]
    theirs = saved_by_timm(tmp_path / "timm", order)
    loaded = bench.task.load(Model(path=str(tmp_path / "timm")), bench.info)
    assert loaded.labels == order and loaded.label_ids == [order.index(name) for name in LABELS]
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(pixel_values=pixels).logits, theirs.eval()(pixels))
    assert not loaded.new_parameters
    other = saved_by_timm(tmp_path / "five", list("abcde"))
    with pytest.raises(RecipeError, match="unknown to the model"):
        bench.task.load(Model(path=str(tmp_path / "five")), bench.info)
    renewed = bench.task.load(Model(path=str(tmp_path / "five"), replace_head=True), bench.info)
    assert sorted(renewed.new_parameters) == ["timm_model.fc.bias", "timm_model.fc.weight"]
    assert torch.equal(renewed.model.timm_model.conv1[0].weight, other.conv1[0].weight)
