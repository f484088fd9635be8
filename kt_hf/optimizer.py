"""Optimizers, learning-rate schedules as functions of the step, and parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kt_hf import sharding
from kt_hf.errors import RecipeError, nearest
from kt_hf.recipe import Training
from kt_hf.strategy import Strategy

Scale = float | Callable[[float], float]


def schedule(training: Training, planned_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at a step, by transformers' name. Pure: no state, nothing to save."""
    from transformers import SchedulerType, get_scheduler

    warmup = training.warmup_steps or math.ceil(training.warmup_ratio * planned_steps)
    known = [s.value for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy")]
    if training.lr_scheduler_type not in known:
        raise RecipeError(
            f"training.lr_scheduler_type: got '{training.lr_scheduler_type}'",
            nearest(training.lr_scheduler_type, known),
        )
    # Some schedules end in an absolute rate: the carrier must have the run's.
    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base_rate(training))
    try:
        made = get_scheduler(
            training.lr_scheduler_type,
            carrier,
            warmup,
            max(planned_steps, 1),
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training.lr_scheduler_kwargs: {error}", "see transformers.get_scheduler") from error
    return made.lr_lambdas[0]


def base_rate(training: Training) -> float:
    """The learning rate before schedule and scales; the first of several that are to be tried; 1 where a test is still
    to find it."""
    rate = training.learning_rate
    if rate == "auto":
        return 1.0
    return rate[0] if isinstance(rate, list) else rate


def named_trainable(bundle: nn.Module) -> dict[str, nn.Parameter]:
    """Every trainable parameter once, by the name it has in the bundle."""
    return {name: p for name, p in bundle.named_parameters() if p.requires_grad}


def groups(bundle: nn.Module, strategies: dict[str, Strategy], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: one for each combination of weight decay and learning-rate scales. Vectors are not decayed."""
    found: dict[Any, dict[str, Any]] = {}
    for name, parameter in named_trainable(bundle).items():
        own = name.removeprefix("model.")
        factor, functions = 1.0, []
        for strategy in strategies.values():
            scale = strategy.lr_scale(own)
            if callable(scale):
                functions.append(scale)
            else:
                factor *= scale
        decay = weight_decay if len(sharding.whole_shape(parameter)) > 1 else 0.0
        key = (factor, tuple(functions), decay, sharding.is_slice(parameter))  # sharded ones do not mix with others
        group = found.setdefault(
            key, {"params": [], "names": [], "weight_decay": decay, "factor": factor, "functions": functions}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(found.values())


def scale_at(group: dict[str, Any], progress: float) -> float:
    """Product of a group's learning-rate scales."""
    factor = group["factor"]
    for function in group["functions"]:
        factor *= function(progress)
    return factor


def build(training: Training, groups_: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """The optimizer by transformers' name."""
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optim in ("adamw_torch", "adamw_torch_fused"):
        fused = training.optim == "adamw_torch_fused"
        return torch.optim.AdamW(groups_, lr=lr, betas=betas, eps=training.adam_epsilon, fused=fused)
    if training.optim == "sgd":
        return torch.optim.SGD(groups_, lr=lr, momentum=training.momentum, fused=True)
    from transformers import Adafactor

    return Adafactor(groups_, lr=lr, scale_parameter=False, relative_step=False)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it leaves out an update by itself where `found_inf` says so."""
    return all(group.get("fused") for group in optimizer.param_groups)


def channels_last(batch: dict[str, Any]) -> dict[str, Any]:
    """Images with their channels last in memory, which convolutions prefer on most devices."""
    return {
        key: value.contiguous(memory_format=torch.channels_last)
        if isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()
        else value
        for key, value in batch.items()
    }


def state_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors: `<parameter>/<key>`. Plain numbers become zero-dimensional tensors."""
    found = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value is None:
                continue
            found[f"{names[id(parameter)]}/{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return found


def restore_state(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, torch.Tensor], device: torch.device
) -> None:
    """The reverse of `state_tensors`."""
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        by_parameter.setdefault(parameter, {})[key] = tensor
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            saved = by_parameter.get(names[id(parameter)], {})
            for key, tensor in saved.items():
                optimizer.state[parameter][key] = _restored(optimizer, group, key, tensor, parameter.device)


def _restored(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], key: str, tensor: torch.Tensor, device: torch.device
) -> Any:
    """A saved entry as the optimizer keeps it: counters are numbers (Adafactor) or live on the CPU (unless fused)."""
    if key == "step":
        if type(optimizer).__name__ == "Adafactor":
            return tensor.item()
        return tensor.to(device) if group.get("fused") or group.get("capturable") else tensor
    return tensor.to(device)
