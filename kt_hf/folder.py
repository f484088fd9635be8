"""The output folder: whose it is, who holds it, and which stages in it are finished."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from kt_hf import checkpoint
from kt_hf.errors import IntegrityError, RecipeError

logger = logging.getLogger(__name__)


def open_folder(folder: Path, recipe: dict[str, Any], overwrite: bool, allow_changed: Sequence[str]) -> None:
    """Make sure that the folder is new, or holds this recipe; otherwise refuse, naming what differs."""
    with checkpoint.disk(folder):
        if folder.exists() and any(p.name != ".lock" and p.name != "error.json" for p in folder.iterdir()):
            if overwrite:
                _set_aside(folder)
            else:
                _check_same(folder, recipe, allow_changed)
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)
        checkpoint.write(folder / ".recipe.partial", [text.encode()])
        os.replace(folder / ".recipe.partial", folder / "recipe.yaml")
        (folder / "error.json").unlink(missing_ok=True)


def _set_aside(folder: Path) -> None:
    n = 1
    while (aside := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    aside.mkdir()
    for path in folder.iterdir():
        if path.name != ".lock":
            os.rename(path, aside / path.name)
    logger.warning("the former content of %s is now in %s", folder, aside)


def _check_same(folder: Path, recipe: dict[str, Any], allow_changed: Sequence[str]) -> None:
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder} is not empty and was not written by kt_hf", "choose another --output-dir, or --overwrite to set it aside")
    former = yaml.safe_load((folder / "recipe.yaml").read_text())
    differing = sorted(set(_flat(former).items()) ^ set(_flat(recipe).items()))
    keys = sorted({key for key, _ in differing if key != "kt_hf_version"})
    refused = [key for key in keys if not any(key == a or key.startswith(f"{a}.") for a in allow_changed)]
    if refused:
        old, new = _flat(former), _flat(recipe)
        shown = "; ".join(f"{k}: {old.get(k, '(absent)')} -> {new.get(k, '(absent)')}" for k in refused[:6])
        raise RecipeError(
            f"{folder} holds a run with other settings: {shown}{' ...' if len(refused) > 6 else ''}",
            "use another --output-dir, --allow-changed KEY to continue all the same, or --overwrite to set the old run aside",
        )
    for key in keys:
        logger.warning("continuing with a changed setting: %s", key)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".strip(".")).items()}
    if isinstance(value, list) and value:
        out: dict[str, str] = {}
        for i, inner in enumerate(value):
            name = str(i)
            if isinstance(inner, dict):  # stages and strategies go by their names
                verb = next((v for v in ("train", "merge", "ensemble", "evaluate") if v in inner), None)
                name = str(inner[verb]) if verb else next(iter(inner)) if len(inner) == 1 else name
            out.update(_flat(inner, f"{prefix}.{name}".strip(".")))
        return out
    return {prefix: repr(value)}


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; a kernel lock, so that a killed run leaves nothing behind."""
    with checkpoint.disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"another process is running in {folder}", "wait for it, or use another --output-dir") from None
        yield
    finally:
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
            path = folder / name
            if not path.is_file() or path.stat().st_size != expected["size"]:
                raise IntegrityError(f"{path} is missing or of another size", "")
            with open(path, "rb") as file:
                import hashlib

                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    raise IntegrityError(f"{path} is not as it was written", "")
        return facts
    except (ValueError, KeyError, IntegrityError) as error:
        logger.warning("%s is run again: %s", folder.name, getattr(error, "cause", error))
        return None


def finish(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Record that a stage is complete, with the hashes of its files."""
    import hashlib

    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for name in ("model", "predictions.parquet", "arrays.safetensors") for p in _files(folder / name)):
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
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else []
