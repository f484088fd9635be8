"""Checkpoints: staged, hashed while written, fsynced, renamed into place. Tensors in safetensors, facts in JSON;
nothing is pickled.

    step-000120/
      state.safetensors   model/<name>, strategies/<name>, optim/<parameter>/<key>
      trainer.json        step, histories, settings
      manifest.json       sha256 and size of every file

A sharded training (kt_hf/sharding.py) has a file of each process, shard-00001-of-00002.safetensors, in its place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kt_hf.errors import IntegrityError, ResourceError

logger = logging.getLogger(__name__)

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_PIECE = 2**24
"""Bytes that are hashed while they are written."""
_FLUSH = 2**25
"""Bytes after which the disk is given work."""
_flush = getattr(os, "fdatasync", os.fsync)


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a `ResourceError`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ResourceError(
                f"the disk is full: {folder}", "free some space and run again; nothing that was saved is lost"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ResourceError(f"cannot write to {folder}: {error.strerror}", "choose another --output-dir") from error
        raise


def write(path: Path, chunks: Iterator[Any] | list[Any]) -> dict[str, Any]:
    """Write and fsync a file; returns its sha256 and size, computed on the way."""
    digest, size, flushed = hashlib.sha256(), 0, 0
    flushing: Future[None] | None = None
    # A thread hashes a piece while it is written: both leave the interpreter, and take about as long. The disk works
    # meanwhile, for what is written is sent there from time to time.
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as flusher:
        for chunk in chunks:
            if size - flushed >= _FLUSH and (flushing is None or flushing.done()):
                flushing, flushed = flusher.submit(_flush, file.fileno()), size
            view = memoryview(chunk).cast("B")
            size += len(view)
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                hashed = hasher.submit(digest.update, piece)
                while piece:
                    piece = piece[file.write(piece) :]
                hashed.result()
        if flushing is not None:
            flushing.result()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


def header(entries: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: dict[str, str] | None = None) -> bytes:
    """The head of a safetensors file of these names, dtypes and shapes, whose bytes follow without gaps."""
    found: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        found[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_chunks(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Iterator[Any]:
    """The bytes of a safetensors file, tensor by tensor, without a copy of the whole."""
    yield header([(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()], metadata)
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> dict[str, Any]:
    return write(path, [json.dumps(value, indent=1, sort_keys=True, default=str).encode()])


def write_manifest(folder: Path, files: dict[str, dict[str, Any]], **facts: Any) -> None:
    write_json(folder / "manifest.json", {"format": "kt_hf.checkpoint/1", "files": files, **facts})


def save(
    folder: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    facts: dict[str, Any],
    keep: int,
    protect: Collection[str] = (),
    about: dict[str, Any] | None = None,
) -> Path:
    """Save a checkpoint as `folder/step-<step>` and remove the oldest beyond `keep`, never those in `protect`.

    about: facts of the process for the manifest, such as its number of threads.
    """
    staged = staging(folder, step)
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for litter in folder.glob(".step-*"):  # of processes that were killed while they wrote or removed
            shutil.rmtree(litter, ignore_errors=True)
        staged.mkdir()
        try:
            files = {"state.safetensors": write(staged / "state.safetensors", tensor_chunks(tensors))}
            return publish(staged, step, files, facts, keep, protect, about)
        except OSError:
            shutil.rmtree(staged, ignore_errors=True)
            raise


def staging(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is renamed into place."""
    return folder / f".step-{step:06d}.partial"


def publish(
    staged: Path,
    step: int,
    files: dict[str, dict[str, Any]],
    facts: dict[str, Any],
    keep: int,
    protect: Collection[str] = (),
    about: dict[str, Any] | None = None,
) -> Path:
    """Add facts and the manifest to a staged folder whose tensors are written, rename it into place, rotate."""
    folder, final = staged.parent, staged.parent / f"step-{step:06d}"
    files["trainer.json"] = write_json(staged / "trainer.json", facts)
    write_manifest(staged, files, step=step, **(about or {}))
    fsync_folder(staged)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(staged, final)
    fsync_folder(folder)
    rotate(folder, keep, {*protect, final.name})
    return final


def steps(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]))


def rotate(folder: Path, keep: int, protect: set[str]) -> None:
    for old in steps(folder)[:-keep]:
        if old.name not in protect:
            # renamed first: a crash in mid-removal leaves no folder that looks like a checkpoint
            gone = folder / f".{old.name}.removed"
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(old, gone)
            shutil.rmtree(gone, ignore_errors=True)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, every file of which has the recorded hash. Raises `IntegrityError` naming the file."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = {str(name): str(facts["sha256"]) for name, facts in manifest["files"].items()}
        if "trainer.json" not in expected or not any(name.endswith(".safetensors") for name in expected):
            raise KeyError("files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{folder} has no readable manifest", "it was not written to its end; remove it"
        ) from error
    for name, sha256 in expected.items():
        path = folder / name
        if Path(name).name != name:
            raise IntegrityError(f"{folder}: the manifest names '{name}'", "manifests name files of their own folder")
        if not path.is_file():
            raise IntegrityError(f"{path} is missing", "remove the folder; the run continues from what is intact")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise IntegrityError(
                f"{path}: sha256 is {found[:12]}..., the manifest says {sha256[:12]}...",
                "remove the folder; the run continues from what is intact",
            )
    return manifest


def newest(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """The newest checkpoint that verifies, its facts and its manifest; those that do not are named in a warning."""
    for path in reversed(steps(folder)):
        try:
            manifest = verify(path)
            return path, json.loads((path / "trainer.json").read_text()), manifest
        except IntegrityError as error:
            logger.warning("skipping checkpoint %s: %s", path.name, error.cause)
    return None


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of tensors. Raises `IntegrityError` where it is not what it says it is."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise IntegrityError(
            f"{path} is no sound file of tensors: {' '.join(str(error).split())[:200]}", "remove this checkpoint"
        ) from error


def load_into(path: Path, tensors: dict[str, torch.Tensor], strict: bool = True) -> set[str]:
    """Copy saved tensors into existing storage. Returns the names in the file that were not asked for."""
    with opened(path / "state.safetensors") as file, torch.no_grad():
        names = set(file.keys())
        missing = [name for name in tensors if name not in names]
        if missing and strict:
            raise IntegrityError(
                f"{path} lacks {missing[0]} ({len(missing)} tensors)",
                "the recipe has changed; use --overwrite to start anew",
            )
        for name, tensor in tensors.items():
            saved = file.get_tensor(name)
            if saved.shape != tensor.shape:
                raise IntegrityError(
                    f"{path}: {name} is {tuple(saved.shape)}, the model has {tuple(tensor.shape)}",
                    "use --overwrite to start anew",
                )
            tensor.copy_(saved)
    return names - set(tensors)


def read_tensors(path: Path, names: set[str]) -> dict[str, torch.Tensor]:
    with opened(path / "state.safetensors") as file:
        return {name: file.get_tensor(name) for name in names}
