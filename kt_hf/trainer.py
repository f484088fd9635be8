"""The training loop. The order of work is decided here and reads from top to bottom; see `Trainer.run`.

Only this file builds parameter groups, calls backward, clips, steps and saves.
"""

from __future__ import annotations

import logging
import math
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from kt_hf import (
    checkpoint,
    evaluation,
    optimizer,
    packing,
    randomness,
    range_test,
    sharding,
    signals,
    unpadding,
    zero3,
)
from kt_hf.bundle import Bundle, Position
from kt_hf.clock import Clock, Tracer, named
from kt_hf.errors import NonFiniteError, NotMeaningful, RecipeError, nearest
from kt_hf.facts import Run
from kt_hf.feed import Feed, Sizes, global_batch
from kt_hf.loader import Plan
from kt_hf.notes import Notes
from kt_hf.progress import Progress, title
from kt_hf.recipe import Data, Training
from kt_hf.strategy import Strategy
from kt_hf.task import Batch, Loaded

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """What a training leaves: the exported model, its curves and its cost.

    curve: one point per log (step, loss, learning_rate, terms). evaluations: one point per evaluation. revisions:
    commits of the frozen models, by the reference that the recipe gives. range_test: what `learning_rate: auto` found.
    """

    loaded: Loaded
    curve: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    revisions: dict[str, str] = field(default_factory=dict)
    range_test: dict[str, Any] | None = None


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
        self.log_since = 0
        self.saved = 0
        self.told = TellTale(run)
        self.range_test: dict[str, Any] | None = None
        self.save_end = False
        """Whether a checkpoint of the last step is left, too."""
        self.wrapped: Any = None
        self.sharded: sharding.Sharded | zero3.Zero3 | None = None

    # --- the whole, top to bottom ---

    def run(self) -> Result:
        try:
            self.prepare()
            if self.training.learning_rate == "auto":
                self.range_test = range_test.settle(self)
            if self.training.cache_frozen:
                from kt_hf import prefix  # its files lie where the data library keeps its own

                self.bundle.prefix = prefix.find(self)
            start = self.resume()
            self.started = time.perf_counter()
            self.loop(start)
            if self.save_end:
                self.save(self.stop_at)
            self.seconds += time.perf_counter() - self.started
            return self.finish()
        finally:
            self.release()

    def prepare(self) -> None:
        """Everything before the first step that does not depend on an earlier run."""
        self.shards = check_accelerator(self.accelerator, self.training)
        self.check_selection()
        self.prepare_model()
        self.feed = Feed(self.run_facts, self.training, self.data, self.strategies, self.stream_info, self.stop_at)
        if self.task.has_loss and all(s.task_weight(0.0) for s in self.strategies.values()):
            self.feed.check_learnable()
        rows = self.feed.some_rows()
        if isinstance(rows, packing.Packed):
            packing.check(self.bundle.model, self.task, rows, self.run_facts.device)
        if self.training.packing and self.task.packs == "rows":
            unpadding.begin(self.bundle.model, self.run_facts, rows)
        self.wrap()

    def release(self) -> None:
        """Let go of the model: accelerate keeps every one that it ever prepared (`free_memory` would also collect
        garbage, 0.3 s), and layers that leave padding out run as they were."""
        if "bundle" in vars(self):
            unpadding.end(self.bundle.model, self.run_facts)
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
        if t.channels_last:
            model.to(memory_format=torch.channels_last)
        self.loaded.model = model
        for name, strategy in self.strategies.items():
            randomness.seed_all("ready", name, run.seed)
            strategy.ready(model, run)
        self.bundle = Bundle(
            self.loaded, self.task, self.strategies, t.label_smoothing_factor, t.forward_chunk_size, half(t)
        ).to(run.device)
        self.backward_hook = next((s.backward for s in self.strategies.values() if s.backward is not None), None)
        self.begin()

    def begin(self) -> None:
        """What counts from the first step on, with the learning rate that is known by now."""
        t, run = self.training, self.run_facts
        self.base_rate = optimizer.base_rate(t)
        self.factor_at = optimizer.schedule(t, run.planned_steps)
        self.build_optimizer()
        self.notes = Notes(run.device, run.world, skip=t.non_finite == "skip")
        self.scaler = torch.amp.GradScaler(run.device.type) if t.fp16 else None
        self.clock = Clock(run.device)
        self.buffers_before = self.kept_buffers()

    def build_optimizer(self) -> None:
        """Over what is trainable now; sharding puts other parameters in the place of these."""
        self.trainable = list(optimizer.named_trainable(self.bundle).values())
        if not self.trainable:
            raise RecipeError(
                "nothing is trainable: every parameter is frozen", "freeze less, or use an evaluate stage"
            )
        self.names = {id(p): name for name, p in self.bundle.named_parameters()}
        self.optimizer = optimizer.build(
            self.training,
            optimizer.groups(self.bundle, self.strategies, self.training.weight_decay),
            self.base_rate,
        )

    def kept_buffers(self) -> dict[str, torch.Tensor]:
        """Copies of the batch statistics, where steps may be skipped."""
        if self.training.non_finite != "skip":
            return {}
        return {name: buffer.clone() for name, buffer in self.bundle.named_buffers()}

    def wrap(self) -> None:
        """Give the bundle to accelerate; DDP has to know beforehand whether some weights may get no gradient."""
        self.bundle.train()
        if self.shards is not None:
            self.shard()
            return
        if self.run_facts.world > 1:
            handler = self.accelerator.ddp_handler or DistributedDataParallelKwargs(broadcast_buffers=False)
            handler.find_unused_parameters = self.misses_parameters()
            self.accelerator.ddp_handler = handler
        with warnings.catch_warnings():  # torch renames the flag by which DDP is told to leave buffers alone
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self.wrapped = self.accelerator.prepare_model(self.bundle)
        if self.training.torch_compile:
            self.bundle.model.compile()  # in place: names of weights stay

    def shard(self) -> None:
        """Shard the bundle in place, then build the optimizer over the shards."""
        assert self.shards is not None
        self.saved_names = set(self.model_tensors())
        missing = self.misses_parameters()
        self.trainable.clear()  # or they would keep whole weights in memory
        self.optimizer.param_groups.clear()
        self.sharded = self.shards(self.bundle, self.run_facts.device, missing)
        self.wrapped = self.sharded.wrapped
        self.build_optimizer()

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
        """Steps from `start` on, each with what is due after it."""
        t, run = self.training, self.run_facts
        self.eval_every, self.save_every = self.cadence(t.eval_steps, True), self.cadence(t.save_steps, False)
        progress = Progress(title(run.folder), self.stop_at, start, self.accelerator.is_main_process)
        traced = t.profile_steps if self.accelerator.is_main_process else 0  # ranks would write over one another
        tracer = Tracer(traced, run.folder / "logs" / "trace.json")
        with closing(progress), closing(tracer), closing(self.feed.steps(start)) as steps, signals.patience():
            if start and self.judge(start, progress):  # the run ended between saving and evaluating
                return
            if start and self.exhausted():  # the checkpoint is of the end
                self.stop_at = start
            for step in range(start, self.stop_at):
                with self.clock.phase("data"):
                    window, sizes = next(steps)
                    if self.bundle.prefix is not None:
                        window = [{**micro, "train": self.bundle.prefix.attach(micro["train"])} for micro in window]
                    window = [{k: self.to_device(batch) for k, batch in micro.items()} for micro in window]
                self.step(step, window, sizes)
                progress.step()
                tracer.step()
                done = step + 1
                if done % t.logging_steps == 0 or done == self.stop_at:
                    self.log(done, progress)
                if self.judge(done, progress):
                    return
                if self.save_every and done % self.save_every == 0 and done < self.stop_at:
                    self.save(done)
                if self.told.to_stop:
                    self.save(done)
                    raise signals.Interrupted(signals.received() or signal.SIGTERM, f"; saved at step {done}")

    def judge(self, done: int, progress: Progress) -> bool:
        """Evaluate where that is due and was not yet done; True where that ends the training."""
        due = self.eval_every and (done % self.eval_every == 0 or done == self.stop_at)
        if not due or any(found["step"] == done for found in self.evaluations):
            return False
        self.check_finite()
        try:
            with self.clock.phase("evaluation"):
                self.evaluate(done, progress)
        except signals.Interrupted:
            self.save(done)
            raise
        if not self.exhausted():
            return False
        self.log(done, progress)
        self.stop_at = done
        return True

    def to_device(self, batch: Batch) -> Batch:
        batch = evaluation.to_device(batch, self.run_facts.device)
        return optimizer.channels_last(batch) if self.training.channels_last else batch

    def step(self, step: int, window: list[dict[str, Batch]], sizes: list[Sizes]) -> None:
        """One optimizer step over its window of micro-batches."""
        counts = self.count(window, sizes)
        positions = [self.position(step, i, len(window), counts, size) for i, size in enumerate(sizes)]

        def compute(i: int) -> torch.Tensor:
            with self.clock.phase("forward"):
                terms = self.wrapped("loss", window[i]["train"], _extra(window[i]), positions[i])
                total = self.total(terms)
                return total if self.scaler is None else self.scaler.scale(total)

        try:
            if self.backward_hook is not None:
                self.backward_hook(compute, len(window), self.run_facts)
            else:
                for i in range(len(window)):
                    with self.no_sync() if i + 1 < len(window) else nullcontext():
                        total = compute(i)
                        with self.clock.phase("backward"):
                            total.backward()
        except RuntimeError as error:
            if "finished reduction" in str(error):
                raise RecipeError(
                    "the loss stopped reaching some trained weights in mid-run, which DDP cannot follow",
                    "let the term fade with a factor instead",
                ) from error
            raise
        with self.clock.phase("optimizer"):
            self.update(step, positions[0].progress)

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients are exchanged with the last micro-batch of a window only."""
        return self.accelerator.no_sync(self.wrapped) if self.sharded is None else self.sharded.no_sync()

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the terms that have a gradient; all are added up for the log."""
        trained = [value.float() for value in terms.values() if value.requires_grad]
        if not trained:
            raise RecipeError(
                f"no term of the loss depends on a trained weight (terms: {', '.join(terms) or 'none'})",
                "freeze less, or add an objective",
            )
        total = torch.stack(trained).sum() if len(trained) > 1 else trained[0]
        self.notes.add(terms, total)
        return total

    def update(self, step: int, progress: float) -> None:
        t, whole = self.training, self.sharded is None
        if self.sharded is not None:
            self.sharded.collect(self.trainable)
        self.rate = self.base_rate * self.factor_at(step)
        for group in self.optimizer.param_groups:
            scale = optimizer.scale_at(group, progress)
            group["lr"] = self.rate * scale
            if scale == 0:  # as if frozen: no decay, no moments, no part in the norm
                for parameter in group["params"]:
                    parameter.grad = None
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        total_norm = torch.nn.utils.get_total_norm if whole else sharding.total_norm
        norm = total_norm(gradients, foreach=True).to(self.run_facts.device)
        bad = self.notes.close(step, norm, overflow_is_bad=self.scaler is None)
        if t.max_grad_norm:
            clip = torch.nn.utils.clip_grads_with_norm_ if whole else sharding.clip
            clip(self.trainable, t.max_grad_norm, norm, foreach=True)
        self.make_update(bad)
        for name, strategy in self.strategies.items():
            with named(f"{name}.after_step"):
                strategy.after_step(self.bundle.model, progress)
        self.optimizer.zero_grad(set_to_none=True)

    def make_update(self, bad: torch.Tensor) -> None:
        """Step the optimizer, unless the numbers are bad. Fused optimizers decide that on the device; for the others
        somebody has to look, which waits for the device at every step."""
        if self.scaler is not None:  # skips what overflows, and halves the scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif optimizer.is_fused(self.optimizer):
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()
        for name, kept in self.buffers_before.items():  # a bad batch would spoil running statistics for good
            buffer = self.bundle.get_buffer(name)
            buffer.copy_(torch.where(bad > 0, kept, buffer))
            kept.copy_(buffer)

    def count(self, window: list[dict[str, Batch]], sizes: list[Sizes]) -> dict[str, dict[str, Any]]:
        """Units in the window over all ranks, by stream. At least 1, so that an empty window has a loss of 0."""
        world, local = self.run_facts.world, dict[tuple[str, str], Any]()
        for batches, size in zip(window, sizes, strict=True):
            for stream, batch in batches.items():
                counts = size[stream][self.run_facts.rank] > 0
                for unit, n in self.task.units(batch).items():
                    local[stream, unit] = local.get((stream, unit), 0) + (n if counts else n * 0)
        found: dict[str, dict[str, Any]] = {}
        values: Any = local.values()
        if world > 1:
            everywhere = torch.stack([self.on_device(v) for v in (*values, self.told.mark)])
            torch.distributed.all_reduce(everywhere)
            *values, told = everywhere.unbind()
            self.told.hear(told)
        for (stream, unit), value in zip(local, values, strict=True):
            at_least_one = value.clamp(min=1) if isinstance(value, torch.Tensor) else max(value, 1)
            found.setdefault(stream, {})[unit] = at_least_one
        return found

    def on_device(self, number: float | torch.Tensor) -> torch.Tensor:
        """As float32. A number that is filled in is waited for by nobody, one that is copied is."""
        device = self.run_facts.device
        return number.float() if isinstance(number, torch.Tensor) else torch.full((), float(number), device=device)

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

    def log(self, done: int, progress: Progress) -> None:
        if done == self.log_since:
            return
        self.check_finite()
        steps, self.log_since = done - self.log_since, done
        terms = self.notes.means(steps)
        point: dict[str, Any] = {"step": done, "loss": terms.pop("loss"), "learning_rate": self.rate, "terms": terms}
        self.curve.append(point)
        self.clock.settle()
        progress.losses(point)
        values = {"loss": point["loss"], "learning_rate": self.rate, "grad_norm": float(self.notes.norm or 0.0)}
        self.tell("train", {**values, **terms}, done)

    def tell(self, what: str, values: dict[str, float], done: int) -> None:
        """Give figures to the trackers. The seconds that they take, to start above all, are not the training's."""
        if self.track is None:
            return
        began = time.perf_counter()
        self.track({f"{what}/{key}": value for key, value in values.items()}, done)
        self.started += time.perf_counter() - began

    def check_finite(self) -> None:
        """Stop when a loss or gradient was not finite since the last look. Reading the notes waits for the device."""
        found = self.notes.first_bad()
        if found is None:
            return
        step, wrong = found
        rows = self.feed.index(step)
        shown = ", ".join(map(str, rows[:16])) + (f", ... ({len(rows)})" if len(rows) > 16 else "")
        saved = checkpoint.steps(self.checkpoints)
        raise NonFiniteError(
            f"training became non-finite at step {step + 1} ({', '.join(wrong) or 'gradient'}; training rows {shown})",
            f"lower learning_rate, or look at these rows, or non_finite=skip; the last checkpoint is "
            f"{saved[-1].name if saved else 'none'}",
        )

    def evaluate(self, done: int, progress: Progress) -> None:
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
        if self.sharded is not None:
            self.sharded.reshard()
        scores = evaluation.measure(self.task, self.loaded, self.info, found)
        self.evaluations.append({"step": done, **scores.metrics})
        self.tell("validation", scores.metrics, done)
        name, higher = self.selection()
        if name not in scores.metrics:
            raise RecipeError(
                f"training.metric_for_best_model: there is no metric '{name}'", f"valid: {', '.join(scores.metrics)}"
            )
        value = scores.metrics[name]
        better = self.best["value"] is None or (value > self.best["value"] if higher else value < self.best["value"])
        shown = ", ".join(f"{k} {v:.4f}" for k, v in scores.metrics.items())
        progress.say(f"{shown}{', the best so far' if better else ''}")
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
        if self.sharded is not None:
            return {name: t for name, t in self.bundle.state_dict().items() if name in self.saved_names}
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
        with self.clock.phase("saving"):
            state = {f"optim/{k}": v for k, v in optimizer.state_tensors(self.optimizer, self.names).items()}
            tensors, facts = {**self.model_tensors(), **state}, self.facts(done)
            protect = {f"step-{self.best['step']:06d}"} if self.best["step"] else set()
            about = {"world": self.run_facts.world, "threads": torch.get_num_threads()}
            limit = self.training.save_total_limit
            if self.sharded is not None:
                device = self.run_facts.device
                sharding.save(self.checkpoints, done, tensors, facts, limit, protect, about, device)
            elif self.accelerator.is_main_process:
                checkpoint.save(self.checkpoints, done, tensors, facts, limit, protect, about)
            self.accelerator.wait_for_everyone()

    def facts(self, done: int) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            "step": done,
            "curve": self.curve,
            "evaluations": self.evaluations,
            "best": self.best,
            "notes": self.notes.state(),
            "log_since": self.log_since,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "seconds": self.seconds + time.perf_counter() - self.started,
            "phases": self.clock.seconds,
            "global_batch": global_batch(self.training, self.run_facts.world),
            "data": self.info.fingerprint,
            "labels": self.loaded.labels,
            "streams": self.feed.state(done),
        }

    def resume(self) -> int:
        """Continue from the newest checkpoint that verifies; returns the step to start from."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            return 0
        path, facts, about = found
        self.check_same(path, facts)
        rest = {name for name in self.load_into(path) if name.startswith("optim/")}
        if self.sharded is not None or sharding.is_sharded(path):
            saved = sharding.like_parameters(path, rest, dict(self.bundle.named_parameters()))
        else:
            saved = checkpoint.read_tensors(path, rest)
        optimizer.restore_state(
            self.optimizer, self.names, {k.removeprefix("optim/"): v for k, v in saved.items()}, self.run_facts.device
        )
        self.curve, self.evaluations, self.best = facts["curve"], facts["evaluations"], facts["best"]
        self.notes.restore(facts["notes"], self.run_facts.rank)
        if self.scaler is not None and facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        self.log_since, self.seconds = facts["log_since"], facts["seconds"]
        self.clock.seconds.update(facts["phases"])
        self.buffers_before = self.kept_buffers()
        self.saved = int(facts["step"])
        self.feed.restore(self.saved, facts.get("streams", {}))
        if self.saved < self.stop_at:
            logger.warning("%s: resumed at step %d", title(self.run_facts.folder), self.saved)
        now = {"world": self.run_facts.world, "threads": torch.get_num_threads()}
        for key, what in (("world", "processes"), ("threads", "threads")):
            if about.get(key) != now[key]:
                logger.warning(
                    "%s was saved with %s %s, now there are %d: sums may differ in their last bits",
                    path.name,
                    about.get(key),
                    what,
                    now[key],
                )
        return self.saved

    def load_into(self, path: Path) -> set[str]:
        """Copy a checkpoint's weights into the bundle; returns the names of what else it holds."""
        if self.sharded is not None or sharding.is_sharded(path):
            return sharding.load_into(path, self.model_tensors())
        return checkpoint.load_into(path, self.model_tensors())

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
            self.load_into(best)
        if self.sharded is not None:
            self.sharded.whole()
        trained = sum(p.numel() for p in self.trainable)
        total = sum(p.numel() for p in self.bundle.model.parameters())
        model: nn.Module = self.bundle.model
        for strategy in self.strategies.values():
            model = strategy.eval_model(model)
        for strategy in reversed(list(self.strategies.values())):
            model = strategy.export(model)
        model.eval()
        self.loaded.model = model
        per_step = global_batch(self.training, self.run_facts.world)
        examples = steps * (per_step if self.info.stream is not None else min(per_step, len(self.info.splits["train"])))
        cost = {
            "optimizer_steps": steps,
            "seconds": self.seconds,
            "examples_per_second": examples / self.seconds if self.seconds else 0.0,
            "trained_parameters": trained,
            "total_parameters": total,
            "phases": self.clock.shares(self.seconds),
        }
        revisions = self.run_facts.revisions()
        skipped = cost["skipped_steps"] = self.notes.skipped
        if skipped:
            logger.warning("%s: %d steps were not finite and were skipped", title(self.run_facts.folder), skipped)
        return Result(self.loaded, self.curve, self.evaluations, cost, self.best["step"], revisions, self.range_test)


class TellTale:
    """Whether a signal asks to stop. Ranks learn it together, from a sum that they exchange in every step; what a GPU
    summed is read two steps later, when it is there anyhow."""

    def __init__(self, run: Run):
        self.run, self.agreed = run, False
        self._coming: list[tuple[torch.Tensor, Any]] = []

    @property
    def mark(self) -> float:
        return float(signals.received() is not None)

    @property
    def to_stop(self) -> bool:
        return self.agreed if self.run.world > 1 else signals.received() is not None

    def hear(self, total: torch.Tensor) -> None:
        if total.device.type != "cuda":
            self.agreed = bool(total > 0)
            return
        event, here = torch.cuda.Event(), torch.empty((), pin_memory=True)
        here.copy_(total, non_blocking=True)
        event.record()
        self._coming.append((here, event))
        if len(self._coming) > 2:
            here, event = self._coming.pop(0)
            event.synchronize()
            self.agreed = bool(here > 0)


def half(training: Training) -> torch.dtype | None:
    """The narrower numbers that the forward computes with, if any; weights stay as they are."""
    return torch.float16 if training.fp16 else torch.bfloat16 if training.bf16 else None


def planned_steps(training: Training, num_rows: int | None, world: int) -> int:
    """Optimizer steps of a training: max_steps, or enough for the epochs. num_rows: None for a stream."""
    if num_rows is None:
        return training.max_steps
    per_epoch = steps_of_epoch(training, num_rows, world)
    if training.max_steps > 0:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * per_epoch))


def steps_of_epoch(training: Training, num_rows: int, world: int) -> int:
    """Optimizer steps of an epoch, where no strategy makes the batches. Raises `RecipeError` where it has none."""
    plan = Plan(num_rows, global_batch(training, world), 0, training.dataloader_drop_last)
    plan.check()
    return plan.steps_per_epoch


def check_stack(strategies: dict[str, Strategy], training: Training, task: Any, where: str) -> None:
    """Refuse stacks that cannot be right, before any weight is loaded. Both parties are named."""
    for hook in ("batches", "backward"):
        owners = [name for name, s in strategies.items() if getattr(s, hook) is not None]
        if len(owners) > 1:
            raise RecipeError(
                f"{where}: '{owners[0]}' and '{owners[1]}' both decide the {hook}", "use one of them in this stage"
            )
    owner = next((name for name, s in strategies.items() if s.batches is not None), None)
    if owner and training.train_sampling_strategy != "random":
        raise RecipeError(
            f"{where}: '{owner}' and train_sampling_strategy={training.train_sampling_strategy} both make the batches",
            "use one of them",
        )
    if training.packing:
        check_packing(strategies, training, task, where)
    sharding.check_stack(strategies, training, where)
    if training.fp16 and training.bf16:
        raise RecipeError(f"{where}: fp16 and bf16 exclude each other", "choose one of them")
    owner = next((name for name, s in strategies.items() if s.backward is not None), None)
    if training.fp16 and owner:
        raise RecipeError(
            f"{where}: '{owner}' makes its own gradients, which fp16 would have to scale", "use training.bf16=true"
        )
    if training.eval_steps == 0 and (training.load_best_model_at_end or training.early_stopping_patience):
        raise RecipeError(
            f"{where}: the best model is to be chosen and eval_steps=0 never evaluates", "leave eval_steps out"
        )
    chosen = training.metric_for_best_model
    if chosen and task.metrics and chosen not in (*task.metrics, task.metric):
        raise RecipeError(
            f"{where}: training.metric_for_best_model: there is no metric '{chosen}'", nearest(chosen, task.metrics)
        )
    if training.gradient_accumulation_steps > 1:
        for name, strategy in strategies.items():
            if strategy.scope == "batch":
                raise RecipeError(
                    f"{where}: '{name}' and gradient_accumulation_steps={training.gradient_accumulation_steps} "
                    "exclude each other: its loss is about the batch as a whole",
                    "raise per_device_train_batch_size, with forward_chunk_size to save memory",
                )
    for name, strategy in strategies.items():
        if strategy.needs_scores and not task.has_scores:
            raise NotMeaningful(
                f"{where}: '{name}' takes scores over classes, and {type(task).__name__} has none",
                "use another strategy or task",
            )
    if not task.has_loss and not any(type(s).adds_objective for s in strategies.values()):
        raise RecipeError(
            f"{where}: {type(task).__name__} has no loss and no strategy of {', '.join(strategies)} adds one",
            "add the strategy 'contrastive'",
        )


def check_packing(strategies: dict[str, Strategy], training: Training, task: Any, where: str) -> None:
    """Refuse what would see bins for rows, and what would see into layers that run on bins."""
    bins = task.packs == "bins"
    reasons = {
        f"{type(task).__name__} does not pack rows": not task.packs,
        f"train_sampling_strategy={training.train_sampling_strategy} is about rows, not bins": (
            bins and training.train_sampling_strategy == "group_by_length"
        ),
        "cache_frozen keeps outputs by row": bins and bool(training.cache_frozen),
        "cache_frozen stands in the place of the layers that would leave padding out": (
            not bins and bool(training.cache_frozen)
        ),
        "torch_compile would compile the model anew for every batch, since bins differ": (
            not bins and training.torch_compile
        ),
    }
    for name, strategy in strategies.items():
        reasons[f"'{name}' makes batches of rows"] = bins and strategy.batches is not None
        reasons[f"the loss of '{name}' is about the rows of a batch"] = bins and strategy.scope == "batch"
        asks = bool(strategy.forward_kwargs.get("output_attentions"))
        reasons[f"'{name}' asks for attentions, which are those of bins"] = asks
    for reason, holds in reasons.items():
        if holds:
            raise RecipeError(f"{where}: training.packing: {reason}", "use one of them in this stage")


def check_accelerator(accelerator: Any, training: Training) -> Any:
    """Refuse what a launcher may have set that this loop does not do, rather than train something else. Returns what
    shards the bundle, if anything."""
    kind = accelerator.distributed_type
    if kind.value not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"):
        raise RecipeError(
            f"the launch configuration asks for {kind.value}, which is not supported",
            "use one process, MULTI_GPU, MULTI_CPU, FSDP with fsdp_version 2, or DEEPSPEED with zero_stage 3",
        )
    shards = sharding.check(accelerator, training) or zero3.check(accelerator, training)
    if accelerator.mixed_precision not in ("no", "bf16") or (
        accelerator.mixed_precision == "bf16" and not training.bf16
    ):
        raise RecipeError(
            f"the launch configuration asks for mixed precision {accelerator.mixed_precision}",
            "set training.bf16=true instead",
        )
    # the terms are normalised by count; accelerate must not divide once more
    accelerator.gradient_accumulation_steps = 1
    return shards


def checkpoint_gradients(model: nn.Module) -> None:
    how = {"use_reentrant": False}
    try:
        if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.24 on
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)  # type: ignore[operator]
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # type: ignore[operator]
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
