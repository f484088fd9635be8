"""The file that holds what frozen layers give for every training row: its layout, its manifest, and who may write it.

`<key>.bin` is raw little-endian data: where rows of unequal length are kept, first the offsets (N + 1 of int64), then
for every kept tensor one block of N rows, or of T tokens, each as long as the others. `<key>.json` beside it holds the
facts that made the key, the size and the sha256 of the data. A file without a manifest that fits it is never read.

Shapes: N rows of the data, T tokens of all rows, B rows of a batch, L tokens of its longest row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

logger = logging.getLogger(__name__)

_ALIGNED = 64


@dataclass(frozen=True)
class Block:
    """What is kept of one tensor: `shape` is that of one row, or of one token where `tokens` is set."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tokens: bool

    @property
    def stride(self) -> int:
        """Bytes of one row or token."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Layout:
    """Where everything lies. lengths_N: tokens of every row; None where no block has tokens."""

    def __init__(self, blocks: Sequence[Block], num_rows: int, lengths_N: np.ndarray | None):
        self.blocks, self.num_rows = list(blocks), num_rows
        self.offsets = None if lengths_N is None else np.concatenate([[0], np.cumsum(lengths_N, dtype=np.int64)])
        self.starts, size = [], 0 if self.offsets is None else _aligned(self.offsets.nbytes)
        for block in self.blocks:
            self.starts.append(size)
            size = _aligned(size + block.stride * self.count(block))
        self.size = size

    def count(self, block: Block) -> int:
        if not block.tokens:
            return self.num_rows
        assert self.offsets is not None
        return int(self.offsets[-1])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def folder() -> Path:
    """Beside the data sets' own cache: the same rows serve other seeds and learning rates of a stage, and later
    runs."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "kt_hf_frozen"


def intact(key: str) -> bool:
    """Whether there is a file of that key that is what its manifest says; one that is not is named."""
    data, manifest = folder() / f"{key}.bin", folder() / f"{key}.json"
    if not manifest.exists():
        return False
    try:
        said = json.loads(manifest.read_text())
        if data.stat().st_size != said["size"]:
            raise ValueError(f"{data.stat().st_size} bytes instead of {said['size']}")
        if _sha256(data) != said["sha256"]:
            raise ValueError("its bytes have changed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the outputs of frozen layers in %s are not used, but computed again: %s", data, error)
        return False
    os.utime(manifest)  # what was used last is removed last
    return True


def create(name: str, layout: Layout) -> Path:
    """An empty file to fill, under another name until it is published."""
    path = folder() / f"{name}.part"
    with path.open("wb") as file:
        if layout.offsets is not None:
            file.write(layout.offsets.astype("<i8").tobytes())
        file.truncate(layout.size)
    return path


def write(file: int, layout: Layout, number: int, rows: Sequence[int], values: torch.Tensor) -> None:
    """Put the values of some rows, one after the other in `values`, where they belong in block `number`."""
    block, start = layout.blocks[number], layout.starts[number]
    data = memoryview(values.contiguous().cpu().view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
    at = 0
    for row in rows:
        first, count = (row, 1)
        if block.tokens:
            assert layout.offsets is not None
            first, count = int(layout.offsets[row]), int(layout.offsets[row + 1] - layout.offsets[row])
        size = count * block.stride
        os.pwrite(file, data[at : at + size], start + first * block.stride)
        at += size
    assert at == len(data), "values do not fit the rows"


def publish(path: Path, key: str, facts: dict[str, Any]) -> None:
    """Write the manifest and give the filled file its name."""
    manifest = {**facts, "size": path.stat().st_size, "sha256": _sha256(path)}
    (folder() / f"{key}.json").unlink(missing_ok=True)
    path.replace(folder() / f"{key}.bin")
    staged = path.with_suffix(".manifest")
    staged.write_text(json.dumps(manifest, indent=1))
    staged.replace(folder() / f"{key}.json")


def make_room(size: int, limit: int) -> None:
    """Remove what was not used for longest until `size` bytes more stay within the limit. A process that still reads
    a removed file keeps it."""
    kept = sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in folder().glob("*.bin"))
    for manifest in kept:
        if total + size <= limit:
            return
        data = manifest.with_suffix(".bin")
        manifest.unlink()
        if data.exists():
            total -= data.stat().st_size
            data.unlink()
        logger.info("removed %s, outputs of frozen layers that were not used for longest", data)


def read(key: str, blocks: Sequence[Block], num_rows: int) -> tuple[list[torch.Tensor], np.ndarray | None]:
    """(the blocks, memory-mapped, each count x shape; offsets)."""
    mapped = np.memmap(folder() / f"{key}.bin", np.uint8, "c")  # copy on write: torch warns of read-only memory
    lengths_N = None
    if any(block.tokens for block in blocks):
        lengths_N = np.diff(mapped[: (num_rows + 1) * 8].view("<i8"))
    layout = Layout(blocks, num_rows, lengths_N)
    found = []
    for block, start in zip(blocks, layout.starts, strict=True):
        count = layout.count(block)
        data = torch.from_numpy(mapped[start : start + count * block.stride])
        found.append(data.view(block.dtype).view(count, *block.shape))
    return found, layout.offsets


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
