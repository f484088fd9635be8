"""Checkpoints as tensors in safetensors files: opened memory-mapped, and written in place in any order.

`safe_open` maps a file so that it may be written to, which the kernel counts as memory and refuses where a file is
larger than that; `opened` maps it for reading alone. Writing into such a tensor kills the process: hand out copies.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kt_hf import checkpoint
from kt_hf.errors import IntegrityError, RecipeError

SINGLE = ("model.safetensors", "open_clip_model.safetensors")
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Of a shard, where the first parent has shards and nothing was said."""

_DTYPES = {word: dtype for dtype, word in checkpoint.DTYPES.items()}


# --- reading ---------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises `IntegrityError` where one is missing."""
    if (folder / "adapter_config.json").exists():
        raise RecipeError(f"{folder} holds an adapter, and a full model is needed here", "name a full model")
    if (folder / INDEX).is_file():
        return [folder / name for name in dict.fromkeys(_index(folder).values())]
    for name in SINGLE:
        if (folder / name).is_file():
            return [folder / name]
    remedy = f"expected {SINGLE[0]} or {INDEX}"
    if any((folder / "model" / name).is_file() for name in (INDEX, *SINGLE)):
        remedy = f"did you mean {folder / 'model'}?"
    raise IntegrityError(f"{folder} has no safetensors weights", remedy)


def _index(folder: Path) -> dict[str, str]:
    """tensor name -> file name, as the index of a sharded checkpoint says."""
    try:
        names = json.loads((folder / INDEX).read_text())["weight_map"]
        files = {str(n) for n in names.values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntegrityError(
            f"{folder / INDEX} cannot be read ({type(error).__name__})", "fetch this model again"
        ) from error
    for file in sorted(files):
        if Path(file).is_absolute() or ".." in Path(file).parts or not (folder / file).is_file():
            raise IntegrityError(f"{folder}: the index names the shard '{file}'", "the checkpoint is incomplete")
    return names


def open_model(folder: Path) -> dict[str, torch.Tensor]:
    """name -> tensor of a model directory, in the order of its files; mapped for reading, to be copied before use."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors |= opened(path)
    if (folder / INDEX).is_file():
        named = _index(folder)
        if absent := sorted(named.keys() - tensors.keys()):
            raise IntegrityError(
                f"{folder}: the index names {absent[0]}, which {named[absent[0]]} does not hold",
                "the checkpoint is incomplete: make or fetch it again",
            )
        tensors = {name: tensor for name, tensor in tensors.items() if name in named}
    return tensors


def opened(path: Path) -> dict[str, torch.Tensor]:
    """name -> tensor of one file, in the order of their bytes."""
    try:
        with safe_open(str(path), framework="numpy"):  # it checks the header against the file, and reads no tensor
            pass
    except Exception as error:
        cause = f"{path} is no intact safetensors file: {' '.join(str(error).split())[:200]}"
        raise IntegrityError(cause, "make or fetch this model again") from error
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(start - 8))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    header.pop("__metadata__", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: the tensors cannot be written to
        order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        return {name: _view(path, mapped, start, name, entry) for name, entry in order}


def _view(path: Path, mapped: mmap.mmap, start: int, name: str, entry: dict[str, Any]) -> torch.Tensor:
    if entry["dtype"] not in _DTYPES:
        raise RecipeError(
            f"{path}: {name} is stored as {entry['dtype']}, which has no arithmetic of its own",
            "merge the models as they were before they were quantised",
        )
    dtype, count = _DTYPES[entry["dtype"]], math.prod(entry["shape"])
    if not count:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + entry["data_offsets"][0]).view(
        entry["shape"]
    )


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What a tensor will be, before there is one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """A model's safetensors files, laid out in full before the first tensor is there; pieces are written in any order,
    from any thread, and nothing is held in memory.

    single: the name of the file if all fits into one. shard_bytes: of a file at most, but for larger tensors; None for
    one file.
    """

    def __init__(self, folder: Path, specs: Sequence[Spec], single: str, shard_bytes: int | None):
        self.folder, self.total = folder, sum(s.bytes for s in specs)
        shards = _pack(specs, shard_bytes)
        count = len(shards)
        self.files = (
            [single] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        )
        self.place: dict[str, tuple[int, int]] = {}
        """name -> which file, and where in it"""
        self.specs = {s.name: s for s in specs}
        self._handles = [self._begin(i, shard) for i, shard in enumerate(shards)]

    def _begin(self, i: int, shard: Sequence[Spec]) -> int:
        head = checkpoint.header([(s.name, s.dtype, s.shape) for s in shard], {"format": "pt"})
        offset = len(head)
        for spec in shard:
            self.place[spec.name] = (i, offset)
            offset += spec.bytes
        handle = os.open(self.folder / self.files[i], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        _reserve(handle, offset)
        _write(handle, head, 0)
        return handle

    def write(self, name: str, data: memoryview, skipped: int = 0) -> None:
        """Bytes of a tensor, from `skipped` on."""
        i, offset = self.place[name]
        _write(self._handles[i], data, offset + skipped)

    def sync(self, i: int) -> None:
        """Of a file that is complete."""
        os.fsync(self._handles[i])

    def finish(self) -> None:
        """Write the index and look at every file as a reader will."""
        if len(self.files) > 1:
            names = {name: self.files[i] for name, (i, _) in self.place.items()}
            checkpoint.write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": names})
        found = {s.name: s for file in self.files for s in specs_of(opened(self.folder / file))}
        if found != self.specs:
            odd = sorted(name for name in found.keys() | self.specs.keys() if found.get(name) != self.specs.get(name))
            raise IntegrityError(f"{self.folder} is not as it was written: {odd[0]}", "merge again")

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.pop())


def specs_of(tensors: dict[str, torch.Tensor]) -> list[Spec]:
    return [Spec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def _pack(specs: Sequence[Spec], limit: int | None) -> list[list[Spec]]:
    """In order; a tensor that is larger than a file may be gets one of its own. Within a file the widest come first,
    so that each starts at a multiple of its item size: readers that map the file may refuse others."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if limit is not None and shards[-1] and size + spec.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.bytes
    return [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]


def _reserve(handle: int, size: int) -> None:
    """A disk that is too small is found out here, where the file system can do that."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(handle, size)


def _write(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def read_size(text: str | int) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes. Raises `RecipeError`."""
    found, size = _SIZE.fullmatch(str(text).strip()), 0
    if found is not None:
        power = " KMGT".index(found[2].upper() or " ")
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if not size:
        raise RecipeError(f"'{text}' is no size of a file", "write it as 5GB, 500MB or 2GiB")
    return size
