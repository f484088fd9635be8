"""Low-rank adapters by peft."""

from __future__ import annotations

import logging
import warnings
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from kt_hf import Strategy, loading
from kt_hf.errors import RecipeError, nearest

logger = logging.getLogger(__name__)


class Lora(Strategy):
    """Trains low-rank adapters on frozen weights; the head is trained in full.

    target_modules: names or suffixes as in peft; by default every linear layer of the backbone, or its convolutions
    where it has none. modules_to_save: trained in full beside the adapters; by default the task's head. config: any
    other field of peft's `LoraConfig` (use_rslora, use_dora, rank_pattern, ...). save: `merged` into the weights, or
    as an `adapter`.
    """

    paper = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685"

    def __init__(
        self,
        *,
        r: Annotated[int, Field(gt=0)] = 8,
        lora_alpha: Annotated[float, Field(gt=0)] = 16,
        lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        target_modules: list[str] | str | None = None,
        modules_to_save: list[str] | None = None,
        config: dict[str, Any] | None = None,
        save: Literal["merged", "adapter"] = "merged",
    ):
        super().__init__()
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.target_modules, self.modules_to_save, self.config, self.save = (
            target_modules,
            modules_to_save,
            config or {},
            save,
        )
        self.matched: list[str] = []

    def describe(self) -> str:
        where = f" on {_summary(self.matched)}" if self.matched else ""
        return f"adapters of rank {self.r}{where}; saved {'as an adapter' if self.save == 'adapter' else 'merged'}"

    def setup(self, model: nn.Module, run: Any) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        head = run.task.head(model)
        targets = self.target_modules or _default_targets(model, head)
        given = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": targets,
        }
        unknown = set(self.config) - set(LoraConfig.__dataclass_fields__)
        if unknown:
            raise RecipeError(
                f"lora.config.{min(unknown)}: peft's LoraConfig has no such field",
                nearest(min(unknown), LoraConfig.__dataclass_fields__),
            )
        keep = self.modules_to_save if self.modules_to_save is not None else head
        try:
            revision = run.loaded.origin.get("revision")  # of the base, where it came from the Hub
            config = LoraConfig(**{**given, "modules_to_save": keep or None, "revision": revision, **self.config})
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft sets it right by itself
                adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        except ValueError as error:
            linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
            raise RecipeError(
                f"lora: {' '.join(str(error).split())[:200]}",
                nearest(str(targets), {n.rpartition(".")[2] for n in linear}),
            ) from error
        self.matched = sorted(
            {
                n.rpartition(".lora_A")[0].removeprefix("base_model.model.")
                for n, _ in adapted.named_parameters()
                if ".lora_A" in n
            }
        )
        if not self.matched:
            raise RecipeError(
                f"lora.target_modules: {targets} matched nothing", "name linear or convolution layers of the model"
            )
        logger.info("lora: %s", self.describe())
        return adapted

    def export(self, model: nn.Module) -> nn.Module:
        return model if self.save == "adapter" else loading.merged(model)


def _default_targets(model: nn.Module, head: list[str]) -> list[str]:
    """Names of the linear layers outside of the head; of the convolutions where there are none."""
    # PyTorch's own attention reads the weights of its projection directly: an adapter there would have no effect.
    without = [*head, *(n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))]
    outside = [(n, m) for n, m in model.named_modules() if not any(n == h or n.startswith(f"{h}.") for h in without)]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for kind in (nn.Linear, nn.Conv2d):
        names = [n for n, m in outside if isinstance(m, kind) and m is not output and getattr(m, "groups", 1) == 1]
        if names:
            return names
    names = [n for n, m in outside if type(m).__name__ == "Conv1D"]  # transformers' name for GPT-2's linear layer
    if not names:
        raise RecipeError("lora: the backbone has no linear layer and no convolution", "name lora.target_modules")
    return names


def _summary(names: list[str]) -> str:
    kinds: dict[str, int] = {}
    for name in names:
        last = name.rpartition(".")[2]
        kinds[last] = kinds.get(last, 0) + 1
    return f"{len(names)} layers ({', '.join(f'{n} {k}' for k, n in kinds.items())})"
