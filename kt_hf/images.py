"""Images as tasks take them, and what is said of those that cannot be read.

Decoding turns an image as its EXIF orientation says, takes the first frame of several, and refuses one that would
unfold to an enormous size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kt_hf.errors import LEAVE_OUT, DataError

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

REMEDY = f"mend or remove it, {LEAVE_OUT}"


def rgb(image: Image) -> Image:
    """Three channels of 8 bits. Those of 16 bits are scaled; Pillow alone would cut them at 255.

    Raises `DataError` for floating-point pixels, whose range nobody knows.
    """
    from PIL import Image as pil

    if image.mode == "F":
        raise DataError("an image has floating-point pixels, of which no range is known", "save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if image.mode != "I" or pixels.max(initial=0) > 255:
            pixels = np.clip(pixels, 0, 65535) >> 8
        image = pil.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def fetch(source: datasets.Dataset, positions: Any, split: str) -> dict[str, list[Any]]:
    """Rows with their images decoded.

    Raises `DataError` that names the first row whose image cannot be.
    """
    columns = image_columns(source)
    try:
        rows = source[positions]
        for image in (image for name in columns for value in rows[name] for image in _each(value)):
            if image.mode == "F":
                rgb(image)
        return rows
    except Exception as error:
        places = range(*positions.indices(len(source))) if isinstance(positions, slice) else positions
        for place in places if columns else ():
            if why := fault(source, int(place), columns):
                row = source.select_columns(["index"])[int(place)]["index"]
                raise DataError(f"the image of row {row} of {split} cannot be read: {why}", REMEDY) from error
        raise


def image_columns(source: datasets.Dataset) -> list[str]:
    """Columns of images and of lists of them; by the name of their kind, since tables of other libraries are none of
    the data library's business."""
    features = getattr(source, "features", {})
    return [n for n, f in features.items() if "Image" in (type(f).__name__, type(getattr(f, "feature", None)).__name__)]


def _each(value: Any) -> list[Any]:
    """The images of a cell."""
    return [image for image in (value if isinstance(value, list) else [value]) if image is not None]


def fault(source: datasets.Dataset, place: int, columns: Sequence[str]) -> str:
    """What is wrong with the images of a row, in words; empty where nothing is."""
    try:
        row = source.select_columns(list(columns))[place]
        for name in columns:
            for image in _each(row[name]):
                rgb(image)
    except DataError as error:
        return error.cause
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return ""
