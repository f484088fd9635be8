"""Weights, gradients and optimizer state sharded over the processes by DeepSpeed's ZeRO-3, as accelerate's launch
configurations ask for it. The same interface as `sharding.Sharded`, whose checkpoints and arithmetic it uses.

DeepSpeed gathers weights for the forward and the backward and scatters the gradients; the update stays the trainer's.
A process holds of each weight a slice of the flattened whole. From the end of a backward to the next forward, the
bundle shows these slices as DTensors of one dimension, so that the optimizer, strategies and checkpoints see what they
see under FSDP2. DeepSpeed's own optimizer never makes a step, and its own checkpoints, which are pickled, are not used.

`deepspeed.initialize` is called here with the settings of accelerate's plugin, and not through `accelerator.prepare`:
that takes one model in the life of a process, and on CPUs leaves DeepSpeed out silently.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import nn

from kt_hf import sharding
from kt_hf.bundle import Bundle
from kt_hf.errors import RecipeError
from kt_hf.recipe import Training

TUNING = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "overlap_comm",
    "contiguous_gradients",
    "sub_group_size",
    "round_robin_gradients",
)
"""Settings of a launch configuration's `zero_optimization` that change how fast it is, not what is computed."""
UNUSED = (
    "stage",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "offload_optimizer",
    "offload_param",
)
"""Those that have been looked at, or that say how DeepSpeed would save."""


# --- what a launch configuration asks for


def check(accelerator: Any, training: Training) -> partial[Zero3] | None:
    """What shards the bundle, where the launch asks for it; `RecipeError` for settings that nobody has tried."""
    if sharding.requested() != "DeepSpeed" or accelerator.distributed_type == DistributedType.NO:
        return None
    from accelerate.utils import DeepSpeedPlugin

    on_gpus = accelerator.distributed_type == DistributedType.DEEPSPEED
    plugin = accelerator.state.deepspeed_plugin if on_gpus else DeepSpeedPlugin()
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    unknown = sorted(set(zero) - {*TUNING, *UNUSED})
    precise = any(str(config.get(k, {}).get("enabled", False)).lower() == "true" for k in ("fp16", "bf16", "amp"))
    wanted = {
        "zero_stage": (zero.get("stage") != 3, "set it to 3"),
        "zero3_init_flag": (plugin.zero3_init_flag, "set it to false: every rank loads"),
        "offload_optimizer_device": (_device(zero, "offload_optimizer") != "none", "set it to none"),
        "offload_param_device": (_device(zero, "offload_param") != "none", "set it to none"),
        "mixed_precision": (accelerator.mixed_precision != "no" or precise, "set it to no, and training.bf16=true"),
        "gradient_clipping": (
            config.get("gradient_clipping", "auto") not in ("auto", 0.0),
            "use training.max_grad_norm",
        ),
        "gradient_accumulation_steps": (
            config.get("gradient_accumulation_steps", "auto") not in ("auto", 1),
            "use training.gradient_accumulation_steps",
        ),
        "optimizer": ("optimizer" in config, "use training.optim"),
        "scheduler": ("scheduler" in config, "use training.lr_scheduler_type"),
        f"zero_optimization.{''.join(unknown[:1])}": (bool(unknown), f"leave it out; tried are {', '.join(TUNING)}"),
    }
    for name, (refused, remedy) in wanted.items():
        if refused:
            raise RecipeError(f"the launch configuration's {name} is not supported with DeepSpeed", remedy)
    sharding.check_training(training, "training")
    return partial(Zero3, {key: value for key, value in zero.items() if key in TUNING and value != "auto"})


def load_whole(accelerator: Any) -> None:
    """Undo what accelerate tells transformers whatever `zero3_init_flag` says: to shard models while they load."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _device(zero: dict[str, Any], key: str) -> str:
    return str((zero.get(key) or {}).get("device", "none"))


def library(device: torch.device) -> Any:
    """DeepSpeed, which takes two seconds to import and says what it looks for."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
    if device.type == "cpu":  # it would compile an exchange for inference, for which it first tries every compiler
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    # torch renames what DeepSpeed calls in every step
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


# --- the bundle


class Zero3:
    """A bundle, sharded in place. `whole` turns it back into the plain module that it was."""

    def __init__(self, tuning: dict[str, Any], bundle: Bundle, device: torch.device, missing: bool):
        """missing: whether some trained weights may get no gradient on some process."""
        from torch.distributed.device_mesh import init_device_mesh

        deepspeed = library(device)
        self.bundle, self.missing = bundle, missing
        sharding.same_everywhere(bundle)
        self._before = sharding.Before(bundle)
        owned = [(m, name, p) for m in bundle.modules() for name, p in m._parameters.items() if p is not None]
        self._scalars = [owner for owner in owned if not owner[2].dim()]  # DeepSpeed fails on them: it sees none
        self._theirs = [owner for owner in owned if owner[2].dim()]
        self._hide(True)
        unique = {id(p): p for _, _, p in self._theirs}.values()
        trained = [p for p in unique if p.requires_grad]
        if not trained:
            raise RecipeError("ZeRO-3 has nothing to shard: only single numbers are trained", "launch it without")
        # its buffers for gradients are not to be larger than all of them
        bucket = {"reduce_bucket_size": min(5 * 10**8, sum(p.numel() for p in trained))}
        zero = {**bucket, **tuning, "stage": 3, "memory_efficient_linear": False}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
        self.engine = deepspeed.initialize(model=bundle, optimizer=torch.optim.SGD(trained, lr=0.0), config=config)[0]
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._parts: dict[int, Any] = {id(p): part_of(p, mesh) for p in unique}
        self._trained = [(p, self._parts[id(p)]) for p in trained]
        self._reached: set[int] = set()
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: self._reached.add(id(p)))
        self._window = ExitStack()
        self._before.close()
        self._at_work = True
        self.reshard()

    def wrapped(self, mode: str, *args: Any, **kwargs: Any) -> Any:
        """The bundle's forward, with DeepSpeed's weights in it until `collect` or `reshard`."""
        self._hide(True)
        if not self._at_work:
            self._at_work = True
            for module, name, parameter in self._theirs:
                module._parameters[name] = parameter
        if self.missing and mode == "loss":
            self._keep_whole()
        return self.engine(mode, *args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients stay whole and on their process until `collect`."""
        self._keep_whole()
        yield

    def _keep_whole(self) -> None:
        if not self.engine.inside_no_sync_ctxt:
            self._window.enter_context(self.engine.coalesce_grad_reduction())

    def collect(self, parameters: list[nn.Parameter]) -> None:
        """After the last backward of a window: put the averaged gradients on the slices that the bundle shows."""
        from deepspeed.utils import safe_get_local_grad

        reached = self._agree() if self.missing else self._reached
        if not self.missing and len(reached) < len(self._trained):
            raise RecipeError(
                "the loss stopped reaching some trained weights in mid-run, which ZeRO-3 cannot follow",
                "let the term fade with a factor instead",
            )
        self._window.close()
        for parameter, part in self._trained:
            if id(parameter) in reached:
                part.grad = as_part(safe_get_local_grad(parameter), part)
        self.engine.optimizer.zero_grad()
        self._reached = set()
        self.reshard()
        sharding.average_whole(parameters)

    def _agree(self) -> set[int]:
        """Weights that the loss reached on some process; those where it did not give a gradient of zeros."""
        from deepspeed.runtime.zero import GatheredParameters

        device = self._trained[0][1].device
        reached = torch.tensor([id(p) in self._reached for p, _ in self._trained], dtype=torch.int32, device=device)
        dist.all_reduce(reached)
        some = [p for (p, _), n in zip(self._trained, reached.tolist(), strict=True) if n]
        partly = [p for (p, _), n in zip(self._trained, reached.tolist(), strict=True) if 0 < n < dist.get_world_size()]
        with GatheredParameters(partly):  # a gradient must have the shape of its weight
            for parameter in partly:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return {id(p) for p in some}

    def reshard(self) -> None:
        """Let go of what was gathered, and show the slices."""
        if not self._at_work:
            return
        self._at_work = False
        self.engine.optimizer.empty_partition_cache()  # the engine's own also collects garbage, 1 s a step
        self._hide(False)
        for module, name, parameter in self._theirs:
            module._parameters[name] = self._parts[id(parameter)]

    def whole(self) -> None:
        """Gather every parameter on every process and take DeepSpeed out of the modules."""
        from deepspeed.runtime.zero import parameter_offload

        self.reshard()
        self.engine.destroy()
        full = {
            key: nn.Parameter(part.full_tensor().detach().reshape(part.whole_shape), part.requires_grad)
            for key, part in self._parts.items()
        }
        for module, name, parameter in self._theirs:
            module._parameters[name] = full[id(parameter)]
        for module in self.bundle.modules():
            module._parameters = dict(module._parameters)
            for name in [n for n in vars(module) if n.startswith(("ds_", "applied_pre_backward"))]:  # of the hooks
                del vars(module)[name]
        self._before.restore()
        stack = parameter_offload.FWD_MODULE_STACK  # it would keep the model
        stack[:] = [module for module in stack if module is not self.bundle]

    def _hide(self, hidden: bool) -> None:
        """Keep single numbers out of DeepSpeed's sight: plain attributes of their modules, found by the same name."""
        for module, name, parameter in self._scalars:
            if hidden:
                module._parameters.pop(name, None)
                vars(module)[name] = parameter
            else:
                vars(module).pop(name, None)
                module._parameters[name] = parameter


def part_of(parameter: Any, mesh: Any) -> nn.Parameter:
    """This process' slice of a weight, as DeepSpeed keeps it but for the padding."""
    from torch.distributed.tensor import DTensor, Shard

    size, n = parameter.ds_tensor.numel(), parameter.ds_numel
    own = parameter.ds_tensor.data[: max(0, min(size, n - size * dist.get_rank()))]
    whole = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size([n]), stride=(1,))
    part = nn.Parameter(whole, parameter.requires_grad)
    part.whole_shape = torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]
    return part


def as_part(local: torch.Tensor, part: Any) -> Any:
    """A flat local tensor, with padding or not, sharded as a part is."""
    from torch.distributed.tensor import DTensor

    own = local.reshape(-1)[: part.to_local().numel()]
    return DTensor.from_local(
        own, part.device_mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
    )
