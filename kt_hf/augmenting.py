"""Changes of training rows, by name: torchvision's transforms for images, our own for texts and sound.

They draw from torch's global generator, which is seeded for every sample: what a row becomes is a function of seed,
epoch and row. Waves are numpy arrays of float32, one channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from kt_hf.errors import Collector, RecipeError, nearest
from kt_hf.settings import validate

Share = Annotated[float, Field(ge=0, le=1)]


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


class WordDropout:
    """Leaves out every word with probability `p`; one always stays."""

    def __init__(self, *, p: Share = 0.1):
        self.p = p

    def __call__(self, text: str) -> str:
        words = text.split()
        kept = [word for word, draw in zip(words, torch.rand(len(words)).tolist(), strict=True) if draw >= self.p]
        return " ".join(kept or words[:1])


class WordMask:
    """Puts `token` in the place of every word with probability `p`."""

    def __init__(self, *, p: Share = 0.15, token: str = "[MASK]"):
        self.p, self.token = p, token

    def __call__(self, text: str) -> str:
        words = text.split()
        draws = torch.rand(len(words)).tolist()
        return " ".join(self.token if draw < self.p else word for word, draw in zip(words, draws, strict=True))


class Noise:
    """Adds white noise with a signal-to-noise ratio drawn between `low` and `high` decibels."""

    def __init__(self, *, low: float = 10.0, high: float = 40.0):
        if low > high:
            raise ValueError(f"low={low} is above high={high}")
        self.low, self.high = low, high

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        power = float(np.square(wave).mean()) if len(wave) else 0.0
        scale = np.sqrt(power / 10 ** (_uniform(self.low, self.high) / 10))
        return (wave + scale * torch.randn(len(wave)).numpy()).astype(np.float32)


class Gain:
    """Makes it louder or softer by up to `decibels`."""

    def __init__(self, *, decibels: Annotated[float, Field(ge=0, le=60)] = 6.0):
        self.decibels = decibels

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        return (wave * 10 ** (_uniform(-self.decibels, self.decibels) / 20)).astype(np.float32)


class Shift:
    """Moves it in time by up to `share` of its length; silence comes in."""

    def __init__(self, *, share: Share = 0.1):
        self.share = share

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        steps = round(_uniform(-self.share, self.share) * len(wave))
        moved = np.zeros_like(wave)
        if steps >= 0:
            moved[steps:] = wave[: len(wave) - steps]
        else:
            moved[:steps] = wave[-steps:]
        return moved


class TimeMask:
    """Silences `count` stretches of up to `share` of its length each: SpecAugment's time masks, on the wave.

    Park et al. 2019, arXiv:1904.08779, section 2. The masks over frequencies and over the features of a spectrogram
    belong to the models that have them (`mask_feature_prob` of wav2vec 2.0's configuration).
    """

    def __init__(self, *, count: Annotated[int, Field(ge=1)] = 2, share: Share = 0.1):
        self.count, self.share = count, share

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        wave = wave.copy()
        for _ in range(self.count):
            width = round(_uniform(0, self.share) * len(wave))
            start = int(_uniform(0, max(len(wave) - width, 0)))
            wave[start : start + width] = 0
        return wave


class FrequencyMask:
    """Takes `count` bands of frequencies of up to `share` of all out of it: SpecAugment's frequency masks, on the wave.

    Park et al. 2019, arXiv:1904.08779, section 2, with the Fourier transform of the whole in the place of a mel
    spectrogram's channels.
    """

    def __init__(self, *, count: Annotated[int, Field(ge=1)] = 2, share: Share = 0.1):
        self.count, self.share = count, share

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        spectrum = np.fft.rfft(wave)
        for _ in range(self.count):
            width = round(_uniform(0, self.share) * len(spectrum))
            start = int(_uniform(0, max(len(spectrum) - width, 0)))
            spectrum[start : start + width] = 0
        return np.fft.irfft(spectrum, len(wave)).astype(np.float32)


OWN: dict[str, dict[str, type]] = {
    "text": {cls.__name__: cls for cls in (WordDropout, WordMask)},
    "audio": {cls.__name__: cls for cls in (Noise, Gain, Shift, TimeMask, FrequencyMask)},
}
MEDIA = ("image", *OWN)


def transforms(spec: Sequence[Any] | None, medium: str | None = "image") -> Callable[[Any], Any] | None:
    """Transforms by name, one after the other: `RandomRotation` or `{RandomRotation: {degrees: 10}}`. None for none.

    medium: what they change, one of `MEDIA`; None where that is not known yet. Raises `RecipeError`.
    """
    if not spec:
        return None
    steps = [_transform(*_named(item), medium) for item in spec]
    if medium == "image":
        from torchvision.transforms import v2

        return v2.Compose(steps)

    def all_of_them(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return all_of_them


def _named(item: Any) -> tuple[str, dict[str, Any]]:
    name, given = (item, {}) if isinstance(item, str) else next(iter(item.items()))
    return name, dict(given or {})


def _transform(name: str, given: dict[str, Any], medium: str | None) -> Any:
    owner = next((m for m, known in OWN.items() if name in known and medium in (None, m)), None)
    if owner is not None:
        return _own(name, OWN[owner][name], given)
    if medium not in (None, "image"):
        if not medium:
            raise RecipeError(f"data.augment.{name}: this task's rows are not augmented", "leave data.augment out")
        raise RecipeError(f"data.augment: there is no '{name}' for {medium}", nearest(name, OWN[medium]))
    from torchvision.transforms import v2

    cls = getattr(v2, name, None)
    if not (isinstance(cls, type) and issubclass(cls, v2.Transform)):
        names = [n for n in dir(v2) if n[0].isupper()] + (
            [] if medium else [n for known in OWN.values() for n in known]
        )
        raise RecipeError(f"data.augment: torchvision has no transform '{name}'", nearest(name, names))
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"data.augment.{name}: {error}", "see the transform's arguments in torchvision.transforms.v2"
        ) from error


def _own(name: str, cls: type, given: dict[str, Any]) -> Any:
    collect = Collector()
    settings = validate(cls, given, f"data.augment.{name}", collect)
    collect.raise_if_any()
    try:
        return cls(**settings)
    except ValueError as error:
        raise RecipeError(f"data.augment.{name}: {error}", "see kt_hf/augmenting.py") from error
