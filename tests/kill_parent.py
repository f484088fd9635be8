"""A process that has imported everything and nothing else, and forks a child for every run: imports take seconds, a run
takes one. Requests and answers are lines of JSON on stdin and stdout:

    {"start": {"recipe": ..., "arguments": [...], "log": ..., "ranks": [environment, ...]}}  -> {"pids": [...]}
    {"wait": [pid, ...], "seconds": s}  -> {"codes": [...]}, negative for a signal; null for one that had to be killed

That forking is sound: no other thread is alive at the fork (looked at every time), no thread pool was ever started in
this process, and no generator is inherited by anything, since the trainer seeds them all. That a child gives the same
bits as a fresh process is tested.
"""

from __future__ import annotations

import os

# pyarrow's allocator starts a thread when it is imported, unless told otherwise
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"

import importlib
import json
import signal
import sys
import threading
import time
import traceback
from typing import Any

import conftest  # noqa: F401  the environment first
import kill_child

WARM = (
    "datasets",
    "evaluate",
    "kt_hf.cli",
    "kt_hf.reporting",
    "kt_hf.report",
    "kt_hf.runner",
    "open_clip.loss",
    "peft",
    "pyarrow.parquet",
    "sklearn.datasets",
    "sklearn.metrics",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2",
)


def threads() -> list[str]:
    """Names of the threads of this process beside the main one, as Python and as the kernel know them."""
    found = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    for task in os.listdir("/proc/self/task"):
        if int(task) != os.getpid():
            with open(f"/proc/self/task/{task}/comm") as file:
                found.append(file.read().strip())
    return found


def start(recipe: str, arguments: list[str], log: str, ranks: list[dict[str, str]]) -> list[int]:
    alive = threads()
    assert not alive, f"forking is not sound beside these threads: {alive}"
    pids = []
    for environment in ranks:
        pid = os.fork()
        if not pid:
            _child(recipe, arguments, log, environment)
        pids.append(pid)
    return pids


def _child(recipe: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, handle), (2, handle)):
            os.dup2(source, target)
        os.environ.update(environment)
        code = kill_child.run(recipe, arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int], seconds: float) -> list[int | None]:
    codes: dict[int, int | None] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = None
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def main() -> None:
    for name in WARM:
        importlib.import_module(name)
    from kt_hf import registry

    for kind, name in registry.entries():
        registry.load(kind, name)
    print(json.dumps({"ready": os.getpid(), "threads": threads()}), flush=True)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        answer: dict[str, Any]
        if "start" in request:
            answer = {"pids": start(**request["start"])}
        else:
            answer = {"codes": wait(request["wait"], request["seconds"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
