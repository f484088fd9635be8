"""Full or partial fine-tuning: what is trained, and how fast each layer."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from kt_hf import Strategy
from kt_hf.errors import RecipeError, nearest


class Finetune(Strategy):
    """Trains the model's own weights: all, without some, or the head alone.

    freeze: parameter-name patterns (`*embeddings*`) that are not trained. freeze_layers: so many layers from the input,
    embeddings being the first. linear_probe: train the head alone. layer_decay: the rate of a layer is that of the
    layer above times this factor (ULMFiT; Howard & Ruder 2018). head_scale: factor on the head's rate.
    """

    paper = "Howard & Ruder 2018, Universal Language Model Fine-tuning, arXiv:1801.06146 (layer-wise rates)"

    def __init__(
        self,
        *,
        freeze: list[str] | None = None,
        freeze_layers: Annotated[int, Field(ge=0)] = 0,
        linear_probe: bool = False,
        layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0,
        head_scale: Annotated[float, Field(ge=0)] = 1.0,
    ):
        super().__init__()
        self.freeze, self.freeze_layers, self.linear_probe = freeze or [], freeze_layers, linear_probe
        self.layer_decay, self.head_scale = layer_decay, head_scale
        self._scales: dict[str, float] = {}

    def describe(self) -> str:
        if self.linear_probe:
            return "trains the head alone"
        parts = [f"freezes {', '.join(self.freeze)}"] if self.freeze else []
        parts += [f"freezes the lowest {self.freeze_layers} layers"] if self.freeze_layers else []
        parts += [f"layer decay {self.layer_decay}"] if self.layer_decay < 1 else []
        return "trains all weights" if not parts else "; ".join(parts)

    def setup(self, model: nn.Module, run: Any) -> nn.Module:
        frozen = self._frozen_names(model, run.task)
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
        return model

    def _frozen_names(self, model: nn.Module, task: Any) -> set[str]:
        names = [name for name, _ in model.named_parameters()]
        frozen: set[str] = set()
        for pattern in self.freeze:
            matched = {n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")}
            if not matched:
                raise RecipeError(f"finetune.freeze: '{pattern}' matches no parameter", nearest(pattern, names))
            frozen |= matched
        if self.freeze_layers:
            layers = task.layers(model)
            if self.freeze_layers > len(layers):
                raise RecipeError(
                    f"finetune.freeze_layers: got {self.freeze_layers}, the backbone has {len(layers)}",
                    "freeze fewer, or use linear_probe",
                )
            frozen |= {name for layer in layers[: self.freeze_layers] for name in layer}
        if self.linear_probe:
            head = tuple(f"{module}." for module in task.head(model))
            if not head:
                raise RecipeError(
                    "finetune.linear_probe: this model has no head apart from its backbone", "freeze by pattern instead"
                )
            frozen |= {name for name in names if not name.startswith(head)}
        return frozen

    def ready(self, model: nn.Module, run: Any) -> None:
        if self.layer_decay < 1:
            layers = run.task.layers(model)
            self._scales = {n: self.layer_decay ** (len(layers) - i) for i, layer in enumerate(layers) for n in layer}
        if self.head_scale != 1:
            head = tuple(f"{module}." for module in run.task.head(model))
            self._scales.update({n: self.head_scale for n, _ in model.named_parameters() if n.startswith(head)})

    def lr_scale(self, name: str) -> float:
        return self._scales.get(name, 1.0)
