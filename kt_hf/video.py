"""Clips: the frames of a video file or of a list of images, as many as a model takes. Files are decoded by PyAV, which
the extra `video` installs.

Shapes: T frames of a clip, C channels, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kt_hf import images
from kt_hf.errors import LEAVE_OUT, DataError, RecipeError, RowError

REMEDY = f"mend the file, {LEAVE_OUT}"


def evenly(total: int, wanted: int | None) -> list[int]:
    """Numbers of `wanted` of the frames (None: all), as transformers' video processors take them: frame i * total /
    wanted, rounded down. Of a clip with too few, some come more than once."""
    wanted = total if wanted is None else wanted
    return [i * total // wanted for i in range(wanted)]


def clip(value: Any, wanted: int | None, place: int) -> torch.Tensor:
    """clip_TCHW of a row, uint8 in RGB. value: a list of images, or `bytes` or `path` of a file. place: of the row
    among those of its call. Raises `RowError`."""
    if not value or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None):
        raise RowError(place, "there is no video", "leave it out: data.drop=[empty]")
    return _of_file(value, wanted, place) if isinstance(value, dict) else _of_images(value, wanted, place)


def _of_images(frames: Sequence[Any], wanted: int | None, place: int) -> torch.Tensor:
    if any(frame is None for frame in frames):
        raise RowError(place, f"frame {[f is None for f in frames].index(True)} is missing", REMEDY)
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        listed = " and ".join(f"{width}x{height}" for width, height in sorted(sizes)[:2])
        raise RowError(place, f"its frames differ in size ({listed})", "save all frames of a clip in one size")
    try:
        taken = [np.asarray(images.rgb(frames[i])) for i in evenly(len(frames), wanted)]
    except DataError as error:
        raise RowError(place, error.cause, error.remedy) from error
    return torch.from_numpy(np.stack(taken)).permute(0, 3, 1, 2)


def _of_file(value: dict[str, Any], wanted: int | None, place: int) -> torch.Tensor:
    try:
        import av
    except ImportError as error:
        raise RecipeError(
            f"reading video files needs av ({error})", "pip install 'kt_hf[video]', or give clips as lists of images"
        ) from error
    source = value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"])
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise RowError(place, "the file holds no video", REMEDY)
            said = container.streams.video[0].frames
            taken, count = _take(container, evenly(said, wanted) if said else [])
            if count != said and count:  # the file does not say how many there are, or says something wrong
                taken, _ = _take(container, evenly(count, wanted))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        what = " ".join(str(error).split())[:150]
        raise RowError(place, f"it cannot be decoded as video: {what}", REMEDY) from error
    if not taken:
        raise RowError(place, "the file holds no frame at all", REMEDY)
    return torch.from_numpy(np.stack(taken)).permute(0, 3, 1, 2)


def _take(container: Any, numbers: list[int]) -> tuple[list[np.ndarray], int]:
    """(frames with these numbers, how many there are)."""
    container.seek(0)
    found, count, wanted = {}, 0, set(numbers)
    for frame in container.decode(video=0):
        if count in wanted:
            found[count] = frame.to_ndarray(format="rgb24")
        count += 1
    return [found[i] for i in numbers if i in found], count
