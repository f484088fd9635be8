"""Two launches with machine ranks 0 and 1, in two network namespaces where the machine allows, else on loopback: one is
killed, the other ends with an error, both are started again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import helpers
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
STEPS, PATIENCE = 150, 90
"""Steps of the training; seconds in which the surviving machine has to end."""


@dataclass
class Machines:
    """How a command is run on each of two machines, and the first one's address."""

    where: str
    address: str
    interfaces: tuple[str, str]
    prefixes: tuple[list[str], list[str]] = ([], [])
    running: list[subprocess.Popen] = field(default_factory=list)

    def start(self, rank: int, output: Path, port: int) -> subprocess.Popen:
        command = [
            *self.prefixes[rank], sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(ROOT / "recipes" / "accelerate" / "two_nodes.yaml"),
            "--machine_rank", str(rank), "--main_process_ip", self.address, "--main_process_port", str(port),
            str(ROOT / "recipes" / "finetune.py"), "training.num_threads=1", f"training.max_steps={STEPS}",
            "stages.source.training.max_steps=2", "training.save_steps=10", "--output-dir", str(output),
        ]  # fmt: skip
        own = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with open(output.with_name(f"{output.name}.{rank}.log"), "ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **own, "GLOO_SOCKET_IFNAME": self.interfaces[rank]},
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def run(self, output: Path) -> str:
        """Both to their end; the first one's log."""
        port = free_port()
        both = [self.start(rank, output, port) for rank in (0, 1)]
        log = output.with_name(f"{output.name}.0.log")
        assert [process.wait(300) for process in both] == [0, 0], log.read_text()[-3000:]
        return log.read_text()


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def machines() -> Iterator[Machines]:
    names = [f"kt{os.getpid()}{side}" for side in "ab"]
    made = shutil.which("ip") is not None and all(ip("netns", "add", name) for name in names)
    cards = [f"v{name[-8:]}" for name in names]
    made = made and ip("link", "add", cards[0], "netns", names[0], "type", "veth", "peer", cards[1], "netns", names[1])
    for i, (name, card) in enumerate(zip(names, cards, strict=True)):
        made = made and ip("-n", name, "link", "set", "lo", "up")
        made = made and ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", card)
        made = made and ip("-n", name, "link", "set", card, "up")
    prefixes = tuple(["ip", "netns", "exec", name] for name in names) if made else ([], [])
    found = Machines(
        "two network namespaces" if made else "loopback",
        "10.77.0.1" if made else "127.0.0.1",
        (cards[0], cards[1]) if made else ("lo", "lo"),
        prefixes,  # type: ignore[arg-type]
    )
    if sys.platform != "linux":
        pytest.skip("needs Linux: interfaces are named as there")
    try:
        yield found
    finally:
        for process in found.running:
            kill(process)
        for name in names if shutil.which("ip") else []:
            ip("netns", "del", name)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def kill(process: subprocess.Popen) -> None:
    """As when a machine loses power: the launcher and all that it has started."""
    doomed = [process.pid]
    for pid in doomed:
        doomed += children(pid)
    for pid in doomed if process.poll() is None else []:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_machines_is_killed(killed, machines, tmp_path):
    print(machines.where)
    machines.run(tmp_path / "whole")
    output, port = tmp_path / "broken", free_port()
    both = [machines.start(rank, output, port) for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while not list((output / "finetune" / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in both), "no checkpoint came"
        time.sleep(0.02)
    kill(both[killed])
    survivor = both[1 - killed]
    assert survivor.wait(PATIENCE) != 0
    assert not (output / "finetune" / "model").exists(), "it had finished before"
    log = output.with_name(f"broken.{1 - killed}.log").read_text()
    assert "another process of this run has ended" in log and "run the same command again, on every machine" in log
    if killed == 1:  # the first machine writes for all
        assert json.loads((output / "error.json").read_text())["code"] == 6
    again = machines.run(output)
    resumed = re.findall(r"finetune: resumed at step (\d+)", again)
    assert len(resumed) == 1 and 0 < int(resumed[0]) < STEPS
    ours, theirs = (load_file(f / "finetune" / "model" / "model.safetensors") for f in (output, tmp_path / "whole"))
    assert helpers.identical(ours, theirs)
