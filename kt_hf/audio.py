"""Sound: what is in a file, as one channel at the rate that a model wants, and as that model's inputs. Decoded by
soundfile, which the extra `audio` installs.
"""

from __future__ import annotations

import io
import math
import wave
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kt_hf.errors import LEAVE_OUT, RecipeError, RowError

if TYPE_CHECKING:
    from kt_hf.recipe import Model

REMEDY = f"mend the file, {LEAVE_OUT}"


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


def wav(samples_L: np.ndarray, rate: int) -> bytes:
    """A file of one channel with these samples, which are in [-1, 1]."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples_L.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return content.getvalue()


# --- inputs of models -------------------------------------------------------------------------------------------------


def load_extractor(ref: Model, config: Any) -> Any:
    """The model's feature extractor, or for a fresh model the one of its kind, with fields that its size asks for."""
    import transformers
    from transformers import AutoFeatureExtractor
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES as KNOWN

    from kt_hf import loading

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


def encode(extractor: Any, values: list[Any], max_seconds: float, augment: Any = None) -> dict[str, list[torch.Tensor]]:
    """A model's inputs from pieces of sound as the data library holds them, of B rows each: longer pieces are cut,
    shorter ones padded. augment: a callable on waves, or None."""
    rate, limit = extractor.sampling_rate, round(max_seconds * extractor.sampling_rate)
    waves = [decode(value, rate, place)[:limit] for place, value in enumerate(values)]
    if augment is not None:
        waves = [augment(one) for one in waves]
    given = {"sampling_rate": rate, "return_tensors": "np"}
    if extractor.model_input_names[0] == "input_values" and not hasattr(extractor, "num_mel_bins"):
        given |= {"padding": "max_length", "max_length": limit, "truncation": True}
    return {k: list(torch.from_numpy(np.asarray(v))) for k, v in extractor(waves, **given).items()}


def signature(extractor: Any) -> dict[str, Any]:
    """What a feature extractor does to sound."""
    known = extractor.to_dict()
    fields = ("sampling_rate", "do_normalize", "num_mel_bins", "mean", "std", "feature_size", "max_length")
    return {k: known[k] for k in fields if known.get(k) is not None}


def probe(extractor: Any, max_seconds: float) -> dict[str, torch.Tensor]:
    """A model's inputs from one row of silence, of which nothing is masked."""
    rate = extractor.sampling_rate
    silence = {"bytes": wav(np.zeros(round(max_seconds * rate)), rate), "path": None}
    found = encode(extractor, [silence], max_seconds)
    return {name: torch.stack(rows) for name, rows in found.items() if name != "attention_mask"}


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
