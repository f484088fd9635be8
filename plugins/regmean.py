"""RegMean: linear layers merged by regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from kt_hf import MergeMethod
from kt_hf.errors import RecipeError
from kt_hf.functional.averaging import weighted_mean
from kt_hf.functional.measured import gram_of_rows, regression_mean


class RegMean(MergeMethod):
    """Each linear layer becomes the one whose outputs are nearest to those of all parents, each on the inputs that it
    had itself on training rows; all other weights become their mean.

    Needs no labels. Rows are run one by one, so that nothing is padded to the longest, and positions that
    `attention_mask` leaves out do not count. Measured are the inner products of a layer's inputs, which take I x I
    numbers for I inputs: more than the layer itself where it has more inputs than outputs. Weights that are tied to
    others become their mean. A parent that comes from a stage is asked on that stage's data.

    examples: rows that are looked at. alpha: what the inner products of different inputs are multiplied by; 0 goes by
    the size of each input alone, 1 is the exact regression, and may have no solution.
    """

    paper = "Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv:2212.09849"
    measures_on = "train"

    def __init__(
        self,
        *,
        examples: Annotated[int, Field(ge=1)] = 256,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.9,
    ):
        self.examples, self.alpha = examples, alpha

    def measured_by(self) -> dict[str, Any]:
        return {"examples": self.examples}

    def measure(self, parent: Any, run: Any) -> dict[str, torch.Tensor]:
        """Gram matrices II of the inputs, or 1II for layers that keep their weights as IO."""
        layers = _linear_layers(parent.model)
        grams = {name: torch.zeros(_inputs(m), _inputs(m), device=parent.device) for name, m in layers.items()}
        mask: list[torch.Tensor | None] = [None]
        hooks = [
            m.register_forward_pre_hook(_adding(grams[name], mask), with_kwargs=True) for name, m in layers.items()
        ]
        try:
            with torch.no_grad():
                for batch in parent.sample("train", self.examples):
                    mask[0] = batch.get("attention_mask")
                    parent.forward(batch)
        finally:
            for hook in hooks:
                hook.remove()
        grams = dict(zip(grams, parent.sum(list(grams.values())), strict=True))
        used = {name: gram for name, gram in grams.items() if bool(gram.diagonal().any())}
        if not used:
            raise RecipeError(
                f"'{parent.label}' has no linear layer that its rows go through", "take uniform_soup or fisher"
            )
        return {f"{name}.weight": g if isinstance(layers[name], nn.Linear) else g[None] for name, g in used.items()}

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        grams = stats or [None]
        if any(gram is None for gram in grams):
            return weighted_mean(tensors_M, [1.0] * len(tensors_M))
        turned = grams[0].dim() == 3
        weights_MOI = [t.T for t in tensors_M] if turned else tensors_M
        try:
            merged_OI = regression_mean(weights_MOI, [g[0] if turned else g for g in grams], self.alpha)
        except torch.linalg.LinAlgError as error:
            raise RecipeError(
                f"regmean: the inputs of {name} depend on each other, so that alpha={self.alpha} has no solution",
                "lower alpha, or look at more examples",
            ) from error
        return merged_OI.T.contiguous() if turned else merged_OI


def _linear_layers(model: nn.Module) -> dict[str, Any]:
    """Linear layers and GPT-2's, which are the same turned round, but for those whose weight another module shares."""
    from transformers.pytorch_utils import Conv1D

    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return {name: m for name, m in found.items() if owners[id(m.weight)] == 1}


def _inputs(layer: Any) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]


def _adding(gram_II: torch.Tensor, mask: list[torch.Tensor | None]) -> Callable[..., None]:
    """A hook that adds the inner products of a layer's inputs."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given, mask_BL = args[0] if args else next(iter(kwargs.values())), mask[0]
        if mask_BL is not None and given.dim() == 3 and mask_BL.shape == given.shape[:2]:
            given = given[mask_BL.bool()]
        gram_II.add_(gram_of_rows(given.detach().reshape(-1, given.shape[-1])))

    return hook
