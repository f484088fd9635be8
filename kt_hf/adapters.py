"""LoRA adapters as files: what one means, module by module, and how one is written.

An adapter adds scaling * B A to the weight of each module that it names, and holds some tensors in full, such as a
head. Names here are those of the model's tensors and modules, without peft's prefix. What changes a model in another
way is refused by name.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kt_hf import checkpoint
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.tensor_files import opened

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB])"
    r"|lora_B\.(?P<bias>bias)|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_NEUTRAL = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "bias", "fan_in_fan_out", "use_dora", "layers_pattern"),
    *("layers_to_transform", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config"),
    *("init_lora_weights", "velora_config", "target_modules_to_tie", "modules_to_tie"),
}
"""Fields of `LoraConfig` that are read here, or that do not change what an adapter means once it is trained."""
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights as they are."""


@dataclass
class Pair:
    """What an adapter holds of one module: scaling * B A, and where it has them, an addition to the bias and the
    magnitudes of DoRA. a: (R, I, kernel...); b: (O, R, 1...)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    embedding: bool = False
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as linear layers and convolutions hold it: outputs, inputs, kernel."""
        return (self.b.shape[0], *self.a.shape[1:])

    def matrices(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """B_OR and A_RI without the scaling; a convolution's kernel counts among the inputs."""
        return self.b.to(dtype).reshape(self.b.shape[:2]), self.a.to(dtype).reshape(self.rank, -1)

    def delta(self, dtype: torch.dtype) -> torch.Tensor:
        """scaling * B A in the shape of the weight; an embedding's is (words, width)."""
        b_OR, a_RI = self.matrices(dtype)
        return as_weight(b_OR * self.scaling @ a_RI, self.shape, self.embedding)


def as_weight(delta_OI: torch.Tensor, shape: tuple[int, ...], embedding: bool) -> torch.Tensor:
    """As the module holds its weight."""
    return delta_OI.T.contiguous() if embedding else delta_OI.reshape(shape)


def as_matrix(weight: torch.Tensor, embedding: bool) -> torch.Tensor:
    """As a matrix of outputs by inputs."""
    return weight.T if embedding else weight.flatten(1)


@dataclass
class Adapter:
    """An adapter's folder. full: tensors that it holds in full, by the name that they have in the model; bases: copies
    of weights that it adds to, which peft stores beside adapters of embeddings."""

    label: str
    folder: Path
    config: dict[str, Any]
    pairs: dict[str, Pair] = field(default_factory=dict)
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    bases: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def open_adapter(folder: Path, label: str) -> Adapter:
    """Read an adapter; its tensors are mapped for reading. Raises `RecipeError` for what is not LoRA as it is meant
    here."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{folder / CONFIG} cannot be read ({type(error).__name__})", "fetch it again") from error
    _refuse(config, label)
    if not (folder / WEIGHTS).is_file():
        raise IntegrityError(f"{folder} has no {WEIGHTS}", "adapters are read from safetensors alone")
    adapter = Adapter(label, folder, config)
    parts: dict[str, dict[str, Any]] = {}
    for key, tensor in opened(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        found = _FACTOR.fullmatch(name)
        if found:
            side = found["side"] or found["embedding"] or ("bias" if found["bias"] else "magnitude")
            part = parts.setdefault(found["module"], {})
            part[side], part["embedding"] = tensor, part.get("embedding") or bool(found["embedding"])
        elif re.search(r"\.(lora_|token_adapter\.)|original_module|modules_to_save\.", name):
            raise RecipeError(f"adapter '{label}': {name} is no part of LoRA that can be merged", _REMEDY)
        else:
            adapter.full[name] = tensor
    for module, part in parts.items():
        adapter.pairs[module] = _pair(adapter, module, part)
    for name in list(adapter.full):
        module, _, rest = name.partition(".base_layer.")
        if not rest:
            continue
        if module not in adapter.pairs or rest not in ("weight", "bias"):
            raise RecipeError(f"adapter '{label}': {name} is no part of LoRA that can be merged", _REMEDY)
        (adapter.bases if rest == "weight" else adapter.full)[f"{module}.{rest}"] = adapter.full.pop(name)
    return adapter


_REMEDY = "merge it into its base with peft's `merge_and_unload`, and use that model"


def _refuse(config: dict[str, Any], label: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RecipeError(f"adapter '{label}' is of the type {kind}; LORA is what can be merged", _REMEDY)
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise RecipeError(
            f"adapter '{label}' began as init_lora_weights={start}, which may have changed the base's weights, too",
            "convert it: save it by peft with path_initial_model_for_weight_conversion",
        )
    odd = sorted(key for key, value in config.items() if value and key not in _NEUTRAL)
    if odd:
        raise RecipeError(f"adapter '{label}' uses {', '.join(odd)}, which is more than a low-rank addition", _REMEDY)


def _pair(adapter: Adapter, module: str, part: dict[str, Any]) -> Pair:
    if "A" not in part or "B" not in part:
        raise IntegrityError(f"adapter '{adapter.label}' has one factor of {module} alone", "fetch or make it again")
    a, b = part["A"], part["B"]
    if ".base_layer." in f"{module}." or a.dim() < 2 or b.dim() < 2:
        raise RecipeError(f"adapter '{adapter.label}': {module} is no layer that can be merged", _REMEDY)
    if b.shape[1] != a.shape[0]:
        raise RecipeError(f"adapter '{adapter.label}': {module} is a convolution in groups", _REMEDY)
    if part["embedding"] and "magnitude" in part:
        raise RecipeError(f"adapter '{adapter.label}': {module} is an embedding with DoRA", _REMEDY)
    return Pair(
        a, b, scaling(adapter.config, module, a.shape[0]), part["embedding"], part.get("bias"), part.get("magnitude")
    )


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A is multiplied by, as peft reads its patterns: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Source: Hu et al. 2021, section 4.1 (arXiv:2106.09685); Kalajdzievski 2023, equation (7) (arXiv:2312.03732).
    """
    said = _by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if said != rank:
        raise IntegrityError(
            f"{module} is of rank {rank}, and the adapter's configuration says {said}",
            "fetch it again",
        )
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# --- writing ---------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path, config: Mapping[str, Any], pairs: Mapping[str, Pair], full: Mapping[str, torch.Tensor]
) -> int:
    """Write what peft loads: every module by its full name, with a scaling of 1. Returns the bytes of the tensors.

    config: what else is to be said of it, such as `base_model_name_or_path`. full: as in `Adapter`; a copy of an
    adapted module's weight, too.
    """
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in pairs.items():
        key = f"{PREFIX}{module}.lora_embedding_" if pair.embedding else f"{PREFIX}{module}.lora_"
        end = "" if pair.embedding else ".weight"
        tensors |= {f"{key}A{end}": pair.a, f"{key}B{end}": pair.b}
        if pair.bias is not None:
            tensors[f"{key}B.bias"] = pair.bias
    for name, tensor in full.items():
        module, _, last = name.rpartition(".")
        tensors[f"{PREFIX}{module}.base_layer.{last}" if module in pairs else f"{PREFIX}{name}"] = tensor
    ranks = [pair.rank for pair in pairs.values()]
    common = max(set(ranks), key=lambda rank: (ranks.count(rank), rank))
    # peft looks for the pattern at the end of a module's name: anchored, it means that module alone.
    other = {f"^{re.escape(module)}": pair.rank for module, pair in pairs.items() if pair.rank != common}
    said = {
        "peft_type": "LORA",
        "inference_mode": True,
        "bias": "none",
        **config,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(pairs),
        "lora_bias": any(pair.bias is not None for pair in pairs.values()),
    }
    checkpoint.write_json(folder / CONFIG, said)
    checkpoint.write(folder / WEIGHTS, checkpoint.tensor_chunks(tensors, {"format": "pt"}))
    return sum(t.numel() * t.element_size() for t in tensors.values())


def ranks_of(pairs: Mapping[str, Pair]) -> str:
    """In words: `rank 8`, or `ranks 3 to 17, median 9`."""
    ranks = sorted(pair.rank for pair in pairs.values())
    if ranks[0] == ranks[-1]:
        return f"rank {ranks[0]}"
    return f"ranks {ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}"
