"""What pipelines of transformers say of exports, beside `kt-hf predict`, for tasks whose own tests do not ask that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from kt_hf import inference
from kt_hf.recipe import Model
from kt_hf.testing.bench import Bench
from kt_hf.tiny import BERT, VIT


def test_text_generation(tmp_path: Path) -> None:
    bench = Bench("text-generation", tmp_path)
    saved, given = bench.saved("start"), bench.info.splits["test"]["text"][:4]
    ours = inference.predict(saved, given, max_new_tokens=7)["prediction"]
    ask: Any = pipeline("text-generation", model=saved)
    theirs = [
        found[0]["generated_text"] for found in ask(given, max_new_tokens=7, do_sample=False, return_full_text=False)
    ]
    assert ours == theirs and any(text.strip() for text in ours)


def test_image_classification(tmp_path: Path) -> None:
    bench = Bench("image-classification", tmp_path)
    saved, pictures = bench.saved("start"), bench.info.splits["test"]["image"][:6]
    files = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    ours = inference.predict(saved, files)
    theirs = [found[0] for found in pipeline("image-classification", model=saved)(pictures)]
    assert ours["prediction"] == [found["label"] for found in theirs]
    assert ours["probability"] == pytest.approx([found["score"] for found in theirs], rel=1e-4)


def test_zero_shot_image_classification(tmp_path: Path) -> None:
    """A model of CLIP's own kind; towers of other kinds are no pipeline's."""
    bench = Bench("zero-shot-image-classification", tmp_path)
    towers = {"text_config": BERT["config_overrides"], "vision_config": VIT["config_overrides"]}
    torch.manual_seed(0)
    fresh = Model(config="clip", config_overrides={"projection_dim": 12, "logit_scale_init_value": 1.0, **towers})
    loaded = bench.task.load(fresh, bench.info)
    bench.task.save(loaded, tmp_path / "clip")
    picture = bench.info.splits["test"]["image"][0]
    picture.save(tmp_path / "one.png")
    names = ["circle", "square", "star"]
    ours = inference.predict(str(tmp_path / "clip"), [str(tmp_path / "one.png")], labels=names)
    ask: Any = pipeline("zero-shot-image-classification", model=str(tmp_path / "clip"))
    best = ask(picture, candidate_labels=names, hypothesis_template="a photo of a {}")[0]
    assert ours["prediction"] == [best["label"]] and ours["probability"] == pytest.approx([best["score"]], rel=1e-4)
