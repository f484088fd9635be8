"""The output folder: whose it is, who holds it, and which stages in it are finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kt_hf import checkpoint, failing
from kt_hf.errors import IntegrityError, RecipeError, ResourceError
from kt_hf.nouns import name_of, verb_of
from kt_hf.recipe_yaml import from_yaml, to_yaml

logger = logging.getLogger(__name__)


def open_folder(folder: Path, recipe: dict[str, Any], overwrite: bool, allow_changed: Sequence[str]) -> None:
    """Make sure that the folder is new, or holds this recipe; otherwise refuse, naming what differs."""
    with _writable(folder):
        if not failing.is_blank(folder):
            if overwrite:
                _set_aside(folder)
            else:
                _check_same(folder, recipe, allow_changed)
        folder.mkdir(parents=True, exist_ok=True)
        _check_links(folder)
        checkpoint.write(folder / ".recipe.partial", [to_yaml(recipe).encode()])
        os.replace(folder / ".recipe.partial", folder / "recipe.yaml")
        (folder / "error.json").unlink(missing_ok=True)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into a `ResourceError` that names the folder."""
    try:
        with checkpoint.disk(folder):
            yield
    except OSError as error:
        if error.errno in failing.UNWRITABLE:
            raise ResourceError(f"cannot write to {folder}: {error.strerror}", "choose another --output-dir") from error
        raise


def _set_aside(folder: Path) -> None:
    """Rename everything in the folder into a new one beside it."""
    where = folder.resolve()
    if where in (Path.cwd(), *Path.cwd().parents):
        raise RecipeError(
            f"--overwrite would set aside {folder}, which the current folder is in", "name another --output-dir"
        )
    n = 1
    while (aside := where.with_name(f"{where.name}.old-{n}")).exists():
        n += 1
    aside.mkdir()
    for path in where.iterdir():
        if path.name != ".lock":
            os.rename(path, aside / path.name)
    logger.warning("the former content of %s is now in %s", folder, aside)


def _check_same(folder: Path, recipe: dict[str, Any], allow_changed: Sequence[str]) -> None:
    if not failing.is_ours(folder):
        remedy = "choose another --output-dir, or --overwrite to set it aside"
        raise RecipeError(f"{folder} is not empty and was not written by kt_hf", remedy)
    old, new = _flat(from_yaml(str(folder / "recipe.yaml"))), _flat(recipe)
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and k != "kt_hf_version")
    if keys and not _begun(folder):
        logger.info("nothing was finished or saved in %s: starting with the changed settings", folder)
        return
    refused = [key for key in keys if not any(key == a or key.startswith(f"{a}.") for a in allow_changed)]
    if refused:
        changes = list(dict.fromkeys(_change(key, old, new) for key in refused))
        shown = "; ".join(changes[:10])
        more = f" and {len(changes) - 10} others" if len(changes) > 10 else ""
        remedy = (
            "use another --output-dir, continue all the same with --allow-changed KEY, or set it aside with --overwrite"
        )
        raise RecipeError(f"{folder} holds a run with other settings: {shown}{more}", remedy)
    for key in keys:
        change = _change(key, old, new)
        logger.warning("continuing with a changed setting: %s (finished stages stay as they are)", change)


def _change(key: str, old: dict[str, str], new: dict[str, str]) -> str:
    """A difference in words; what one of the two lacks as a whole is said once."""
    if key in old and key in new:
        return f"{key}: {old[key]} -> {new[key]}"
    lacking = old if key not in old else new
    parts = key.split(".")
    for n in range(1, len(parts)):
        whole = ".".join(parts[:n])
        if not any(k == whole or k.startswith(f"{whole}.") for k in lacking):
            return f"{whole}: {'(absent) -> present' if lacking is old else 'present -> (absent)'}"
    return f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"


def _begun(folder: Path) -> bool:
    """Whether a stage is finished or has a checkpoint: something that depends on the settings it was made with."""
    return any(folder.glob("**/stage.json")) or any(folder.glob("**/checkpoints/step-*"))


def _check_links(folder: Path) -> None:
    """Refuse symbolic links that would lead what is written out of the folder."""
    root = folder.resolve()
    for path in folder.iterdir():
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise IntegrityError(f"{path} is a link that leads out of the output folder", "remove the link")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> value; stages and strategies go by their names, in their order."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".strip(".")).items()}
    if not isinstance(value, list) or not value:
        return {prefix: repr(int(value) if isinstance(value, float) and value.is_integer() else value)}
    out: dict[str, str] = {}
    names = [name_of(item) if isinstance(item, dict) else "" for item in value]
    if all(names) and len(set(names)) == len(names):
        for name, item in zip(names, value, strict=True):
            inner = item if verb_of(item) else item.get(name, item)
            out.update(_flat(inner, f"{prefix}.{name}".strip(".")))
        out[f"{prefix} (order)"] = ", ".join(names)
        return out
    for i, item in enumerate(value):
        out.update(_flat(item, f"{prefix}.{i}".strip(".")))
    return out


_held: set[int] = set()


def _let_go() -> None:
    """In a forked child, such as a data worker: the lock is the parent's alone, or an orphan would hold it on."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; a kernel lock, so that a killed run leaves nothing behind."""
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        ours = failing.is_blank(folder) or (folder / ".lock").exists()
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, or use another --output-dir"
            raise RecipeError(f"another process is running in {folder}", remedy) from None
        yield
    except RecipeError:
        if not ours and not failing.is_ours(folder):  # refused: leave no trace in somebody else's folder
            (folder / ".lock").unlink(missing_ok=True)
        raise
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


def stage_folder(root: Path, stage: str, seed: int) -> Path:
    """`<stage>` for seed 0, `<stage>/seeds/<i>` for the others."""
    return root / stage if seed == 0 else root / stage / "seeds" / str(seed)


def finished(folder: Path) -> dict[str, Any] | None:
    """The facts of a finished stage whose files are as they were written; None where it is to be run."""
    if not (folder / "stage.json").is_file():
        return None
    try:
        facts = json.loads((folder / "stage.json").read_text())
        for name, expected in facts["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise IntegrityError(f"its record names the file '{name}'", "")
            path = folder / name
            if not path.is_file() or path.stat().st_size != expected["size"]:
                raise IntegrityError(f"{path} is missing or of another size", "")
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    raise IntegrityError(f"{path} is not as it was written", "")
        return facts
    except (ValueError, KeyError, TypeError, AttributeError, OSError, IntegrityError) as error:
        logger.warning("%s is run again: %s", folder.name, getattr(error, "cause", error))
        return None


def finish(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Record that a stage is complete, with the hashes of its files."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(
        p for name in ("model", "predictions.parquet", "arrays.safetensors") for p in _files(folder / name)
    ):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"sha256": digest, "size": path.stat().st_size}
    facts = {**facts, "files": files}
    checkpoint.write_json(folder / ".stage.partial", facts)
    os.replace(folder / ".stage.partial", folder / "stage.json")
    checkpoint.fsync_folder(folder)
    return facts


def _files(path: Path) -> list[Path]:
    return (
        [path]
        if path.is_file()
        else [p for p in path.rglob("*") if p.is_file() and p.name != "README.md"]
        if path.is_dir()
        else []
    )
