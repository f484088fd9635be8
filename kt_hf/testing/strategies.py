"""Rules for strategies. All but the first look at tiny trainings by the real trainer, made once for each case."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kt_hf import settings
from kt_hf.bundle import Frozen
from kt_hf.data import DataInfo
from kt_hf.errors import KtError
from kt_hf.facts import Run
from kt_hf.strategy import Strategy
from kt_hf.task import Loaded, Task
from kt_hf.testing import exports
from kt_hf.testing.bench import Bench, Trained, copy_state, differing, other_draws
from kt_hf.testing.plugin import Case
from kt_hf.testing.reach import leaves, reach
from kt_hf.testing.rules import NotApplicable, demand, rule

TASKS = ("image-classification", "zero-shot-image-classification", "text-classification", "text-generation")
STEPS, HALF = 4, 2
_NOT_ITS_OWN = (Run, DataInfo, Frozen, Loaded, Task)


class Watch(Strategy):
    """Looks at another strategy from the end of the stack; changes nothing."""

    def __init__(self, strategy: Strategy | None):
        super().__init__()
        self.look = lambda: strategy  # a closure, so that it is no submodule of this one
        self.frozen: dict[str, torch.Tensor] = {}
        self.moved: set[str] = set()
        self.shapes: list[dict[str, Any]] = []
        self.gradients: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        self.loose: dict[str, str] = {}

    def ready(self, model: nn.Module, run: Any) -> None:
        self.frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        self.inspect(model)

    def after_step(self, model: nn.Module, progress: float) -> None:
        self.moved |= {
            n for n, p in model.named_parameters() if n in self.frozen and not torch.equal(p, self.frozen[n])
        }
        strategy = self.look()
        if strategy is None:
            return
        scales = {name: strategy.lr_scale(name) for name, _ in model.named_parameters()}
        parameters = [*model.named_parameters(), *((f"the strategy's {n}", p) for n, p in strategy.named_parameters())]
        for name, p in parameters:
            scale = scales.get(name, 1.0)
            if p.requires_grad and (scale(progress) if callable(scale) else scale) != 0:
                now = "none" if p.grad is None else "zero" if not p.grad.any() else "some"
                before = self.gradients.get(name)
                self.gradients[name] = (
                    now
                    if before is None or now == "none"
                    else before
                    if now == "zero"
                    else "some"
                    if before != "none"
                    else before
                )
        self.inspect(model)

    def inspect(self, model: nn.Module) -> None:
        """What the strategy keeps of the model, and what it would train beside the module tree."""
        strategy = self.look()
        if strategy is None:
            return
        self.shapes.append({n: tuple(t.shape) for n, t in strategy.state_dict().items() if isinstance(t, torch.Tensor)})
        modules = {id(m) for m in model.modules()}
        trained = {
            p.untyped_storage().data_ptr(): name
            for name, p in model.named_parameters()
            if p.requires_grad and p.numel()
        }
        own = {id(m) for m in strategy.modules()} | {id(p) for p in strategy.parameters()}
        for path, item in reach(strategy):
            if isinstance(item, nn.Module) and id(item) in modules:
                self.kept.setdefault(path, type(item).__name__)
            elif (
                isinstance(item, torch.Tensor)
                and not item.is_meta
                and item.numel()
                and item.untyped_storage().data_ptr() in trained
            ):
                self.kept.setdefault(path, f"the weights {trained[item.untyped_storage().data_ptr()]}")
            elif id(item) not in own and isinstance(item, nn.Parameter) and item.requires_grad:
                self.loose.setdefault(path, f"parameter of shape {tuple(item.shape)}")


class StrategyCase(Case):
    """A strategy with its bench. Trainings are made when a rule asks, each once."""

    bench: Bench

    def __init__(self, name: str, cls: type, given: dict[str, Any], folder: Path, task: str | None):
        super().__init__("strategy", name, cls, given, folder)
        self.tasks = (task,) if task else (self.declared["task"],) if "task" in self.declared else TASKS
        self.bench = Bench(self.tasks[0], folder / self.tasks[0])

    def settings(self, **changes: Any) -> dict[str, Any]:
        """References that the strategy cannot do without are filled in: a teacher, a data set."""
        filled: dict[str, Any] = {}
        for name in required(self.cls, "model"):
            filled[name] = self.bench.saved("teacher")
        for name in required(self.cls, "data"):
            filled[name] = "bench"
        return super().settings(**{**{k: v for k, v in filled.items() if k not in self.given}, **changes})

    def train(
        self, where: str, changes: dict[str, Any] | None = None, absent: bool = False, **training: Any
    ) -> tuple[Trained, Watch]:
        strategy = None if absent else self.build(**(changes or {}))
        watch = Watch(strategy)
        stack: dict[str, Strategy] = {"watch": watch} if strategy is None else {self.name: strategy, "watch": watch}
        return self.bench.train(stack, self.folder / self.bench.name / where, **training), watch

    @functools.cached_property
    def whole(self) -> tuple[Trained, Watch]:
        """All steps, with evaluations and a checkpoint half-way, on the first task that the strategy is for."""
        refused: KtError | None = None
        for task in self.tasks:
            if task != self.bench.name:
                self.bench = Bench(task, self.folder / task)
            try:
                return self.train("whole", dropout=0.1, max_steps=STEPS, save_steps=HALF, eval_steps=1)
            except KtError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    @functools.cached_property
    def resumed(self) -> tuple[Trained, Watch]:
        """Fresh objects that find the checkpoint of `whole`."""
        self.whole  # noqa: B018
        return self.train("whole", dropout=0.1, max_steps=STEPS, save_steps=HALF, eval_steps=1)

    @functools.cached_property
    def checkpoint(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        path = self.whole[0].folder / "checkpoints" / f"step-{HALF:06d}" / "state.safetensors"
        return load_file(path)

    def exact(self, where: str, **training: Any) -> Trained:
        """A training in which rounding is all that may differ: no dropout, an optimizer that does not magnify it."""
        return self.train(where, optim="sgd", learning_rate=0.05, max_steps=3, **training)[0]


def required(cls: type, kind: str) -> list[str]:
    required = [name for name, (_, p) in settings.parameters(cls).items() if p.default is p.empty]
    return list(settings.references(cls, dict.fromkeys(required, "x"), kind))


def some(names: Any) -> str:
    listed = [str(n) for n in names]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


# --- training --------------------------------------------------------------------------------------------------------

TRAINS = "trains-finitely"


@rule("strategy", TRAINS, needs=("builds",))
def trains_finitely(case: StrategyCase) -> None:
    """It trains some steps; losses and weights stay finite, and something is trained."""
    trained, _ = case.whole
    demand(len(trained.losses) == STEPS, f"{len(trained.losses)} of {STEPS} steps were logged")
    demand(all(map(math.isfinite, trained.losses)), f"losses {trained.losses}")
    tensors = {**trained.weights, **{f"the strategy's {k}": v for k, v in trained.state.items()}}
    demand(
        not (bad := [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]),
        f"not finite: {some(bad)}",
    )


@rule("strategy", "every-trained-weight-gets-a-gradient", needs=(TRAINS,))
def every_trained_weight_gets_a_gradient(case: StrategyCase) -> None:
    """Every trainable parameter whose rate is not 0 has a gradient in every step, and not only zeros."""
    found = case.whole[1].gradients
    demand(
        not (names := [n for n, g in found.items() if g == "none"]),
        f"without gradient: {some(names)}; freeze what is not trained",
    )
    demand(not (names := [n for n, g in found.items() if g == "zero"]), f"its gradient is always 0: {some(names)}")


@rule("strategy", "frozen-weights-stay", needs=(TRAINS,))
def frozen_weights_stay(case: StrategyCase) -> None:
    """What is frozen of the model after `setup` and `ready` is the same after training, bit for bit."""
    moved = case.whole[1].moved
    demand(not moved, f"frozen weights have changed: {some(sorted(moved))}")


# --- teachers --------------------------------------------------------------------------------------------------------

STAY = "teachers-stay-frozen"


def teachers(case: StrategyCase) -> list[tuple[str, Any, dict[str, torch.Tensor]]]:
    found = case.whole[0].run.teachers
    if not found:
        raise NotApplicable("it has no teacher")
    return found


@rule("strategy", STAY, needs=(TRAINS,))
def teachers_stay_frozen(case: StrategyCase) -> None:
    """Teachers are in eval mode, ask for no gradient, are in no optimizer and keep every weight, bit for bit."""
    optimized = {id(p) for group in case.whole[0].trainer.optimizer.param_groups for p in group["params"]}
    for ref, model, before in teachers(case):
        asking = [n for n, p in model.named_parameters() if p.requires_grad or id(p) in optimized]
        demand(not asking, f"teacher '{_last(ref)}' is trained: {some(asking)}")
        changed = differing(before, copy_state(model))
        demand(not changed, f"teacher '{_last(ref)}' has changed: {some(changed)}")
        demand(not any(m.training for m in model.modules()), f"teacher '{_last(ref)}' is in training mode")


@rule("strategy", "teachers-stay-outside", needs=(TRAINS, STAY))
def teachers_stay_outside(case: StrategyCase) -> None:
    """No teacher is registered in the model or the strategy, saved in a checkpoint or exported."""
    trained = case.whole[0]
    for ref, model, before in teachers(case):
        storages = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers()) if p.numel()}
        held = [
            n
            for n, t in trained.trainer.bundle.state_dict().items()
            if isinstance(t, torch.Tensor) and t.numel() and t.untyped_storage().data_ptr() in storages
        ]
        demand(
            not held,
            f"teacher '{_last(ref)}' is registered: {some(held)}; keep what `run.frozen` returns, not its model",
        )
        copies = [
            n
            for n, t in case.checkpoint.items()
            if n.startswith("strategies/") or n.startswith("strategies.")
            if _among(t, before)
        ]
        demand(not copies, f"a copy of teacher '{_last(ref)}' is in the checkpoint: {some(copies)}")
        exported = [
            n
            for n, t in trained.result.loaded.model.state_dict().items()
            if t.numel() and t.untyped_storage().data_ptr() in storages
        ]
        demand(not exported, f"teacher '{_last(ref)}' is exported: {some(exported)}")


def _among(tensor: torch.Tensor, state: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor that is no mere constant occurs in a state."""
    if tensor.numel() < 2 or bool((tensor == tensor.reshape(-1)[0]).all()):
        return False
    return any(t.shape == tensor.shape and t.dtype == tensor.dtype and torch.equal(t, tensor) for t in state.values())


def _last(ref: str) -> str:
    return ref.rpartition("/")[2]


# --- what it keeps ---------------------------------------------------------------------------------------------------


@rule("strategy", "does-not-store-the-model", needs=(TRAINS,))
def does_not_store_the_model(case: StrategyCase) -> None:
    """Nothing that it leads to, at any depth, is the model, a part of it, or memory of its trained weights."""
    kept = case.whole[1].kept
    demand(not kept, f"it keeps {some(f'{path} ({what})' for path, what in kept.items())}; hooks are given the model")


@rule("strategy", "trained-modules-are-registered", needs=(TRAINS, STAY, "does-not-store-the-model"))
def trained_modules_are_registered(case: StrategyCase) -> None:
    """What asks for gradients is a submodule or parameter; in a list or a dictionary nobody trains or saves it."""
    loose = case.whole[1].loose
    listed = some(f"{path} ({what})" for path, what in loose.items())
    demand(not loose, f"outside of the module tree: {listed}; use nn.ModuleList or an attribute")


@rule("strategy", "state-is-final-after-ready", needs=(TRAINS,))
def state_is_final_after_ready(case: StrategyCase) -> None:
    """Names and shapes of the strategy's state are the same after `ready` and after training."""
    first, *_, last = case.whole[1].shapes
    odd = sorted(n for n in first.keys() | last.keys() if first.get(n) != last.get(n))
    demand(not odd, f"changed after `ready`: {some(odd)}")


# --- exactness -------------------------------------------------------------------------------------------------------


@rule("strategy", "neutral-equals-absence", needs=(TRAINS,))
def neutral_equals_absence(case: StrategyCase) -> None:
    """With its `neutral` settings, losses and exported weights are those of a run without it, bit for bit."""
    if case.cls.neutral is None:  # type: ignore[attr-defined]
        raise NotApplicable("it declares no neutral settings")
    case.whole  # noqa: B018  settles the task
    if not case.bench.task.has_loss:
        raise NotApplicable(f"{case.bench.name} has no loss of its own")
    neutral = case.train("neutral", case.cls.neutral, dropout=0.1)[0]  # type: ignore[attr-defined]
    absent = case.train("absent", absent=True, dropout=0.1)[0]
    demand(neutral.losses == absent.losses, f"losses {neutral.losses}, without it {absent.losses}")
    demand(not (names := differing(neutral.weights, absent.weights)), f"other weights than without it: {some(names)}")


NAMED = "state-in-named-tensors"


@rule("strategy", NAMED, needs=(TRAINS,))
def state_in_named_tensors(case: StrategyCase) -> None:
    """What training changes in the strategy is a parameter or buffer; after resuming, nothing else differs either."""
    plain = [_plain_state(trained.strategy) for trained in (case.whole[0], case.resumed[0])]
    odd = sorted(k for k in plain[0].keys() | plain[1].keys() if plain[0].get(k) != plain[1].get(k))
    demand(not odd, f"a resumed run has another {some(odd)}; state is saved from buffers and parameters alone")


def _plain_state(strategy: Strategy | None) -> dict[str, Any]:
    assert strategy is not None
    saved = strategy.state_dict(keep_vars=True)  # without buffers that are not persistent
    return leaves(strategy, {id(t) for t in saved.values()}, _NOT_ITS_OWN)


@rule("strategy", "resumes-exactly", needs=(TRAINS, NAMED))
def resumes_exactly(case: StrategyCase) -> None:
    """Some steps, fresh objects from the checkpoint, and the other steps equal all steps at once, bit for bit."""
    same(case.whole[0], case.resumed[0], "after resuming")


def same(one: Trained, two: Trained, when: str, **tolerance: float) -> None:
    """Demand equal exported weights and equal state of the strategy."""
    demand(not (names := differing(one.weights, two.weights, **tolerance)), f"other weights {when}: {some(names)}")
    demand(
        not (names := differing(one.state, two.state, **tolerance)),
        f"another state of the strategy {when}: {some(names)}",
    )


@rule("strategy", "looking-changes-nothing", needs=(TRAINS,))
def looking_changes_nothing(case: StrategyCase) -> None:
    """Evaluating and saving in between leave losses and weights as they are, bit for bit."""
    unseen = case.train("unseen", dropout=0.1, max_steps=STEPS)[0]
    demand(unseen.losses == case.whole[0].losses, f"losses {unseen.losses}, with evaluation {case.whole[0].losses}")
    same(unseen, case.whole[0], "with evaluation")


@rule("strategy", "accumulation-equals-one-batch", needs=(TRAINS, NAMED))
def accumulation_equals_one_batch(case: StrategyCase) -> None:
    """Two micro-batches of b rows train as one batch of 2 b: reductions are by the count over the whole window."""
    if case.cls.scope == "batch":  # type: ignore[attr-defined]
        raise NotApplicable("its loss is about the batch as a whole")
    if draws(case):
        raise NotApplicable("it draws random numbers for every micro-batch")
    halves = case.exact("halves", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    same(case.at_once, halves, "from two micro-batches", rtol=1e-4, atol=2e-6)  # type: ignore[attr-defined]


def draws(case: StrategyCase) -> bool:
    """Whether other seeds per micro-batch change what it does; dropout is off."""
    case.whole  # noqa: B018  settles the task
    case.at_once = case.exact("at-once", per_device_train_batch_size=8)  # type: ignore[attr-defined]
    with other_draws():
        salted = case.exact("salted", per_device_train_batch_size=8)
    return bool(differing(case.at_once.weights, salted.weights))  # type: ignore[attr-defined]


@rule("strategy", "export-loads-elsewhere", needs=(TRAINS,))
def export_loads_elsewhere(case: StrategyCase) -> None:
    """The saved model loads in plain transformers, peft or open_clip and gives the same outputs."""
    trained = case.whole[0]
    exports.check(case.bench, trained.result.loaded, trained.folder / "export")


# --- other processes -------------------------------------------------------------------------------------------------


@rule("strategy", "new-process-resumes-exactly", needs=(TRAINS, "resumes-exactly"), thorough=True)
def new_process_resumes_exactly(case: StrategyCase) -> None:
    """As `resumes-exactly`, with a process that is killed and a new one."""
    from kt_hf.testing import worker

    killed = worker.train(case, "killed", dropout=0.1, max_steps=STEPS, save_steps=HALF, eval_steps=1, kill=True)
    demand(killed is None, "the process was to be killed and was not")
    continued = worker.train(case, "killed", dropout=0.1, max_steps=STEPS, save_steps=HALF, eval_steps=1)
    assert continued is not None
    once = worker.outcome(case.whole[0])
    demand(not (names := differing(once, continued)), f"a new process ends with other values: {some(names)}")


@rule("strategy", "two-processes-equal-one", needs=(TRAINS, NAMED), thorough=True)
def two_processes_equal_one(case: StrategyCase) -> None:
    """Two processes with b rows each train as one with 2 b rows."""
    from kt_hf.testing import worker

    if draws(case):
        raise NotApplicable("it draws random numbers for every process")
    exact: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3}
    one = worker.outcome(case.train("one", per_device_train_batch_size=8, **exact)[0])
    two = worker.train(case, "two", processes=2, per_device_train_batch_size=4, **exact)
    assert two is not None
    demand(not (names := differing(one, two, rtol=1e-4, atol=2e-6)), f"other values from two processes: {some(names)}")
