"""Model, task and strategies in one module: the only thing that accelerate wraps. Training, evaluation and
generation all run inside its forward. `Step` is what a strategy's `loss` sees.

Shapes: B rows, N scored units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from kt_hf import randomness
from kt_hf.clock import named
from kt_hf.errors import RecipeError
from kt_hf.functional.mixing import place
from kt_hf.strategy import Strategy
from kt_hf.task import Batch, Loaded, Task

if TYPE_CHECKING:
    from kt_hf.prefix import Prefix


@dataclass(frozen=True)
class Position:
    """Where in the run a micro-batch stands. counts: global number of units per stream in the accumulation window."""

    step: int
    progress: float
    micro_batch: int
    micro_batches: int
    seed: int
    rank: int
    world: int
    counts: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Sequence[int]]
    """stream -> rows of every rank's micro-batch that count; 0 where one only keeps ranks in step."""


class _GatherRows(torch.autograd.Function):
    """All-gather along dim 0, ranks in order; backward sums the gradients of all ranks and returns the own part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:  # type: ignore[override]
        ctx.sizes, ctx.own = sizes, x.shape[0]
        longest = max(*sizes, 1)
        padded = torch.zeros((longest, *x.shape[1:]), dtype=x.dtype, device=x.device)
        mine = sizes[dist.get_rank()]
        padded[:mine] = x[:mine]
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        rank = dist.get_rank()
        start, size = sum(ctx.sizes[:rank]), ctx.sizes[rank]
        own = torch.zeros((ctx.own, *gradient.shape[1:]), dtype=gradient.dtype, device=gradient.device)
        own[:size] = total[start : start + size]
        return own, None


class Step:
    """One micro-batch as a strategy's `loss` sees it. Outputs are computed once, whoever asks first."""

    def __init__(self, bundle: Bundle, batch: Batch, streams: dict[str, Batch], position: Position):
        self._bundle, self._position = bundle, position
        self.batch, self.streams = batch, streams
        self.task: Task = bundle.task
        self.progress, self.step = position.progress, position.step
        self._outputs: dict[str, Any] = {}
        self._encoded: dict[str, int] = {}

    @property
    def model(self) -> nn.Module:
        """The model in training, for losses about its weights. Not to be kept."""
        return self._bundle.model

    @property
    def outputs(self) -> Any:
        """The model's outputs on the training batch."""
        return self.forward("train")

    def forward(self, stream: str = "train") -> Any:
        """The model's outputs on a stream, computed once."""
        if stream not in self._outputs:
            if stream != "train" and stream not in self.streams:
                raise RecipeError(
                    f"there is no stream '{stream}'", f"streams of this stage: train, {', '.join(self.streams)}"
                )
            self._outputs[stream] = self.encode(self.batch if stream == "train" else self.streams[stream], stream)
        return self._outputs[stream]

    def encode(self, batch: Batch, name: str = "extra") -> Any:
        """Run the model on any batch, in checkpointed chunks where `training.forward_chunk_size` asks for it."""
        position, nth = self._position, self._encoded.get(name, 0)
        self._encoded[name] = nth + 1  # the same rows twice see two draws of dropout
        randomness.seed_all("forward", name, nth, position.seed, position.step, position.micro_batch, position.rank)
        return self._bundle.encode(batch, own=batch is self.batch)

    def mean(
        self, values: torch.Tensor, weight: torch.Tensor | None = None, unit: str = "example", stream: str = "train"
    ) -> torch.Tensor:
        """Sum of values (times weight), over the global count of that unit in the accumulation window on all ranks."""
        total = (values if weight is None else values * weight).sum()
        position = self._position
        counts = position.counts[stream]
        if unit not in counts:
            raise RecipeError(f"the task does not count '{unit}'", f"it counts {', '.join(counts)}")
        scaled = (total if position.world == 1 else total * position.world) / counts[unit]
        return scaled if position.rows[stream][position.rank] else scaled * 0.0

    def once(self, scalar: torch.Tensor) -> torch.Tensor:
        """A quantity of the batch as a whole (of all ranks, through `gather`) or of the weights."""
        return scalar / self._position.micro_batches

    def gather(self, x: torch.Tensor, stream: str = "train") -> torch.Tensor:
        """Rows of all ranks, in order. Differentiable: the backward sums over ranks, so that `once` of a loss over
        gathered rows has the gradient of one process with all rows. `x` has one row, or equally many, for each row
        of the stream."""
        position = self._position
        if position.world == 1:
            return x
        rows = position.rows[stream]
        times, rest = divmod(x.shape[0], max(rows[position.rank], 1))
        if rest:
            raise RecipeError(
                f"gather: got {x.shape[0]} rows for {rows[position.rank]} rows of '{stream}'",
                "gather what has rows of the batch, then select",
            )
        return _GatherRows.apply(x, [times * size for size in rows])


class Bundle(nn.Module):
    """See the module's docstring. `strategies` in the order of the recipe."""

    def __init__(
        self,
        loaded: Loaded,
        task: Task,
        strategies: dict[str, Strategy],
        label_smoothing: float = 0.0,
        chunk: int = 0,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.model = loaded.model
        self.strategies = nn.ModuleDict(strategies)
        self.task, self.loaded = task, loaded
        self.label_smoothing, self.chunk, self.autocast = label_smoothing, chunk, autocast
        self.forward_kwargs = merge_forward_kwargs(strategies)
        # Plain mappings, which register nothing: those that have the hook, since every call is seeded.
        self.changers = {n: s for n, s in strategies.items() if type(s).batch is not Strategy.batch}
        self.weighers = [s for s in strategies.values() if type(s).weigh is not Strategy.weigh]
        self.objectives = {n: s for n, s in strategies.items() if type(s).loss is not Strategy.loss}
        self._evaluated: list[nn.Module] = []  # a list, so that it is no submodule
        self.prefix: Prefix | None = None
        """Outputs of frozen layers for training rows, once they are known."""

    def stack(self) -> dict[str, Strategy]:
        return dict(self.strategies.items())  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Bundle:
        """Modules that are frozen as a whole stay in eval mode: their dropout is off and their statistics stand
        still."""
        super().train(mode)
        if mode:
            for module in _frozen_roots(self):
                module.eval()
        return self

    def forward(
        self,
        mode: str,
        batch: Batch,
        streams: dict[str, Batch] | None = None,
        position: Position | None = None,
        context: Any = None,
    ) -> Any:
        device = next(self.parameters()).device.type if self.autocast else ""
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            if mode == "loss":
                assert position is not None
                return self.terms(batch, streams or {}, position)
            model = self.evaluated()
            if mode == "context":
                return self.task.context(model, self.loaded, context, next(model.parameters()).device)
            if mode == "scores":
                return self.task.scores(self.task.forward(model, batch), batch)
            return self.task.predict(model, batch, context or {})

    def terms(self, batch: Batch, streams: dict[str, Batch], position: Position) -> dict[str, torch.Tensor]:
        """Every term of the loss by name, normalised such that the sum of all micro-batches' backwards, averaged
        over ranks, is the gradient of the whole window."""
        where = (position.seed, position.step, position.micro_batch, position.rank)
        stack = self.stack()
        for name, strategy in self.changers.items():
            randomness.seed_all("batch", name, *where)
            with named(f"{name}.batch"):
                batch = self.task.current(strategy.batch(batch, self.model, position.progress), batch)
        if type(self.task).choose is not Task.choose:
            randomness.seed_all("choose", *where)
            with named("task.choose"), torch.no_grad():
                batch = self.task.choose(self.model, batch)
        step = Step(self, batch, streams, position)
        weight = 1.0
        for strategy in stack.values():
            weight *= strategy.task_weight(position.progress)
        terms: dict[str, torch.Tensor] = {}
        if weight and self.task.has_loss:
            loss = self.task.loss(step.outputs, batch, self.label_smoothing)
            parts = [self._mean(step, *part) for part in (loss if isinstance(loss, list) else [loss])]
            mean = sum(parts[1:], parts[0])
            terms["task"] = mean if weight == 1.0 else weight * mean
        elif not any(type(s).adds_objective for s in stack.values()):
            raise RecipeError(
                "nothing to train on: the task's loss has weight 0 and no strategy adds an objective",
                "add one, or raise the task's weight",
            )
        else:
            step.outputs  # noqa: B018  the task's forward goes first, whatever the weights
        for name, strategy in self.objectives.items():
            randomness.seed_all("loss", name, *where)
            with named(f"{name}.loss"):
                found = strategy.loss(step)
            terms |= {f"{name}/{key}": value for key, value in found.items()}
        return terms

    def _mean(self, step: Step, values: torch.Tensor, weights: torch.Tensor | None, unit: str) -> torch.Tensor:
        """A part of the task's loss, its values weighed."""
        for strategy in self.weighers:
            weights = strategy.weigh(weights, values, step.batch)
        return step.mean(values, weights, unit)

    def encode(self, batch: Batch, own: bool = False) -> Any:
        """The model's outputs; `own` where the batch is the training batch as it came."""
        if self.prefix is not None and own:
            with self.prefix.serving(batch):
                return self.task.forward(self.model, batch)
        rows = len(batch["index"])
        if not self.chunk or rows <= self.chunk:
            return self.task.forward(self.model, batch, **self.forward_kwargs)
        parts = []
        for start in range(0, rows, self.chunk):
            part = self.task.part(batch, start, start + self.chunk)
            parts.append(checkpoint(self.task.forward, self.model, part, use_reentrant=False, **self.forward_kwargs))
        return _concatenate(parts)

    def begin_evaluation(self) -> None:
        """Fold `eval_model` once; evaluation then uses that model until `end_evaluation`."""
        model = self.model
        for strategy in self.stack().values():
            model = strategy.eval_model(model)
        model.eval()
        self._evaluated = [model]

    def end_evaluation(self) -> None:
        self._evaluated = []

    def evaluated(self) -> nn.Module:
        return self._evaluated[0] if self._evaluated else self.model


def _concatenate(parts: list[Any]) -> Any:
    """Model outputs of chunks as those of the whole: tensors with rows are joined, scalars are taken from the first."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts) if first.dim() else first
    if isinstance(first, (tuple, list)) and not hasattr(first, "keys"):
        return type(first)(_concatenate([part[i] for part in parts]) for i in range(len(first)))
    if hasattr(first, "keys"):
        return type(first)(**{key: _concatenate([part[key] for part in parts]) for key in first})
    if hasattr(first, "__dataclass_fields__"):
        return type(first)(
            **{key: _concatenate([getattr(part, key) for part in parts]) for key in first.__dataclass_fields__}
        )
    return first


def _frozen_roots(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that have parameters, none of which is trained."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return [module]
    return [root for child in module.children() for root in _frozen_roots(child)]


def merge_forward_kwargs(strategies: dict[str, Strategy]) -> dict[str, Any]:
    merged: dict[str, tuple[str, Any]] = {}
    for name, strategy in strategies.items():
        for key, value in strategy.forward_kwargs.items():
            if key in merged and merged[key][1] != value:
                raise RecipeError(
                    f"'{merged[key][0]}' asks the model for {key}={merged[key][1]!r}, '{name}' for {value!r}",
                    "use one of them",
                )
            merged[key] = (name, value)
    return {key: value for key, (_, value) in merged.items()}


@dataclass
class Frozen:
    """A frozen model, or an ensemble of them, that a strategy may ask. No module, so that nobody trains, saves or
    exports it."""

    members: list[Loaded]
    task: Task
    name: str
    combine: Any = None
    classes: list[list[int]] = field(default_factory=list)
    num_scores: int | None = None
    autocast: torch.dtype | None = None

    def outputs(self, batch: Batch) -> Any:
        """Raw outputs of a single frozen model."""
        assert len(self.members) == 1
        return self._forward(self.members[0], batch)

    def _forward(self, member: Loaded, batch: Batch) -> Any:
        device = next(member.model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            return self.task.forward(member.model, batch)

    def scores(self, batch: Batch) -> torch.Tensor:
        """Logits scores_NC over the student's classes, in its order (log-probabilities of an ensemble)."""
        found = []
        for i, member in enumerate(self.members):
            scores_NC, _ = self.task.scores(self._forward(member, batch), batch)
            found.append(place(self.select(scores_NC), self.classes[i] if self.classes else None))
        return found[0] if self.combine is None else self.combine(torch.stack(found))

    def select(self, scores_NC: torch.Tensor) -> torch.Tensor:
        """The scores both models have: vocabularies may be padded to different widths."""
        return scores_NC if self.num_scores is None else scores_NC[:, : self.num_scores]
