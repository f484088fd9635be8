"""open_clip's models: loaded from, and saved as, `open_clip_config.json` and `open_clip_model.safetensors`."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kt_hf import loading
from kt_hf.errors import IntegrityError, RecipeError, nearest
from kt_hf.recipe import Model
from kt_hf.task import Loaded

logger = logging.getLogger(__name__)

_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_OPEN_CLIP_NAMES = (_OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors")
_OPEN_CLIP_FILES = ("*.json", "*.txt", "*.model", *_OPEN_CLIP_NAMES)


def names_open_clip(ref: Model) -> bool:
    """Whether a reference is to an open_clip model: a folder with its config, `hf-hub:ID`, or `open_clip:NAME`."""
    if ref.path is not None:
        return str(ref.path).startswith("hf-hub:") or (Path(ref.path) / _OPEN_CLIP_CONFIG).is_file()
    return str(ref.config).startswith("open_clip:")


def load_open_clip(ref: Model) -> Loaded:
    """An open_clip model with its own preprocessing and tokenizer. Weights come from safetensors alone."""
    if ref.dtype not in ("float32", "auto"):
        raise RecipeError(
            f"model.dtype: got {ref.dtype} for a model of open_clip", "it is trained in float32; training.bf16=true"
        )
    if ref.path is None:
        return _fresh_open_clip(ref)
    if ref.config_overrides:
        raise RecipeError(
            "model.config_overrides: a checkpoint of open_clip is taken as it is", "they are for fresh models"
        )
    remote = str(ref.path).startswith("hf-hub:")
    folder = _download_open_clip(ref) if remote else Path(ref.path)
    origin = {"path": str(ref.path), "revision": folder.name if remote else None}
    described = _read_open_clip(folder / _OPEN_CLIP_CONFIG)
    weights = next((folder / name for name in _OPEN_CLIP_NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise IntegrityError(
            f"{ref.path} has no safetensors weights of open_clip",
            f"kt_hf unpickles nothing; convert them to {_OPEN_CLIP_WEIGHTS}",
        )
    return _build_open_clip(folder, described, origin, weights)


def _download_open_clip(ref: Model) -> Path:
    from huggingface_hub import snapshot_download

    with loading.loading(f"model '{ref.path}'"):
        return Path(
            snapshot_download(
                str(ref.path).removeprefix("hf-hub:"), revision=ref.revision, allow_patterns=list(_OPEN_CLIP_FILES)
            )
        )


def _read_open_clip(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise IntegrityError(
            f"{path} cannot be read ({type(error).__name__})", "make or fetch this model again"
        ) from error
    described = described if "model_cfg" in described else {"model_cfg": described}
    if "trust_remote_code" in json.dumps(described):  # its tokenizer's settings go to from_pretrained as they are
        raise IntegrityError(
            f"{path} asks to run code of its own (trust_remote_code)", "kt_hf does not run remote code"
        )
    return {"preprocess_cfg": {}, **described}


def _fresh_open_clip(ref: Model) -> Loaded:
    """A fresh model: one of open_clip's configurations, or a file of one, with `config_overrides` merged into it."""
    import open_clip

    name = str(ref.config).removeprefix("open_clip:")
    if Path(name).exists():
        described = _read_open_clip(Path(name) / _OPEN_CLIP_CONFIG if Path(name).is_dir() else Path(name))
    else:
        found = open_clip.get_model_config(name) if name in open_clip.list_models() else None
        if found is None:
            raise RecipeError(f"model.config: open_clip has no model '{name}'", nearest(name, open_clip.list_models()))
        described = {"model_cfg": found, "preprocess_cfg": {}}
    described["model_cfg"] = _merged(described["model_cfg"], ref.config_overrides or {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / _OPEN_CLIP_CONFIG).write_text(json.dumps(described))
        wanted = described["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
        if wanted:  # open_clip takes a folder's tokenizer from that folder
            loading.load_tokenizer(Model(processor=ref.processor or wanted)).save_pretrained(folder)
        loaded = _build_open_clip(folder, described, {"config": ref.config}, None)
    loaded.new_parameters = [n for n, _ in loaded.model.named_parameters()]
    return loaded


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {
        **base,
        **{
            k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
            for k, v in changes.items()
        },
    }


def _build_open_clip(folder: Path, described: dict[str, Any], origin: dict[str, Any], weights: Path | None) -> Loaded:
    import open_clip

    what = f"open_clip model '{origin.get('path') or origin.get('config')}'"
    with loading.loading(what), _quiet():
        # open_clip's own choice of a weights file may be a pickle: build without weights, then give it ours
        options: dict[str, Any] = {"pretrained_image": False, "pretrained_text": False}
        model = open_clip.create_model(
            f"local-dir:{folder}", load_weights=False, device=torch.get_default_device(), **options
        )
        if weights is not None:
            open_clip.load_checkpoint(model, str(weights), strict=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    freeze_unused(model)
    processor = OpenClipProcessor(tokenizer, dict(model.visual.preprocess_cfg), described["model_cfg"])
    return Loaded(model, processor, origin=origin, kind="open_clip")


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip speaks through the root logger, and installs a handler there if it finds none."""
    silent, before = logging.NullHandler(), logging.root.manager.disable
    logging.root.addHandler(silent)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(silent)


class OpenClipProcessor:
    """Images and texts to an open_clip model's inputs: its own preprocessing for evaluation, and its own tokenizer.

    Texts are padded to the model's context length, which is the only length it takes.
    """

    def __init__(self, tokenizer: Any, preprocess: dict[str, Any], config: dict[str, Any]):
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.tokenizer, self.preprocess, self.config = tokenizer, preprocess, config
        self.transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)

    def images(self, images: list[Any]) -> dict[str, Any]:
        return {"pixel_values": torch.stack([self.transform(image) for image in images])}

    def texts(self, texts: list[str], max_length: int) -> dict[str, Any]:
        return {"input_ids": list(self.tokenizer(texts))}

    def pad(self, tokens: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack(values) for name, values in tokens.items()}

    def signature(self) -> dict[str, Any]:
        inner = getattr(self.tokenizer, "tokenizer", None)
        vocabulary = (
            loading.tokenizer_signature(inner)
            if inner is not None
            else {"vocabulary": f"{type(self.tokenizer).__name__} {self.tokenizer.vocab_size}"}
        )
        plain = json.loads(json.dumps(self.preprocess))  # a saved configuration has lists where a fresh one has tuples
        return {**vocabulary, "normalisation": plain, "padded_to": self.tokenizer.context_length}

    def save_pretrained(self, folder: Path) -> None:
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)


def save_open_clip(loaded: Loaded, folder: Path) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads."""
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    model: Any = loaded.model
    config = copy.deepcopy(loaded.processor.config)
    if getattr(model, "logit_bias", None) is not None:
        config["init_logit_bias"] = (
            config.get("init_logit_bias") or -10.0
        )  # says that there is one; its value is in the weights
    folder.mkdir(parents=True, exist_ok=True)
    save_config_for_hf(model, folder / _OPEN_CLIP_CONFIG, model_config=config)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()},
        folder / _OPEN_CLIP_WEIGHTS,
        metadata={"format": "pt"},
    )
    loaded.processor.save_pretrained(folder)


def freeze_unused(model: nn.Module) -> None:
    """Weights that no embedding depends on would wait for a gradient that never comes."""
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token") or name.startswith("text_decoder."):
            parameter.requires_grad_(False)
