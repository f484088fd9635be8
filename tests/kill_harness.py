"""Runs recipes in children, kills them, starts them again, and compares what is left with a run that was left alone.

It looks only at what anybody can look at: the output folder, exit codes, what was said.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from safetensors.numpy import load_file

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
TIMINGS = re.compile(r"(.*_)?seconds|phases|.*_per_second|peak_memory_bytes|created")
"""Figures that two runs never share, wherever they stand in a report."""


@dataclass
class Row:
    """A recipe, and the points at which its processes are killed, one after another.

    Beside those of `kill_child.Point` there are {"random": True}, from outside, at a drawn time within the training,
    and {"sweep": STAGE}, before every change of the file system from the end of that stage's training on. ends: whether
    the last child resumes a training, or finds all of them finished. cold: the killed run comes first and finds no
    cache of preprocessed data.
    """

    name: str
    recipe: dict[str, Any]
    kills: list[dict[str, Any]]
    ranks: int = 1
    ends: str = "resumed"
    cold: bool = False

    def stages(self) -> list[dict[str, Any]]:
        return [stage for stage in self.recipe["stages"] if "train" in stage]

    def strategies(self) -> list[str]:
        """Names of all strategies that some stage trains with, in order."""
        stacks = [stage.get("strategies") or ["finetune"] for stage in self.stages()]
        names = [item if isinstance(item, str) else next(iter(item)) for stack in stacks for item in stack]
        return list(dict.fromkeys(names))


@dataclass
class Outcome:
    """What came of a row: where each child died, and at which step each resumed."""

    row: Row
    folder: Path
    killed: list[str] = field(default_factory=list)
    missed: int = 0
    resumed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list)


class Parent:
    """The warm process, seen from here."""

    def __init__(self, cache: Path) -> None:
        command = [sys.executable, str(HERE / "kill_parent.py")]
        environment = {**ENVIRONMENT, "HF_DATASETS_CACHE": str(cache)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the parent of the children has ended"
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environments(ranks: int, variables: dict[str, str]) -> list[dict[str, str]]:
    """What torchrun would give every rank."""
    if ranks == 1:
        return [variables]
    common = {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@dataclass
class Place:
    """Where a run of a row lives: `out` is what the product writes, the rest is ours."""

    root: Path
    row: Row
    data: Path

    def __post_init__(self) -> None:
        self.notes.mkdir(parents=True, exist_ok=True)
        recipe = json.loads(json.dumps(self.row.recipe).replace("{data}", str(self.data)))
        for stage in recipe["stages"]:
            if "train" in stage:
                stage["strategies"] = [*(stage.get("strategies") or ["finetune"]), "witness"]
        self.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def notes(self) -> Path:
        return self.root / "notes"

    @property
    def recipe(self) -> Path:
        return self.root / "case.yaml"

    def log(self, n: int) -> Path:
        return self.root / f"child-{n}.log"

    def variables(self, point: dict[str, Any]) -> dict[str, str]:
        return {"KILL_NOTES": str(self.notes), "KILL_POINT": json.dumps(point)}

    def begin(self, parent: Parent, n: int, point: dict[str, Any]) -> list[int]:
        return parent.ask(
            start={
                "recipe": str(self.recipe),
                "arguments": ["--output-dir", str(self.out)],
                "log": str(self.log(n)),
                "ranks": environments(self.row.ranks, self.variables(point)),
            }
        )["pids"]

    def newest(self) -> int:
        """The newest checkpoint's step of the last training stage."""
        folder = self.out / self.row.stages()[-1]["train"] / "checkpoints"
        return max((int(p.name[5:]) for p in folder.glob("step-*")), default=0)

    def changes(self) -> list[str]:
        """Every change of the file system that rank 0 made, in order, as `Point` describes them."""
        return (self.notes / "changes.0").read_text().splitlines()


def run_to_the_end(parent: Parent, place: Place, n: int = 0, seconds: float = 120) -> str:
    """Run without a kill; returns what was said."""
    codes = parent.ask(wait=place.begin(parent, n, {}), seconds=seconds)["codes"]
    said = place.log(n).read_text()
    assert codes == [0] * place.row.ranks, f"{place.row.name}: exit codes {codes}\n{said[-3000:]}"
    return said


def run_and_kill(parent: Parent, place: Place, n: int, point: dict[str, Any], seconds: float = 120) -> bool:
    """Run until it is killed; False where it came to its end before a random kill."""
    if point.get("random"):
        return _kill_at_random(parent, place, n, seconds)
    codes = parent.ask(wait=place.begin(parent, n, point), seconds=seconds)["codes"]
    if "rank" in point:  # the others must end by themselves
        assert codes[point["rank"]] in KILLED and None not in codes and 0 not in codes, f"{point}: {codes}"
    else:
        said = place.log(n).read_text()
        assert any(c in KILLED for c in codes) and None not in codes and 0 not in codes, f"{point}: {codes}\n{said}"
    return True


def _kill_at_random(parent: Parent, place: Place, n: int, seconds: float) -> bool:
    """SIGKILL to all ranks at a drawn time after a drawn step was begun."""
    draw = random.Random(f"{place.row.name} {n}")
    step, delay = place.newest() + draw.randint(1, 5), draw.uniform(0, 0.03)
    note = place.notes / f"{place.row.stages()[-1]['train']}.42" / f"{step:03d}.0.0"
    before = note.stat().st_size if note.exists() else 0
    pids, end = place.begin(parent, n, {}), time.monotonic() + seconds
    while time.monotonic() < end:
        if note.exists() and note.stat().st_size > before:
            time.sleep(delay)
            break
        if _state(pids[0]) == "Z":
            break
        time.sleep(0.001)
    for pid in pids:  # not yet waited for, so that the number is still theirs
        os.kill(pid, signal.SIGKILL)
    codes = parent.ask(wait=pids, seconds=10)["codes"]
    said = place.log(n).read_text()
    assert set(codes) <= {-signal.SIGKILL, 0}, f"exit codes {codes}\n{said[-3000:]}"
    return -signal.SIGKILL in codes


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def resumed_at(said: str) -> str:
    """At which steps trainings of this child resumed; `-` where none did."""
    return "+".join(re.findall(r"resumed at step (\d+)", said)) or "-"


def play(parent: Parent, row: Row, root: Path, data: Path) -> Outcome:
    """Run a row undisturbed and disturbed, and compare."""
    began = time.monotonic()
    reference, place = Place(root / "whole", row, data), Place(root / "killed", row, data)
    if not row.cold:
        run_to_the_end(parent, reference)
    outcome = disturb(parent, place, [point for given in row.kills for point in unfold(given, reference, place)])
    if row.cold:
        run_to_the_end(parent, reference)
    outcome.differences += compare(reference, place)
    outcome.seconds = time.monotonic() - began
    return outcome


def disturb(parent: Parent, place: Place, kills: list[dict[str, Any]]) -> Outcome:
    """Run a row with all its kills, to the end."""
    outcome, newest = Outcome(place.row, place.root), 0
    for n, point in enumerate(kills):
        if run_and_kill(parent, place, n, point):
            outcome.killed.append("random" if point.get("random") else describe(point))
        else:
            outcome.missed += 1
        outcome.resumed.append(resumed_at(place.log(n).read_text()))
        check_checkpoints(place.out)
        assert place.newest() >= newest, f"{place.out}: checkpoint {newest} was lost for one that was being written"
        newest = place.newest()
    said = run_to_the_end(parent, place, len(kills))
    outcome.resumed.append(resumed_at(said))
    outcome.differences = check_end(outcome, said)
    return outcome


def unfold(point: dict[str, Any], reference: Place, place: Place) -> list[dict[str, Any]]:
    """The points of a sweep, from what the reference did after the stage's last checkpoint; others are one point."""
    if "sweep" not in point:
        return [point]
    changes = [c for c in reference.changes() if str(reference.out) in c]
    last = max(i for i, change in enumerate(changes) if f"/{point['sweep']}/checkpoints" in change)
    found, seen = [], list[str]()
    for change in changes[last + 1 :]:
        seen.append(change)
        pattern = re.escape(change.replace(str(reference.out), str(place.out))) + "$"
        found.append({"op": pattern, "nth": seen.count(change), "name": change.replace(f"{reference.out}/", "")})
    return found


def check_checkpoints(out: Path) -> None:
    """Whatever is called a checkpoint is whole."""
    for folder in out.glob("**/checkpoints"):
        for path in folder.glob("step-*"):
            for name, facts in json.loads((path / "manifest.json").read_text())["files"].items():
                assert hashlib.sha256((path / name).read_bytes()).hexdigest() == facts["sha256"], f"{path / name}"


def check_end(outcome: Outcome, said: str) -> list[str]:
    """The last child must have gone on from something."""
    if outcome.row.ends == "finished":
        jobs = sum(stage.get("seeds", 1) for stage in outcome.row.stages())
        return [] if said.count("finished before") >= jobs else ["the last child did not find the stages finished"]
    steps = [int(step) for step in outcome.resumed[-1].split("+") if step.isdigit()]
    return [] if steps and min(steps) > 0 else ["the last child did not resume at a step above 0"]


def describe(point: dict[str, Any]) -> str:
    if "step" in point:
        return (
            f"{point['training']} step {point['step']}"
            if "training" in point
            else f"step {point['step']}" + (f".{point['micro_batch']}" if point.get("micro_batch") else "")
        )
    return (
        point.get("name", point["op"])
        + (f" #{point['nth']}" if point.get("nth", 1) > 1 else "")
        + (" torn" * ("tear" in point))
    )


# --- what is left, compared -------------------------------------------------------------------------------------------


def compare(reference: Place, place: Place) -> list[str]:
    """What differs between two runs, in words; nothing where they are equal."""
    return compare_outputs(reference.out, place.out) + compare_notes(reference.notes, place.notes)


def compare_outputs(whole: Path, killed: Path) -> list[str]:
    """What differs between two output folders."""
    a, b = dict(leaves(whole)), dict(leaves(killed))
    assert any(key.endswith(".safetensors") for key in a), f"{whole}: there is nothing to compare"
    found = [f"{key} is missing" for key in a.keys() - b.keys()] + [
        f"{key} is left over" for key in b.keys() - a.keys()
    ]
    return sorted(
        [*found, *(f"{key}: {_difference(a[key], b[key])}" for key in a.keys() & b.keys() if a[key] != b[key])]
    )


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
        return "; ".join(f"{k}: {_difference(a.get(k), b.get(k))}" for k in keys[:3])
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return "; ".join(
            [f"[{i}]: {_difference(x, y)}" for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y][:3]
        )
    return f"{str(a)[:120]} != {str(b)[:120]}"


def compare_notes(whole: Path, killed: Path) -> list[str]:
    """Rows and values of every micro-batch, each time that it was computed."""
    found = []
    names = {p.relative_to(root) for root in (whole, killed) for p in root.glob("*/*")}
    assert names, f"{whole}: the witness has noted nothing"
    for name in sorted(names):
        a, b = ({*p.read_text().splitlines()} if (p := root / name).exists() else set() for root in (whole, killed))
        if a != b or len(a) != 1:
            found.append(f"batch {name}: {sorted(a)} != {sorted(b)}")
    return found


def leaves(out: Path) -> Iterator[tuple[str, Any]]:
    """(what, its value or hash) of everything in an output folder that two equal runs share."""
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.name in ("README.md", "report.html", ".lock", "manifest.json", "recipe.yaml"):
            yield name, "there"  # with times in it, or hashes of what has; or nothing
        elif "/logs/" in name:
            continue
        elif path.name in ("stage.json", "trainer.json", "report.json"):
            yield name, without_timings(json.loads(path.read_text()))
        elif path.suffix == ".parquet":
            yield name, repr(pq.read_table(path).to_pydict())
        elif "/checkpoints/" in name and path.suffix == ".safetensors":
            yield name, {key: sha(value) for key, value in load_file(path).items()}
        else:
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()
    for folder in sorted(out.glob("**/logs")):
        yield str(folder.relative_to(out)), scalars(folder)


def sha(value: np.ndarray) -> str:
    return f"{value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if not TIMINGS.fullmatch(k)}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


def scalars(folder: Path) -> dict[str, dict[int, list[float]]]:
    """TensorBoard's scalars: tag -> step -> the different values that were logged for it."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, dict[int, set[float]]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, {}).setdefault(event.step, set()).add(value.simple_value)
    return {tag: {step: sorted(v) for step, v in sorted(steps.items())} for tag, steps in found.items()}


# --- the table --------------------------------------------------------------------------------------------------------

COLUMNS = ("strategies", "scenario", "kills", "resumed at", "equal")


def entry(outcome: Outcome) -> dict[str, Any]:
    """A line of the table."""
    return {
        "strategies": " + ".join(outcome.row.strategies()),
        "scenario": outcome.row.name,
        "kills": len(outcome.killed),
        "missed": outcome.missed,
        "where": outcome.killed,
        "resumed at": outcome.resumed[1:],
        "equal": not outcome.differences,
        "seconds": round(outcome.seconds, 1),
    }


def markdown(entries: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for line in entries:
        resumed = line["resumed at"]
        shown = ", ".join(resumed) if len(resumed) <= 6 else f"{', '.join(resumed[:3])} ... {resumed[-1]}"
        cells = (line["strategies"], line["scenario"], str(line["kills"]), shown, "yes" if line["equal"] else "NO")
        lines.append(f"| {' | '.join(cells)} |")
    total = sum(line["kills"] for line in entries)
    equal = sum(line["equal"] for line in entries)
    return "\n".join(lines) + f"\n\n{len(entries)} rows, {equal} equal; {total} kills.\n"
