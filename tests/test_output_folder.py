"""The output folder: whose it is, who holds it, what is finished, what a failure leaves; and that recipe.yaml
reproduces a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kt_hf import Data, Model, Recipe, Train, failing, folder, launch
from kt_hf import recipe as grammar
from kt_hf.errors import IntegrityError, KtError, RecipeError, ResourceError

VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def tiny() -> Recipe:
    return Recipe(
        name="tiny",
        data=Data("digits", "target", max_examples=40),
        model=Model(config="vit", config_overrides=VIT),
        training={"max_steps": 2, "learning_rate": 1e-3, "report_to": "none", "eval_steps": 0},
        stages=[Train("first"), Train("second", model="@first", training={"max_steps": 1})],
    )


def go(recipe: Any, output: Path, *arguments: str, code: int = 0) -> None:
    """Run as a recipe file would, and check the exit code."""
    try:
        launch.main(recipe, [*arguments, "--output-dir", str(output)])
        found: Any = 0
    except SystemExit as stop:
        found = stop.code
    assert found == code, (output / "error.json").read_text() if (output / "error.json").exists() else found


def error(output: Path) -> dict[str, Any]:
    return json.loads((output / "error.json").read_text())


def weights(output: Path) -> dict[str, str]:
    files = sorted(output.glob("*/model/*.safetensors"))
    return {str(f.relative_to(output)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    logger = logging.getLogger("kt_hf")
    logger.addHandler(caplog.handler)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records)
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe; tests that change it work on a copy."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    go(tiny(), output)
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(finished, tmp_path / "run")


# --- reproducing ---


def test_recipe_yaml_reproduces_the_bits_of_the_weights(finished: Path, tmp_path: Path) -> None:
    raw = grammar.from_yaml(str(finished / "recipe.yaml"))
    go(raw, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(finished) and len(weights(finished)) == 2
    assert (tmp_path / "again" / "recipe.yaml").read_text() == (finished / "recipe.yaml").read_text()


def test_the_command_reproduces_them_too(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("kt_hf.cli", reason="this checkout has no kt_hf/cli.py")
    command = [
        sys.executable,
        "-m",
        "kt_hf.cli",
        "run",
        str(finished / "recipe.yaml"),
        "--output-dir",
        str(tmp_path / "again"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "again") == weights(finished)


def test_printing_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tiny(), tmp_path / "out", "--print", "training.max_steps=5")
    text = capsys.readouterr().out
    assert "max_steps: 5" in text and "plan: 2 stages" in text and "train second" in text
    assert not (tmp_path / "out").exists()


# --- continuing ---


def test_the_same_recipe_continues_and_skips_what_is_finished(run: Path, log: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/stage.json")}
    go(tiny(), run)
    assert {p: p.stat().st_mtime_ns for p in run.glob("*/stage.json")} == before
    assert log().count("finished before") == 2


def test_a_damaged_stage_is_made_again(run: Path, log: Any) -> None:
    former = weights(run)
    path = run / "second" / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    go(tiny(), run)
    assert "second is run again" in log() and log().count("finished before") == 1
    assert weights(run) == former


def test_another_recipe_is_refused_and_the_differences_are_named(run: Path) -> None:
    go(tiny(), run, "training.learning_rate=0.5", "stages.second.strategies=[lora]", code=2)
    cause = error(run)["cause"]
    assert "training.learning_rate: 0.001 -> 0.5" in cause
    assert "stages.second.strategies.lora" in cause and "--allow-changed" in error(run)["remedy"]
    go(tiny(), run)
    assert not (run / "error.json").exists()


def test_allowed_changes_are_logged_and_others_still_refused(run: Path, log: Any) -> None:
    change = ["training.learning_rate=0.5", "training.weight_decay=0.1"]
    go(tiny(), run, *change, "--allow-changed", "training.learning_rate", code=2)
    assert "weight_decay" in error(run)["cause"] and "learning_rate" not in error(run)["cause"]
    go(tiny(), run, *change, "--allow-changed", "training")
    assert "continuing with a changed setting: training.learning_rate: 0.001 -> 0.5" in log()
    assert grammar.from_yaml(str(run / "recipe.yaml"))["training"]["weight_decay"] == 0.1


def test_a_run_that_made_nothing_does_not_bind(tmp_path: Path) -> None:
    go(tiny(), tmp_path / "out", "data.columns.label=lable", code=2)
    assert "did you mean 'label'" in error(tmp_path / "out")["remedy"]
    go(tiny(), tmp_path / "out", "--print")
    with folder.lock(tmp_path / "out"):
        folder.open_folder(tmp_path / "out", {"kt_hf_version": "x", "seeds": 2}, False, [])
    assert not (tmp_path / "out" / "error.json").exists()


def test_the_order_of_stages_and_strategies_is_a_setting() -> None:
    one = {"stages": [{"train": "a", "strategies": [{"x": {}}, {"y": {"r": 1}}]}, {"train": "b"}]}
    two = {"stages": [{"train": "a", "strategies": [{"y": {"r": 1}}, {"x": {}}]}, {"train": "b"}]}
    assert folder._flat(one)["stages.a.strategies.y.r"] == "1"
    differing = {k for k in folder._flat(one) if folder._flat(one)[k] != folder._flat(two).get(k)}
    assert differing == {"stages.a.strategies (order)"}


# --- refusing ---


def test_a_foreign_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("words")
    (foreign / "recipe.yaml").write_text("eggs: 2\n")
    go(tiny(), foreign, code=2)
    assert sorted(p.name for p in foreign.iterdir()) == ["chapter1.txt", "recipe.yaml"]
    go(tiny(), foreign, "seeds=0", code=2)
    assert sorted(p.name for p in foreign.iterdir()) == ["chapter1.txt", "recipe.yaml"]


def test_overwrite_renames_aside_and_deletes_nothing(tmp_path: Path) -> None:
    foreign = tmp_path / "out"
    for n in (1, 2):
        foreign.mkdir(exist_ok=True)
        (foreign / "notes.txt").write_text(f"words {n}")
        with folder.lock(foreign):
            folder.open_folder(foreign, {"kt_hf_version": "x"}, True, [])
        assert sorted(p.name for p in foreign.iterdir()) == [".lock", "recipe.yaml"]
        assert (tmp_path / f"out.old-{n}" / "notes.txt").read_text() == f"words {n}"


def test_overwrite_does_not_move_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(RecipeError, match="the current folder is in"):
        folder.open_folder(tmp_path, {}, True, [])
    assert (tmp_path / "notes.txt").exists()


def test_a_held_folder_is_refused_at_once(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        go(tiny(), tmp_path, code=2)
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]  # nothing written beside the run at work
    finally:
        holder.kill()
        holder.wait()
    with folder.lock(tmp_path):  # the kernel let go of it
        pass


def test_an_orphaned_worker_does_not_hold_the_folder(tmp_path: Path) -> None:
    """Data workers are forked while the folder is held, and outlive a killed run by seconds."""
    from multiprocessing import get_context

    with folder.lock(tmp_path):
        context = get_context("fork")
        begun = context.Event()
        worker = context.Process(target=lambda: (begun.set(), time.sleep(60)))
        worker.start()
        assert begun.wait(20)
    try:
        with folder.lock(tmp_path):
            assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_path_that_cannot_be_a_folder(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    go(tiny(), tmp_path / where, code=6)
    assert (tmp_path / "file").read_text() == "x"


def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write anywhere; the refusal is tested with a path below a file")
        with pytest.raises(ResourceError, match="cannot write to"), folder.lock(tmp_path / "out"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    output = tmp_path / "out"
    output.mkdir()
    (output / "recipe.yaml").write_text("kt_hf_version: x\n")
    (output / "first").symlink_to(tmp_path / "outside")
    with pytest.raises(IntegrityError, match="leads out of the output folder") as refused:
        folder.open_folder(output, {"kt_hf_version": "x"}, False, [])
    assert refused.value.exit_code == 4


# --- error.json ---


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["seeds=0"], 2, "seeds: got 0"),
        (["model=nobody/has-this"], 5, "nobody/has-this"),
        (["data.path=/nowhere/at/all"], 3, "there is no such folder"),
        (["name=../x"], 4, "leads out of"),
        (["data.augment=[Nothing]"], 2, "no transform 'Nothing'"),
    ],
)
def test_a_failure_leaves_its_code_cause_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, part: str
) -> None:
    go(tiny(), tmp_path / "out", *arguments, code=code)
    facts = error(tmp_path / "out")
    assert facts["code"] == code and part in facts["cause"] and facts["remedy"]
    text = capsys.readouterr().err
    assert part in text and "Traceback" not in text


def test_debug_shows_the_traceback(tmp_path: Path, log: Any, caplog: pytest.LogCaptureFixture) -> None:
    go(tiny(), tmp_path / "out", "data.path=/nowhere/at/all", "--debug", code=3)
    assert any(record.exc_info for record in caplog.records)


def _fail_as(rank: int, folder: Path, gate) -> None:
    os.environ["RANK"] = str(rank)
    gate.wait()
    with contextlib.suppress(SystemExit):
        failing.fail(KtError("the main process" if rank == 0 else "another process " * 40, ""), folder)


def test_ranks_that_fail_at_the_same_moment_leave_one_whole_error_json(tmp_path):
    fork = multiprocessing.get_context("fork")
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        gate = fork.Barrier(4)
        ranks = [fork.Process(target=_fail_as, args=(rank, folder, gate)) for rank in range(4)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        facts = json.loads((folder / "error.json").read_text())
        assert facts["cause"] == "the main process" and [p.name for p in folder.iterdir()] == ["error.json"]
