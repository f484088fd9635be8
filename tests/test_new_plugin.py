"""From `kt-hf new-plugin` to a recipe that uses the plugin: written, installed, listed, checked, run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kt_hf import scaffold, testing
from kt_hf.errors import RecipeError


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which a new plugin was installed by pip."""
    root = tmp_path_factory.mktemp("plugin")
    folder = scaffold.write("pull-home", root)
    target = root / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        str(target),
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    return target


def run(installed: Path, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in (str(installed), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=280, check=False, env=environment, cwd=cwd
    )


def test_the_package_has_what_it_takes(tmp_path: Path):
    folder = scaffold.write("my-strategy", tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "my_strategy.py",
        "pyproject.toml",
        "test_my_strategy.py",
    ]
    assert not any(
        "@" in line and "@stage" not in line for p in folder.iterdir() for line in p.read_text().splitlines()
    )
    with pytest.raises(RecipeError, match="exists"):
        scaffold.write("my-strategy", tmp_path)


@pytest.mark.parametrize(
    "name", ["", "My", "1st", "a b", "../up", "a/b", "-x", "class", "json", "torch", "finetune", "a--b", "x" * 70]
)
def test_names_that_cannot_be_packages(name: str, tmp_path: Path):
    with pytest.raises(RecipeError):
        scaffold.write(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_is_installed_and_listed(installed: Path):
    done = run(installed, "-m", "kt_hf.cli", "list")
    assert any(line.split() == ["pull-home", "pull-home"] for line in done.stdout.splitlines()), (
        done.stdout + done.stderr
    )


def test_it_is_checked_by_its_own_test_and_by_the_command(installed: Path):
    own = run(
        installed,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(installed.parent / "pull-home"),
        cwd=installed.parent,
    )
    assert own.returncode == 0 and "1 passed" in own.stdout, own.stdout[-1500:]


@pytest.mark.slow
def test_the_command_checks_it(installed: Path):
    done = run(installed, "-m", "kt_hf.cli", "check-plugin", "pull-home", "alpha=0.5")
    assert done.returncode == 0 and "0 of " in done.stdout, done.stdout[-1500:] + done.stderr[-500:]


def test_it_serves_in_a_recipe(installed: Path, tmp_path: Path):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    recipe = {
        "data": {"path": "digits", "max_examples": 40},
        "model": {"config": "vit", "config_overrides": sizes},
        "training": {"max_steps": 4, "report_to": "none"},
        "stages": [
            {"train": "start"},
            {"train": "held", "model": "@start", "strategies": ["finetune", {"pull-home": {"alpha": 100.0}}]},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = run(
        installed, "-m", "kt_hf.cli", "run", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr[-1500:]
    terms = json.loads((tmp_path / "out" / "held" / "stage.json").read_text())["curve"][-1]["terms"]
    assert terms["pull-home/start"] > 0


def test_the_new_strategy_pulls_as_its_equation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """alpha / 2 * sum (w - w0)^2, on weights that came from a checkpoint."""
    import importlib
    from types import SimpleNamespace

    import torch
    from torch import nn

    folder = scaffold.write("pull-here", tmp_path)
    monkeypatch.syspath_prepend(folder)
    cls = importlib.import_module("pull_here").PullHere
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    strategy = cls(alpha=3.0, beta=0.5)
    strategy.ready(model, SimpleNamespace(loaded=SimpleNamespace(new_parameters=["1.weight", "1.bias"])))
    with torch.no_grad():
        model[0].weight += 1.0
        model[1].weight.fill_(2.0)
        model[1].bias.zero_()
    found = strategy.loss(SimpleNamespace(model=model, once=lambda x: x))
    assert found["start"].item() == pytest.approx(3.0 / 2 * 4) and found["zero"].item() == pytest.approx(0.5 / 2 * 8)
    assert {n for n, _ in strategy.named_buffers()} == {"anchor_0", "anchor_1"}
    with pytest.raises(testing.NotConforming):
        monkeypatch.setattr(cls, "neutral", {"alpha": 1.0})
        testing.check_strategy(cls)
