"""What would wait for a GPU, found on the CPU: operations whose result has to be known before the next one can be
started, such as a number that Python asks for, or a shape that depends on contents (`x[mask]`).

Seen are torch's own operations, one by one. What an operator from elsewhere does inside is not seen, so it counts as
one that waits.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_ON_CONTENTS = {
    aten._local_scalar_dense: "a number for Python",
    aten.equal: "a number for Python",
    aten.multinomial: "looks whether its chances are sound",
    aten._linalg_check_errors: "looks whether a matrix was sound",
    aten._ctc_loss: "takes lengths on the host",
    aten._cudnn_ctc_loss: "takes lengths on the host",
}
"""Operations that wait without a tag that says so, and why."""
_LEAVES = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}
"""Methods that leave the device, which on the CPU reach no operation."""
_FILLS = {torch.tensor, torch.as_tensor, torch.asarray}
"""Functions that copy numbers of Python's to the device that they are given; `torch.full` fills them in there."""
_FAMILIES = {"aten", "prims", "prim", "profiler"}


@dataclass(frozen=True)
class Wait:
    """An operation that waits, and the line outside of torch from which it was asked for."""

    name: str
    where: str

    def __str__(self) -> str:
        return f"{self.name} ({self.where})"


@dataclass
class Watch:
    """found: what waits. in_model: what waits inside of the watched models' own forward, which does not count."""

    found: list[Wait] = field(default_factory=list)
    in_model: list[Wait] = field(default_factory=list)
    depth: int = 0

    def note(self, name: str) -> None:
        wait = Wait(name, _where(bool(self.depth)))
        known = self.in_model if self.depth else self.found
        if wait not in known:
            known.append(wait)


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation would wait for a GPU on which its tensors are."""
    packet = func.overloadpacket
    if packet in _INDEXING:  # by numbers the shape is known
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet is aten._to_copy and kwargs.get("device") is not None:
        return torch.device(kwargs["device"]) != args[0].device
    return func.namespace not in _FAMILIES or packet in _ON_CONTENTS or bool(_TAGS & set(func.tags))


class _Operations(TorchDispatchMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args, kwargs or {}):
            self.watch.note(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = func in _LEAVES or (func is torch.Tensor.to and "cpu" in (*args[1:], kwargs.get("device")))
        fills = func in _FILLS and kwargs.get("device") is not None and not isinstance(args[0], torch.Tensor)
        if leaves or fills or func is torch.Tensor.new_tensor:
            self.watch.note(func.__name__)
        return func(*args, **kwargs)


@contextmanager
def watching(*models: nn.Module) -> Iterator[Watch]:
    """What waits within, apart from the forward of these models and their parts."""
    watch = Watch()

    def enter(*_: Any) -> None:
        watch.depth += 1

    def leave(*_: Any) -> None:
        watch.depth -= 1

    with ExitStack() as stack:
        for module in {module for model in models for module in model.modules()}:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(_Methods(watch))
        stack.enter_context(_Operations(watch))
        yield watch


def _where(in_model: bool) -> str:
    """The line that asked; within a model the innermost one outside of torch."""
    torch_folder, own = str(Path(torch.__file__).parent), __file__
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != own and not frame.filename.startswith((torch_folder, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "?"
