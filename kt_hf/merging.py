"""The merge engine: parents are safetensors checkpoints; tensors are read memory-mapped, merged one by one and written.

Shapes: M parents.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from kt_hf import checkpoint
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.functional.averaging import weighted_mean
from kt_hf.merge import MergeMethod

logger = logging.getLogger(__name__)

_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")
_INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
"""What a parent's folder may hold beside: it would be taken for weights of the merged model."""


def weight_files(folder: Path) -> dict[str, Path]:
    """tensor name -> file of a model directory. Raises `IntegrityError` for missing, empty or torn files."""
    if (folder / "adapter_config.json").exists():
        raise RecipeError(f"{folder} holds an adapter", "merge stages take full models: export LoRA as `save: merged`")
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text())["weight_map"]
        files = {name: folder / file for name, file in names.items()}
        for file in set(names.values()):
            if Path(file).is_absolute() or ".." in Path(file).parts or not (folder / file).is_file():
                raise IntegrityError(f"{folder}: the index names the shard '{file}'", "the checkpoint is incomplete")
        return files
    for candidate in _WEIGHTS:
        path = folder / candidate
        if path.is_file():
            try:
                with safe_open(str(path), framework="pt") as opened:
                    return dict.fromkeys(opened.keys(), path)
            except Exception as error:
                raise IntegrityError(
                    f"{path} is no intact safetensors file: {error}", "make or fetch this model again"
                ) from error
    raise IntegrityError(f"{folder} has no safetensors weights", f"expected {_WEIGHTS[0]} or {_INDEX}")


class Parents:
    """The parents' tensors, memory-mapped. Checked on opening: same names and shapes, all finite when asked."""

    def __init__(self, folders: Sequence[Path], names: Sequence[str]):
        self.folders, self.labels = list(folders), list(names)
        self.files = [weight_files(folder) for folder in folders]
        first = set(self.files[0])
        for label, files in zip(names, self.files, strict=True):
            if set(files) != first:
                odd = sorted(set(files) ^ first)
                raise RecipeError(
                    f"'{names[0]}' and '{label}' differ in {len(odd)} tensors: {', '.join(odd[:5])}",
                    "merge models of one architecture",
                )
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Parents:
        for path in {p for files in self.files for p in files.values()}:
            self._open[path] = self._stack.enter_context(safe_open(str(path), framework="pt"))
        for name in self.files[0]:
            shapes = [self._open[files[name]].get_slice(name).get_shape() for files in self.files]
            for label, shape in zip(self.labels, shapes, strict=True):
                if shape != shapes[0]:
                    raise RecipeError(
                        f"{name} is {shapes[0]} in '{self.labels[0]}' and {shape} in '{label}'",
                        "merge models of one shape, with the same labels and vocabulary",
                    )
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return list(self.files[0])

    def tensors(self, name: str) -> list[torch.Tensor]:
        return [self._open[files[name]].get_tensor(name) for files in self.files]

    def check_finite(self) -> None:
        for name in self.names():
            for label, tensor in zip(self.labels, self.tensors(name), strict=True):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise IntegrityError(
                        f"parent '{label}' has non-finite values in {name}", "leave it out of the merge"
                    )


class MergeRun:
    """What a merge that searches may ask.

    score: weights_M -> validation metric of the weighted mean of the parents, and of the base where that has a weight.
    higher_is_better: of that metric. evaluate: gets one weight per parent, and one more for the base.
    """

    def __init__(
        self, num_parents: int, names: Sequence[str], higher_is_better: bool, evaluate: Callable[[list[float]], float]
    ):
        self.num_parents, self.names, self.higher_is_better = num_parents, list(names), higher_is_better
        self._evaluate = evaluate
        self.scores: list[dict[str, Any]] = []

    def score(self, weights_M: Sequence[float], base_weight: float = 0.0) -> float:
        weights = [float(w) for w in weights_M] + ([float(base_weight)] if base_weight else [])
        value = self._evaluate(weights)
        self.scores.append({"weights": weights, "score": value})
        return value

    def better(self, a: float, b: float) -> bool:
        """Whether score `a` is at least as good as `b`."""
        return a >= b if self.higher_is_better else a <= b


class WeightedMean(MergeMethod):
    """The weighted mean of the parents, for scoring candidates. Parents of weight 0 are left out exactly."""

    def __init__(self, weights_M: Sequence[float]):
        self.weights_M = weights_M

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        used = [(t, w) for t, w in zip(tensors_M, self.weights_M, strict=True) if w]
        return weighted_mean([t for t, _ in used], [w for _, w in used])


def merge(method: MergeMethod, parents: Parents, base: Parents | None, folder: Path) -> None:
    """Write the merged model directory: the first parent's files with merged weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = set(parents.files[0].values())
    for path in parents.folders[0].iterdir():
        if path.is_file() and path.suffix not in _OTHER_WEIGHTS and path.name not in (_INDEX, "README.md"):
            shutil.copy2(path, folder / path.name)
    target = next(iter(weights)).name if len(weights) == 1 else "model.safetensors"

    merged: dict[str, torch.Tensor] = {}
    for name in parents.names():
        tensors = parents.tensors(name)
        if not tensors[0].is_floating_point():
            merged[name] = tensors[0]
            continue
        base_tensor = base.tensors(name)[0].float() if base is not None else None
        merged[name] = method.tensor(name, [t.float() for t in tensors], base_tensor, None).to(tensors[0].dtype)
    checkpoint.write(folder / target, checkpoint.tensor_chunks(merged, {"format": "pt"}))


def batch_statistics(model: nn.Module) -> list[nn.Module]:
    """Modules that keep running statistics of batches, which weight averaging makes wrong; not those whose statistics
    never move, as in backbones of detectors."""
    kept = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), torch.Tensor)]
    return [m for m in kept if hasattr(m, "reset_running_stats")]


def reestimate(model: nn.Module, run_batches: Callable[[], Iterator[Any]], forward: Callable[[Any], Any]) -> int:
    """Reset batch statistics and estimate them as the mean over training batches. Returns the number of batches.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima", section 3.2 (arXiv:1803.05407).
    """
    modules: list[Any] = batch_statistics(model)
    momenta = [m.momentum for m in modules]
    model.eval()
    for module in modules:
        module.reset_running_stats()
        module.momentum = None  # a plain mean over batches
        module.train()
    count = 0
    with torch.no_grad():
        for batch in run_batches():
            forward(batch)
            count += 1
    for module, momentum in zip(modules, momenta, strict=True):
        module.momentum = momentum
    model.eval()
    return count
