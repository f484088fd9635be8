"""Contrastive training of dual encoders: CLIP's and SigLIP's losses, negatives from all processes, locked towers.

Shapes: B rows of this process, N rows of all processes, D width of the shared space.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from kt_hf import Strategy, loading
from kt_hf.errors import NotMeaningful, RecipeError
from kt_hf.functional import losses

_FRESH_SCALE = {"clip": math.log(1 / 0.07), "siglip": math.log(10)}
_FRESH_BIAS = -10.0


class Contrastive(Strategy):
    """Pulls an image and its text together, and apart from all others of the global batch.

    loss: `clip`, a softmax over the batch in both directions, or `siglip`, a sigmoid for every pair. lock_image,
    lock_text: train only the other tower and the projections; unlocked_layers: the last layers of a locked tower that
    are trained all the same. alpha: weight of this loss, where the task has one of its own, which keeps 1 - alpha.
    max_logit_scale: the factor on cosine similarities is kept below it (`clip` alone; 0 for no limit). Scale and bias
    of a fresh model start at the papers' values, those of a checkpoint are kept. A model without a place for SigLIP's
    bias is trained with one of the strategy's own, which is not exported: it shifts all logits alike.
    """

    paper = (
        "Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, arXiv:2103.00020; "
        "Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343; "
        "Zhai et al. 2022, LiT: Zero-Shot Transfer with Locked-image text Tuning, arXiv:2111.07991"
    )
    scope = "batch"
    adds_objective = True

    def __init__(
        self,
        *,
        loss: Literal["clip", "siglip"] = "clip",
        lock_image: bool = False,
        lock_text: bool = False,
        unlocked_layers: Annotated[int, Field(ge=0)] = 0,
        alpha: Annotated[float, Field(gt=0, le=1)] = 1.0,
        max_logit_scale: Annotated[float, Field(ge=0)] = 100.0,
    ):
        super().__init__()
        self.kind, self.unlocked_layers, self.max_logit_scale = loss, unlocked_layers, max_logit_scale
        self.locked = [tower for tower, lock in (("image", lock_image), ("text", lock_text)) if lock]
        self.alpha, self.rank, self.world = alpha, 0, 1

    def describe(self) -> str:
        name = {"clip": "CLIP", "siglip": "SigLIP"}[self.kind]
        locked = f"; {' and '.join(self.locked)} tower locked" if self.locked else ""
        but = f" but for {self.unlocked_layers} layers" if self.locked and self.unlocked_layers else ""
        return f"{name} loss over the global batch{locked}{but}"

    def task_weight(self, progress: float) -> float:
        return 1.0 - self.alpha

    # --- surgery ---

    def setup(self, model: nn.Module, run: Any) -> nn.Module:
        inner = loading.unwrap(model)
        if not hasattr(run.task, "towers") or not hasattr(inner, "logit_scale"):
            raise NotMeaningful(
                "contrastive: this model has no image and text towers",
                "use the task zero-shot-image-classification or image-text-matching",
            )
        self.rank, self.world = run.rank, run.world
        locked = self._locked_names(model, run.task)
        for name, parameter in model.named_parameters():
            if name in locked:
                parameter.requires_grad_(False)
        self._start(inner, run.loaded.new_parameters)
        return model

    def _locked_names(self, model: nn.Module, task: Any) -> set[str]:
        towers = task.towers(model) if self.locked else {}
        names: set[str] = set()
        for tower in self.locked:
            layers = towers.get(tower) or []
            if not layers:
                raise RecipeError(
                    f"contrastive.lock_{tower}: no {tower} tower was found in {type(model).__name__}",
                    "freeze it by pattern: finetune.freeze",
                )
            if self.unlocked_layers >= len(layers):
                raise RecipeError(
                    f"contrastive.unlocked_layers: got {self.unlocked_layers}, the {tower} tower has {len(layers)}",
                    f"give fewer, or lock_{tower}=false",
                )
            names |= {name for layer in layers[: len(layers) - self.unlocked_layers] for name in layer}
        return names

    def _start(self, inner: Any, new: list[str]) -> None:
        """Initial scale and bias. A bias that the model has no use for, or no place for, is kept out of it."""
        if "logit_scale" in new:
            inner.logit_scale.data.fill_(_FRESH_SCALE[self.kind])
        bias = getattr(inner, "logit_bias", None)
        if self.kind == "clip":
            if (
                bias is not None
            ):  # a softmax does not see it, but an adaptive optimizer would move it on rounding errors
                bias.requires_grad_(False)
        elif bias is not None:
            if "logit_bias" in new:
                bias.data.fill_(_FRESH_BIAS)
        elif hasattr(inner, "logit_bias"):  # a place for one: it is exported with the model
            inner.logit_bias = nn.Parameter(torch.full_like(inner.logit_scale.data, _FRESH_BIAS))
        else:
            self.logit_bias = nn.Parameter(torch.tensor(_FRESH_BIAS))

    def ready(self, model: nn.Module, run: Any) -> None:
        locked = self._locked_names(model, run.task)
        moved = [name for name, p in model.named_parameters() if name in locked and p.requires_grad]
        if moved:
            raise RecipeError(
                f"contrastive: a later strategy trains the locked tower again ({moved[0]})",
                "name 'contrastive' after it",
            )

    # --- training ---

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        outputs = step.outputs
        if outputs.image_embeds is None or outputs.text_embeds is None:
            raise RecipeError(
                "contrastive: the training batch has no images or no texts",
                "name the columns: data.columns.image, data.columns.text",
            )
        bias = outputs.logit_bias if outputs.logit_bias is not None else getattr(self, "logit_bias", None)
        with torch.autocast(outputs.image_embeds.device.type, enabled=False):
            value = self._whole(step, outputs, bias) if self.world == 1 else self._share(step, outputs, bias)
        return {self.kind: self.alpha * value, "logit_scale": step.once(outputs.logit_scale.detach())}

    def _whole(self, step: Any, outputs: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """One process has all rows: open_clip's losses as they are."""
        try:
            from open_clip.loss import ClipLoss, SigLipLoss
        except ImportError:  # benchmarks/gpu_check.py does without
            return self._share(step, outputs, bias)
        if self.kind == "clip":
            return step.once(ClipLoss()(outputs.image_embeds, outputs.text_embeds, outputs.logit_scale))
        return step.once(SigLipLoss()(outputs.image_embeds, outputs.text_embeds, outputs.logit_scale, bias))

    def _share(self, step: Any, outputs: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """Several processes: each takes its own rows against those of all, B x N instead of N x N logits.

        open_clip's classes do this only for equally many rows everywhere, which the last batch may not have. The
        gradient of the whole is exact: `gather` brings back what other processes' rows owe to the rows of this one.
        """
        image, text = outputs.image_embeds, outputs.text_embeds
        ranks_N = step.gather(torch.full((len(image),), self.rank, device=image.device))
        offset = (ranks_N < self.rank).sum()
        rows = losses.clip_rows if self.kind == "clip" else losses.siglip_rows
        return step.mean(rows(image, text, step.gather(image), step.gather(text), outputs.logit_scale, bias, offset))

    def after_step(self, model: nn.Module, progress: float) -> None:
        """CLIP's limit, on the parameter itself: what is exported is what was trained, and it keeps its gradient."""
        scale: Any = loading.unwrap(model).logit_scale
        if self.kind == "clip" and self.max_logit_scale and scale.requires_grad:
            with torch.no_grad():
                scale.clamp_(max=math.log(self.max_logit_scale))
