"""Every recipe of the repository, end to end, with a few steps; and what a finished run holds."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForImageClassification

from kt_hf import launch

RECIPES = Path(__file__).parent.parent / "recipes"
README = Path(__file__).parent.parent / "README.md"
QUICK = ["training.max_steps=3", "training.learning_rate=1e-3", "seeds=1", "stages.finetune.seeds=2"]


def run_recipe(name: str, folder: Path, *settings: str) -> dict:
    recipe = runpy.run_path(str(RECIPES / f"{name}.py"))["recipe"]
    return launch.main(recipe, [*settings, "--output-dir", str(folder)])


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.py")))
def test_recipe_runs_end_to_end(name, tmp_path, capsys):
    settings = [s for s in QUICK if name == "soup" or not s.startswith("stages.")]
    report = run_recipe(name, tmp_path / "out", *settings)
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stages"] == report["stages"]
    for stage in report["stages"]:
        folder = tmp_path / "out" / stage["name"]
        table = pq.read_table(folder / "predictions.parquet")
        assert len(table) == stage["examples"]
        assert stage["name"] in printed
        if stage["kind"] in ("train", "merge"):
            assert (folder / "model" / "README.md").read_text().startswith("---")


def test_every_recipe_says_how_it_is_launched():
    for path in RECIPES.glob("*.py"):
        assert f"accelerate launch recipes/{path.name}" in path.read_text(), path.name


def test_accuracy_can_be_recomputed_from_the_predictions(tmp_path):
    report = run_recipe("finetune", tmp_path / "out", "training.max_steps=20")
    entry = report["stages"][-1]
    rows = pq.read_table(tmp_path / "out" / entry["name"] / "predictions.parquet").to_pylist()
    right = [row["label"] == row["prediction"] for row in rows]
    assert sum(right) / len(right) == pytest.approx(entry["metrics"]["accuracy"]["value"], abs=1e-9)


def test_card_and_report_say_how_a_stage_was_trained(tmp_path):
    settings = ["training.learning_rate=2e-3", "stages.finetune.training.weight_decay=0.1", "training.max_steps=2"]
    report = run_recipe("finetune", tmp_path / "out", *settings)
    told = report["stages"][-1]["settings"]["training"]
    wanted = {"learning_rate": 2e-3, "weight_decay": 0.1, "max_steps": 2, "per_device_train_batch_size": 16, "seed": 42}
    assert wanted.items() <= told.items() and "num_train_epochs" not in told and "bf16" not in told
    card = (tmp_path / "out" / "finetune" / "model" / "README.md").read_text()
    assert all(f"{key}: {value}" in card for key, value in wanted.items())


def test_exports_load_with_nothing_missing(tmp_path):
    run_recipe("lora", tmp_path / "out", "training.max_steps=2")
    _, info = AutoModelForImageClassification.from_pretrained(
        str(tmp_path / "out" / "lora" / "model"), output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_readme_names_the_commands_that_the_check_script_runs():
    script = (README.parent / ".ci" / "run").read_text()
    for command in (
        "pip install -e . && accelerate launch recipes/quickstart.py",
        'pip install -e ".[test]" && pytest',
    ):
        assert command in README.read_text()
        assert command in script


def test_the_readme_lists_every_plugin_of_ours():
    from kt_hf import registry

    text = README.read_text()
    for (kind, name), entry in registry.entries().items():
        if entry.distribution.replace("-", "_") == "kt_hf":
            assert f"`{name}`" in text, f"{kind} {name}"


def test_plugins_import_kt_hf_and_no_other_plugin():
    import ast

    plugins = README.parent / "plugins"
    names = {p.stem for p in plugins.glob("*.py")}
    for path in plugins.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert not any(m.startswith("kt_hf_plugins") or m.split(".")[0] in names for m in modules), path.name
    for path in (README.parent / "kt_hf").rglob("*.py"):
        if "testing" not in path.parts and path.name != "scaffold.py":
            assert "kt_hf_plugins" not in path.read_text().replace('"kt_hf_plugins"', ""), path.name
    for path in (README.parent / "kt_hf" / "functional").glob("*.py"):
        assert "import kt_hf" not in path.read_text() and "from kt_hf" not in path.read_text(), path.name


def test_zero_shot_is_measured_where_the_model_can_answer(tmp_path):
    report = run_recipe("finetune", tmp_path / "out", "training.max_steps=5", "stages.finetune.compare=[zero_shot]")
    gains = report["stages"][-1]["gains"]
    assert {g["baseline"] for g in gains} == {"zero_shot"}
    assert {g["verdict"] for g in gains} == {"one seed: no claim"}


def test_zero_shot_of_a_new_head_is_explained(tmp_path):
    report = run_recipe("distill", tmp_path / "out", "training.max_steps=2", "stages.student.compare=[zero_shot]")
    assert any("nothing trained" in note for note in report["notes"])


def test_metrics_are_chosen_by_name_and_the_first_decides(tmp_path):
    metrics = "task={image-classification: {metrics: [matthews_correlation, accuracy]}}"
    report = run_recipe("finetune", tmp_path / "out", "training.max_steps=5", metrics)
    entry = report["stages"][-1]
    assert entry["metric"] == "matthews_correlation"
    found = entry["metrics"]["matthews_correlation"]
    assert found["low"] < found["value"] < found["high"]
