"""Weights, gradients and optimizer state sharded over the processes: FSDP2, as accelerate's launch configurations ask
for it, and its checkpoints.

`fully_shard` is called here with the settings of accelerate's plugin, and not through `accelerator.prepare`: that wants
an optimizer from before the sharding, finds no layers inside of a bundle, and on CPUs leaves FSDP out silently. So what
two processes on a CPU test is what runs on GPUs.

The bundle is sharded as one: each transformer layer (of the model and of copies that strategies keep) is a group of its
own, the rest belongs to the bundle. Parameters without dimensions cannot be sharded; they stay whole on every process
and their gradients are averaged (`average_whole`).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from kt_hf import checkpoint
from kt_hf.bundle import Bundle
from kt_hf.errors import IntegrityError, KtError, RecipeError, ResourceError
from kt_hf.recipe import Training
from kt_hf.strategy import Strategy

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

OFFSETS = "DCP_SHARDING_INFO"
"""Key under which torch's distributed checkpoint keeps, in a safetensors file, where its tensors begin in the whole."""


def is_slice(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a process' part of a sharded one: a DTensor, of which importing takes a third of a second."""
    return hasattr(tensor, "to_local")


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of a weight that may be shown as slices of its flattened self."""
    return getattr(tensor, "whole_shape", tensor.shape)


# --- what a launch configuration asks for


def requested() -> str | None:
    """What the launcher asks for, if anything. On CPUs accelerate itself does not look at that."""
    for name in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            return name
    return None


def check_installed() -> None:
    """Before accelerate looks for the library. Raises `RecipeError`."""
    if requested() == "DeepSpeed" and find_spec("deepspeed") is None:
        raise RecipeError(
            "the launch configuration asks for DeepSpeed, which is not installed",
            "pip install 'kt_hf[deepspeed]', or use FSDP 2: recipes/accelerate/fsdp2.yaml",
        )


def check(accelerator: Any, training: Training) -> partial[Sharded] | None:
    """What shards the bundle, where the launch asks for it; `RecipeError` for settings that nobody has tried.

    None for one process without a process group: there is nothing to shard.
    """
    if requested() != "FSDP" or accelerator.distributed_type == DistributedType.NO:
        return None
    on_gpus = accelerator.distributed_type == DistributedType.FSDP
    plugin = accelerator.state.fsdp_plugin if on_gpus else FullyShardedDataParallelPlugin()
    wanted = {
        "fsdp_version": (plugin.fsdp_version != 2, "set fsdp_version: 2"),
        "fsdp_offload_params": (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy", "set it to false"),
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "set it to false: every rank loads"),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, "use training.gradient_checkpointing=true"),
        "fsdp_auto_wrap_policy": (
            getattr(plugin.auto_wrap_policy, "__name__", "") == "size_based_auto_wrap_policy",
            "use TRANSFORMER_BASED_WRAP or NO_WRAP",
        ),
        "mixed_precision": (accelerator.mixed_precision != "no", "set it to no, and training.bf16=true"),
    }
    for name, (refused, remedy) in wanted.items():
        if refused:
            raise RecipeError(f"the launch configuration's {name} is not supported with FSDP", remedy)
    check_training(training, "training")
    return partial(Sharded, plugin)


def check_training(training: Training, where: str) -> None:
    """Settings that sharded training does not do."""
    wanted = {
        "fp16": (training.fp16, "use training.bf16=true"),
        "torch_compile": (training.torch_compile, "leave it out"),
        "channels_last": (training.channels_last, "leave it out"),
        "optim=adafactor": (training.optim == "adafactor", "use adamw_torch_fused: factored moments do not shard"),
    }
    for name, (refused, remedy) in wanted.items():
        if refused:
            raise RecipeError(f"{where}: {name} and {requested()} exclude each other so far", remedy)


def check_stack(strategies: Mapping[str, Strategy], training: Training, where: str) -> None:
    """Refuse, before any weight is loaded, what sharded training does not do."""
    kind = requested()
    if kind is None:
        return
    check_training(training, where)
    for name, strategy in strategies.items():
        if strategy.backward is not None:
            raise RecipeError(
                f"{where}: '{name}' makes its own gradients, which {kind} shards while they are made",
                f"launch it without {kind}",
            )
        if kind == "DeepSpeed" and strategy.scope == "weights" and type(strategy).loss is not Strategy.loss:
            raise RecipeError(
                f"{where}: the loss of '{name}' is about weights, which DeepSpeed gathers only for the layer at work",
                "use FSDP 2: recipes/accelerate/fsdp2.yaml",
            )


# --- the bundle


class Sharded:
    """A bundle, sharded in place. `whole` turns it back into the plain module that it was."""

    def __init__(self, plugin: FullyShardedDataParallelPlugin, bundle: Bundle, device: torch.device, missing: bool):
        """missing: whether some trained weights may get no gradient on some process."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self.bundle = bundle
        give_copies_their_own(bundle)
        same_everywhere(bundle)
        self._before = Before(bundle)
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
            "ignored_params": {p for p in bundle.parameters() if p.dim() == 0},
        }
        for module in layers(bundle, plugin):
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **settings)
        fully_shard(bundle, **settings)
        if missing:
            if not hasattr(bundle, "set_reduce_scatter_unused_params"):
                raise RecipeError(
                    "the loss does not reach some trained weights, which FSDP of this torch cannot follow",
                    "freeze them, or use torch 2.15",
                )
            bundle.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
        self.parts = [module for module in bundle.modules() if isinstance(module, FSDPModule)]
        self._before.close()
        self.wrapped = bundle

    def collect(self, parameters: list[nn.Parameter]) -> None:
        """After the last backward of a window: see that all gradients are averaged."""
        average_whole(parameters)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients stay whole and on their process until the last micro-batch of a window."""
        self.bundle.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            self.bundle.set_requires_gradient_sync(True)  # type: ignore[operator]

    def reshard(self) -> None:
        """Let go of weights that an evaluation has gathered; no backward comes to do so."""
        for part in self.parts:
            part.reshard()

    def whole(self) -> None:
        """Gather every parameter on every process and take FSDP out of the modules."""
        self.reshard()
        full: dict[int, nn.Parameter] = {}
        for module in self.bundle.modules():
            for name, parameter in module._parameters.items():
                if is_slice(parameter):
                    if id(parameter) not in full:  # tied weights stay tied
                        full[id(parameter)] = nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad)
                    module._parameters[name] = full[id(parameter)]
        self._before.restore()


def same_everywhere(bundle: Bundle) -> None:
    """A process takes its slice of what it has itself: all must have the same."""
    with torch.no_grad():
        for tensor in (*bundle.parameters(), *bundle.buffers()):
            dist.broadcast(tensor, 0)


class Before:
    """Classes, attributes and hooks of modules before somebody shards them. `close` once that is done."""

    def __init__(self, bundle: Bundle):
        self._found = {module: (type(module), set(vars(module)), _hooks(module)) for module in bundle.modules()}

    def close(self) -> None:
        self._added = {module: set(vars(module)) - names for module, (_, names, _) in self._found.items()}

    def restore(self) -> None:
        for module, (kind, _, hooks) in self._found.items():
            module.__class__ = kind
            for name in self._added[module]:
                vars(module).pop(name, None)
            vars(module).update(hooks)


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {name: copy(value) for name, value in vars(module).items() if name.endswith(("_hooks", "_with_kwargs"))}


def layers(bundle: Bundle, plugin: FullyShardedDataParallelPlugin) -> list[nn.Module]:
    """The modules that get a group of their own: layers that the configuration or the models themselves name."""
    if plugin.auto_wrap_policy is None:
        return []
    names = set(plugin.transformer_cls_names_to_wrap or [])
    if not names:
        for module in bundle.modules():
            names |= set(getattr(module, "_no_split_modules", None) or [])
    found = [module for module in bundle.modules() if type(module).__name__ in names]
    missing = set(plugin.transformer_cls_names_to_wrap or []) - {type(module).__name__ for module in found}
    if missing:
        raise RecipeError(
            f"fsdp_transformer_layer_cls_to_wrap: the model has no {min(missing)}", "leave it out, or name its layers"
        )
    inside = {child for module in found for child in module.modules() if child is not module}
    places = _places(bundle)  # a parameter has one group: embeddings tied to a head outside stay with the bundle
    return [m for m in found if m not in inside and all(places[p] == n for p, n in _places(m).items())]


def _places(module: nn.Module) -> Counter[int]:
    """In how many places each parameter, by its id, is used."""
    return Counter(id(p) for child in module.modules() for p in child._parameters.values() if p is not None)


def give_copies_their_own(bundle: Bundle) -> None:
    """FSDP wants every parameter in one group: a copy of the model that shares its frozen weights gets its own."""
    shared = {id(p) for p in bundle.model.parameters()}
    own: dict[int, nn.Parameter] = {}
    for module in bundle.strategies.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in shared:
                if id(parameter) not in own:
                    own[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = own[id(parameter)]


# --- the update


def average_whole(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that are not sharded."""
    for parameter in parameters:
        if not is_slice(parameter):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient / dist.get_world_size()


def total_norm(gradients: list[torch.Tensor], foreach: bool = True) -> torch.Tensor:
    """2-norm over gradients of which some are sharded, equal on every process."""
    kinds: list[list[torch.Tensor]] = [
        [g for g in gradients if is_slice(g)],
        [g for g in gradients if not is_slice(g)],
    ]
    norms = [torch.nn.utils.get_total_norm(kind, foreach=foreach) for kind in kinds if kind]
    found = [norm.full_tensor() if is_slice(norm) else norm for norm in norms]
    return torch.stack(found).norm() if len(found) > 1 else found[0] if found else torch.zeros(())


def clip(parameters: list[nn.Parameter], max_norm: float, norm: torch.Tensor, foreach: bool = True) -> None:
    """Sharded gradients apart from whole ones: torch does not take both in one call."""
    for sharded in (True, False):
        kind = [p for p in parameters if is_slice(p) == sharded]
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm, foreach=foreach)


# --- checkpoints


def own_part(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What this process writes: its slices of the sharded tensors, and on the first process those that are whole.
    With the metadata of the file, by which torch's `HuggingFaceStorageReader` puts the slices together."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    found: dict[str, torch.Tensor] = {}
    offsets: dict[str, Any] = {}
    for name, tensor in tensors.items():
        offset: tuple[int, ...] = (0,) * tensor.dim()
        if is_slice(tensor):
            _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            if not tensor.to_local().numel() and tensor.numel():
                continue
            tensor = tensor.to_local()
        elif dist.get_rank() > 0:
            continue
        found[name], offsets[name] = tensor, {"saved_offsets": list(offset)}
    return found, {OFFSETS: json.dumps(offsets)}


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    facts: dict[str, Any],
    keep: int,
    protect: Collection[str],
    about: dict[str, Any],
    device: torch.device,
) -> None:
    """`checkpoint.save` with a file of each process, on a disk that all of them see. All fail if one does."""
    staged, rank, world = checkpoint.staging(folder, step), dist.get_rank(), dist.get_world_size()
    names = [f"shard-{i + 1:05d}-of-{world:05d}.safetensors" for i in range(world)]
    with together(folder, device):
        if rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
    try:
        with together(folder, device):
            mine = checkpoint.write(staged / names[rank], checkpoint.tensor_chunks(*own_part(tensors)))
        files = dict(zip(names, exchange(mine, device), strict=True))
        with together(folder, device):
            if rank == 0:
                checkpoint.publish(staged, step, files, facts, keep, protect, about)
    except (KtError, OSError):
        if rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
        raise


def exchange(mine: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Hash and size of the file of every process, sent as bytes."""
    sent = bytearray(bytes.fromhex(mine["sha256"]) + mine["size"].to_bytes(8, "big"))
    digest = torch.frombuffer(sent, dtype=torch.uint8).to(device)
    digests = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(digests, digest)
    return [
        {"sha256": d[:32].hex(), "size": int.from_bytes(d[32:], "big")} for d in (bytes(d.tolist()) for d in digests)
    ]


@contextmanager
def together(folder: Path, device: torch.device) -> Iterator[None]:
    """Where one process fails to write, all raise, and none waits for it."""
    failure: Exception | None = None
    try:
        with checkpoint.disk(folder):
            yield
    except (KtError, OSError) as error:
        failure = error
    failed = torch.tensor(failure is not None, dtype=torch.int32, device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if failed:
        raise ResourceError(
            f"another process could not write its part of the checkpoint in {folder}",
            "see its message; nothing that was saved is lost",
        )


def reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))


def is_sharded(folder: Path) -> bool:
    return not (folder / "state.safetensors").is_file()


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The whole tensors that the files of a checkpoint hold together, without their content."""
    found: dict[str, torch.Tensor] = {}
    for name, entry in reader(folder).read_metadata().state_dict_metadata.items():
        found[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise IntegrityError(f"{folder}: a part of {name} is in none of its files", "use another checkpoint")
    return found


def load_into(folder: Path, tensors: dict[str, torch.Tensor]) -> set[str]:
    """Copy saved tensors into existing ones, each process its own slices, whatever number of processes has written
    them. Nothing is touched before all names and shapes are known to fit. Returns the other names in the files."""
    known = saved(folder)
    missing = [name for name in tensors if name not in known]
    if missing:
        raise IntegrityError(
            f"{folder} lacks {missing[0]} ({len(missing)} tensors)",
            "the recipe has changed; use --overwrite to start anew",
        )
    for name, tensor in tensors.items():
        if not fits(known[name].shape, tensor.shape):
            raise IntegrityError(
                f"{folder}: {name} is {tuple(known[name].shape)}, the model has {tuple(tensor.shape)}",
                "use --overwrite to start anew",
            )
    same = {name: tensor.detach() for name, tensor in tensors.items() if known[name].shape == tensor.shape}
    _read(folder, same)
    for name in [name for name in tensors if name not in same]:  # one after the other, since each is read whole
        whole = torch.empty_like(known[name], device="cpu")
        _read(folder, {name: whole})
        copy_own(whole.reshape(tensors[name].shape), tensors[name])
    return set(known) - set(tensors)


def _read(folder: Path, tensors: dict[str, Any]) -> None:
    from torch.distributed import checkpoint as dcp

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        dcp.load(tensors, storage_reader=reader(folder), no_dist=True)


def fits(saved: torch.Size, ours: torch.Size) -> bool:
    """Whether a saved tensor is one of ours: of its shape, or one of them flattened, as ZeRO-3 keeps weights."""
    return saved == ours or (saved.numel() == ours.numel() and min(len(saved), len(ours)) == 1)


def copy_own(whole: torch.Tensor, tensor: Any) -> None:
    """Copy into a tensor, or into this process' slice of it, what belongs there."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    with torch.no_grad():
        if not is_slice(tensor):
            tensor.copy_(whole)
            return
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        own = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
        tensor.to_local().copy_(whole[own])


def like_parameters(
    folder: Path, names: Iterable[str], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Read the optimizer's entries `optim/<parameter>/<key>`, each sharded as its parameter where it has its shape."""
    known = saved(folder)
    found: dict[str, torch.Tensor] = {}
    for name in names:
        parameter = parameters[name.removeprefix("optim/").rpartition("/")[0]]
        same = fits(known[name].shape, parameter.shape)
        found[name] = torch.empty_like(parameter) if same else torch.empty_like(known[name], device="cpu")
    load_into(folder, found)
    return found
