"""The training loop. The order of work is decided here and reads from top to bottom; see `Trainer.run`.

Only this file builds parameter groups, calls backward, clips, steps and saves.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from kt_hf import checkpoint, evaluation, optimizer, randomness
from kt_hf.bundle import Bundle, Position
from kt_hf.errors import DataError, NonFiniteError, RecipeError
from kt_hf.loader import Plan, Rows, Windows, load_batches, transforms
from kt_hf.recipe import Data, Training
from kt_hf.facts import Run
from kt_hf.strategy import Strategy
from kt_hf.task import Loaded

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """What a training leaves: the exported model, its curves and its cost.

    curve: one point per log (step, loss, learning_rate, terms). evaluations: one point per evaluation.
    """

    loaded: Loaded
    curve: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None


class Trainer:
    """One training: a stage with one seed."""

    def __init__(self, run: Run, loaded: Loaded, strategies: dict[str, Strategy], training: Training, data: Data, track: Callable[..., None] | None = None, stream_info: Any = None, until: float = 1.0):
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

    # --- the whole, top to bottom ---

    def run(self) -> Result:
        self.prepare_model()
        self.wrap()
        start = self.resume()
        self.started = time.perf_counter()
        self.loop(start)
        self.seconds += time.perf_counter() - self.started
        return self.finish()

    def prepare_model(self) -> None:
        """`setup`, then `ready`, each with generators seeded from what it is."""
        model, run, t = self.loaded.model, self.run_facts, self.training
        for name, strategy in self.strategies.items():
            randomness.seed_all("setup", name, run.seed)
            model = strategy.setup(model, run)
        if t.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        model.to(run.device)
        self.loaded.model = model
        for name, strategy in self.strategies.items():
            randomness.seed_all("ready", name, run.seed)
            strategy.ready(model, run)
        self.bundle = Bundle(self.loaded, self.task, self.strategies, t.label_smoothing_factor, t.forward_chunk_size, t.bf16).to(run.device)
        trainable = optimizer.named_trainable(self.bundle)
        if not trainable:
            raise RecipeError("nothing is trainable: every parameter is frozen", "freeze less, or use an evaluate stage")
        self.trainable = list(trainable.values())
        self.names = {id(p): name for name, p in self.bundle.named_parameters()}

    def wrap(self) -> None:
        t = self.training
        groups = optimizer.groups(self.bundle, self.strategies, t.weight_decay)
        raw = optimizer.build(t, groups, self.base_rate())
        self.factor_at = optimizer.schedule(t, self.run_facts.planned_steps)
        self.bundle.train()
        self.wrapped = self.accelerator.prepare_model(self.bundle)
        self.optimizer = raw
        self.backward_hook = next((s.backward for s in self.strategies.values() if s.backward is not None), None)

    def base_rate(self) -> float:
        rate = self.training.learning_rate
        return rate[0] if isinstance(rate, list) else rate

    # --- the loop ---

    def loop(self, start: int) -> None:
        t, run = self.training, self.run_facts
        windows = Windows(self.batch_plan(), start, self.stop_at, run.world, run.rank, t.gradient_accumulation_steps)
        rows = Rows(self.info, "train", self.task, self.loaded, transforms(self.data.augment), t.seed, train=True)
        batches = load_batches(rows, windows, t.dataloader_num_workers, run.device.type == "cuda")
        streams = self.stream_batches(start)
        eval_every, save_every = self.cadence(t.eval_steps, True), self.cadence(t.save_steps, False)
        self.bad = torch.full((), -1, dtype=torch.int64, device=run.device)
        quiet = not (self.accelerator.is_main_process and sys.stderr.isatty())
        bar = tqdm(total=self.stop_at, initial=start, desc=run.folder.name, disable=quiet, leave=False, dynamic_ncols=True)
        for step, sizes in zip(range(start, self.stop_at), windows.sizes(), strict=True):
            window = [evaluation.to_device(next(batches), run.device) for _ in sizes]
            extra = [{k: evaluation.to_device(next(it), run.device) for k, it in streams.items()} for _ in sizes]
            self.step(step, window, extra, sizes)
            bar.update()
            done = step + 1
            last = done == self.stop_at
            if done % t.logging_steps == 0 or last:
                self.log(done, windows, bar)
            if eval_every and (done % eval_every == 0 or last):
                self.check_finite(windows)
                self.evaluate(done)
                if self.exhausted():
                    self.log(done, windows, bar)
                    self.stop_at = done
                    break
            if save_every and done % save_every == 0 and not last:
                self.check_finite(windows)
                self.save(done)
        bar.close()
        batches.close()  # type: ignore[attr-defined]

    def step(self, step: int, window: list[dict[str, Any]], extra: list[dict[str, Any]], sizes: list[int]) -> None:
        """One optimizer step over its window of micro-batches."""
        progress = step / max(self.run_facts.planned_steps, 1)
        counts = self.count(window, extra, sizes)
        positions = [self.position(step, progress, i, len(window), counts, size) for i, size in enumerate(sizes)]

        def compute(i: int) -> torch.Tensor:
            terms = self.wrapped("loss", window[i], extra[i], positions[i])
            total = torch.stack([v for v in terms.values() if v.requires_grad]).sum()
            for name, value in {**terms, "loss": total}.items():
                value = value.detach()
                self.log_terms[name] = self.log_terms[name] + value if name in self.log_terms else value
            return total

        if self.backward_hook is not None:
            self.backward_hook(compute, len(window), self.run_facts)
        else:
            for i in range(len(window)):
                with self.accelerator.no_sync(self.wrapped) if i + 1 < len(window) else _nothing():
                    self.accelerator.backward(compute(i))
        self.update(step, progress)

    def update(self, step: int, progress: float) -> None:
        t = self.training
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, t.max_grad_norm or math.inf, foreach=True)
        self.bad = torch.where((self.bad < 0) & ~torch.isfinite(norm), torch.full_like(self.bad, step), self.bad)
        self.rate = self.base_rate() * self.factor_at(step)
        for group in self.optimizer.param_groups:
            scale = optimizer.scale_at(group, progress)
            group["lr"] = self.rate * scale
            if scale == 0:
                for parameter in group["params"]:
                    parameter.grad = None
        self.optimizer.step()
        for strategy in self.strategies.values():
            strategy.after_step(self.bundle.model, progress)
        self.optimizer.zero_grad(set_to_none=True)

    def count(self, window: list[dict[str, Any]], extra: list[dict[str, Any]], sizes: list[int]) -> dict[str, dict[str, Any]]:
        """Units in the window over all ranks, by stream. At least 1, so that an empty window has a loss of 0."""
        local: dict[tuple[str, str], Any] = {}
        for micro, more, size in zip(window, extra, sizes, strict=True):
            for stream, batch in {"train": micro, **more}.items():
                for unit, n in self.task.units(batch).items():
                    local[stream, unit] = local.get((stream, unit), 0) + (n if size else n * 0)
        values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.run_facts.device) for v in local.values()])
        if self.run_facts.world > 1:
            torch.distributed.all_reduce(values)
        counts: dict[str, dict[str, Any]] = {}
        for (stream, unit), value in zip(local, values.clamp(min=1), strict=True):
            counts.setdefault(stream, {})[unit] = value
        return counts

    def position(self, step: int, progress: float, i: int, n: int, counts: Any, rows: int) -> Position:
        run = self.run_facts
        return Position(step, progress, i, n, self.training.seed, run.rank, run.world, counts, rows)

    def batch_plan(self) -> Plan:
        t, run = self.training, self.run_facts
        custom = next((s.batches for s in self.strategies.values() if s.batches is not None), None)
        rows = len(self.info.splits["train"])
        return Plan(rows, global_batch(t, run.world), t.seed, t.dataloader_drop_last, custom, self.info.splits["train"])

    def stream_batches(self, start: int) -> dict[str, Any]:
        """Loaders of the extra streams that strategies asked for, by name; each in the order of its own seed."""
        t, run = self.training, self.run_facts
        found = {}
        for owner, strategy in self.strategies.items():
            for name, stream in strategy.streams().items():
                info = self.info if stream.data == "train" else self.stream_info(stream.data)
                seed = randomness.number("stream", owner, name, t.seed)
                for view in range(stream.views):
                    size = max(1, round(global_batch(t, run.world) * stream.ratio))
                    plan = self.batch_plan() if stream.data == "train" else Plan(len(info.splits["train"]), size, seed % 2**32, True)
                    if plan.steps_per_epoch == 0:
                        plan = Plan(plan.num_rows, plan.num_rows, plan.seed)
                    rows = Rows(info, "train", self.task, self.loaded, transforms(stream.augment), seed + view, train=True)
                    windows = Windows(plan, start, self.stop_at, run.world, run.rank, t.gradient_accumulation_steps)
                    key = name if stream.views == 1 else f"{name}.{view}"
                    found[key] = load_batches(rows, windows, t.dataloader_num_workers, run.device.type == "cuda")
        return found

    def cadence(self, every: float | None, default_epoch: bool) -> int:
        if every is None:
            if not default_epoch:
                return 0
            # after every epoch, but not more than about ten times
            return max(self.batch_plan().steps_per_epoch, math.ceil(self.run_facts.planned_steps / 10))
        return max(1, round(every * self.run_facts.planned_steps)) if 0 < every < 1 else int(every)

    # --- looking, judging, saving ---

    def log(self, done: int, windows: Windows, bar: Any) -> None:
        if done == self.log_since or not self.log_terms:
            return
        steps = done - self.log_since
        values = torch.stack(list(self.log_terms.values())) / steps
        if self.run_facts.world > 1:
            torch.distributed.all_reduce(values)
            values /= self.run_facts.world
        self.check_finite(windows)
        terms = dict(zip(self.log_terms, values.tolist(), strict=True))
        self.log_terms, self.log_since = {}, done
        point = {"step": done, "loss": terms.pop("loss"), "learning_rate": self.rate, "terms": terms}
        self.curve.append(point)
        bar.set_postfix(loss=f"{point['loss']:.4f}", lr=f"{self.rate:.2e}")
        if self.track is not None:
            self.track({"train/loss": point["loss"], "train/learning_rate": self.rate, **{f"train/{k}": v for k, v in terms.items()}}, done)
        logger.debug("step %d: loss %.4f", done, point["loss"])

    def check_finite(self, windows: Windows) -> None:
        """Stop when a gradient was not finite since the last look. Reading the flag waits for the device."""
        step = int(self.bad)
        if step < 0:
            return
        rows = [int(self.info.splits["train"][int(i)]["index"]) for i in windows.rows(step)[:16]]
        terms = {k: float(v) for k, v in self.log_terms.items()}
        wrong = [k for k, v in terms.items() if not math.isfinite(v)]
        raise NonFiniteError(
            f"training became non-finite at step {step + 1} ({', '.join(wrong) or 'gradient'}; training rows {rows})",
            "lower learning_rate, or look at these rows; nothing was saved after that step",
        )

    def evaluate(self, done: int) -> None:
        """Measure on validation data; keep what the choice of the best needs."""
        if "validation" not in self.info.splits:
            return
        found = evaluation.predict(self.wrapped, self.bundle, self.accelerator, self.info, "validation", self.training.per_device_eval_batch_size)
        scores = evaluation.measure(self.task, self.loaded, self.info, found)
        self.evaluations.append({"step": done, **scores.metrics})
        if self.track is not None:
            self.track({f"validation/{k}": v for k, v in scores.metrics.items()}, done)
        name, higher = self.selection()
        if name not in scores.metrics:
            raise RecipeError(f"training.metric_for_best_model: there is no metric '{name}'", f"valid: {', '.join(scores.metrics)}")
        value = scores.metrics[name]
        better = self.best["value"] is None or (value > self.best["value"] if higher else value < self.best["value"])
        logger.info("%s step %d: %s", self.run_facts.folder.name, done, ", ".join(f"{k} {v:.4f}" for k, v in scores.metrics.items()))
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
        """What training changes: trained weights, buffers, and all that strategies registered. Frozen weights of the model come
        from where it was loaded."""
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
            "world": self.run_facts.world,
            "data": self.info.fingerprint,
            "labels": self.loaded.labels,
            "threads": torch.get_num_threads(),
        }
        if self.accelerator.is_main_process:
            protect = {f"step-{self.best['step']:06d}"} if self.best["step"] else set()
            checkpoint.save(self.checkpoints, done, {**tensors, **state}, facts, self.training.save_total_limit, protect)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Continue from the newest checkpoint that verifies; returns the step to start from."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            return 0
        path, facts = found
        if facts["data"] != self.info.fingerprint:
            raise RecipeError(f"{path}: the training data have changed since", "restore them, or start anew with --overwrite")
        rest = checkpoint.load_into(path, self.model_tensors())
        saved = checkpoint.read_tensors(path, {name for name in rest if name.startswith("optim/")})
        optimizer.restore_state(self.optimizer, self.names, {k.removeprefix("optim/"): v for k, v in saved.items()}, self.run_facts.device)
        self.curve, self.evaluations, self.best = facts["curve"], facts["evaluations"], facts["best"]
        logger.warning("%s: resumed at step %d", self.run_facts.folder.name, facts["step"])
        device = self.run_facts.device
        self.log_terms = {k: torch.tensor(v, device=device) for k, v in facts["log_terms"].items()}
        self.log_since, self.seconds = facts["log_since"], facts["seconds"]
        return int(facts["step"])

    def finish(self) -> Result:
        """Take the best weights where asked, fold `eval_model`, then `export` in reverse."""
        steps = self.stop_at
        if self.training.load_best_model_at_end and self.best["step"] not in (None, steps):
            checkpoint.load_into(self.checkpoints / f"step-{self.best['step']:06d}", self.model_tensors())
        trained = sum(p.numel() for p in self.trainable)
        total = sum(p.numel() for p in self.bundle.model.parameters())
        model: nn.Module = self.bundle.model
        for strategy in self.strategies.values():
            model = strategy.eval_model(model)
        for strategy in reversed(list(self.strategies.values())):
            model = strategy.export(model)
        model.eval()
        self.loaded.model = model
        examples = min(steps * global_batch(self.training, self.run_facts.world), steps * len(self.info.splits["train"]))
        cost = {
            "optimizer_steps": steps,
            "seconds": self.seconds,
            "examples_per_second": examples / self.seconds if self.seconds else 0.0,
            "trained_parameters": trained,
            "total_parameters": total,
        }
        return Result(self.loaded, self.curve, self.evaluations, cost, self.best["step"])


def global_batch(training: Training, world: int) -> int:
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * world


def planned_steps(training: Training, num_rows: int, world: int) -> int:
    """Optimizer steps of a training: max_steps, or enough for the epochs."""
    if training.max_steps > 0:
        return training.max_steps
    plan = Plan(num_rows, global_batch(training, world), 0, training.dataloader_drop_last)
    if plan.steps_per_epoch == 0:
        raise DataError(f"{num_rows} training rows do not fill a batch of {plan.global_batch}", "lower the batch size, or dataloader_drop_last=false")
    return max(1, math.ceil(training.num_train_epochs * plan.steps_per_epoch))


def check_stack(strategies: dict[str, Strategy], training: Training, task: Any, where: str) -> None:
    """Refuse stacks that cannot be right, before any weight is loaded. Both parties are named."""
    for hook in ("batches", "backward"):
        owners = [name for name, s in strategies.items() if getattr(s, hook) is not None]
        if len(owners) > 1:
            raise RecipeError(f"{where}: '{owners[0]}' and '{owners[1]}' both decide the {hook}", "use one of them in this stage")
    if training.gradient_accumulation_steps > 1:
        for name, strategy in strategies.items():
            if strategy.scope == "batch":
                raise RecipeError(
                    f"{where}: '{name}' and gradient_accumulation_steps={training.gradient_accumulation_steps} exclude each other: its loss is about the batch as a whole",
                    "raise per_device_train_batch_size, with forward_chunk_size to save memory",
                )
    if not task.has_loss and not any(type(s).adds_objective for s in strategies.values()):
        raise RecipeError(f"{where}: {type(task).__name__} has no loss of its own and no strategy of {', '.join(strategies)} adds one", "add the strategy 'contrastive'")


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...
