"""What a failed run leaves: a line of cause and one of remedy, `error.json`, an exit code. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from kt_hf.errors import KtError, Mistakes
from kt_hf.signals import Interrupted

UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
"""Errors of the file system that another output folder, or more space, would mend."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad alloc")
"""What PyTorch says when there is none left, of a GPU or of the machine."""
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "remote process exited",
    "watchdog caught collective operation timeout",
)
"""What gloo, nccl and torch's store say when another process is gone."""
_START_ALL = "see its own message; run the same command again, on every machine, to continue from the last checkpoint"
_HARMLESS = (".lock", "error.json", ".error.json.partial")


def is_ours(folder: Path) -> bool:
    """Whether kt_hf wrote this folder: it has a resolved recipe with our version in it."""
    try:
        with open(folder / "recipe.yaml", "rb") as file:
            return any(line.startswith(b"kt_hf_version:") for line in file.read(4096).splitlines())
    except OSError:
        return False


def is_blank(folder: Path) -> bool:
    """Whether a folder is absent or holds nothing but what a refused run leaves."""
    return not folder.exists() or (folder.is_dir() and all(path.name in _HARMLESS for path in folder.iterdir()))


def held_by_another(folder: Path) -> bool:
    """Whether another process holds the folder's lock."""
    try:
        handle = os.open(folder / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def describe(error: BaseException) -> tuple[int, str, str, list[KtError]]:
    """(exit code, cause, remedy, the mistakes where there are several)."""
    if isinstance(error, Mistakes) and len(error.mistakes) > 1:
        return error.exit_code, str(error), "", error.mistakes
    if isinstance(error, Mistakes):
        error = error.mistakes[0]
    if isinstance(error, KtError):
        return error.exit_code, error.cause, error.remedy, []
    if isinstance(error, KeyboardInterrupt):
        code = error.exit_code if isinstance(error, Interrupted) else 130
        return code, str(error) or "interrupted", "run the same command again to continue", []
    text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(sign in text.lower() for sign in _NO_MEMORY):
        remedy = (
            "lower training.per_device_train_batch_size (and raise gradient_accumulation_steps by as much), or set "
            "forward_chunk_size or gradient_checkpointing; --print estimates what a training takes"
        )
        return 6, f"out of memory with {_in_use()} in use at the height: {text}", remedy, []
    if isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _LOST):
        return 6, f"another process of this run has ended or is out of reach: {text}", _START_ALL, []
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return 6, text, "check the free space and the rights of the output folder", []
    return 1, f"internal error: {text}", "run again with --debug and report the traceback", []


def _in_use() -> str:
    """The most memory that this process has used: of its GPU where it uses one."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        return f"{cuda.max_memory_allocated() / 1e9:.2f} GB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"


def fail(error: BaseException, output: Path | None, create: bool = False) -> NoReturn:
    """Say what is wrong, leave `error.json` in the output folder, and exit with the error's code."""
    from kt_hf.hub import scrub

    code, cause, remedy, several = describe(error)
    cause, remedy = scrub(cause), scrub(remedy)
    print(f"error: {cause}" + (f"\n  -> {remedy}" if remedy else ""), file=sys.stderr, flush=True)
    if output is not None:
        try:
            _write(output, {"code": code, "cause": cause, "remedy": remedy}, several, create)
        except OSError:
            pass  # what could not be written has been said
    sys.exit(code)


def _write(folder: Path, facts: dict[str, Any], several: Sequence[KtError], create: bool) -> None:
    """error.json; never in a folder that is not ours, nor in one in which another process is at work."""
    from kt_hf.hub import scrub

    if create:
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir() or not (is_ours(folder) or is_blank(folder)):
        return
    path = folder / "error.json"
    if several:
        facts["mistakes"] = [{"cause": scrub(m.cause), "remedy": scrub(m.remedy)} for m in several]
    # ranks fail at the same moment: the main process replaces the file whole, another one only makes it where none is
    if (rank := int(os.environ.get("RANK", 0))) == 0:
        if not held_by_another(folder):
            whole = folder / ".error.json.partial"
            whole.write_text(json.dumps(facts, indent=1))
            os.replace(whole, path)
    else:
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(json.dumps({**facts, "rank": rank}, indent=1))
