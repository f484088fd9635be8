"""The training loop. The order of work is decided here and reads from top to bottom; see `Trainer.run`.

Only this file builds parameter groups, calls backward, clips, steps and saves.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from tqdm.auto import tqdm

from kt_hf import checkpoint, evaluation, optimizer, prefix, randomness
from kt_hf.bundle import Bundle, Position
from kt_hf.errors import DataError, NonFiniteError, RecipeError
from kt_hf.facts import Run
from kt_hf.feed import Feed, Sizes, global_batch
from kt_hf.loader import Plan  # the plan checks transforms before data are read
from kt_hf.loader import transforms as transforms
from kt_hf.recipe import Data, Training
from kt_hf.strategy import Strategy
from kt_hf.task import Batch, Loaded

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """What a training leaves: the exported model, its curves and its cost.

    curve: one point per log (step, loss, learning_rate, terms). evaluations: one point per evaluation. revisions:
    commits of the frozen models, by the reference that the recipe gives.
    """

    loaded: Loaded
    curve: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    revisions: dict[str, str] = field(default_factory=dict)


class Trainer:
    """One training: a stage with one seed."""

    def __init__(
        self,
        run: Run,
        loaded: Loaded,
        strategies: dict[str, Strategy],
        training: Training,
        data: Data,
        track: Callable[..., None] | None = None,
        stream_info: Any = None,
        until: float = 1.0,
    ):
        self.run_facts, self.loaded, self.strategies, self.training, self.data = run, loaded, strategies, training, data
        self.accelerator, self.task, self.info = run.accelerator, run.task, run.info
        self.track, self.stream_info = track, stream_info
        self.curve: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.best: dict[str, Any] = {"step": None, "value": None, "waited": 0}
        self.stop_at = max(1, round(run.planned_steps * until)) if until < 1 else run.planned_steps
        self.log_terms: dict[str, torch.Tensor] = {}
        self.log_since = 0
        self.saved = 0
        self.wrapped: Any = None

    # --- the whole, top to bottom ---

    def run(self) -> Result:
        check_accelerator(self.accelerator, self.training)
        self.check_selection()
        self.prepare_model()
        self.feed = Feed(self.run_facts, self.training, self.data, self.strategies, self.stream_info, self.stop_at)
        if self.task.has_loss and all(s.task_weight(0.0) for s in self.strategies.values()):
            self.feed.check_learnable()
        try:
            self.wrap()
            self.bundle.prefix = prefix.find(self)
            start = self.resume()
            self.started = time.perf_counter()
            self.loop(start)
            self.seconds += time.perf_counter() - self.started
            return self.finish()
        finally:
            self.release()

    def release(self) -> None:
        """Let go of the model: accelerate keeps every one that it ever prepared (`free_memory` would also collect
        garbage, 0.3 s)."""
        prepared = self.accelerator._models
        prepared[:] = [model for model in prepared if model is not self.wrapped]

    def check_selection(self) -> None:
        """Choosing the best model needs something to choose on."""
        for setting in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self.training, setting) and "validation" not in self.info.splits:
                raise RecipeError(
                    f"training.{setting}: the data have no validation split",
                    "hold some rows out: data.validation_size=0.1",
                )

    def prepare_model(self) -> None:
        """`setup`, then `ready`, each with generators seeded from what it is."""
        model, run, t = self.loaded.model, self.run_facts, self.training
        for name, strategy in self.strategies.items():
            randomness.seed_all("setup", name, run.seed)
            model = strategy.setup(model, run)
        if t.gradient_checkpointing:
            checkpoint_gradients(model)
        model.to(run.device)
        self.loaded.model = model
        for name, strategy in self.strategies.items():
            randomness.seed_all("ready", name, run.seed)
            strategy.ready(model, run)
        self.bundle = Bundle(
            self.loaded, self.task, self.strategies, t.label_smoothing_factor, t.forward_chunk_size, t.bf16
        ).to(run.device)
        self.trainable = list(optimizer.named_trainable(self.bundle).values())
        if not self.trainable:
            raise RecipeError(
                "nothing is trainable: every parameter is frozen", "freeze less, or use an evaluate stage"
            )
        self.names = {id(p): name for name, p in self.bundle.named_parameters()}
        self.base_rate = optimizer.base_rate(t)
        self.factor_at = optimizer.schedule(t, run.planned_steps)
        self.optimizer = optimizer.build(
            t, optimizer.groups(self.bundle, self.strategies, t.weight_decay), self.base_rate
        )
        self.backward_hook = next((s.backward for s in self.strategies.values() if s.backward is not None), None)

    def wrap(self) -> None:
        """Give the bundle to accelerate; DDP has to know beforehand whether some weights may get no gradient."""
        self.bundle.train()
        if self.run_facts.world > 1:
            handler = self.accelerator.ddp_handler or DistributedDataParallelKwargs(broadcast_buffers=False)
            handler.find_unused_parameters = self.misses_parameters()
            self.accelerator.ddp_handler = handler
        with warnings.catch_warnings():  # torch renames the flag by which DDP is told to leave buffers alone
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self.wrapped = self.accelerator.prepare_model(self.bundle)

    def misses_parameters(self) -> bool:
        """Whether the first loss does not reach some trainable parameter, on any rank."""
        batches, sizes = self.feed.first(0)
        batches = {name: evaluation.to_device(batch, self.run_facts.device) for name, batch in batches.items()}
        position = self.position(0, 0, 1, self.count([batches], [sizes]), sizes)
        buffers = [(b, b.clone()) for b in self.bundle.buffers()]
        terms = self.bundle("loss", batches["train"], _extra(batches), position)
        for buffer, before in buffers:
            buffer.data.copy_(before)
        reached = _reached(list(terms.values()))
        missing = torch.tensor(
            any(id(p) not in reached for p in self.trainable), dtype=torch.int32, device=self.run_facts.device
        )
        torch.distributed.all_reduce(missing, torch.distributed.ReduceOp.MAX)
        return bool(missing)

    # --- the loop ---

    def loop(self, start: int) -> None:
        t, run = self.training, self.run_facts
        eval_every, save_every = self.cadence(t.eval_steps, True), self.cadence(t.save_steps, False)
        self.bad = torch.full((), -1, dtype=torch.int64, device=run.device)
        quiet = not (self.accelerator.is_main_process and sys.stderr.isatty())
        steps = self.feed.steps(start)
        with (
            tqdm(
                total=self.stop_at, initial=start, desc=run.folder.name, disable=quiet, leave=False, dynamic_ncols=True
            ) as bar,
            closing(steps),
        ):
            for step, (window, sizes) in enumerate(steps, start):
                if self.bundle.prefix is not None:
                    window = [{**micro, "train": self.bundle.prefix.attach(micro["train"])} for micro in window]
                window = [
                    {name: evaluation.to_device(batch, run.device) for name, batch in micro.items()} for micro in window
                ]
                self.step(step, window, sizes)
                bar.update()
                done = step + 1
                last = done == self.stop_at
                if done % t.logging_steps == 0 or last:
                    self.log(done, bar)
                if eval_every and (done % eval_every == 0 or last):
                    self.check_finite()
                    self.evaluate(done)
                    if self.exhausted():
                        self.log(done, bar)
                        self.stop_at = done
                        return
                if save_every and done % save_every == 0 and not last:
                    self.save(done)

    def step(self, step: int, window: list[dict[str, Batch]], sizes: list[Sizes]) -> None:
        """One optimizer step over its window of micro-batches."""
        counts = self.count(window, sizes)
        positions = [self.position(step, i, len(window), counts, size) for i, size in enumerate(sizes)]

        def compute(i: int) -> torch.Tensor:
            terms = self.wrapped("loss", window[i]["train"], _extra(window[i]), positions[i])
            return self.total(terms)

        try:
            if self.backward_hook is not None:
                self.backward_hook(compute, len(window), self.run_facts)
            else:
                for i in range(len(window)):
                    with self.accelerator.no_sync(self.wrapped) if i + 1 < len(window) else nullcontext():
                        self.accelerator.backward(compute(i))
        except RuntimeError as error:
            if "finished reduction" in str(error):
                raise RecipeError(
                    "the loss stopped reaching some trained weights in mid-run, which DDP cannot follow",
                    "let the term fade with a factor instead",
                ) from error
            raise
        self.update(step, positions[0].progress)

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the terms that have a gradient; all are added up for the log."""
        trained = [value.float() for value in terms.values() if value.requires_grad]
        if not trained:
            raise RecipeError(
                f"no term of the loss depends on a trained weight (terms: {', '.join(terms) or 'none'})",
                "freeze less, or add an objective",
            )
        total = torch.stack(trained).sum() if len(trained) > 1 else trained[0]
        for name, value in {**terms, "loss": total}.items():
            value = value.detach().float()
            self.log_terms[name] = self.log_terms[name] + value if name in self.log_terms else value
        return total

    def update(self, step: int, progress: float) -> None:
        t = self.training
        self.rate = self.base_rate * self.factor_at(step)
        for group in self.optimizer.param_groups:
            scale = optimizer.scale_at(group, progress)
            group["lr"] = self.rate * scale
            if scale == 0:  # as if frozen: no decay, no moments, no part in the norm
                for parameter in group["params"]:
                    parameter.grad = None
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None], foreach=True).to(
            self.bad.device
        )
        self.guard(step, norm)
        if t.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, t.max_grad_norm, norm, foreach=True)
        self.optimizer.step()
        for strategy in self.strategies.values():
            strategy.after_step(self.bundle.model, progress)
        self.optimizer.zero_grad(set_to_none=True)

    def guard(self, step: int, norm: torch.Tensor) -> None:
        """Note the first step whose loss or gradient is not finite, without waiting for the device.

        From that step on no update is made: by the fused optimizer on the device, and at once on a CPU, where
        looking is free.
        """
        finite = torch.isfinite(norm) & torch.isfinite(self.log_terms["loss"])
        self.bad = torch.where((self.bad < 0) & ~finite, torch.full_like(self.bad, step), self.bad)
        if self.bad.device.type == "cpu":
            if not torch.isfinite(norm):  # the same on all ranks
                self.check_finite()
        elif self.training.optim == "adamw_torch_fused":
            self.optimizer.found_inf = (self.bad >= 0).float()  # type: ignore[attr-defined]

    def count(self, window: list[dict[str, Batch]], sizes: list[Sizes]) -> dict[str, dict[str, Any]]:
        """Units in the window over all ranks, by stream. At least 1, so that an empty window has a loss of 0."""
        local: dict[tuple[str, str], Any] = {}
        for batches, size in zip(window, sizes, strict=True):
            for stream, batch in batches.items():
                counts = size[stream][self.run_facts.rank] > 0
                for unit, n in self.task.units(batch).items():
                    local[stream, unit] = local.get((stream, unit), 0) + (n if counts else n * 0)
        values = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=self.run_facts.device) for v in local.values()]
        )
        if self.run_facts.world > 1:
            torch.distributed.all_reduce(values)
        found: dict[str, dict[str, Any]] = {}
        for (stream, unit), value in zip(local, values.clamp(min=1), strict=True):
            found.setdefault(stream, {})[unit] = value
        return found

    def position(self, step: int, i: int, n: int, counts: Any, sizes: Sizes) -> Position:
        run = self.run_facts
        return Position(
            step, step / max(run.planned_steps, 1), i, n, self.training.seed, run.rank, run.world, counts, sizes
        )

    def cadence(self, every: float | None, default_epoch: bool) -> int:
        if every is None:
            if not default_epoch:
                return 0
            # after every epoch, but not more than about ten times
            return max(self.feed.sources["train"].plan.steps_per_epoch, math.ceil(self.run_facts.planned_steps / 10))
        return max(1, round(every * self.run_facts.planned_steps)) if 0 < every < 1 else int(every)

    # --- looking, judging, saving ---

    def log(self, done: int, bar: Any) -> None:
        if done == self.log_since or not self.log_terms:
            return
        self.share_log_terms()
        self.check_finite()
        steps, self.log_since = done - self.log_since, done
        values = (torch.stack(list(self.log_terms.values())) / steps).tolist()
        terms, self.log_terms = dict(zip(self.log_terms, values, strict=True)), {}
        point = {"step": done, "loss": terms.pop("loss"), "learning_rate": self.rate, "terms": terms}
        self.curve.append(point)
        bar.set_postfix(loss=f"{point['loss']:.4f}", lr=f"{self.rate:.2e}")
        if self.track is not None:
            self.track(
                {
                    "train/loss": point["loss"],
                    "train/learning_rate": self.rate,
                    **{f"train/{k}": v for k, v in terms.items()},
                },
                done,
            )
        logger.debug("step %d: loss %.4f", done, point["loss"])

    def share_log_terms(self) -> None:
        """Make the sums for the log those of all ranks, so that one rank can write or save them."""
        if self.run_facts.world > 1 and self.log_terms:
            values = torch.stack(list(self.log_terms.values()))
            torch.distributed.all_reduce(values)
            self.log_terms = dict(zip(self.log_terms, (values / self.run_facts.world).unbind(), strict=True))

    def check_finite(self) -> None:
        """Stop when a loss or gradient was not finite since the last look. Reading the flag waits for the device."""
        bad = self.bad.clone()
        if self.run_facts.world > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        step = int(bad)
        if step < 0:
            return
        rows = self.feed.index(step)
        shown = ", ".join(map(str, rows[:16])) + (f", ... ({len(rows)})" if len(rows) > 16 else "")
        wrong = [k for k, v in self.log_terms.items() if not math.isfinite(float(v))]
        saved = checkpoint.steps(self.checkpoints)
        raise NonFiniteError(
            f"training became non-finite at step {step + 1} ({', '.join(wrong) or 'gradient'}; training rows {shown})",
            f"lower learning_rate, or look at these rows; the last checkpoint is {saved[-1].name if saved else 'none'}",
        )

    def evaluate(self, done: int) -> None:
        """Measure on validation data; keep what the choice of the best needs."""
        if "validation" not in self.info.splits:
            return
        found = evaluation.predict(
            self.wrapped,
            self.bundle,
            self.accelerator,
            self.info,
            "validation",
            self.training.per_device_eval_batch_size,
        )
        scores = evaluation.measure(self.task, self.loaded, self.info, found)
        self.evaluations.append({"step": done, **scores.metrics})
        if self.track is not None:
            self.track({f"validation/{k}": v for k, v in scores.metrics.items()}, done)
        name, higher = self.selection()
        if name not in scores.metrics:
            raise RecipeError(
                f"training.metric_for_best_model: there is no metric '{name}'", f"valid: {', '.join(scores.metrics)}"
            )
        value = scores.metrics[name]
        better = self.best["value"] is None or (value > self.best["value"] if higher else value < self.best["value"])
        logger.info(
            "%s step %d: %s",
            self.run_facts.folder.name,
            done,
            ", ".join(f"{k} {v:.4f}" for k, v in scores.metrics.items()),
        )
        if better:
            self.best = {"step": done, "value": value, "waited": 0}
            if self.training.load_best_model_at_end and done < self.run_facts.planned_steps:
                self.save(done)
        else:
            self.best["waited"] += 1

    def selection(self) -> tuple[str, bool]:
        t, task = self.training, self.task
        name = t.metric_for_best_model or task.metric
        if t.greater_is_better is not None:
            return name, t.greater_is_better
        return name, task.greater_is_better if name == task.metric else name not in task.lower_metrics

    def exhausted(self) -> bool:
        patience = self.training.early_stopping_patience
        return patience is not None and self.best["waited"] >= patience

    @property
    def checkpoints(self) -> Path:
        return self.run_facts.folder / "checkpoints"

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """What training changes: trained weights, buffers, and all that strategies registered. Frozen weights of the
        model come from where it was loaded."""
        frozen = {p.data_ptr() for p in self.bundle.model.parameters() if not p.requires_grad and p.numel()}
        found: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.bundle.state_dict().items():
            pointer = tensor.data_ptr()
            if pointer in frozen or (pointer in seen and tensor.numel()):
                continue
            seen.add(pointer)
            found[name] = tensor
        return found

    def save(self, done: int) -> None:
        """Write a checkpoint of this step, once, after having looked whether all is finite."""
        if done == self.saved:
            return
        self.saved = done
        self.check_finite()
        self.share_log_terms()
        tensors = self.model_tensors()
        state = {f"optim/{k}": v for k, v in optimizer.state_tensors(self.optimizer, self.names).items()}
        facts = {
            "step": done,
            "curve": self.curve,
            "evaluations": self.evaluations,
            "best": self.best,
            "log_terms": {k: float(v) for k, v in self.log_terms.items()},
            "log_since": self.log_since,
            "seconds": self.seconds + time.perf_counter() - self.started,
            "global_batch": global_batch(self.training, self.run_facts.world),
            "data": self.info.fingerprint,
            "labels": self.loaded.labels,
        }
        if self.accelerator.is_main_process:
            protect = {f"step-{self.best['step']:06d}"} if self.best["step"] else set()
            checkpoint.save(
                self.checkpoints, done, {**tensors, **state}, facts, self.training.save_total_limit, protect
            )
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Continue from the newest checkpoint that verifies; returns the step to start from."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            return 0
        path, facts = found
        self.check_same(path, facts)
        rest = checkpoint.load_into(path, self.model_tensors())
        saved = checkpoint.read_tensors(path, {name for name in rest if name.startswith("optim/")})
        optimizer.restore_state(
            self.optimizer, self.names, {k.removeprefix("optim/"): v for k, v in saved.items()}, self.run_facts.device
        )
        self.curve, self.evaluations, self.best = facts["curve"], facts["evaluations"], facts["best"]
        logger.warning("%s: resumed at step %d", self.run_facts.folder.name, facts["step"])
        device = self.run_facts.device
        self.log_terms = {k: torch.tensor(v, device=device) for k, v in facts["log_terms"].items()}
        self.log_since, self.seconds = facts["log_since"], facts["seconds"]
        self.saved = int(facts["step"])
        return self.saved

    def check_same(self, path: Path, facts: dict[str, Any]) -> None:
        """Refuse a checkpoint whose steps would mean something else now."""
        if facts["data"] != self.info.fingerprint:
            raise RecipeError(
                f"{path}: the training data have changed since", "restore them, or start anew with --overwrite"
            )
        if facts["labels"] != self.loaded.labels:
            raise RecipeError(
                f"{path}: the labels were {facts['labels']}, now they are {self.loaded.labels}",
                "restore them, or start anew with --overwrite",
            )
        world, former = self.run_facts.world, facts["global_batch"]
        now = global_batch(self.training, world)
        if former != now:
            raise RecipeError(
                f"{path}: a step took {former} rows, now it is {now} ({world} processes)",
                f"keep their product: processes x per_device_train_batch_size x gradient_accumulation_steps = {former}",
            )

    def finish(self) -> Result:
        """Take the best weights where asked, fold `eval_model`, then `export` in reverse."""
        steps = self.stop_at
        if self.training.load_best_model_at_end and self.best["step"] not in (None, steps):
            best = self.checkpoints / f"step-{self.best['step']:06d}"
            checkpoint.verify(best)
            checkpoint.load_into(best, self.model_tensors())
        trained = sum(p.numel() for p in self.trainable)
        total = sum(p.numel() for p in self.bundle.model.parameters())
        model: nn.Module = self.bundle.model
        for strategy in self.strategies.values():
            model = strategy.eval_model(model)
        for strategy in reversed(list(self.strategies.values())):
            model = strategy.export(model)
        model.eval()
        self.loaded.model = model
        examples = min(
            steps * global_batch(self.training, self.run_facts.world), steps * len(self.info.splits["train"])
        )
        cost = {
            "optimizer_steps": steps,
            "seconds": self.seconds,
            "examples_per_second": examples / self.seconds if self.seconds else 0.0,
            "trained_parameters": trained,
            "total_parameters": total,
        }
        revisions = self.run_facts.revisions()
        return Result(self.loaded, self.curve, self.evaluations, cost, self.best["step"], revisions)


def planned_steps(training: Training, num_rows: int, world: int) -> int:
    """Optimizer steps of a training: max_steps, or enough for the epochs."""
    plan = Plan(num_rows, global_batch(training, world), 0, training.dataloader_drop_last)
    if plan.steps_per_epoch == 0:
        raise DataError(
            f"{num_rows} training rows do not fill a batch of {plan.global_batch}",
            "lower the batch size, or dataloader_drop_last=false",
        )
    if training.max_steps > 0:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * plan.steps_per_epoch))


def check_stack(strategies: dict[str, Strategy], training: Training, task: Any, where: str) -> None:
    """Refuse stacks that cannot be right, before any weight is loaded. Both parties are named."""
    for hook in ("batches", "backward"):
        owners = [name for name, s in strategies.items() if getattr(s, hook) is not None]
        if len(owners) > 1:
            raise RecipeError(
                f"{where}: '{owners[0]}' and '{owners[1]}' both decide the {hook}", "use one of them in this stage"
            )
    if training.eval_steps == 0 and (training.load_best_model_at_end or training.early_stopping_patience):
        raise RecipeError(
            f"{where}: the best model is to be chosen and eval_steps=0 never evaluates", "leave eval_steps out"
        )
    if training.gradient_accumulation_steps > 1:
        for name, strategy in strategies.items():
            if strategy.scope == "batch":
                raise RecipeError(
                    f"{where}: '{name}' and gradient_accumulation_steps={training.gradient_accumulation_steps} "
                    "exclude each other: its loss is about the batch as a whole",
                    "raise per_device_train_batch_size, with forward_chunk_size to save memory",
                )
    if not task.has_loss and not any(type(s).adds_objective for s in strategies.values()):
        raise RecipeError(
            f"{where}: {type(task).__name__} has no loss and no strategy of {', '.join(strategies)} adds one",
            "add the strategy 'contrastive'",
        )


def check_accelerator(accelerator: Any, training: Training) -> None:
    """Refuse what a launcher may have set that this loop does not do, rather than train something else."""
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise RecipeError(
            f"the launch configuration asks for {kind.value}, which is not supported",
            "use one process, MULTI_GPU or MULTI_CPU",
        )
    if accelerator.mixed_precision not in ("no", "bf16") or (
        accelerator.mixed_precision == "bf16" and not training.bf16
    ):
        raise RecipeError(
            f"the launch configuration asks for mixed precision {accelerator.mixed_precision}",
            "set training.bf16=true instead",
        )
    # the terms are normalised by count; accelerate must not divide once more
    accelerator.gradient_accumulation_steps = 1


def checkpoint_gradients(model: nn.Module) -> None:
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise RecipeError(
            f"training.gradient_checkpointing: {type(model).__name__} cannot do that",
            "use training.forward_chunk_size to save memory",
        ) from error


def _extra(batches: dict[str, Batch]) -> dict[str, Batch]:
    return {name: batch for name, batch in batches.items() if name != "train"}


def _reached(terms: list[torch.Tensor]) -> set[int]:
    """Ids of the leaves that a backward from these terms would give a gradient."""
    found: set[int] = set()
    seen: set[Any] = set()
    nodes = [term.grad_fn for term in terms if term.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions if following is not None]
    return found
