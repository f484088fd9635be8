"""Classes of a checkpoint and of the data go together by their names, and models that bring code are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import helpers
import pytest
import torch

from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.recipe import Model


def saved(folder: Path, labels: list[str]) -> Path:
    task, info = helpers.task_and_info("image")
    torch.manual_seed(1)
    task.save(task.load(helpers.config("image"), dataclasses.replace(info, labels=labels)), folder)
    return folder


def test_another_order_is_mapped_by_name_and_keeps_the_head(tmp_path):
    task, info = helpers.task_and_info("image")
    labels = helpers.LABELS[::-1]
    loaded = task.load(Model(path=str(saved(tmp_path, labels))), info)
    assert loaded.labels == labels and loaded.label_ids == [2, 1, 0] and not loaded.new_parameters
    rows = {"image": info.splits["train"][:3]["image"], "label": [0, 1, 2]}
    assert task.preprocess(rows, loaded, False)["labels"] == [2, 1, 0]


def test_unknown_classes_are_refused_and_a_new_head_must_be_asked_for(tmp_path):
    task, info = helpers.task_and_info("image")
    folder = str(saved(tmp_path, ["cat", "dog", "bear"]))
    with pytest.raises(RecipeError, match="owl unknown to the model"):
        task.load(Model(path=folder), info)
    loaded = task.load(Model(path=folder, replace_head=True), info)
    assert loaded.labels == helpers.LABELS and loaded.new_parameters


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_model_that_brings_code_is_refused_and_none_of_it_runs(kind, tmp_path):
    task, info = helpers.task_and_info(kind)
    folder = saved(tmp_path / "m", helpers.LABELS)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(IntegrityError) as error:
        task.load(Model(path=str(folder), processor=helpers.teacher(tmp_path / "t", kind)), info)
    assert "code" in error.value.cause and error.value.exit_code == 4
    assert not (tmp_path / "canary").exists()
