"""Outputs of frozen layers, computed once for every training row instead of in every epoch.

With a share f of the network frozen from the bottom, a step costs 2f + 6(1-f) with and 6(1-f) without them: it becomes
1 + f/(3(1-f)) times faster, and a linear probe costs its head alone (AutoFreeze: Liu et al. 2021, arXiv:2102.01386).

Which modules they are and what of their outputs is needed is found by watching the model run on a few rows. What is
kept of a row is computed before the first step in batches whose order follows from the data alone, so that it does
not depend on the epoch, on the number of processes, or on where a run was interrupted: resumed equals uninterrupted,
bit for bit. Against a run without the cache, results differ by as much as the outputs of a row differ between batches
(other padding and other sizes let matrix products add up in another order): not at all, or in the last bits.

Shapes: B rows of a batch, L tokens of its longest row, N rows of the data.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from kt_hf import evaluation, prefix_file, randomness
from kt_hf.errors import KtError, RecipeError
from kt_hf.loader import Collate, load_batches, preprocessing_key
from kt_hf.prefix_file import Block, Layout
from kt_hf.task import Batch

if TYPE_CHECKING:
    from kt_hf.bundle import Bundle
    from kt_hf.trainer import Trainer

logger = logging.getLogger(__name__)

_KEY = "_frozen"
"""Under `_frozen.0`, `_frozen.1`, ... a batch carries what its rows were given by frozen layers."""
_WATCHED = 8
"""Rows on which the model is watched."""
_WORTH = 0.1
"""The least share of the weights in matrices that must be frozen from the bottom."""


class Unsuitable(Exception):
    """Why frozen layers are computed in every epoch; `said` is False where there is nothing to say."""

    def __init__(self, cause: str, remedy: str = "", said: bool = True):
        super().__init__(cause)
        self.cause, self.remedy, self.said = cause, remedy or "set training.cache_frozen=auto", said


class _Enough(Exception):
    """Ends a forward pass of which the rest is not needed."""


# --- what is known of a module's output -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """One tensor in the output of a frozen module. shape: on the rows on which it was watched; padded: dimension 1 is
    that of the tokens. kept: `all`, the `first` of dimension 1, or `none` where nobody reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    padded: bool
    kept: str = "none"

    @property
    def block(self) -> Block:
        skip = 2 if self.kept == "first" or self.padded else 1
        return Block(self.shape[skip:], self.dtype, tokens=self.padded and self.kept == "all")

    def take(self, tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What the file keeps of a batch: rows, or real tokens, one after the other."""
        if self.kept == "first":
            return tensor[:, 0]
        return tensor[batch["attention_mask"].bool()] if self.padded else tensor

    def expand(self, value: torch.Tensor | None, rows: int, length: int) -> torch.Tensor:
        """The tensor that the module would give. What nobody reads is not a number, so that reading it shows."""
        shape = (rows, length if self.padded else self.shape[1], *self.shape[2:]) if len(self.shape) > 1 else (rows,)
        if self.kept == "none":
            nothing = torch.full((), float("nan")) if self.dtype.is_floating_point else torch.zeros(())
            return nothing.to(self.dtype).expand(shape)
        assert value is not None
        return value.unsqueeze(1).expand(shape) if self.kept == "first" else value


@dataclass
class Output:
    """A module's output: its structure, and every leaf of it, a `Leaf` or a constant."""

    spec: TreeSpec
    leaves: list[Any]

    def kept(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Leaf) and leaf.kept != "none"]


# --- serving --------------------------------------------------------------------------------------------------------


class Prefix:
    """Gives the outputs of frozen modules for training rows. outputs: module name -> what is known of its output."""

    def __init__(self, bundle: Bundle, index: np.ndarray, outputs: dict[str, Output]):
        self.outputs, self.index = outputs, index
        self.modules = {name: bundle.model.get_submodule(name) for name in outputs}
        self.frozen = [p for module in self.modules.values() for p in module.parameters()]
        self.version = self._version()
        self.order = np.argsort(index, kind="stable")
        self.blocks: list[torch.Tensor] = []
        self.offsets: np.ndarray | None = None

    @property
    def leaves(self) -> list[Leaf]:
        return [leaf for output in self.outputs.values() for leaf in output.kept()]

    def open(self, key: str) -> None:
        self.blocks, self.offsets = prefix_file.read(key, [leaf.block for leaf in self.leaves], len(self.index))

    def _version(self) -> int:
        return sum(p._version for p in self.frozen)

    def attach(self, batch: Batch) -> Batch:
        """The batch (still on the CPU) with what frozen layers gave for its rows."""
        if self._version() != self.version:
            raise RecipeError(
                "weights that were frozen have been changed in mid-run, so that their cached outputs are stale",
                "set training.cache_frozen=false",
            )
        at = self.order[np.searchsorted(self.index, batch["index"].numpy(), sorter=self.order)]
        found = {f"{_KEY}.{i}": self._rows(i, leaf, at, batch) for i, leaf in enumerate(self.leaves)}
        return {**batch, **found}

    def _rows(self, number: int, leaf: Leaf, at: np.ndarray, batch: Batch) -> torch.Tensor:
        block = self.blocks[number]
        if not leaf.block.tokens:
            return block[torch.from_numpy(at)]
        assert self.offsets is not None
        mask_BL = batch["attention_mask"].bool()
        found = block.new_zeros((*mask_BL.shape, *block.shape[1:]))
        found[mask_BL] = torch.cat([block[self.offsets[i] : self.offsets[i + 1]] for i in at])
        return found

    @contextmanager
    def serving(self, batch: Batch) -> Iterator[None]:
        """Inside, the frozen modules give what the batch carries. Nothing is registered, nothing stays."""
        if f"{_KEY}.0" not in batch:
            yield
            return
        rows, length, device = len(batch["index"]), _length(batch), batch["index"].device
        values = iter(batch[f"{_KEY}.{i}"] for i in range(len(self.leaves)))
        before = {name: module.__dict__.get("forward") for name, module in self.modules.items()}
        try:
            for name, output in self.outputs.items():
                leaves = [
                    leaf.expand(None if leaf.kept == "none" else next(values), rows, length).to(device)
                    if isinstance(leaf, Leaf)
                    else leaf
                    for leaf in output.leaves
                ]
                self.modules[name].forward = _always(tree_unflatten(leaves, output.spec))  # type: ignore[method-assign]
            yield
        finally:
            for name, forward in before.items():
                if forward is None:
                    self.modules[name].__dict__.pop("forward", None)
                else:
                    self.modules[name].forward = forward  # type: ignore[method-assign]


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _length(batch: Batch) -> int:
    """Tokens of the longest row; 0 where rows are no sequences of unequal length."""
    mask = batch.get("attention_mask")
    return mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else 0


# --- finding --------------------------------------------------------------------------------------------------------


def find(trainer: Trainer) -> Prefix | None:
    """The frozen layers of this training with their outputs for every row; None, with the reason logged, where they
    have to be computed in every epoch.

    To be called before a checkpoint is restored: what is found must not depend on where the run stands. Raises
    `RecipeError` where training.cache_frozen is true and cannot be.
    """
    wanted = trainer.training.cache_frozen
    if wanted is False:
        return None
    try:
        return _find(trainer)
    except Unsuitable as reason:
        if wanted is True:
            raise RecipeError(f"training.cache_frozen: {reason.cause}", reason.remedy) from reason
        if reason.said:
            logger.info("frozen layers are computed in every epoch: %s", reason.cause)
        return None


def _find(trainer: Trainer) -> Prefix:
    bundle, rows, run = trainer.bundle, trainer.feed.rows_at_hand(), trainer.run_facts
    frozen = _frozen_layers(bundle)
    _check_settings(trainer)
    few = list(range(min(_WATCHED, len(rows))))
    batch, half = (_batch(trainer, part) for part in (few, few[: -(-len(few) // 2)]))
    mask = batch.get("attention_mask")
    if mask is not None and len(mask) != len(batch["index"]):
        raise Unsuitable("the model sees several rows for one of the data", "leave it out")
    with _kept_buffers(bundle):
        outputs = _watch(bundle, frozen, batch)
        _check_deterministic(bundle, outputs, batch, half)
    prefix = Prefix(bundle, rows.index, outputs)
    size = sum(leaf.block.stride for leaf in prefix.leaves if not leaf.block.tokens) * len(rows)
    _check_size(trainer, size)
    key, facts = _key(trainer, prefix)
    prefix_file.folder().mkdir(parents=True, exist_ok=True)
    known = prefix_file.intact(key) if run.accelerator.is_main_process else True
    if not _all(trainer, known):
        _fill(trainer, prefix, key, facts)
    prefix.open(key)
    with _kept_buffers(bundle):
        same = _same_step(trainer, prefix)
    if not _all(trainer, same):
        raise Unsuitable("a step with the cached outputs of frozen layers is not the same as one without")
    names = ", ".join(prefix.outputs)
    logger.info("the outputs of frozen layers (%s) are computed once and read from %s", names, prefix_file.folder())
    return prefix


def _frozen_layers(bundle: Bundle) -> set[int]:
    """Ids of the parameters in layers that are frozen as a whole."""
    parameters = dict(bundle.model.named_parameters())
    try:
        layers = bundle.task.layers(bundle.model)
    except KtError as error:
        raise Unsuitable(error.cause, error.remedy, said=False) from error
    frozen = [layer for layer in layers if layer and not any(parameters[n].requires_grad for n in layer)]
    if not frozen:
        raise Unsuitable("no layer is frozen", "freeze some, for example finetune.freeze_layers=4", said=False)
    return {id(parameters[name]) for layer in frozen for name in layer}


def _check_settings(trainer: Trainer) -> None:
    """Refuse what is known without running the model."""
    t, bundle, rows = trainer.training, trainer.bundle, trainer.feed.rows_at_hand()
    config = getattr(bundle.model, "config", None)
    skips = [k for k, v in vars(config).items() if k.endswith("layerdrop") and v] if config is not None else []
    compiled = [n for n, m in bundle.named_modules() if getattr(m, "_compiled_call_impl", None) is not None]
    hooked = [n for n, m in bundle.model.named_modules() if any(not _of_library(hook) for hook in _hooks(m))]
    reasons = [
        (rows.random, "training rows are made anew in every epoch (augmentation)", "leave data.augment out"),
        (
            bool(bundle.changers),
            f"'{next(iter(bundle.changers), '')}' changes batches before the model sees them",
            "leave it out",
        ),
        (
            bool(bundle.forward_kwargs),
            f"a strategy asks the model for {', '.join(bundle.forward_kwargs)}",
            "leave out the strategy that asks for it",
        ),
        (bool(bundle.chunk), "training.forward_chunk_size runs parts of a batch twice", "set forward_chunk_size=0"),
        (
            t.gradient_checkpointing,
            "training.gradient_checkpointing runs layers again in the backward pass",
            "set gradient_checkpointing=false",
        ),
        (bool(skips), f"the model leaves out layers at random ({', '.join(skips)})", "set it to 0"),
        (bool(compiled), "the model is compiled as a whole", "do not compile it"),
        (bool(hooked), f"somebody else listens to the modules {', '.join(hooked[:3])}", "remove the hooks"),
        (trainer.sharded is not None, "weights are sharded", "use one process, MULTI_GPU or MULTI_CPU"),
        (
            len(np.unique(rows.index)) != len(rows),
            "training rows cannot be told apart by their index",
            "",
        ),
        (
            trainer.run_facts.planned_steps < 2 * trainer.feed.sources["train"].plan.steps_per_epoch,
            "the training has fewer than two epochs",
            "train for at least two epochs",
        ),
    ]
    for wrong, cause, remedy in reasons:
        if wrong:
            raise Unsuitable(cause, remedy)


def _hooks(module: nn.Module) -> list[Any]:
    kinds = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return [hook for kind in kinds for hook in kind.values()]


def _of_library(hook: Any) -> bool:
    """transformers' own hooks record outputs for those who ask; who asks was looked at before."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _batch(trainer: Trainer, positions: Sequence[int]) -> Batch:
    rows = trainer.feed.rows_at_hand()
    collate = Collate(rows.task, trainer.loaded)
    return evaluation.to_device(collate(rows.__getitems__([(0, i) for i in positions])), trainer.run_facts.device)


def _all(trainer: Trainer, one: bool) -> bool:
    """Whether it holds on every rank."""
    if trainer.run_facts.world == 1:
        return one
    value = torch.tensor(int(one), dtype=torch.int32, device=trainer.run_facts.device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN)
    return bool(value)


# --- watching the model ---------------------------------------------------------------------------------------------


@contextmanager
def _kept_buffers(bundle: Bundle) -> Iterator[None]:
    """What is tried leaves no trace."""
    before = [(buffer, buffer.clone()) for buffer in bundle.buffers()]
    yield
    for buffer, value in before:
        buffer.data.copy_(value)


def _forward(bundle: Bundle, batch: Batch, seed: int = 0) -> Any:
    randomness.seed_all("frozen layers", seed)
    with _autocast(bundle):
        return bundle.task.forward(bundle.model, batch)


def _autocast(bundle: Bundle) -> AbstractContextManager[Any]:
    device = next(bundle.parameters()).device.type
    return torch.autocast(device, bundle.autocast) if bundle.autocast else nullcontext()


@contextmanager
def _listening(modules: dict[str, nn.Module], heard: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call `heard(name, output)` after each module; what it returns takes the place of the output."""
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, __, output, name=name: heard(name, output))  # type: ignore[misc]
            stack.callback(hook.remove)
        yield


def _watch(bundle: Bundle, frozen: set[int], batch: Batch) -> dict[str, Output]:
    """The frozen modules whose outputs can be kept, in the order in which they run, and what is needed of them.

    Every one's output is made a leaf of its own, so that a gradient says who is read by something that is not frozen.
    """
    modules = _outermost(bundle, frozen, batch)
    found: dict[str, tuple[list[Any], TreeSpec]] = {}

    def detach(name: str, output: Any) -> Any:
        leaves, spec = tree_flatten(output)
        leaves = [
            leaf.detach().requires_grad_(leaf.is_floating_point()) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        ]
        found[name] = leaves, spec
        handed = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]  # some write into it
        return tree_unflatten(handed, spec)

    with _listening(modules, detach), torch.enable_grad():
        read = _read(bundle, _forward(bundle, batch), batch)
    tensors = [leaf for leaves, _ in found.values() for leaf in leaves if _is_float(leaf)]
    randomness.seed_all("frozen layers", "cotangent")
    gradients = torch.autograd.grad(read, tensors, [torch.randn_like(each) for each in read], allow_unused=True)
    gradient_of = dict(zip(map(id, tensors), gradients, strict=True))
    outputs = {}
    for name, (leaves, spec) in found.items():
        known = [_leaf(name, leaf, gradient_of.get(id(leaf)), batch) for leaf in leaves]
        outputs[name] = Output(spec, known)
    if not any(output.kept() for output in outputs.values()):
        raise Unsuitable("nothing that is trained depends on the frozen layers", said=False)
    return outputs


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _leaf(name: str, leaf: Any, gradient: torch.Tensor | None, batch: Batch) -> Any:
    """What is to be kept of one leaf of an output."""
    if not isinstance(leaf, torch.Tensor):
        return leaf if leaf is None or isinstance(leaf, (bool, int, float, str)) else None
    if leaf.dim() == 0 or leaf.shape[0] != len(batch["index"]):
        raise Unsuitable(f"the output of {name} is not row by row: {tuple(leaf.shape)} for {len(batch['index'])} rows")
    padded = leaf.dim() > 1 and leaf.shape[1] == _length(batch) and not (leaf.dim() == 2 and leaf.is_floating_point())
    kept = "all"
    if leaf.is_floating_point():
        if gradient is None:
            kept = "none"
        elif leaf.dim() > 2 and gradient[:, 0].any() and not gradient[:, 1:].any():
            kept = "first"  # a head that reads the first token
    return Leaf(tuple(leaf.shape), leaf.dtype, padded, kept)


def _read(bundle: Bundle, outputs: Any, batch: Batch) -> list[torch.Tensor]:
    """What the model is asked for: its scores; all of its outputs where a task has none."""
    try:
        scores_NC, _ = bundle.task.scores(outputs, batch)
        return [scores_NC]
    except KtError:
        return [leaf for leaf in tree_leaves(outputs) if _is_float(leaf) and leaf.requires_grad]


def _outermost(bundle: Bundle, frozen: set[int], batch: Batch) -> dict[str, nn.Module]:
    """The outermost modules in frozen layers that run once and see no trained weight."""
    owned = {name: list(module.parameters()) for name, module in bundle.model.named_modules()}
    modules = {
        name: module
        for name, module in bundle.model.named_modules()
        if name and owned[name] and all(id(p) in frozen for p in owned[name])
    }
    calls: dict[str, int] = {}
    trained: set[str] = set()

    def count(name: str, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
            trained.add(name)

    with _listening(modules, count), torch.enable_grad():
        _forward(bundle, batch)
    found: dict[str, nn.Module] = {}
    for name in calls.keys() - trained:
        above = [name[:i] for i, letter in enumerate(name) if letter == "."]
        if not any(a in calls and a not in trained for a in above) and _matrices(modules[name]):
            found[name] = modules[name]
    if not found:
        raise Unsuitable("the frozen layers see trained weights, or only look up embeddings", "freeze from the bottom")
    again = [name for name in found if calls[name] > 1]
    if again:
        raise Unsuitable(f"{again[0]} runs {calls[again[0]]} times for a batch")
    share = sum(_matrices(module) for module in found.values()) / _matrices(bundle.model)
    if share < _WORTH:
        raise Unsuitable(f"{share:.0%} of the weights are frozen from the bottom: little to gain", "freeze more layers")
    return {name: found[name] for name in calls if name in found}


def _matrices(module: nn.Module) -> int:
    """Weights that cost time: all but the tables of embeddings, in which one only looks up."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in module.parameters() if id(p) not in tables)


def _values(bundle: Bundle, outputs: dict[str, Output], batch: Batch, seed: int = 0) -> list[torch.Tensor]:
    """What the file keeps of a batch, by running the model up to the last frozen module."""
    modules = {name: bundle.model.get_submodule(name) for name in outputs}
    found: dict[str, list[torch.Tensor]] = {}

    def take(name: str, output: Any) -> None:
        known = outputs[name].leaves
        leaves = zip(tree_leaves(output), known, strict=True)
        found[name] = [k.take(leaf, batch) for leaf, k in leaves if isinstance(k, Leaf) and k.kept != "none"]
        if len(found) == len(outputs):
            raise _Enough

    with torch.no_grad(), _listening(modules, take):
        try:
            _forward(bundle, batch, seed)
        except _Enough:
            pass
    return [value for name in outputs for value in found[name]]


def _check_deterministic(bundle: Bundle, outputs: dict[str, Output], batch: Batch, half: Batch) -> None:
    """Refuse frozen layers whose outputs are drawn, or depend on the other rows of a batch."""
    first, second = (_values(bundle, outputs, batch, seed) for seed in (1, 2))
    if not all(_close(a, b, 1e-6) for a, b in zip(first, second, strict=True)):
        drawn = [n for n, m in bundle.model.named_modules() if "Drop" in type(m).__name__ and m.training]
        raise Unsuitable(
            f"the outputs of frozen layers are random (in train mode: {', '.join(drawn[:3]) or 'no dropout module'})",
            "switch dropout off below the trained layers with model.config_overrides",
        )
    own = _values(bundle, outputs, half)
    leaves = [leaf for output in outputs.values() for leaf in output.kept()]
    tolerance = 5e-2 if bundle.autocast else 1e-3
    for leaf, a, b in zip(leaves, first, own, strict=True):
        count = int(half["attention_mask"].sum()) if leaf.block.tokens else len(b)
        if not _close(a[:count], b[:count], tolerance):
            raise Unsuitable(
                "the outputs of frozen layers depend on the other rows of a batch (batch statistics, or padding that "
                "is not masked)",
                "freeze other layers",
            )


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors agree, relative to the largest number in them."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    scale = max(float(a.abs().max()), 1e-30) if a.numel() else 1.0
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * scale).all())


# --- the file -------------------------------------------------------------------------------------------------------


def _key(trainer: Trainer, prefix: Prefix) -> tuple[str, dict[str, Any]]:
    """(name of the file, all that its contents depend on)."""
    import transformers

    bundle, rows, info = trainer.bundle, trainer.feed.rows_at_hand(), trainer.info
    model: Any = bundle.model
    config = getattr(model, "config", None)
    facts = {
        "modules": {name: [repr(leaf) for leaf in output.kept()] for name, output in prefix.outputs.items()},
        "model": type(model).__name__,
        "config": hashlib.sha256(repr(config).encode()).hexdigest(),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "weights": _weights(bundle),
        "data": info.fingerprint,
        "rows": len(rows),
        "preprocessing": preprocessing_key(info, "train", rows.task, trainer.loaded, True),
        "batch_size": trainer.training.per_device_eval_batch_size,
        "autocast": str(bundle.autocast),
        "device": trainer.run_facts.device.type,
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:32], facts


def _weights(bundle: Bundle) -> str:
    """sha256 of all that is frozen in the model, and of its buffers."""
    found = hashlib.sha256()
    tensors = [*bundle.model.named_parameters(), *bundle.model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if not tensor.requires_grad:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return found.hexdigest()


def _fill(trainer: Trainer, prefix: Prefix, key: str, facts: dict[str, Any]) -> None:
    """Compute what is kept of every row; ranks take turns in batches that do not depend on their number."""
    run, t, rows = trainer.run_facts, trainer.training, trainer.feed.rows_at_hand()
    size = t.per_device_eval_batch_size
    lengths_N = _lengths(trainer) if any(leaf.block.tokens for leaf in prefix.leaves) else None
    layout = Layout([leaf.block for leaf in prefix.leaves], len(rows), lengths_N)
    _check_size(trainer, layout.size)
    order = np.arange(len(rows)) if lengths_N is None else np.argsort(-lengths_N, kind="stable")
    batches = [order[i : i + size].tolist() for i in range(0, len(order), size)][run.rank :: run.world]
    name = hashlib.sha256(f"{key} {run.folder.resolve()}".encode()).hexdigest()[:32]
    path = prefix_file.folder() / f"{name}.part"
    if run.accelerator.is_main_process:
        prefix_file.make_room(layout.size, int(t.cache_frozen_limit * 1e9))
        prefix_file.create(name, layout)
    run.accelerator.wait_for_everyone()
    items = [[(0, i) for i in positions] for positions in batches]
    file = os.open(path, os.O_WRONLY)
    try:
        loaded = load_batches(rows, items, t.dataloader_num_workers, False)
        for positions, batch in zip(batches, loaded, strict=True):
            values = _values(trainer.bundle, prefix.outputs, evaluation.to_device(batch, run.device))
            for number, value in enumerate(values):
                prefix_file.write(file, layout, number, positions, value)
    finally:
        os.close(file)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        prefix_file.publish(path, key, facts)
    run.accelerator.wait_for_everyone()


def _lengths(trainer: Trainer) -> np.ndarray:
    """Real tokens of every row."""
    rows = trainer.feed.rows_at_hand()
    items = [[(0, i) for i in range(start, min(start + 256, len(rows)))] for start in range(0, len(rows), 256)]
    loaded = load_batches(rows, items, trainer.training.dataloader_num_workers, False)
    return np.concatenate([batch["attention_mask"].bool().sum(1).numpy() for batch in loaded])


def _check_size(trainer: Trainer, size: int) -> None:
    limit = trainer.training.cache_frozen_limit
    if size > limit * 1e9:
        raise Unsuitable(
            f"their outputs would take {size / 1e9:.3g} GB, the limit is {limit:g}",
            f"raise training.cache_frozen_limit to {size / 1e9 * 1.05:.3g} or more",
        )


def _same_step(trainer: Trainer, prefix: Prefix) -> bool:
    """Whether the terms and gradients of the first step are those that they are without the cache."""
    bundle, run = trainer.bundle, trainer.run_facts
    batches, sizes = trainer.feed.first(0)
    found = []
    for source in (batches["train"], prefix.attach(batches["train"])):
        now = {name: evaluation.to_device(batch, run.device) for name, batch in {**batches, "train": source}.items()}
        position = trainer.position(0, 0, 1, trainer.count([now], [sizes]), sizes)
        bundle.prefix = prefix
        try:
            terms = bundle("loss", now["train"], {k: v for k, v in now.items() if k != "train"}, position)
        finally:
            bundle.prefix = None
        total = sum(value.float() for value in terms.values() if value.requires_grad)
        gradients = torch.autograd.grad(total, trainer.trainable, allow_unused=True) if _is_float(total) else ()
        flat = [g.float().reshape(-1) for g in gradients if g is not None]
        found.append((torch.stack([v.detach().float() for v in terms.values()]), torch.cat(flat) if flat else None))
    (terms_a, gradient_a), (terms_b, gradient_b) = found
    tolerance = 5e-2 if bundle.autocast else 1e-3
    if gradient_a is None or gradient_b is None:
        return gradient_a is gradient_b and _close(terms_a, terms_b, tolerance)
    return _close(terms_a, terms_b, tolerance) and _close(gradient_a, gradient_b, tolerance)
