"""Sound: what is in a file, as one channel at the rate that a model wants, and feature extractors. Decoded by
soundfile, which the extra `audio` installs.
"""

from __future__ import annotations

import io
import math
import wave
from typing import Any

import numpy as np

from kt_hf import loading
from kt_hf.errors import RecipeError, RowError

REMEDY = "mend the file, or leave out all that cannot be read: data.drop=[unreadable]"


def decode(value: dict[str, Any] | None, rate: int | None, place: int) -> np.ndarray:
    """The wave of a row: float32 in [-1, 1], the mean of its channels, resampled to `rate` per second (None: its own).

    As `read` otherwise.
    """
    wave_LC, own = read(value, place)
    return resample(wave_LC.mean(1), own, rate or own)


def read(value: dict[str, Any] | None, place: int) -> tuple[np.ndarray, int]:
    """(wave_LC, its rate per second) of a file: all channels as they are.

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
    return wave_LC, int(own)


def resample(wave_L: np.ndarray, own: int, wanted: int) -> np.ndarray:
    """A wave at another rate, by a polyphase filter."""
    if own == wanted:
        return wave_L
    from scipy.signal import resample_poly

    common = math.gcd(own, wanted)
    return resample_poly(wave_L, wanted // common, own // common).astype(np.float32)


def encode(samples: np.ndarray, rate: int) -> bytes:
    """A WAV file with 16 bits of a wave in [-1, 1]."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return content.getvalue()


def load_extractor(ref: Any, config: Any) -> Any:
    """The model's feature extractor, or for a fresh model the one of its kind, with fields that its size asks for."""
    import transformers
    from transformers import AutoFeatureExtractor
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES as KNOWN

    source, given = ref.processor or ref.path, dict(ref.processor_overrides or {})
    if source is not None:
        with loading.loading(f"feature extractor '{source}'"):
            return AutoFeatureExtractor.from_pretrained(source, revision=ref.revision, trust_remote_code=False, **given)
    name = KNOWN.get(config.model_type)
    if name is None:
        raise RecipeError(
            f"a fresh model of type '{config.model_type}' has no feature extractor of its own",
            "name one: model.processor=DIR_OR_HUB_ID",
        )
    cls = getattr(transformers, name)
    if hasattr(config, "num_mel_bins") and name != "Wav2Vec2FeatureExtractor":
        sizes = {"num_mel_bins": config.num_mel_bins, "max_length": getattr(config, "max_length", None)}
        if name == "WhisperFeatureExtractor":
            sizes = {"feature_size": config.num_mel_bins, "chunk_length": _whisper_seconds(config, given)}
        given = {**{k: v for k, v in sizes.items() if v is not None}, **given}
    elif hasattr(config, "input_feat_per_channel"):
        given = {**dict.fromkeys(("num_mel_bins", "feature_size"), config.input_feat_per_channel), **given}
    else:  # by convention, only models with layer norm in the convolutions heed what is padded
        given = {"return_attention_mask": getattr(config, "feat_extract_norm", "layer") == "layer", **given}
    return cls(**given)


def _whisper_seconds(config: Any, given: dict[str, Any]) -> int:
    """The length that the encoder's places are for, two spectrum frames each. Raises `RecipeError` where it is no whole
    number of seconds, which the extractor needs."""
    rate, hop = given.get("sampling_rate", 16000), given.get("hop_length", 160)
    seconds, rest = divmod(2 * config.max_source_positions * hop, rate)
    if rest or not seconds:
        raise RecipeError(
            f"max_source_positions={config.max_source_positions} are {seconds + rest / rate:g} s of sound ({2 * hop} "
            f"samples each, {rate} a second), no whole number of seconds",
            f"set model.config_overrides.max_source_positions to a multiple of {rate / (2 * hop):g}",
        )
    return seconds
