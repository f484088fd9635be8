"""Trackers: curves and settings arrive, a resumed training continues its run, a broken tracker costs no training, and
no token is left anywhere. All of it without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kt_hf import tracking
from kt_hf.errors import RecipeError

SECRETS = {"HF_TOKEN": "hf_" + "s" * 34, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}
CHILD = Path(__file__).with_name("tracking_child.py")


def resumed(name: str, folder: Path, **environment: str) -> list[list[dict[str, str]]]:
    """Run the child in `folder`; the numbers of the tracker's runs by round and seed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install 'kt_hf[trackers]')")
    home = {"HOME": str(folder), "WANDB_DIR": "", "MLFLOW_TRACKING_URI": "", **SECRETS, **environment}
    done = subprocess.run(
        [sys.executable, str(CHILD), name, str(folder / "out")],
        cwd=folder,
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "left out" not in done.stderr, done.stderr
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
        for path in folder.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    first, second = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[{")))
    assert first == second and len(first) == 2 and first[0] != first[1], "one run for each seed, continued"
    return first


def test_tensorboard(tmp_path):
    resumed("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "out" / "a" / "logs"
    found = EventAccumulator(str(logs)).Reload()
    assert {e.step for e in found.Scalars("train/loss")} == {1, 2, 3, 4}
    assert "train/grad_norm" in found.Tags()["scalars"] and "validation/accuracy" in found.Tags()["scalars"]
    (settings,) = logs.rglob("hparams.yml")  # once, not again by the resumed one
    assert "training.max_steps: 4" in settings.read_text()


def test_wandb(tmp_path):
    first = resumed("wandb", tmp_path, WANDB_MODE="offline")
    for number, logs in zip(first, ("a/logs", "a/seeds/1/logs"), strict=True):
        files = sorted((tmp_path / "out" / logs).rglob(f"run-{number['wandb']}.wandb"))
        assert len(files) == 2, "two parts of one run"
        begun, continued = (path.read_bytes() for path in files)
        for word in (b"train/loss", b"strategies.finetune.freeze_layers", b"a seed ", b"tiny"):
            assert word in begun
        assert b"train/loss" in continued


def test_mlflow(tmp_path):
    first = resumed("mlflow", tmp_path)
    with sqlite3.connect(tmp_path / "out" / "mlflow.db") as store:
        runs = dict(store.execute("select run_uuid, name from runs"))
        params = dict(store.execute("select key, value from params where run_uuid = ?", (first[1]["mlflow"],)))
        steps = store.execute(
            "select step from metrics where key = 'train/loss' and run_uuid = ?", (first[0]["mlflow"],)
        )
        assert {step for (step,) in steps} == {1, 2, 3, 4}
    assert runs == {first[0]["mlflow"]: "a seed 0", first[1]["mlflow"]: "a seed 1"}
    assert params["seed"] == "43" and params["training.max_steps"] == "4"
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"out"}


def test_trackio(tmp_path):
    first = resumed("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; runs = sorted(S.get_runs('tiny'));"
        "print(json.dumps([[r, [x['step'] for x in S.get_logs('tiny', r) if 'train/loss' in x], "
        "S.get_run_config('tiny', r)] for r in runs], default=str))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    runs = json.loads(found.stdout.splitlines()[-1])
    assert [name for name, _, _ in runs] == [f"a seed {i} {number['trackio']}" for i, number in enumerate(first)]
    for _, steps, config in runs:
        assert set(steps) == {1, 2, 3, 4}
        assert config["training.max_steps"] == 4


def test_a_tracker_that_is_not_installed_is_refused_before_training():
    missing = next(n for n in ("aim", "clearml", "comet_ml", "swanlab") if importlib.util.find_spec(n) is None)
    with pytest.raises(RecipeError, match=f"{missing} is not installed"):
        tracking.check_installed(missing)


def test_a_tracker_that_fails_is_left_out_with_a_warning(tmp_path, caplog):
    context = SimpleNamespace(recipe=SimpleNamespace(name="r"), root=tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "logs").write_text("no folder")
    tracker = tracking.Tracker("tensorboard", context, tmp_path / "a", {})
    with caplog.at_level("WARNING"):
        tracker.log({"x": 1.0}, 1)
        tracker.log({"x": 2.0}, 2)
        tracker.finish()
    assert [r.message for r in caplog.records if "is left out" in r.message] and len(caplog.records) == 1


@pytest.mark.parametrize(
    "path, name",
    [
        ("student", "student seed 0"),
        ("student/seeds/2", "student seed 2"),
        ("student/trials/2-of-6", "student seed 0 trial 2 of 6"),
    ],
)
def test_runs_are_called_by_stage_and_seed(path, name):
    assert tracking.run_name(Path("runs") / path) == name
