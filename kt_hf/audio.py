"""Sound: what is in a file, as one channel at the rate that a model wants. Decoded by soundfile, which the extra
`audio` installs.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from kt_hf.errors import RecipeError, RowError

REMEDY = "mend the file, or leave out all that cannot be read: data.drop=[unreadable]"


def decode(value: dict[str, Any] | None, rate: int | None, place: int) -> np.ndarray:
    """The wave of a row: float32 in [-1, 1], the mean of its channels, resampled to `rate` per second (None: its own).

    value: `bytes` or `path`, as the data library holds them. place: of the row among those of its call. Raises
    `RowError`.
    """
    try:
        import soundfile
    except ImportError as error:
        raise RecipeError(f"reading sound needs soundfile ({error})", "pip install 'kt_hf[audio]'") from error
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise RowError(place, "there is no sound", "leave it out: data.drop=[empty]")
    source = value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"])
    try:
        wave_LC, own = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        what = " ".join(str(error).split())[:150]
        raise RowError(place, f"it cannot be decoded as sound: {what}", REMEDY) from error
    if not len(wave_LC):
        raise RowError(place, "the file holds no sound at all", REMEDY)
    return resample(wave_LC.mean(1), own, rate or own)


def resample(wave_L: np.ndarray, own: int, wanted: int) -> np.ndarray:
    """A wave at another rate, by a polyphase filter."""
    if own == wanted:
        return wave_L
    from scipy.signal import resample_poly

    common = math.gcd(own, wanted)
    return resample_poly(wave_L, wanted // common, own // common).astype(np.float32)
