"""The conformance kit: registered plugins pass all rules, and each planted fault is named by its own rule alone."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from kt_hf import EnsembleMethod, MergeMethod, ModelRef, Strategy, registry, testing
from kt_hf.testing import waits
from kt_hf.testing.rules import Finding


def broken(kind: str, plugin: Any, **settings: Any) -> dict[str, str]:
    """Broken rules of a plugin, with what was found."""
    return {f.rule: f.note for f in testing.examine(kind, plugin, **settings) if f.passed is False}


# --- what is registered ----------------------------------------------------------------------------------------------

REGISTERED = sorted((k, n) for (k, n), e in registry.entries().items() if e.target.startswith("kt_hf_plugins."))


@pytest.mark.parametrize(("kind", "name"), REGISTERED, ids=[f"{k}:{n}" for k, n in REGISTERED])
def test_every_registered_plugin_conforms(kind: str, name: str):
    found = testing.check_plugin(kind, name)
    assert sum(f.passed is True for f in found) >= 6


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"save": "adapter"}),
    ("finetune", {"linear_probe": True}),
    ("finetune", {"layer_decay": 0.5, "head_scale": 2.0}),
    ("contrastive", {"loss": "siglip", "lock_image": True}),
    ("ema", {"decay": 0.5, "warmup": True}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=[f"{n}-{'-'.join(s)}" for n, s in VARIANTS])
def test_settings_that_change_the_model_conform(name: str, settings: dict[str, Any]):
    testing.check_strategy(name, **settings)


@pytest.mark.parametrize(
    ("name", "task"), [("lora", "text-generation"), ("distill", "text-classification"), ("ema", "text-generation")]
)
def test_strategies_conform_on_text(name: str, task: str):
    testing.check_strategy(name, task=task)


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.names("strategy"))
def test_other_processes(name: str):
    found = {f.rule: f for f in testing.check_strategy(name, thorough=True)}
    assert found["new-process-resumes-exactly"].passed and found["two-processes-equal-one"].passed is not False


# --- four planted faults ---------------------------------------------------------------------------------------------


class StoresTheModel(Strategy):
    """Keeps the model for later, in a place where nn.Module does not look."""

    scope = "weights"

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[str, Any] = {}

    def ready(self, model: nn.Module, run: Any) -> None:
        self.notes["later"] = [model]

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        size = torch.stack([p.square().sum() for p in self.notes["later"][0].parameters()]).sum()
        return {"size": step.once(1e-3 * size)}


class TrainsItsTeacher(Strategy):
    """Distils from a teacher that learns, too."""

    adds_objective = True

    def __init__(self, *, teacher: ModelRef):
        super().__init__()
        self.teacher = teacher

    def ready(self, model: nn.Module, run: Any) -> None:
        self.other = run.frozen(self.teacher).members[0].model.requires_grad_(True)

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        student_NC, weight_N = step.task.scores(step.outputs, step.batch)
        teacher_NC, _ = step.task.scores(step.task.forward(self.other, step.batch), step.batch)
        return {
            "kl": step.mean(F.mse_loss(student_NC, teacher_NC, reduction="none").mean(-1), weight_N, step.task.unit)
        }


class CountsInAnAttribute(Strategy):
    """Fades out over steps that it counts itself."""

    scope = "weights"

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        size = torch.stack([p.square().sum() for p in step.model.parameters()]).sum()
        return {"size": step.once(size * 1e-2 / (1 + self.steps))}

    def after_step(self, model: nn.Module, progress: float) -> None:
        self.steps += 1


class HidesItsProjector(Strategy):
    """Compares scores through a projector that stands in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.tools: list[nn.Module] = []

    def ready(self, model: nn.Module, run: Any) -> None:
        self.tools = [nn.Linear(len(run.info.labels), 4)]

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        scores_NC, weight_N = step.task.scores(step.outputs, step.batch)
        return {"projected": step.mean(self.tools[0](scores_NC).square().mean(-1), weight_N, step.task.unit)}


@pytest.mark.parametrize(
    ("cls", "rule", "said"),
    [
        (StoresTheModel, "does-not-store-the-model", "notes['later'][0] (ViTForImageClassification)"),
        (TrainsItsTeacher, "teachers-stay-frozen", "is trained"),
        (CountsInAnAttribute, "state-in-named-tensors", "steps"),
        (HidesItsProjector, "trained-modules-are-registered", "tools[0].weight"),
    ],
)
def test_planted_faults_are_named_by_their_rule_alone(cls: type, rule: str, said: str):
    found = broken("strategy", cls)
    assert list(found) == [rule] and said in found[rule]
    with pytest.raises(testing.NotConforming, match=rule) as caught:
        testing.check_strategy(cls)
    assert caught.value.broken == [rule]


# --- further faults: no rule is for show -----------------------------------------------------------------------------


class Sound(Strategy):
    """Nothing wrong with it: the faults below differ from it in one thing each."""

    def __init__(self, *, weight: float = 0.1):
        super().__init__()
        self.weight = weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def ready(self, model: nn.Module, run: Any) -> None:
        self.project = nn.Linear(len(run.info.labels), 4)

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        scores_NC, weight_N = step.task.scores(step.outputs, step.batch)
        return {
            "projected": self.weight * step.mean(self.project(scores_NC).square().mean(-1), weight_N, step.task.unit)
        }

    def after_step(self, model: nn.Module, progress: float) -> None:
        self.steps += 1


class KeepsTheRun(Sound):
    """Leads to the model through the run."""

    def ready(self, model: nn.Module, run: Any) -> None:
        super().ready(model, run)
        self.run = run


class ClosesOverTheModel(Sound):
    """Leads to the model through a function."""

    def ready(self, model: nn.Module, run: Any) -> None:
        super().ready(model, run)
        self.size = lambda: sum(p.numel() for p in model.parameters())


class SharesMemory(Sound):
    """Its anchor is no copy."""

    def ready(self, model: nn.Module, run: Any) -> None:
        super().ready(model, run)
        self.register_buffer("anchor", next(iter(model.parameters())).detach())


class RegistersItsTeacher(Sound):
    """A frozen teacher in every checkpoint."""

    def __init__(self, *, teacher: ModelRef, weight: float = 0.1):
        super().__init__(weight=weight)
        self.teacher = teacher

    def ready(self, model: nn.Module, run: Any) -> None:
        super().ready(model, run)
        self.other = run.frozen(self.teacher).members[0].model


class TakesAMean(Sound):
    """A mean over the micro-batch alone."""

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        scores_NC, _ = step.task.scores(step.outputs, step.batch)
        return {"projected": self.project(scores_NC).square().mean()}


class GrowsLater(Sound):
    """A buffer that is made in the first step."""

    def after_step(self, model: nn.Module, progress: float) -> None:
        super().after_step(model, progress)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(2))


class MovesFrozenWeights(Sound):
    """Writes into what is frozen."""

    def setup(self, model: nn.Module, run: Any) -> nn.Module:
        next(iter(model.parameters())).requires_grad_(False)
        return model

    def after_step(self, model: nn.Module, progress: float) -> None:
        super().after_step(model, progress)
        next(iter(model.parameters())).data.add_(1e-3)


class LeavesAWeightOut(Sound):
    """A parameter that nothing uses."""

    def ready(self, model: nn.Module, run: Any) -> None:
        super().ready(model, run)
        self.unused = nn.Parameter(torch.zeros(2))


class IsNotNeutral(Sound):
    """Its neutral setting leaves a trace."""

    neutral = {"weight": 0.0}

    def task_weight(self, progress: float) -> float:
        return 0.999


class DrawsByItself(Sound):
    """A generator of its own, which a checkpoint does not hold."""

    def __init__(self, *, weight: float = 0.1):
        super().__init__(weight=weight)
        self.random = torch.Generator().manual_seed(0)

    def task_weight(self, progress: float) -> float:
        return float(1 + torch.rand((), generator=self.random))


class ForgetsABuffer(Sound):
    """Counts in a buffer that is not saved."""

    def __init__(self, *, weight: float = 0.1):
        super().__init__(weight=weight)
        self.register_buffer("lost", torch.zeros(()), persistent=False)

    def after_step(self, model: nn.Module, progress: float) -> None:
        self.lost += 1


COUNTS: list[int] = []


class CountsInItsModule(Sound):
    """Counts in a global list."""

    def task_weight(self, progress: float) -> float:
        return 1.0 / (1 + len(COUNTS))

    def after_step(self, model: nn.Module, progress: float) -> None:
        COUNTS.append(1)


class SaysNothing(Sound):
    """Describes itself in no words."""

    def describe(self) -> str:
        return ""


class NeedsASetting(Sound):
    """Has a setting without a default, and no `conformance` that gives one."""

    def __init__(self, *, width: int):
        super().__init__(weight=width)


class DeclaresItsSetting(NeedsASetting):
    """The same, with a word to the kit."""

    conformance = {"settings": {"width": 1}, "task": "text-classification"}

    def __init__(self, *, width: int):
        super().__init__(width=width)


class SwapsForEvaluation(Sound):
    """Evaluation leaves other weights behind."""

    def eval_model(self, model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.99)
        return model


class DiffersFromItsExport(Sound):
    """Hooks the model, which no saved file can hold."""

    def export(self, model: nn.Module) -> nn.Module:
        model.classifier.register_forward_hook(lambda module, inputs, output: output + 1)  # type: ignore[operator, union-attr]
        return model


class IsUntyped(Sound):
    """A setting that says nothing of itself."""

    def __init__(self, *, weight=0.1):  # type: ignore[no-untyped-def]
        super().__init__(weight=weight)


class IsPositional(Sound):
    """A setting by position."""

    def __init__(self, weight: float = 0.1):
        super().__init__(weight=weight)


class Explodes(Sound):
    """Divides by nothing."""

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        return {"bad": super().loss(step)["projected"] / 0}


@pytest.mark.parametrize("cls", [Sound, DeclaresItsSetting])
def test_sound_ones_pass(cls: type):
    assert broken("strategy", cls) == {}


@pytest.mark.parametrize(
    ("cls", "rule"),
    [
        (KeepsTheRun, "does-not-store-the-model"),
        (ClosesOverTheModel, "does-not-store-the-model"),
        (SharesMemory, "does-not-store-the-model"),
        (RegistersItsTeacher, "teachers-stay-outside"),
        (TakesAMean, "accumulation-equals-one-batch"),
        (GrowsLater, "state-is-final-after-ready"),
        (MovesFrozenWeights, "frozen-weights-stay"),
        (LeavesAWeightOut, "every-trained-weight-gets-a-gradient"),
        (IsNotNeutral, "neutral-equals-absence"),
        (DrawsByItself, "state-in-named-tensors"),
        (ForgetsABuffer, "state-in-named-tensors"),
        (CountsInItsModule, "resumes-exactly"),
        (SaysNothing, "says-what-it-does"),
        (NeedsASetting, "builds"),
        (SwapsForEvaluation, "looking-changes-nothing"),
        (DiffersFromItsExport, "export-loads-elsewhere"),
        (IsUntyped, "settings-are-typed-keywords"),
        (IsPositional, "settings-are-typed-keywords"),
        (Explodes, "trains-finitely"),
    ],
)
def test_every_rule_can_fail(cls: type, rule: str):
    assert rule in broken("strategy", cls)


BORROWER = """
from kt_hf import Strategy
class Borrower(Strategy):
    "Borrows from a neighbour."
    def setup(self, model, run):
        from kt_hf_plugins import ema
        return model
"""


def test_plugins_do_not_import_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "planted_borrower.py").write_text(BORROWER)
    monkeypatch.syspath_prepend(tmp_path)
    found = broken("strategy", importlib.import_module("planted_borrower").Borrower)
    assert list(found) == ["imports-no-other-plugin"] and "kt_hf_plugins.ema" in found["imports-no-other-plugin"]


class SumsUp(MergeMethod):
    """A sum, which is no mean."""

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: Any, stats: Any) -> torch.Tensor:
        return torch.stack(tensors_M).sum(0)


class TakesTheFirst(MergeMethod):
    """The first parent, in place and in half precision, by turns."""

    def __init__(self) -> None:
        self.calls = 0

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: Any, stats: Any) -> torch.Tensor:
        self.calls += 1
        return tensors_M[0].mul_(1 + 1e-3 * self.calls).half()


class SpreadsTheMeans(MergeMethod):
    """Of a whole tensor, though it says that it goes by elements."""

    elementwise = True

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: Any, stats: Any) -> torch.Tensor:
        means_M = torch.stack([t.mean() for t in tensors_M])
        return torch.stack(tensors_M).mean(0) + (means_M.max() - means_M.min())


class HidesItsBase(MergeMethod):
    """A task vector without saying so."""

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: Any, stats: Any) -> torch.Tensor:
        return base + (torch.stack(tensors_M) - base).mean(0)


class SaysItAddsUp(MergeMethod):
    """What depends on the tensors' sizes is no weighted sum."""

    linear = True

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: Any, stats: Any) -> torch.Tensor:
        return torch.stack(tensors_M).mean(0) * (1 + torch.stack(tensors_M).std(0))


class AddsUpAsStored(MergeMethod):
    """In the parents' precision, though it says that it converts."""

    as_stored = True
    order_matters = True

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: Any, stats: Any) -> torch.Tensor:
        return tensors_M[0] + (torch.stack(tensors_M[1:]).mean(0) - tensors_M[1]) / 2


def test_merges_can_fail():
    assert set(broken("merge", AddsUpAsStored)) == {"converts-what-is-stored"}
    assert "linear-is-a-weighted-sum" in broken("merge", SaysItAddsUp)
    assert set(broken("merge", SpreadsTheMeans)) == {"pieces-give-the-whole"}
    assert set(broken("merge", HidesItsBase)) == {"does-without-a-base"}
    assert set(broken("merge", SumsUp)) == {"copies-give-the-model"}
    assert {"order-does-not-matter", "keeps-the-dtype", "tensor-by-tensor", "leaves-the-parents"} <= set(
        broken("merge", TakesTheFirst)
    )


class FavoursTheFirst(EnsembleMethod):
    """Unnormalised, it excludes what one member does not know, and it forgets its weights."""

    def __init__(self, *, weights: list[float] | None = None):
        self.weights = weights

    @property
    def needs_validation(self) -> bool:  # type: ignore[override]
        return self.weights is None

    def fit(self, scores_KNC: torch.Tensor, labels_N: torch.Tensor) -> None:
        self.weights = [0.9, *[0.1] * (len(scores_KNC) - 1)]

    def combine(self, scores_KNC: torch.Tensor) -> torch.Tensor:
        weights_K = torch.tensor(self.weights)
        return (weights_K[:, None, None] * scores_KNC.log_softmax(-1)).sum(0).log_softmax(-1)


def test_ensembles_can_fail():
    assert set(broken("ensemble", FavoursTheFirst)) == {
        "classes-that-a-member-does-not-know",
        "one-member-is-the-member",
        "order-does-not-matter",
        "state-rebuilds-it",
    }


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_a_task_that_picks_by_a_mask_is_seen_to_wait(monkeypatch: pytest.MonkeyPatch):
    def loss(self: Any, outputs: Any, batch: dict[str, Any], label_smoothing: float = 0.0) -> Any:
        hidden_BL = batch["labels"] != -100
        values_N = F.cross_entropy(outputs.logits[hidden_BL], batch["labels"][hidden_BL], reduction="none")
        return values_N, None, "token"

    cls = registry.load("task", "fill-mask")
    monkeypatch.setattr(cls, "loss", loss)
    found = broken("task", "fill-mask")
    assert list(found) == ["waits-for-no-device"] and "index (test_conformance.py:" in found["waits-for-no-device"]
    monkeypatch.setattr(cls, "waits", {"index": "for a test", "index_put": "for a test"})
    assert broken("task", "fill-mask") == {}


X, MASK, ONE = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([True, False, True]), torch.tensor([1])


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("index", lambda: X[MASK]),
        ("index_put_", lambda: X.clone().__setitem__(MASK, X[:2])),
        ("nonzero", lambda: torch.where(MASK)),
        ("masked_select", lambda: X.masked_select(MASK)),
        ("_unique2", lambda: X.unique()),
        ("repeat_interleave", lambda: torch.repeat_interleave(torch.tensor([1, 2]))),
        ("_local_scalar_dense", lambda: X.sum().item()),
        ("_local_scalar_dense", lambda: X[0] if MASK.any() else None),
        ("multinomial", lambda: torch.multinomial(X, 1)),
        ("_ctc_loss", lambda: F.ctc_loss(torch.zeros(2, 1, 3), ONE[None], ONE, ONE)),
        ("tolist", lambda: X.tolist()),
        ("cpu", lambda: X.cpu()),
        ("to", lambda: X.to("cpu")),
        ("numpy", lambda: X.numpy()),
        ("tensor", lambda: torch.tensor([1, 2], device=X.device)),
        ("new_tensor", lambda: X.new_tensor([1, 2])),
        ("", lambda: X[X.argsort()[:2]] + torch.where(MASK, X, 0.0).masked_fill(MASK, 1.0)[:2]),
        ("", lambda: X.to(MASK.device).new_zeros(3).index_add(0, MASK.long(), X).topk(2).values[-1]),
        ("", lambda: torch.full((), 2.0, device=X.device) * X.cumsum(0).argsort().float()),
    ],
)
def test_what_waits_is_told_from_what_does_not(name: str, work: Any):
    with waits.watching() as watch:
        work()
    assert [wait.name for wait in watch.found] == ([name] if name else [])


def test_a_models_own_forward_is_told_apart():
    class Picks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0]

    model = Picks()
    with waits.watching(nn.Sequential(model)) as watch:
        model(X)
    assert not watch.found and [wait.name for wait in watch.in_model] == ["index"]


# --- the kit itself --------------------------------------------------------------------------------------------------


def test_rules_have_distinct_names_and_say_what_they_demand():
    for kind in registry.KINDS:
        rules = testing.rules(kind)
        assert len({r.name for r in rules}) == len(rules) and all(r.text.endswith(".") for r in rules)


def test_findings_read_well():
    assert str(Finding("a-rule", False, "why")) == "BROKEN a-rule: why"
    error = testing.NotConforming("strategy 'x'", [Finding("a", True), Finding("b", False, "why")])
    assert error.broken == ["b"] and "breaks 1 of 2 rules" in str(error) and "b: why" in str(error)


def test_it_is_tried_on_the_cpu_where_the_process_took_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Accelerate's state is one for a process, and refuses another device than it has."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    from kt_hf.testing.bench import cpu_accelerator, on_cpu

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for state in (PartialState, AcceleratorState):
        known = {"device": torch.device("cuda", 0), "distributed_type": DistributedType.NO}
        monkeypatch.setattr(state, "_shared_state", known)
    AcceleratorState._shared_state["marked"] = True  # more than the other's: it was set up
    with pytest.raises(ValueError, match="already been initialized"):
        cpu_accelerator()
    with on_cpu():
        assert cpu_accelerator().device.type == "cpu"
        assert Accelerator().device.type == "cpu"
    assert PartialState._shared_state["device"].type == "cuda" == AcceleratorState._shared_state["device"].type
    assert AcceleratorState._shared_state["marked"] and "ACCELERATE_USE_CPU" not in os.environ
