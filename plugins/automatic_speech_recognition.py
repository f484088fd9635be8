"""Automatic speech recognition: the text of what is said, by a model of frames (CTC) or by an encoder and a decoder.

Shapes: B rows of a batch, I steps of the model's input (samples or spectrum frames), T frames of the model's output, C
entries of the vocabulary, L tokens of the longest target, W tokens written, D width of features, N scored frames or
target tokens of the whole batch, row by row, or examples.
"""

from __future__ import annotations

import bisect
import copy
import inspect
import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from kt_hf import Loaded, Role, Task, audio, language, loading, tiny, writing
from kt_hf.errors import DataError, RecipeError, RowError, nearest
from kt_hf.language import IGNORED
from kt_hf.reading import in_memory
from kt_hf.recipe import Model
from kt_hf.task import FILL, Batch, Scores, auto_classes

logger = logging.getLogger(__name__)

OF_TEXTS = ("wer", "cer")
INPUTS = ("input_values", "input_features")
OF_TOKENIZER = (
    "vocab_size",
    "model_max_length",
    "word_delimiter_token",
    *(f"{n}_token" for n in ("bos", "eos", "pad")),
)
"""Fields of `model.processor_overrides` that are the tokenizer's; all others are the feature extractor's."""


class AutomaticSpeechRecognition(Task):
    """What is said, as text: CTC (`AutoModelForCTC`: wav2vec 2.0, HuBERT, ...), or an encoder and a decoder
    (`AutoModelForSpeechSeq2Seq`: Whisper, Speech2Text, Moonshine).

    max_seconds: longer pieces are refused, since their texts could not be cut with them. case, remove: how texts are
    changed before anything is learnt or measured: letters in lower or upper case, and characters to leave out, such as
    ".,!?". max_target_length: tokens that a decoder learns or writes at most. num_beams: of a decoder; 1 is greedy, and
    frames are always read greedily. spoken_language: told to a decoder that knows several (Whisper). metrics: `wer` and
    `cer`, edits over words and characters of the references, and `loss` in nats per target token, which is always
    there; lower is better. The first decides.
    """

    conformance = {
        "settings": {"max_seconds": 1.0},
        "model": tiny.WAV2VEC,
    }
    roles = (
        Role("audio", ("audio",), aliases=("sound", "file", "speech")),
        Role("text", ("string",), aliases=("sentence", "transcription", "transcript", "words"), predicted=True),
    )
    metric = "wer"
    greater_is_better = False
    lower_metrics = (*OF_TEXTS, "loss")
    cache_rows = False
    augments = "audio"
    derived = {"steps": ("lengths",)}
    waits = {"_ctc_loss": "PyTorch's kernel for alignments takes the lengths of frames and texts on the host"}

    def __init__(
        self,
        *,
        max_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0,
        case: Literal["keep", "lower", "upper"] = "keep",
        remove: str = "",
        max_target_length: Annotated[int, Field(ge=2)] = 128,
        num_beams: Annotated[int, Field(ge=1)] = 1,
        spoken_language: str | None = None,
        metrics: list[str] | None = None,
    ):
        self.max_seconds, self.case, self.remove = max_seconds, case, remove
        self.max_target_length, self.num_beams, self.spoken_language = max_target_length, num_beams, spoken_language
        names = metrics or list(OF_TEXTS)
        for name in names:
            if name not in self.lower_metrics:
                raise RecipeError(f"metrics: there is no '{name}'", nearest(name, self.lower_metrics))
        self.metric = names[0]
        self.of_texts = tuple(name for name in dict.fromkeys(names) if name in OF_TEXTS)

    @classmethod
    def architectures(cls) -> frozenset[str]:
        return auto_classes("AutoModelForCTC") | auto_classes("AutoModelForSpeechSeq2Seq")

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> datasets.Dataset:
        """Two to four tones of three heights, each a syllable."""
        rows = []
        for i in range(count):
            said = [(i + int(random.integers(3))) % 3 for _ in range(2 + i % 3)]
            time = np.arange(240) / 8000
            tones = [np.sin(2 * np.pi * (300, 800, 2000)[s] * time) * np.hanning(240) * 0.5 for s in said]
            wave = np.concatenate(tones) + random.normal(0, 0.02, 240 * len(said))
            text = " ".join(("la", "mi", "so")[s] for s in said)
            rows.append({"audio": {"bytes": audio.wav(wave, 8000), "path": None}, "text": text})
        kinds = {"audio": datasets.Audio(decode=False), "text": datasets.Value("string")}
        return in_memory(rows, datasets.Features(kinds))

    def fits(self, roles: dict[str, str]) -> bool:
        """Not any text beside a sound is what is said."""
        text = next(role for role in self.roles if role.name == "text")
        return "audio" in roles and roles.get("text") in (text.name, *text.aliases)

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        """Raises `RecipeError` for metrics whose library is absent, for a family that does not write what it hears by
        an encoder and a decoder or frames, and for a vocabulary that lacks most of what the training texts have."""
        for name in self.of_texts:
            self._metric(name)
        texts = [self.plain(text) for text in info.texts()]
        loaded = load_frames(ref, texts) if is_ctc(ref) else load_decoder(ref, texts, self.num_beams)
        heard = loaded.processor
        if self.spoken_language is not None:
            heard.speak(self.spoken_language, loaded.model)
        check_vocabulary(heard, texts)
        return loaded

    def _metric(self, name: str) -> Any:
        from kt_hf import metrics

        return metrics.of_texts(name)

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        """`vocabulary` must be equal for teacher and student, and so must the input, and the frames that it gives."""
        heard = loaded.processor
        known = heard.extractor.to_dict()
        fields = ("sampling_rate", "do_normalize", "num_mel_bins", "feature_size", "hop_length", "chunk_length")
        return {
            **loading.tokenizer_signature(heard.tokenizer),
            "num_scores": len(heard.tokenizer),
            "normalisation": {k: known[k] for k in fields if known.get(k) is not None},
            "frames": heard.pace,
        }

    def layers(self, model: nn.Module) -> list[list[str]]:
        ctc = type(loading.unwrap(model)).__name__ in auto_classes("AutoModelForCTC")
        return loading.backbone_layers(model) if ctc else writing.layers(model)

    def head(self, model: nn.Module) -> list[str]:
        ctc = type(loading.unwrap(model)).__name__ in auto_classes("AutoModelForCTC")
        return loading.head_modules(model) if ctc else []

    # --- rows ---

    def plain(self, text: str) -> str:
        """A text as it is learnt and measured."""
        kept = "".join(character for character in text if character not in self.remove)
        kept = {"keep": kept, "lower": kept.lower(), "upper": kept.upper()}[self.case]
        return " ".join(kept.split())

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """The model's input and its mask, one row at a time: what becomes of a row does not depend on others. And the
        token ids of the text."""
        heard: Heard = loaded.processor
        rate = heard.extractor.sampling_rate
        inputs, masks = [], []
        for place, value in enumerate(rows["audio"]):
            wave = audio.decode(value, rate, place)
            check_length(len(wave) / rate, min(self.max_seconds, heard.seconds), place)
            if len(wave) < heard.least:
                raise RowError(place, f"{len(wave) / rate:.3f} s of sound give no frame", audio.REMEDY)
            found = heard.extractor(
                wave if augment is None else augment(wave),
                sampling_rate=rate,
                return_attention_mask=True,
                return_tensors="np",
            )
            one = torch.from_numpy(np.asarray(found[heard.input_name][0], dtype=np.float32))
            mask = found.get("attention_mask")
            inputs.append(one)
            masks.append(torch.ones(len(one)).long() if mask is None else torch.from_numpy(np.asarray(mask[0])).long())
        columns: dict[str, Any] = {heard.input_name: inputs, "attention_mask": masks}
        if "text" in rows:
            columns["labels"] = [heard.tokens(self.plain(text), self.max_target_length) for text in rows["text"]]
        return columns

    def check(self, row: dict[str, Any]) -> None:
        wave_LC, rate = audio.read(row["audio"], 0)
        check_length(len(wave_LC) / rate, self.max_seconds, 0)

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        """Padded on the right. The mask is there where the model heeds one; `lengths` are steps of the input."""
        heard: Heard = loaded.processor
        batch: Batch = {"index": torch.tensor([int(row["index"]) for row in rows])}
        batch[heard.input_name] = _padded([row[heard.input_name] for row in rows], heard.extractor.padding_value)
        mask_BI = _padded([row["attention_mask"] for row in rows], 0)
        batch["lengths"] = mask_BI.sum(1)
        batch["steps"] = batch["lengths"].tolist()
        if heard.masks:
            batch["attention_mask"] = mask_BI
        if "labels" in rows[0]:
            batch["labels"] = _padded([torch.tensor(row["labels"], dtype=torch.int64) for row in rows], IGNORED)
        if heard.ctc:
            batch["blank"] = heard.tokenizer.pad_token_id
        if heard.alone:
            batch["alone"] = True
        return batch

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        """A decoder reads the labels, one place later; no loss is computed by the model."""
        parts = [run_model(model, one, **kwargs) for one in (_rows(batch) if _apart(model, batch) else [batch])]
        if len(parts) == 1:
            return parts[0]
        columns: Any = {
            name: _padded([part[name][0] for part in parts], 0.0)
            for name in ("logits", "last_hidden")
            if name in parts[0]
        }
        if "num_frames" in parts[0]:
            columns["num_frames"] = torch.cat([part["num_frames"] for part in parts])
        return Outputs(**columns)

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """In nats per target token. Frames: -log of the sum over all alignments, one value for each row, of the weight
        of its tokens; 0 where there are too few frames for the text. Decoders: one for each place of a target."""
        if "blank" not in batch:
            return language.loss(*language.learnt(outputs.logits, batch["labels"], None), label_smoothing)
        if label_smoothing:
            raise RecipeError("a loss over alignments (CTC) has no label smoothing", "leave label_smoothing out")
        tokens_B = (batch["labels"] != IGNORED).sum(1)
        nll_B = alignment_loss(outputs.logits, outputs.num_frames, batch)
        return nll_B / tokens_B.clamp(min=1), tokens_B.float(), "token"

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        counts: dict[str, int | torch.Tensor] = {"example": len(batch["index"])}
        return counts | ({"token": (batch["labels"] != IGNORED).sum()} if "labels" in batch else {})

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits over the vocabulary for every frame (decoders: place of a target); those that are real share the
        weight 1 of their row."""
        if "blank" in batch:
            real_BT = _real(outputs.num_frames, outputs.logits.shape[1])
            weight_BT = real_BT / outputs.num_frames.clamp(min=1).unsqueeze(1)
            return outputs.logits.float().flatten(0, 1), weight_BT.flatten()
        real_BL = batch["labels"] != IGNORED
        logits_NC, _ = language.learnt(outputs.logits, batch["labels"], None)
        return logits_NC, (real_BL / real_BL.sum(1, keepdim=True).clamp(min=1)).flatten()

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean of the encoder's last hidden states over the real frames."""
        real_BT1 = _real(outputs.num_frames, outputs.last_hidden.shape[1]).unsqueeze(-1)
        return outputs.last_hidden.masked_fill(~real_BT1, 0.0).sum(1) / real_BT1.sum(1).clamp(min=1)

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Per example `nll` (nats, summed over its tokens) and `tokens`, and `written`: the best token of every frame,
        or the token ids that the decoder writes."""
        if "blank" in batch:
            outputs = self.forward(model, batch)
            return self._read(outputs.logits, outputs.num_frames, batch)
        found = {}
        if "labels" in batch:
            judged = language.judge_labels(self.forward(model, batch).logits, batch["labels"])
            found = {name: judged[name] for name in ("nll", "tokens")}
        return found | ({"written": self._write(loading.unwrap(model), batch)} if self.of_texts else {})

    def _read(self, logits_BTC: torch.Tensor, num_frames_B: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        real_BT = _real(num_frames_B, logits_BTC.shape[1])
        found = {"written": logits_BTC.argmax(-1).masked_fill(~real_BT, FILL).int()}
        if "labels" in batch:
            found["nll"] = alignment_loss(logits_BTC, num_frames_B, batch).double()
            found["tokens"] = (batch["labels"] != IGNORED).sum(1)
        return found

    def _write(self, model: Any, batch: Batch) -> torch.Tensor:
        width = min(self.max_target_length, (writing.positions(model) or 2**31) - _PROMPT)
        written = []
        for part in _rows(batch) if _apart(model, batch) else [batch]:
            given = {name: part[name] for name in (*INPUTS, "attention_mask") if name in part}
            out_BW = writing.generate(model, width, self.num_beams, **given)
            written.append(F.pad(out_BW, (0, width + 1 - out_BW.shape[1]), value=writing.padding(model)))
        return torch.cat(written)

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Frames are read as of one model. Raises `RecipeError` where decoders are to write: members would have to
        agree token by token."""
        rows = len(batch["index"])
        if "blank" in batch:
            num_frames_B = (weight_N.reshape(rows, -1) > 0).sum(1)
            return self._read(scores_NC.reshape(rows, -1, scores_NC.shape[-1]), num_frames_B, batch)
        if self.of_texts:
            raise RecipeError(
                "an ensemble of decoders scores given texts, but does not write",
                "set task.automatic-speech-recognition.metrics=[loss], or merge in weight space instead",
            )
        found = language.judge_scores(scores_NC, weight_N, batch["labels"])
        return {name: found[name] for name in ("nll", "tokens")}

    def finish(self, predictions: dict[str, np.ndarray], loaded: Loaded, rows: Any) -> dict[str, np.ndarray]:
        """Texts in place of token ids, and their edits beside the rows' own texts."""
        found = dict(predictions)
        if "written" in found:
            texts = [loaded.processor.text(ids) for ids in found.pop("written")]
            found["prediction"] = writing.to_bytes(texts)
            if "text" in rows.column_names and self.of_texts:
                said, wanted = ([self.plain(text) for text in column] for column in (texts, rows["text"]))
                found["reference"] = writing.to_bytes(list(rows["text"]))
                found |= {name: self._metric(name).counts(said, wanted) for name in self.of_texts}
        return found

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """WER and CER are edits over sizes of the whole corpus."""
        nll, tokens = (predictions[name].astype(np.float64) for name in ("nll", "tokens"))
        if not tokens.sum():
            raise DataError(f"none of the {len(tokens)} examples has a text", "look at the column of the texts")
        found = Scores({"loss": float(nll.sum() / tokens.sum())}, {"loss": (nll / np.maximum(tokens, 1), tokens)})
        for name in self.of_texts:
            metric, counts_NK = self._metric(name), predictions[name].astype(np.float64)
            found.metrics[name] = metric.score(counts_NK.sum(0))
            found.statistics[name] = lambda weights_N, m=metric, c=counts_NK: m.score(weights_N @ c)
        return found

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        texts = ("prediction", "reference")
        found: dict[str, Any] = {n: writing.from_bytes(predictions[n]) for n in texts if n in predictions}
        return found | {name: predictions[name] for name in ("nll", "tokens") if name in predictions}

    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """What is said in every piece."""
        task = copy.copy(self)
        task.max_target_length = max_new_tokens
        return {"prediction": writing.from_bytes(replace(predictor, task=task).scores(info, "test")["prediction"])}


_PROMPT = 4
"""Places of a decoder that what is told to it beforehand may take: Whisper's start, language, task, no times."""


@dataclass
class Outputs(ModelOutput):
    """num_frames: of the encoder, of every row."""

    logits: torch.Tensor | None = None
    num_frames: torch.Tensor | None = None
    last_hidden: torch.Tensor | None = None


def check_length(seconds: float, limit: float, place: int) -> None:
    if seconds > limit + 1e-3:
        cause = f"the sound is {seconds:.1f} s long, above {limit:g} s"
        raise RowError(
            place, cause, "cut it with its text, raise task.max_seconds as far as the model goes, or leave it out"
        )


def _padded(values: list[torch.Tensor], fill: float) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


def _real(num_frames_B: torch.Tensor, width: int) -> torch.Tensor:
    """Which of so many frames are of the row's sound."""
    return torch.arange(width, device=num_frames_B.device) < num_frames_B.unsqueeze(1)


def alignment_loss(logits_BTC: torch.Tensor, num_frames_B: torch.Tensor, batch: Batch) -> torch.Tensor:
    """-log sum over alignments of p(alignment), of each row in nats; 0 where none is long enough.

    Graves et al. 2006, Connectionist Temporal Classification, equation 14.
    """
    logs_TBC = logits_BTC.float().log_softmax(-1).transpose(0, 1)
    labels_BL = batch["labels"]
    return F.ctc_loss(
        logs_TBC,
        labels_BL.clamp(min=0),
        num_frames_B,
        (labels_BL != IGNORED).sum(1),
        blank=batch["blank"],
        reduction="none",
        zero_infinity=True,
    )


def _apart(model: nn.Module, batch: Batch) -> bool:
    """Whether rows are run one by one: padding would change what the model says of them, which must not depend on what
    else is in a batch. Trained it is on padded batches all the same, as everybody does."""
    return "alone" in batch and not model.training and len(batch["index"]) > 1


def _rows(batch: Batch) -> list[Batch]:
    """Batches of single rows without padding of the sound."""
    found = []
    for i, length in enumerate(batch.get("steps") or batch["lengths"].tolist()):
        one: Batch = {k: v[i : i + 1] if isinstance(v, (torch.Tensor, list)) else v for k, v in batch.items()}
        found.append({k: v[:, :length] if k in (*INPUTS, "attention_mask") else v for k, v in one.items()})
    return found


def run_model(model: nn.Module, batch: Batch, **kwargs: Any) -> Outputs:
    """One call. `last_hidden` is there where hidden states are asked for, and so is `num_frames` of decoders, which
    need it for nothing else (Moonshine's is a number of Python's, which waits for the device)."""
    inner = loading.unwrap(model)
    given = {name: batch[name] for name in (*INPUTS, "attention_mask") if name in batch}
    if "blank" in batch:
        outputs = model(**given, **kwargs)
        hidden = (outputs.get("hidden_states") or (None,))[-1]
    else:
        given["decoder_input_ids"] = writing.shifted(batch["labels"], inner)
        outputs = model(**given, **{"use_cache": False, **kwargs})
        if not kwargs.get("output_hidden_states"):
            return Outputs(logits=outputs.logits)
        hidden = outputs.encoder_last_hidden_state
    steps = outputs.logits if hidden is None else hidden
    frames_B = num_frames(inner, batch["lengths"]).clamp(max=steps.shape[1])
    return Outputs(logits=outputs.logits, num_frames=frames_B, last_hidden=hidden)


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """What makes a model's input of a wave, and token ids of a text.

    ctc: whether tokens are read off frames. start: what a decoder starts with. least: samples that give a frame.
    seconds: the longest sound that the extractor takes. pace: frames of so many seconds (`_PACE`) of sound. alone:
    whether padding may change what the model says of a row. It does where norms run over time (wav2vec 2.0's group
    norm, Moonshine) or convolutions see it (Speech2Text); not after wav2vec 2.0's layer norm, and Whisper's input has
    one length.
    """

    extractor: Any
    tokenizer: Any
    ctc: bool
    start: int | None
    least: int
    seconds: float
    pace: int
    alone: bool

    @classmethod
    def of(cls, model: Any, extractor: Any, tokenizer: Any, start: int | None) -> Heard:
        """Raises `RecipeError` where the extractor makes something else than the model reads."""
        if extractor.model_input_names[0] != model.main_input_name:
            raise RecipeError(
                f"{type(model).__name__} reads {model.main_input_name}, {type(extractor).__name__} makes "
                f"{extractor.model_input_names[0]}",
                "name the feature extractor: model.processor=DIR_OR_HUB_ID",
            )
        rate = extractor.sampling_rate
        raw = extractor.model_input_names[0] == INPUTS[0]
        least = (
            bisect.bisect_left(range(rate), 1, key=lambda n: int(num_frames(model, torch.tensor([n])))) if raw else 1
        )
        pace = int(num_frames(model, torch.tensor([_PACE * rate if raw else 100 * _PACE])))
        seconds = getattr(extractor, "n_samples", math.inf) / rate
        alone = getattr(model.config, "feat_extract_norm", None) != "layer" and seconds == math.inf
        return cls(extractor, tokenizer, start is None, start, least, seconds, pace, alone)

    @property
    def input_name(self) -> str:
        return self.extractor.model_input_names[0]

    @property
    def masks(self) -> bool:
        """Whether the model heeds what is padded."""
        return getattr(self.extractor, "return_attention_mask", None) is not False

    @property
    def backend_tokenizer(self) -> Any:
        return getattr(self.tokenizer, "backend_tokenizer", None)

    def tokens(self, text: str, limit: int) -> list[int]:
        """Token ids of a text. Those of a decoder end with the end token, also where they are cut, and do not begin
        with the start token, which `writing.shifted` puts there."""
        if self.ctc:
            return self.tokenizer(text)["input_ids"]
        limit = min(limit, self.tokenizer.model_max_length)
        ids = loading.encode(self.tokenizer, text, max_length=limit + 1, target=True)["input_ids"]
        if ids[:1] == [self.start]:
            ids = ids[1:]
        return writing.ended(ids[:limit], self.tokenizer.eos_token_id, limit)

    def text(self, ids: np.ndarray) -> str:
        """What transformers' pipeline makes of the best tokens of frames, or of written ones."""
        kept = ids[ids != FILL].tolist()
        return self.tokenizer.decode(kept, skip_special_tokens=not self.ctc) if kept else ""

    def speak(self, name: str, model: Any) -> None:
        """Tell a decoder which language it hears."""
        if not hasattr(self.tokenizer, "set_prefix_tokens") or self.ctc:
            raise RecipeError(
                f"{type(model).__name__} is not told which language it hears", "leave task.spoken_language out"
            )
        with loading.loading(f"language '{name}'"):
            self.tokenizer.set_prefix_tokens(language=name, task="transcribe")
        model.generation_config.language, model.generation_config.task = name, "transcribe"

    def save_pretrained(self, folder: Path) -> None:
        self.extractor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


_PACE = 3
"""Seconds of sound by whose frames models are compared."""


def num_frames(model: Any, lengths_B: torch.Tensor) -> torch.Tensor:
    """Frames of the encoder's output for so many steps of its input."""
    for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
        for owner in (model, model.get_encoder() if hasattr(model, "get_encoder") else None):
            if hasattr(owner, name):
                found = [torch.as_tensor(getattr(owner, name)(one)) for one in lengths_B]  # Moonshine's takes but one
                return torch.stack(found).long().to(lengths_B.device)
    if type(model).__name__ in auto_classes("AutoModelForCTC"):
        raise RecipeError(
            f"{type(model).__name__} does not say how many frames it makes of a sound", "choose another model"
        )
    return torch.full_like(lengths_B, 2**31)


def is_ctc(ref: Any) -> bool:
    """Whether a model reads frames: by the class that its files name, else by its type."""
    if loading.is_adapter(ref):
        described = json.loads((Path(ref.path) / loading.ADAPTER).read_text())
        return is_ctc(Model(path=described["base_model_name_or_path"], revision=described.get("revision")))
    config = loading.config_of(ref)
    named = set(config.architectures or [])
    if named & auto_classes("AutoModelForSpeechSeq2Seq") and config.model_type not in _OF_SOUNDS:
        check_decoder(config)
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES as OF_FRAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES as OF_DECODERS

    if config.model_type not in {*OF_FRAMES, *OF_DECODERS} - _OF_SOUNDS:
        raise RecipeError(
            f"a model of type '{config.model_type}' does not recognise speech",
            f"choose one of {', '.join([*OF_FRAMES][:6])}, whisper, speech_to_text, ...",
        )
    if config.model_type not in OF_FRAMES:
        check_decoder(config)
    return config.model_type in OF_FRAMES


_OF_SOUNDS = {"dia", "pop2piano"}
"""Listed by transformers with those that write, but what they write is sound."""


def check_decoder(config: Any) -> None:
    """Refuse, before there are weights, what is prompted as a chat."""
    from transformers import AutoModelForSpeechSeq2Seq

    found = AutoModelForSpeechSeq2Seq._model_mapping[type(config)]
    cls: Any = found[0] if isinstance(found, tuple) else found
    if not config.is_encoder_decoder or "decoder_input_ids" not in inspect.signature(cls.forward).parameters:
        raise RecipeError(
            f"{cls.__name__} does not write what it hears by a decoder of its own",
            "choose whisper, speech_to_text or moonshine, or a model of frames such as wav2vec2",
        )


def parted(ref: Any) -> tuple[Any, Any]:
    """The reference as the tokenizer's loader needs it, and as the feature extractor's."""
    given = ref.processor_overrides or {}
    own = {name: value for name, value in given.items() if name in OF_TOKENIZER}
    rest = {name: value for name, value in given.items() if name not in OF_TOKENIZER}
    return tuple(Model(**{**ref.given, "processor_overrides": part or None}) for part in (own, rest))  # type: ignore


def load_frames(ref: Any, texts: list[str]) -> Loaded:
    """A CTC model. Where there is no head yet, its vocabulary is of the characters of the training texts."""
    from transformers import AutoModelForCTC

    of_tokenizer, of_extractor = parted(ref)
    trained = ref.path is not None and (
        loading.is_adapter(ref) or loading.has_head(AutoModelForCTC, loading.config_of(ref))
    )
    if trained or ref.processor:
        tokenizer = loading.load_tokenizer(of_tokenizer)
    else:
        tokenizer = character_tokenizer(texts, **(of_tokenizer.processor_overrides or {}))
    fields = {} if trained else {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    loaded = loading.load_model(AutoModelForCTC, ref, None, **fields)
    config: Any = loaded.model.config
    if tokenizer.pad_token_id != config.pad_token_id or len(tokenizer) > config.vocab_size:
        raise RecipeError(
            f"the tokenizer has {len(tokenizer)} tokens with {tokenizer.pad_token_id} for no sound, the model "
            f"{config.vocab_size} with {config.pad_token_id}",
            "give the model its own tokenizer (model.processor)",
        )
    extractor = audio.load_extractor(of_extractor, config)
    loaded.processor = Heard.of(loaded.model, extractor, tokenizer, None)
    return loaded


def character_tokenizer(texts: Iterable[str], word_delimiter_token: str = "|", **given: Any) -> Any:
    """A tokenizer of the characters of the texts; its padding token stands for no sound (the blank)."""
    from transformers import Wav2Vec2CTCTokenizer

    found = sorted({character for text in texts for character in text} - {" "})
    if word_delimiter_token in found:
        raise RecipeError(
            f"the texts have the character '{word_delimiter_token}', which stands for blanks between words",
            "leave it out (task.remove), or set model.processor_overrides.word_delimiter_token",
        )
    names = ["<pad>", "<unk>", word_delimiter_token, *found]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
        special = {"bos_token": None, "eos_token": None, "word_delimiter_token": word_delimiter_token}
        return Wav2Vec2CTCTokenizer(str(path), **{**special, **given})


def load_decoder(ref: Any, texts: list[str], num_beams: int) -> Loaded:
    """A model of an encoder and a decoder; a fresh one has a tokenizer trained on the texts."""
    from transformers import AutoModelForSpeechSeq2Seq

    of_tokenizer, of_extractor = parted(ref)
    fresh = ref.path is None
    tokenizer, fields = loading.load_tokenizer(of_tokenizer, texts, causal=True), {}
    if fresh:
        if ref.config == "whisper" and not ref.processor:
            tokenizer = whisper_tokenizer(tokenizer)
        start = tokenizer.convert_tokens_to_ids(_START) if _START in tokenizer.get_vocab() else tokenizer.pad_token_id
        wanted = {"decoder_start_token_id": start, "suppress_tokens": None, "begin_suppress_tokens": None}
        fields = {**writing.fresh_fields(ref, tokenizer), **loading.unset_fields(ref, wanted)}
    loaded = loading.load_model(AutoModelForSpeechSeq2Seq, ref, None, **fields)
    model: Any = loading.unwrap(loaded.model)
    if fresh:
        writing.start_fresh(model, tokenizer)
        if _QUIET in tokenizer.get_vocab():
            model.generation_config.no_timestamps_token_id = tokenizer.convert_tokens_to_ids(_QUIET)
            model.generation_config.is_multilingual = False
    if model.generation_config.num_beams is None:  # else transformers' pipeline would take 5
        model.generation_config.num_beams = num_beams
    longest = writing.positions(model)
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        if fresh:  # transformers' pipeline writes 256 tokens where nothing else is said
            model.generation_config.max_length = longest
    writing.check_model(loaded, tokenizer, fresh)
    extractor = audio.load_extractor(of_extractor, model.config)
    loaded.processor = Heard.of(model, extractor, tokenizer, writing.start_of(model))
    return loaded


_START, _QUIET = "<|startoftranscript|>", "<|notimestamps|>"
"""Whisper's tokens before every text."""


def whisper_tokenizer(trained: Any) -> Any:
    """A tokenizer of our own as Whisper's class: its pipeline and its `generate` need what the class knows. One
    language, no times."""
    from transformers import WhisperTokenizer

    state = json.loads(trained.backend_tokenizer.to_str())["model"]
    found = WhisperTokenizer(
        vocab={name: number for name, number in state["vocab"].items()},
        merges=[tuple(pair) for pair in state["merges"]],
        pad_token="<|endoftext|>",
        model_max_length=trained.model_max_length,
    )
    found.add_tokens([_START, _QUIET], special_tokens=True)
    found.set_prefix_tokens()  # which it had to do without these
    return found


def check_vocabulary(heard: Heard, texts: Iterable[str]) -> None:
    """Say which characters of the training texts the model has no token for; refuse where that is most of them."""
    if not heard.ctc:
        return
    counts = Counter(character for text in texts for character in text if character != " ")
    tokenizer = heard.tokenizer
    lacking = [c for c in counts if tokenizer.unk_token_id in tokenizer(c)["input_ids"]]
    share = sum(counts[c] for c in lacking) / max(sum(counts.values()), 1)
    listed = " ".join(sorted(lacking)[:20])
    if share > 0.5:
        raise RecipeError(
            f"the model has no tokens for {share:.0%} of the characters of the training texts ({listed})",
            "set task.case to upper or lower, or start from a checkpoint without a vocabulary",
        )
    if lacking:
        logger.warning(
            "the model has no tokens for %.2g %% of the characters of the training texts: %s; task.remove leaves them "
            "out",
            100 * share,
            listed,
        )
