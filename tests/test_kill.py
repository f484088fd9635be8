"""Runs that are killed, at any moment and any number of times, end bit for bit as the run that never was.

pytest -m slow tests/test_kill.py                          # minutes; prints the table
KILL_TABLE=docs/resume pytest -m slow tests/test_kill.py   # also writes docs/resume.md and docs/resume.json
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kill_harness
import kill_rows
import pyarrow.parquet as pq
import pytest
from kill_harness import Parent, Place, Row
from kill_rows import ROWS

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


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
def table(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Lines that tests add; printed at the end, and written where KILL_TABLE says."""
    lines: list[dict[str, Any]] = []
    yield lines
    text = kill_harness.markdown(lines)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{text}")
    if target := os.environ.get("KILL_TABLE"):
        Path(f"{target}.md").write_text(f"{HEAD}\n{text}")
        Path(f"{target}.json").write_text(json.dumps(lines, indent=1) + "\n")


HEAD = """# Killed and resumed

Every row is a recipe that was run twice: once left alone, once killed so many times and started again each time. Most
kills are SIGKILL at a chosen step, before a chosen change of the file system, or at a drawn time; one is made by the
kernel in the middle of a write. `equal` means bit for bit: exported weights, every tensor of the checkpoints (weights,
optimizer, EMA), losses, learning rates, evaluations, metrics, predictions, the files that are left, and the rows and
the pixels or tokens of every micro-batch, each time it was computed. `resumed at` are the steps at which the processes
that were started again went on; `-`: there was no checkpoint yet, or no training left; `+`: several trainings in one.

Written by `KILL_TABLE=docs/resume pytest -m slow tests/test_kill.py`.
"""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{'+'.join(row.strategies())}: {row.name}")
def test_killed_equals_undisturbed(row: Row, parent: Parent, data: Path, table: list[Any], tmp_path: Path) -> None:
    outcome = kill_harness.play(parent, row, tmp_path, data)
    table.append(kill_harness.entry(outcome))
    assert not outcome.differences, "\n".join(outcome.differences)


# --- the table of rows ------------------------------------------------------------------------------------------------


def test_every_registered_strategy_has_a_row() -> None:
    from kt_hf import registry

    installed = {n for (kind, n), e in registry.entries().items() if kind == "strategy" and e.plugin is None}
    missing = installed - {name for row in ROWS for name in row.strategies()}
    assert installed and not missing, f"strategies without a row in tests/kill_rows.py: {', '.join(sorted(missing))}"


def test_the_rows_cover_the_axes() -> None:
    found = {axis for row in ROWS for axis in kill_rows.axes(row)}
    wanted = {"0 workers", "2 workers", "1 ranks", "2 ranks", "accumulation 1", "accumulation 2", "stack"}
    wanted |= {"RandomRotation", "hidden_dropout_prob", "resid_pdrop", "streaming", "packing", "group_by_length"}
    wanted |= {"adamw_torch_fused", "adamw_torch", "sgd", "adafactor"}
    assert wanted <= found, wanted - found
    assert len(ROWS) + kill_rows.LAUNCHED <= 24
    assert sum(len(row.kills) for row in ROWS) >= 30


# --- the harness itself -----------------------------------------------------------------------------------------------

SIMPLE = ROWS[0]


@pytest.fixture(scope="module")
def whole(parent: Parent, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The simplest row, undisturbed."""
    place = Place(tmp_path_factory.mktemp("simple") / "whole", SIMPLE, data)
    kill_harness.run_to_the_end(parent, place)
    return place


def test_forking_is_sound(parent: Parent, whole: Place, data: Path, tmp_path: Path) -> None:
    """No thread beside the main one, before the first fork and after it; and a fresh process gives the same bits."""
    assert parent.facts["threads"] == []
    fresh = Place(tmp_path, SIMPLE, data)
    command = [sys.executable, str(HERE / "kill_child.py"), str(fresh.recipe), "--output-dir", str(fresh.out)]
    environment = {**kill_harness.ENVIRONMENT, **fresh.variables({})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kill_harness.compare(whole, fresh) == []


def test_a_strategy_that_forgets_is_found_out(parent: Parent, data: Path, tmp_path: Path) -> None:
    recipe = {**SIMPLE.recipe, "stages": [{"train": "main", "strategies": ["finetune", "forgetful"]}]}
    outcome = kill_harness.play(parent, Row("forgets", recipe, [{"step": 7}]), tmp_path, data)
    assert outcome.resumed == ["-", "6"]
    found = "\n".join(outcome.differences)
    assert all(name in found for name in ("model.safetensors", "stage.json", "step-000018/state.safetensors"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def shorten(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)


TAMPERING = {
    "weights": lambda p: flip(p.out / "main/model/model.safetensors"),
    "the configuration": lambda p: edit(p.out / "main/model/config.json", "hidden_size", "hidden_sizes"),
    "state of the optimizer": lambda p: flip(p.out / "main/checkpoints/step-000018/state.safetensors"),
    "a loss": lambda p: edit(p.out / "main/stage.json", '"loss": ', '"loss": 1'),
    "a learning rate": lambda p: edit(p.out / "main/stage.json", '"learning_rate": ', '"learning_rate": 1'),
    "a loss in a checkpoint": lambda p: edit(
        p.out / "main/checkpoints/step-000015/trainer.json", '"loss": ', '"loss": 1'
    ),
    "a metric": lambda p: edit(p.out / "report.json", '"value": ', '"value": 1'),
    "a prediction": lambda p: shorten(p.out / "main/predictions.parquet"),
    "a missing file": lambda p: (p.out / "main/arrays.safetensors").unlink(),
    "litter": lambda p: (p.out / "main/.stage.partial").write_text("{}"),
    "the order of rows": lambda p: edit(p.notes / "main.42/007.1.0", "[", "[1"),
    "a step that was done twice, otherwise": lambda p: (p.notes / "main.42/007.1.0").open("a").write("[1, 2] x\n"),
    "a step that was left out": lambda p: (p.notes / "main.42/007.1.0").unlink(),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_the_comparison_sees(what: str, whole: Place, tmp_path: Path) -> None:
    shutil.copytree(whole.root, tmp_path / "copy")
    copy = Place(tmp_path / "copy", whole.row, whole.data)
    assert kill_harness.compare(whole, copy) == []
    TAMPERING[what](copy)
    assert len(kill_harness.compare(whole, copy)) == 1


# --- real launchers ---------------------------------------------------------------------------------------------------


def processes(word: str) -> list[int]:
    """Processes whose command line holds a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def launch(command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that the launcher and its children can be killed together."""
    environment = {**kill_harness.ENVIRONMENT, "ACCELERATE_USE_CPU": "true", **variables}
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *command], stdout=file, stderr=file, env=environment, start_new_session=True
        )


def test_torchrun_one_rank_is_killed(parent: Parent, data: Path, table: list[Any], tmp_path: Path) -> None:
    """The other rank and the launcher end by themselves; the next launch resumes."""
    began = time.monotonic()
    recipe = kill_rows.recipe({**kill_rows.DIGITS, **kill_rows.TURNED}, kill_rows.VIT, [kill_rows.LORA, kill_rows.EMA])
    row = Row("torchrun, 2 ranks, one of which is killed", recipe, [], ranks=2)
    reference, place = Place(tmp_path / "whole", row, data), Place(tmp_path / "killed", row, data)
    kill_harness.run_to_the_end(parent, reference)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "kill_child.py")]
    command += [str(place.recipe), "--output-dir", str(place.out)]
    first = launch(command, place.log(0), place.variables({"step": 8, "rank": 1}))
    assert first.wait(120) != 0 and not processes(str(place.out))
    second = launch(command, place.log(1), place.variables({}))
    assert second.wait(120) == 0, place.log(1).read_text()[-3000:]
    outcome = kill_harness.Outcome(row, place.root, ["step 8, rank 1"])
    outcome.resumed = [kill_harness.resumed_at(place.log(n).read_text()) for n in (0, 1)]
    outcome.differences = kill_harness.compare(reference, place)
    outcome.seconds = time.monotonic() - began
    table.append(kill_harness.entry(outcome))
    assert outcome.resumed == ["-", "6"] and outcome.differences == []


def test_accelerate_launch_of_a_recipe_is_killed(parent: Parent, table: list[Any], tmp_path: Path) -> None:
    """A file of recipes/, as a user starts it; launcher and child are killed."""
    began = time.monotonic()
    recipe = HERE.parent / "recipes" / "finetune.py"
    settings = ["training.max_steps=60", "training.save_steps=5", "training.logging_steps=7", "training.num_threads=1"]
    settings += ["data.augment=[{RandomRotation: {degrees: 30}}]", "training.dataloader_num_workers=2"]
    settings += ["data.max_examples={validation: 20, test: 20}"]
    request = {"recipe": str(recipe), "arguments": [*settings, "--output-dir", str(tmp_path / "whole" / "out")]}
    (tmp_path / "whole").mkdir()
    pids = parent.ask(start={**request, "log": str(tmp_path / "whole.log"), "ranks": [{}]})["pids"]
    assert parent.ask(wait=pids, seconds=120)["codes"] == [0], (tmp_path / "whole.log").read_text()[-3000:]
    out = tmp_path / "killed" / "out"
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", str(recipe), *settings]
    command += ["--output-dir", str(out)]
    resumed = []
    for n, step in enumerate((5, 25)):
        running = launch(command, tmp_path / f"{n}.log", {})
        while running.poll() is None and not (out / "finetune" / "checkpoints" / f"step-{step:06d}").is_dir():
            time.sleep(0.001)
        os.killpg(running.pid, signal.SIGKILL)
        assert running.wait(20) == -signal.SIGKILL, (tmp_path / f"{n}.log").read_text()[-3000:]
        resumed.append(kill_harness.resumed_at((tmp_path / f"{n}.log").read_text()))
    assert launch(command, tmp_path / "last.log", {}).wait(120) == 0, (tmp_path / "last.log").read_text()[-3000:]
    resumed.append(kill_harness.resumed_at((tmp_path / "last.log").read_text()))
    stages = {"stages": [{"train": "source"}, {"train": "finetune"}]}
    row = Row("accelerate launch recipes/finetune.py, 2 workers, rotation; launcher and child are killed", stages, [])
    outcome = kill_harness.Outcome(row, out, ["launcher and child"] * 2, resumed=resumed)
    outcome.differences = kill_harness.compare_outputs(tmp_path / "whole" / "out", out)
    outcome.seconds = time.monotonic() - began
    table.append(kill_harness.entry(outcome))
    assert int(resumed[1]) >= 5 and int(resumed[2]) >= 25 and outcome.differences == []
