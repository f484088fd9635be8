"""How much memory a training will take, from its model without weights.

One step is played on tensors that have shapes and no content (PyTorch's `FakeTensorMode`, which chooses the kernels of
the device that will be used): setup, forward, backward. What is alive is counted by storage, so that views, tied
weights and what the backward keeps are counted once and temporary tensors count while they live. An estimate it stays:
what kernels take inside, what the allocator keeps, and the libraries themselves are not in it.

Shapes: B rows of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kt_hf import optimizer, registry
from kt_hf import recipe as grammar
from kt_hf.bundle import Bundle, Position
from kt_hf.errors import KtError
from kt_hf.recipe import Train, Training

if TYPE_CHECKING:
    from kt_hf.facts import Run
    from kt_hf.runner import Context
    from kt_hf.skeleton import Sketch
    from kt_hf.task import Batch

logger = logging.getLogger(__name__)

SAMPLE = 256
"""Rows among which the longest are sought."""


@dataclass
class Memory:
    """Bytes of one process. activations: what the backward keeps of a forward; peak: of the whole step, at its height.
    None where that is unknown, `why` says why. shape: the batch, in words."""

    weights: int
    gradients: int
    optimizer: int
    strategies: int | None = None
    frozen: int | None = None
    activations: int | None = None
    peak: int | None = None
    shape: str = ""
    why: str = ""

    def __str__(self) -> str:
        parts: dict[str, int | None] = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer state": self.optimizer,
            "frozen models": self.frozen,
            "of strategies": self.strategies,
            "activations": self.activations,
        }
        shown = ", ".join(f"{name} {size_of(size)}" for name, size in parts.items() if size)
        if self.peak is None:
            return f"memory: {shown}; activations unknown ({self.why})"
        return f"memory: about {size_of(self.peak)} at its height ({shown}; {self.shape})"


def size_of(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def memory(context: Context, stage: Train, sketch: Sketch, batches: dict[str, Batch] | None = None) -> Memory:
    """The estimate for a stage; for given micro-batches by stream, or for the longest of some rows."""
    model, training = sketch.loaded.model, stage.training
    trained = [p for p in model.parameters() if p.requires_grad]
    found = Memory(bytes_of([model]), sum(_size(p) for p in trained), optimizer_bytes(trained, training))
    try:
        batches = batches or longest(context, stage, sketch)
        found.shape = shape_of(batches["train"])
        _play(context, stage, sketch, batches, found)
    except Exception as error:  # some models cannot run without content; that is no fault of the recipe
        found.why = (
            error.cause if isinstance(error, KtError) else f"{type(error).__name__}: {error}".split("\n")[0][:120]
        )
        logger.debug("no estimate of activations for %s", stage.name, exc_info=True)
    return found


def optimizer_bytes(parameters: Iterable[torch.Tensor], training: Training) -> int:
    """Bytes of the optimizer's state by its kind; without counters."""
    total = 0
    for p in parameters:
        if training.optim.startswith("adamw"):
            total += 2 * _size(p)
        elif training.optim == "sgd":
            total += _size(p) if training.momentum else 0
        else:  # Adafactor keeps a mean of rows and one of columns
            *rest, rows, columns = p.shape if p.dim() > 1 else (0, p.numel())
            total += int(np.prod(rest, dtype=np.int64)) * (rows + columns) * p.element_size()
    return total


def shape_of(batch: Batch) -> str:
    """A batch in words: its largest tensor."""
    name, largest = max(_tensors(batch).items(), key=lambda item: item[1].numel())
    return f"{name} {' x '.join(map(str, largest.shape))}"


# --- the batch -------------------------------------------------------------------------------------------------------


def longest(context: Context, stage: Train, sketch: Sketch) -> dict[str, Batch]:
    """A micro-batch by stream: of the longest among some rows where rows have lengths. Not augmented."""
    task, size = sketch.run.task, stage.training.per_device_train_batch_size
    if stage.training.packing:
        raise _Unknown("rows are packed")
    if any(strategy.batches is not None for strategy in sketch.stack.values()):
        raise _Unknown("a strategy makes the batches")
    batches = {"train": _rows(context.info(stage), sketch, size)}
    for strategy in sketch.stack.values():
        for name, stream in strategy.streams().items():
            own = stream.data == "train"
            info = (
                context.info(stage) if own else context.named_info(stream.data, context.recipe.data[stream.data], task)
            )
            count = size if own else max(1, round(size * stream.ratio))
            for key in [name] if stream.views == 1 else [f"{name}.{view}" for view in range(stream.views)]:
                batches[key] = _rows(info, sketch, count)
    return batches


class _Unknown(KtError):
    """Why there is no estimate, in words."""


def _rows(info: Any, sketch: Sketch, size: int) -> Batch:
    task, source = sketch.run.task, info.splits["train"]
    column = task.length_column
    count = min(len(source), max(size, SAMPLE) if column else size)
    raw = source[np.linspace(0, len(source) - 1, count).astype(int)]
    columns = task.preprocess({k: v for k, v in raw.items() if k != "index"}, sketch.loaded, True, None)
    columns["index"] = raw["index"]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if column:
        rows.sort(key=lambda row: -len(row[column]))
    return task.collate(rows[:size], sketch.loaded)


# --- a step without content ------------------------------------------------------------------------------------------


def _play(context: Context, stage: Train, sketch: Sketch, batches: dict[str, Batch], found: Memory) -> None:
    """Play a step, and fill in what it took."""
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    training, run, task = stage.training, sketch.run, sketch.run.task
    device = context.accelerator.device
    counts = {name: {unit: max(int(n), 1) for unit, n in task.units(batch).items()} for name, batch in batches.items()}
    rows = {name: (len(batch["index"]),) for name, batch in batches.items()}
    run._frozen.clear()
    with _quiet(), torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        with unset_fake_temporarily():
            teachers = _teachers(context, stage, run)
        _embody([sketch.loaded.model, *sketch.stack.values(), *teachers], device)
        if training.gradient_checkpointing:
            from kt_hf.trainer import checkpoint_gradients

            checkpoint_gradients(sketch.loaded.model)
        for strategy in sketch.stack.values():
            strategy.ready(sketch.loaded.model, run)
        half = torch.float16 if training.fp16 else torch.bfloat16 if training.bf16 else None
        bundle = Bundle(
            sketch.loaded, task, sketch.stack, training.label_smoothing_factor, training.forward_chunk_size, half
        )
        bundle.train()
        trained = list(optimizer.named_trainable(bundle).values())
        frozen = [member.model for each in run._frozen.values() for member in each.members]
        found.gradients = sum(_size(p) for p in trained)
        found.optimizer = optimizer_bytes(trained, training)
        found.frozen = bytes_of(frozen)
        found.strategies = bytes_of([bundle, *frozen]) - found.weights - found.frozen
        given = {name: _without_content(fake, batch, device) for name, batch in batches.items()}
        extra = {name: batch for name, batch in given.items() if name != "train"}
        micro_batches = min(training.gradient_accumulation_steps, 2)  # with the second one, gradients are there
        resident = [bundle, *frozen]
        with _Live(resident) as live:
            before = live.now
            for i in range(micro_batches):
                position = Position(0, 0.0, i, micro_batches, training.seed, 0, 1, counts, rows)
                terms = bundle("loss", given["train"], extra, position)
                if i == 0:
                    found.activations = live.now - before
                total = torch.stack([t.float() for t in terms.values() if t.requires_grad]).sum()
                total.backward()
                del terms, total
        found.peak = live.peak + found.optimizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Copying a tensor without content warns that it has no address; remarks on models come with the real ones."""
    ours, level = logging.getLogger("kt_hf"), logging.getLogger("kt_hf").level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.setLevel(logging.ERROR)
        try:
            yield
        finally:
            ours.setLevel(level)


def _teachers(context: Context, stage: Train, run: Run) -> list[nn.Module]:
    """The frozen models that strategies name in their settings, without weights."""
    nowhere = SimpleNamespace(device=torch.device("meta"), process_index=0, num_processes=1)
    loading = dataclasses.replace(run, accelerator=nowhere)  # shares what is loaded
    with torch.device("meta"):
        for item in stage.strategies:
            name, given = grammar.named(item)
            for ref in grammar.settings.references(registry.load("strategy", name), given, "model").values():
                loading.frozen(ref)
    return [member.model for each in run._frozen.values() for member in each.members]


def _embody(modules: list[nn.Module], device: torch.device) -> None:
    """Give meta tensors a device; still without content. Tied weights stay tied."""
    made: dict[int, torch.Tensor] = {}

    def fresh(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in (sub for each in modules for sub in each.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fresh(tensor)  # type: ignore[assignment]


def _without_content(fake: Any, batch: Batch, device: torch.device) -> Batch:
    return {k: fake.from_tensor(v).to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, from those of some modules on."""

    def __init__(self, modules: list[nn.Module]):
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()
        for tensor in _of(modules):
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


# --- sizes -----------------------------------------------------------------------------------------------------------


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}


def _of(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """Bytes of parameters and buffers, each once."""
    return sum(_size(t) for t in {id(t): t for t in _of(modules)}.values())
