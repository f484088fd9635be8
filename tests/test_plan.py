"""What does not go together is found before any stage begins: labels, vocabularies, normalisation of checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers import BERT, VIT, config, task_and_info
from test_data import write

from kt_hf import Data, Recipe, Train, digits, run
from kt_hf.errors import KtError
from kt_hf.recipe import Model

TINY = {"config": "bert", "config_overrides": BERT}


def saved(folder: Path, kind: str, labels: list[str], model: Model | None = None) -> str:
    """A checkpoint of a tiny model with a head for these labels."""
    task, info = task_and_info(kind)
    loaded = task.load(model or config(kind), dataclasses.replace(info, labels=labels))
    task.save(loaded, folder)
    return str(folder)


def texts(path: Path) -> str:
    rows = {
        "text": [f"word{i} word{i + 1}" for i in range(12)],
        "label": [("cat", "dog", "owl")[i % 3] for i in range(12)],
    }
    return str(write(path, train=rows, validation=rows, test=rows))


def refused(tmp_path: Path, model: Any, data: str, stages: list[Any]) -> str:
    recipe = Recipe(data=Data(data), model=model, training={"max_steps": 2, "report_to": "none"}, stages=stages)
    with pytest.raises(KtError) as found:
        run(recipe, tmp_path / "out")
    assert found.value.exit_code == 2
    assert not (tmp_path / "out" / "first").exists(), "nothing was begun"
    return str(found.value)


def test_a_teacher_of_other_classes_or_words(tmp_path):
    student = saved(tmp_path / "student", "text", ["cat", "dog", "owl"])
    strangers = saved(tmp_path / "strangers", "text", ["cat", "dog", "emu"])
    fewer = saved(tmp_path / "fewer", "text", ["cat", "dog", "owl"], config("text", vocab_size=2000))
    data = texts(tmp_path / "data")

    def stages(teacher: str) -> list[Any]:
        return [Train("first"), Train("second", strategies=[{"distill": {"teacher": teacher}}])]

    assert "owl unknown to the model" in refused(tmp_path, student, data, stages(strangers))
    # the fresh student's tokenizer is made of other texts than the teacher's
    assert "differ in vocabulary" in refused(tmp_path, TINY, data, stages(fewer))


def test_a_student_whose_head_is_for_other_classes(tmp_path):
    strangers = saved(tmp_path / "strangers", "text", ["cat", "dog", "emu"])
    stages = [Train("first", model=TINY), Train("second")]
    assert "owl unknown to the model" in refused(tmp_path, strangers, texts(tmp_path / "data"), stages)


def test_a_teacher_that_sees_images_in_another_way(tmp_path):
    teacher = saved(tmp_path / "teacher", "image", list(digits.load("target")["train"].features["label"].names))
    small = {"config": "vit", "config_overrides": VIT, "processor_overrides": {"image_mean": [0.1] * 3}}
    stages = [Train("first"), Train("second", strategies=[{"distill": {"teacher": teacher}}])]
    recipe = Recipe(data=Data("digits"), model=small, training={"max_steps": 2, "report_to": "none"}, stages=stages)
    with pytest.raises(KtError, match="image_mean"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "first").exists()


def test_what_goes_together_is_trained(tmp_path):
    student = saved(tmp_path / "student", "text", ["owl", "cat", "dog"])
    data = texts(tmp_path / "data")
    stages = [Train("first", strategies=["lora", {"distill": {"teacher": student}}])]
    training = {"max_steps": 2, "report_to": "none"}
    report = run(Recipe(data=Data(data), model=student, training=training, stages=stages), tmp_path / "out")
    assert report["stages"][0]["name"] == "first"


def test_a_tokenizer_of_a_stage_that_has_not_run(tmp_path):
    """Two fresh models with one vocabulary: planned before it is there, and again when it is."""
    data = texts(tmp_path / "data")
    given = {"data": Data(data), "training": {"max_steps": 2, "report_to": "none"}, "model": TINY}
    student = {**TINY, "processor": "@teacher"}
    distill = {"distill": {"teacher": "@teacher"}}
    recipe = Recipe(stages=[Train("teacher"), Train("student", strategies=[distill], model=student)], **given)
    run(recipe, tmp_path / "out")
    folders = [tmp_path / "out" / name / "model" / "tokenizer.json" for name in ("teacher", "student")]
    assert folders[0].read_text() == folders[1].read_text()
    run(recipe, tmp_path / "out")


def test_outputs_are_not_kept_for_a_single_epoch(tmp_path):
    """12 rows, 2 steps of 8: found before the first stage begins."""
    probe = Train("second", [{"finetune": {"linear_probe": True}}], training={"cache_frozen": True})
    said = refused(tmp_path, TINY, texts(tmp_path / "data"), [Train("first"), probe])
    assert "fewer than two epochs" in said
    probe = Train("second", [{"finetune": {"linear_probe": True}}], training={"cache_frozen": True})
    training = {"max_steps": 2, "dataloader_drop_last": True, "report_to": "none"}  # of 8 of the 12 rows: two epochs
    run(Recipe([probe], data=Data(texts(tmp_path / "more")), model=TINY, training=training), tmp_path / "ran")
