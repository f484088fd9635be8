"""Rows that cannot be used, found before anything is computed: for `data.drop=[unreadable]`, which leaves them out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from kt_hf import audio, images
from kt_hf.errors import RowError

if TYPE_CHECKING:
    import datasets

    from kt_hf.task import Task

logger = logging.getLogger(__name__)

_NAMED = 5
"""So many rows are told one by one."""


def find(rows: datasets.Dataset, keep: np.ndarray, task: Task, where: str) -> np.ndarray:
    """bad_N: which rows have an image or a sound that cannot be decoded, or are refused by the task. Looks at the rows
    in `keep` alone, and at every one of these. The first are named, with what is wrong."""
    bad_N = np.zeros(len(rows), dtype=bool)
    pictures = images.image_columns(rows)
    sounds = [name for name, feature in rows.features.items() if type(feature).__name__ == "Audio"]
    named = 0
    for place in keep.tolist():
        why = _fault(rows, place, pictures, sounds, task)
        bad_N[place] = bool(why)
        if why and named < _NAMED:
            named += 1
            logger.warning("row %d of %s: %s", rows.select_columns(["index"])[place]["index"], where, why)
    return bad_N


def _fault(rows: datasets.Dataset, place: int, pictures: list[str], sounds: list[str], task: Task) -> str:
    if pictures and (why := images.fault(rows, place, pictures)):
        return f"the image cannot be read: {why}"
    row: dict[str, Any] = rows[place]
    try:
        for name in sounds:
            if row[name] is not None and any(row[name].get(key) is not None for key in ("bytes", "path")):
                audio.decode(row[name], None, 0)
        task.check({name: value for name, value in row.items() if name != "index"})
    except RowError as error:
        return error.cause
    return ""
