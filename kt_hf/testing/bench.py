"""The bench of the conformance kit: tiny data and models, made on the spot, and one training by the real trainer.

Everything is drawn with fixed seeds, so that another process can set up the same bench.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from PIL import Image

from kt_hf import randomness, registry
from kt_hf.bundle import Frozen
from kt_hf.data import DataInfo
from kt_hf.errors import RecipeError
from kt_hf.facts import Run
from kt_hf.recipe import TOWERS, Data, Model, Training
from kt_hf.strategy import Strategy
from kt_hf.task import Loaded, Task
from kt_hf.trainer import Result, Trainer

LABELS = ("circle", "square", "star")
WORDS = tuple(f"{a}{b}" for a in ("red", "blue", "old", "new") for b in ("stone", "river", "lamp", "cloud"))
ROWS = {"train": 24, "validation": 9, "test": 9}
_DROPOUT = ("dropout", "dropout_prob", "_pdrop", "_drop")
"""How fields of configurations end that say how much is dropped."""


def fresh_model(task: str, dropout: float = 0.0) -> Model:
    """What the kit tries a task's strategies on, as its `conformance["model"]` says; its dropout is as asked for."""
    found = getattr(registry.load("task", task), "conformance", {}).get("model")
    if found is None:
        raise RecipeError(
            f"the kit knows no tiny model for '{task}'", "declare one in its class: conformance = {'model': {...}}"
        )
    return _fresh(found, dropout)


def _fresh(given: dict[str, Any], dropout: float) -> Model:
    fields: dict[str, Any] = {k: _fresh(v, dropout) if k in TOWERS else v for k, v in given.items()}
    overrides = fields.get("config_overrides", {})
    drop = {name: dropout for name in overrides if name.endswith(_DROPOUT)}
    if overrides:
        fields["config_overrides"] = {**overrides, **drop}
    return Model(**fields)


def make_data(name: str, task: Task, seed: int = 0) -> DataInfo:
    """A data set with the columns that the task requires: its own sample, or images, words and classes that belong
    together."""
    random = np.random.default_rng(seed)
    named = type(task).conformance.get("roles")
    roles = [r for r in task.roles if (r.name in named if named else r.required)]
    splits = {}
    for split, count in ROWS.items():
        own = type(task).sample(count, random)
        rows = _rows(roles, count, random) if own is None else own
        splits[split] = rows.add_column("index", np.arange(count))
    columns = next(iter(splits.values())).features
    labels = None
    if "label" in columns:
        inner = getattr(columns["label"], "feature", columns["label"])
        labels = None if str(getattr(inner, "dtype", "")).startswith("float") else list(LABELS)
        labels = list(inner.names) if isinstance(inner, datasets.ClassLabel) else labels
    return DataInfo(
        f"bench{seed}",
        splits,
        {name: name for name in columns if name != "index"},
        labels,
        f"bench-{type(task).__name__}-{seed}",
    )


def _rows(roles: list[Any], n: int, random: np.random.Generator) -> datasets.Dataset:
    classes_N = np.arange(n) % len(LABELS)
    columns: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for role in roles:
        kind = role.kinds[0]
        if kind == "image":
            pixels = (
                (random.normal(0, 40, (n, 8, 8, 3)) + 60 + 60 * classes_N[:, None, None, None])
                .clip(0, 255)
                .astype(np.uint8)
            )
            columns[role.name], kinds[role.name] = [Image.fromarray(p) for p in pixels], datasets.Image()
        elif kind == "class":
            columns[role.name], kinds[role.name] = classes_N, datasets.Value("int64")
        else:
            texts = [" ".join([LABELS[c], *random.choice(WORDS, random.integers(3, 7))]) for c in classes_N]
            columns[role.name], kinds[role.name] = texts, datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


@contextmanager
def on_cpu() -> Iterator[None]:
    """All within is done on the CPU, also in a process whose Accelerator took a GPU, which has it again afterwards."""
    shared = [PartialState._shared_state, AcceleratorState._shared_state]
    before, flag = [dict(state) for state in shared], os.environ.get("ACCELERATE_USE_CPU")
    if before[0] and before[0]["device"].type != "cpu":
        for state in shared:
            state.clear()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_USE_CPU")
        if flag is not None:
            os.environ["ACCELERATE_USE_CPU"] = flag
        for state, was in zip(shared, before, strict=True):
            state.clear()
            state.update(was)


def cpu_accelerator() -> Accelerator:
    return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])


@dataclass
class WatchedRun(Run):
    """A run that remembers what its frozen models were when they were loaded."""

    teachers: list[tuple[str, Any, dict[str, torch.Tensor]]] = field(default_factory=list)

    def frozen(self, ref: Any) -> Frozen:
        found = super().frozen(ref)
        known = {id(model) for _, model, _ in self.teachers}
        for member in found.members:
            if id(member.model) not in known:
                self.teachers.append((str(ref), member.model, copy_state(member.model)))
        return found


@dataclass
class Trained:
    """One training of the bench. weights: of the exported model. state: of the strategy, named."""

    trainer: Trainer
    run: WatchedRun
    result: Result
    strategy: Strategy | None
    folder: Path

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return copy_state(self.result.loaded.model)

    @functools.cached_property
    def state(self) -> dict[str, torch.Tensor]:
        return {} if self.strategy is None else copy_state(self.strategy)

    @property
    def losses(self) -> list[float]:
        return [point["loss"] for point in self.result.curve]


class Bench:
    """Data, a starting model and a teacher for one task, in a folder of its own."""

    def __init__(self, task: str, folder: Path):
        self.name, self.folder = task, Path(folder)
        cls = registry.load("task", task)
        self.task: Task = cls(**getattr(cls, "conformance", {}).get("settings", {}))
        self.info = make_data(self.name, self.task)

    @functools.cache  # noqa: B019  the bench lives as long as its folder
    def other_data(self, name: str) -> DataInfo:
        """Whatever further data set a strategy asks for."""
        return make_data(self.name, self.task, seed=1 + randomness.number(name) % 1000)

    def saved(self, name: str, dropout: float = 0.0) -> str:
        """The folder of a model: `start`, or another name for other weights."""
        folder = self.folder / "models" / f"{name}-{dropout:g}"
        if not folder.exists():
            randomness.seed_all("bench", name)
            loaded = self.task.load(fresh_model(self.name, dropout), self.info)
            staged = folder.with_name(f".{folder.name}")
            staged.mkdir(parents=True)
            self.task.save(loaded, staged)
            staged.rename(folder)
        return str(folder)

    def load(self, folder: str) -> Loaded:
        return self.task.load(Model(path=folder), self.info)

    def train(
        self,
        stack: dict[str, Strategy],
        folder: Path,
        *,
        dropout: float = 0.0,
        task: Task | None = None,
        **training: Any,
    ) -> Trained:
        """Train a stack by the real trainer; a folder that holds a checkpoint is resumed."""
        task = task or self.task
        given = {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.01,
            "logging_steps": 1,
            "eval_steps": 0,
        }
        settings = Training(**{**given, **training})
        randomness.seed_all("load", settings.seed)
        loaded = task.load(Model(path=self.saved("start", dropout)), self.info)
        run = WatchedRun(
            cpu_accelerator(), settings.seed, Path(folder), task, loaded, self.info, settings.max_steps, _as_model
        )
        trainer = Trainer(run, loaded, stack, settings, Data("bench"), None, self.other_data)
        result = trainer.run()
        return Trained(trainer, run, result, next(iter(stack.values()), None), Path(folder))


def _as_model(ref: Any) -> Model:
    return ref if isinstance(ref, Model) else Model(**ref) if isinstance(ref, dict) else Model(path=str(ref))


def copy_state(module: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


def differing(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float = 0.0, atol: float = 0.0
) -> list[str]:
    """Names that only one side has, or whose tensors differ; bit for bit by default."""
    names = sorted(a.keys() ^ b.keys())
    for name in sorted(a.keys() & b.keys()):
        one, two = a[name], b[name]
        if one.shape != two.shape or one.dtype != two.dtype:
            names.append(name)
        elif rtol or atol:
            if not torch.allclose(one.double(), two.double(), rtol=rtol, atol=atol, equal_nan=True):
                names.append(name)
        elif not torch.equal(one, two):
            names.append(name)
    return names


@contextmanager
def other_draws() -> Iterator[None]:
    """Within, all that is drawn per micro-batch is drawn with other seeds; what is drawn once is not."""
    original: Callable[..., None] = randomness.seed_all

    def salted(*where: Any) -> None:
        original(*(("salt", *where) if where and where[0] in ("batch", "loss", "forward") else where))

    randomness.seed_all = salted
    try:
        yield
    finally:
        randomness.seed_all = original
