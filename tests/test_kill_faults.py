"""Faults around checkpoints, provoked from outside: a full disk, a flipped byte, changed settings, a folder that cannot
be written, two processes on one folder. In each case nothing is lost: mended, the run ends as if nothing had been.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kill_harness
import kill_rows
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from kill_harness import Parent, Place, Row

pytestmark = pytest.mark.slow
TEXT = Row("text", kill_rows.recipe(kill_rows.TEXTS, kill_rows.BERT, ["finetune", kill_rows.EMA]), [])


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    found = Parent(tmp_path_factory.mktemp("cache"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    kill_rows.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(parent: Parent, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The run that nothing happens to."""
    place = Place(tmp_path_factory.mktemp("whole"), TEXT, data)
    kill_harness.run_to_the_end(parent, place)
    return place


@pytest.fixture
def place(parent: Parent, data: Path, tmp_path: Path) -> Place:
    """A run that was killed in its eighth step: checkpoints 3 and 6 are there."""
    found = Place(tmp_path / "run", TEXT, data)
    kill_harness.run_and_kill(parent, found, 0, {"step": 7})
    return found


def start(parent: Parent, place: Place, *arguments: str, ranks: int = 1, n: int = 1) -> tuple[list[int], str]:
    """(exit codes, what this child said)."""
    log = place.log(n)
    log.unlink(missing_ok=True)
    request = {"recipe": str(place.recipe), "arguments": [*arguments, "--output-dir", str(place.out)], "log": str(log)}
    pids = parent.ask(start={**request, "ranks": kill_harness.environments(ranks, place.variables({}))})["pids"]
    codes = parent.ask(wait=pids, seconds=120)["codes"]
    return codes, log.read_text()


def error(place: Place) -> dict[str, Any]:
    return json.loads((place.out / "error.json").read_text())


def check_resumes(parent: Parent, place: Place, whole: Place, step: int = 6) -> None:
    """The run goes on from that step, and ends as the undisturbed one."""
    codes, said = start(parent, place, n=9)
    assert codes == [0] and kill_harness.resumed_at(said) == str(step), said
    assert kill_harness.compare(whole, place) == []


# --- 4: a byte is flipped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state.safetensors", "trainer.json", "manifest.json"])
def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_used(
    name: str, parent: Parent, place: Place, whole: Place
) -> None:
    path = place.out / "main" / "checkpoints" / "step-000006" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    codes, said = start(parent, place)
    assert codes == [0] and "skipping checkpoint step-000006" in said and "resumed at step 3" in said
    assert name == "manifest.json" or (name in said and "sha256" in said)
    assert kill_harness.compare(whole, place) == []


# --- 2, 12: the disk --------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system in memory of that size at `folder`; skips where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_in_the_middle_of_a_save(parent: Parent, data: Path, whole: Place, tmp_path: Path) -> None:
    place = Place(tmp_path, TEXT, data)
    with small_disk(place.out, "8m"):
        kill_harness.run_and_kill(parent, place, 0, {"step": 4})
        checkpoints = place.out / "main" / "checkpoints"
        size = (checkpoints / "step-000003" / "state.safetensors").stat().st_size
        free = os.statvfs(place.out)
        ballast = free.f_bavail * free.f_frsize - size // 2  # half a checkpoint fits
        assert size // 2 > 3 * 4096 and ballast > 0
        (tmp_path / "out" / "ballast").write_bytes(b"x" * ballast)
        codes, said = start(parent, place)
        assert codes == [6] and "the disk is full" in said and "Traceback" not in said, said
        assert error(place)["code"] == 6 and "nothing that was saved is lost" in error(place)["remedy"]
        assert [p.name for p in checkpoints.iterdir()] == ["step-000003"]
        kill_harness.check_checkpoints(place.out)
        (tmp_path / "out" / "ballast").unlink()
        check_resumes(parent, place, whole, 3)


def test_a_folder_that_cannot_be_written_is_refused_before_training(parent: Parent, place: Place, whole: Place) -> None:
    kept = place.root / "kept"
    shutil.move(place.out, kept)
    with small_disk(place.out, "8m"):
        shutil.copytree(kept, place.out, dirs_exist_ok=True)
        steps = {p: p.stat().st_size for p in place.notes.glob("main.42/*")}
        subprocess.run(["mount", "-o", "remount,ro", str(place.out)], check=True)
        codes, said = start(parent, place)
        assert codes == [6] and "cannot write to" in said and "Traceback" not in said, said
        assert steps and {p: p.stat().st_size for p in place.notes.glob("main.42/*")} == steps, "it has trained"
        subprocess.run(["mount", "-o", "remount,rw", str(place.out)], check=True)
        check_resumes(parent, place, whole)


def test_overwrite_sets_the_run_aside_and_starts_anew(parent: Parent, place: Place, whole: Place) -> None:
    before = dict(kill_harness.leaves(place.out))
    codes, said = start(parent, place, "--overwrite")
    assert codes == [0] and "resumed" not in said
    assert dict(kill_harness.leaves(place.out.with_name("out.old-1"))) == {
        k: v for k, v in before.items() if k != ".lock"
    }
    assert kill_harness.compare_outputs(whole.out, place.out) == []


# --- 11: something has changed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("training.learning_rate=0.5", "training.learning_rate: 0.01 -> 0.5"),
        ("training.seed=1", "training.seed"),
        ("data.path=other", "data.path"),
        ("model.config_overrides.hidden_size=32", "model.config_overrides.hidden_size: 16 -> 32"),
        ("stages.main.strategies.ema.decay=0.5", "stages.main.strategies.ema.decay: 0.8 -> 0.5"),
    ],
)
def test_changed_settings_are_refused_by_name(
    change: str, named: str, parent: Parent, place: Place, whole: Place
) -> None:
    codes, said = start(parent, place, change)
    assert codes == [2] and named in said and "--allow-changed" in said and error(place)["code"] == 2
    check_resumes(parent, place, whole)


def test_an_allowed_change_is_logged(parent: Parent, place: Place) -> None:
    codes, said = start(parent, place, "training.learning_rate=0.5", "--allow-changed", "training.learning_rate")
    assert codes == [0] and kill_harness.resumed_at(said) == "6"
    assert "continuing with a changed setting: training.learning_rate: 0.01 -> 0.5" in said
    assert yaml.safe_load((place.out / "recipe.yaml").read_text())["training"]["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("text", lambda text: text.replace("word1 ", "word2 ")),
        ("label", lambda label: {"cat": "dog", "dog": "cat"}.get(label, label)),
        ("label", lambda label: {"cat": "tiger"}.get(label, label)),
    ],
    ids=["texts", "labels", "names of labels"],
)
def test_changed_data_are_refused(
    column: str, change: Any, parent: Parent, place: Place, whole: Place, data: Path
) -> None:
    files = {path: path.read_bytes() for path in (data / "texts").glob("*.parquet")}
    try:
        for path in files:
            values = pq.read_table(path).to_pydict()
            pq.write_table(pa.table({**values, column: [change(v) for v in values[column]]}), path)
        codes, said = start(parent, place)
    finally:
        for path, content in files.items():
            path.write_bytes(content)
    assert codes == [2] and "the training data have changed since" in said and "Traceback" not in said, said
    assert "resumed" not in said and error(place)["code"] == 2
    check_resumes(parent, place, whole)


def test_another_number_of_processes_is_refused_with_the_numbers_or_continues(
    parent: Parent, place: Place, whole: Place
) -> None:
    """Three cannot share steps of four rows. Two do, without a word in the recipe, up to the order of sums."""
    codes, said = start(parent, place, ranks=3)
    assert 0 not in codes and 2 in codes, said
    assert "begun on 1 process with steps of 4 rows, which 3 cannot share" in said and "divide them: 1, 2, 4" in said
    codes, said = start(parent, place, ranks=2)
    assert codes == [0, 0] and kill_harness.resumed_at(said) == "6", said
    assert "per_device_train_batch_size=2 and gradient_accumulation_steps=1 keep its steps of 4 rows" in said
    mine, theirs = (json.loads((p.out / "main" / "stage.json").read_text())["curve"] for p in (place, whole))
    assert [point["learning_rate"] for point in mine] == [point["learning_rate"] for point in theirs]
    assert mine[0] == theirs[0]  # before the change


def test_ranks_that_share_a_global_batch_see_the_same_rows_and_rates(
    parent: Parent, whole: Place, data: Path, tmp_path: Path
) -> None:
    place = Place(tmp_path, TEXT, data)
    codes, said = start(parent, place, "training.per_device_train_batch_size=1", ranks=2)
    assert codes == [0, 0], said

    def rows(of: Place, step: int) -> list[int]:
        notes = of.notes.glob(f"main.42/{step:03d}.*")
        return sorted(
            i for note in notes for i in json.loads(set(note.read_text().splitlines()).pop().split("] ")[0] + "]")
        )

    assert all(len(rows(whole, step)) >= 2 and rows(place, step) == rows(whole, step) for step in range(19))
    mine, theirs = (json.loads((p.out / "main" / "stage.json").read_text())["curve"] for p in (place, whole))
    assert [point["learning_rate"] for point in mine] == [point["learning_rate"] for point in theirs]
    assert [point["loss"] for point in mine] != [point["loss"] for point in theirs]  # other draws of dropout


# --- 14: two processes on one folder ----------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(
    parent: Parent, place: Place, whole: Place
) -> None:
    pids = place.begin(parent, 2, {})
    note = place.notes / "main.42" / "009.0.0"
    end = time.monotonic() + 60
    while not note.exists() and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(pids[0], signal.SIGSTOP)
    try:
        assert note.exists()
        listing = sorted(p.relative_to(place.out) for p in place.out.rglob("*"))
        codes, said = start(parent, place)
        assert codes == [2] and "another process is running in" in said
        assert sorted(p.relative_to(place.out) for p in place.out.rglob("*")) == listing
    finally:
        os.kill(pids[0], signal.SIGKILL)
    assert parent.ask(wait=pids, seconds=10)["codes"] == [-signal.SIGKILL]
    codes, said = start(parent, place, n=3)  # at once
    assert codes == [0] and int(kill_harness.resumed_at(said)) >= 6
    assert kill_harness.compare(whole, place) == []
