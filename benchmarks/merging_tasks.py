"""The second part of soups.py: one encoder of several tasks. MiniLM-L6 is fine-tuned on each of four data sets, the
encoders are merged, and every task puts its own head on what comes out.

Figures are accuracies as shares of those of the task's own fine-tuning. What the methods that are about task vectors
multiply them by is chosen on validation data, the same for all tasks; the others have nothing to choose. RegMean and
Fisher ask each parent on the training rows of its own task.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kt_hf_plugins.dare import Dare
from kt_hf_plugins.fisher import Fisher
from kt_hf_plugins.regmean import RegMean
from kt_hf_plugins.task_arithmetic import TaskArithmetic
from kt_hf_plugins.ties import Ties
from kt_hf_plugins.uniform_soup import UniformSoup
from safetensors.torch import load_file, save_file
from task_rows import minilm

from kt_hf import Data, MergeMethod, Model, Recipe, Train, data, evaluation, merging, run
from kt_hf.bundle import Bundle
from kt_hf.functional.statistics import Replicates, bounds, ratios
from kt_hf.measuring import Parent
from kt_hf.testing.bench import cpu_accelerator

logger = logging.getLogger(__name__)

TASKS: dict[str, int] = {"sst2": 50, "ag_news": 50, "trec": 80, "cola": 80}
"""Data set -> steps of 16 rows."""
SCALINGS = [0.2, 0.3, 0.5, 0.75, 1.0]
HEAD = "classifier."
Scaled = Callable[[float], MergeMethod]
SCALED: dict[str, Scaled] = {
    "task_arithmetic": lambda scaling: TaskArithmetic(scaling=scaling),
    "ties": lambda scaling: Ties(scaling=scaling),
    "dare": lambda scaling: Dare(scaling=scaling),
}
PLAIN: dict[str, Callable[[], MergeMethod]] = {
    "mean": UniformSoup,
    "fisher": lambda: Fisher(normalize=True),
    "regmean": RegMean,
}


def recipe(folder: Path, seeds: int) -> Recipe:
    """A fine-tuning for each data set."""
    stages = [
        Train(name, data=_data(folder, name), training={"max_steps": steps}, seeds=seeds)
        for name, steps in TASKS.items()
    ]
    training = {"learning_rate": 2e-4, "per_device_train_batch_size": 16, "warmup_ratio": 0.1, "eval_steps": 0}
    training |= {"num_threads": 1, "report_to": "none"}
    return Recipe(stages, task=TEXTS, model=minilm(), training=training)


TEXTS = {"text-classification": {"max_length": 32}}


def _data(folder: Path, name: str) -> Data:
    return Data(str(folder / name), max_examples={"train": 1500, "validation": 150, "test": 500}, drop=["overlap"])


class Encoders:
    """The fine-tunings of one seed: each loaded with its head and its rows, the encoders' files without the heads."""

    def __init__(self, folder: Path, out: Path, seed: int):
        self.parents, self.folders, self.given = {}, [], []
        self.work = out / "work" / str(seed)
        for name in TASKS:
            place = out / "trained" / name if seed == 0 else out / "trained" / name / "seeds" / str(seed)
            task = _task()
            info = data.prepare(name, _data(folder, name), task)
            task.settle(info)
            tensors = load_file(place / "model" / "model.safetensors")
            loaded = task.load(Model(path=str(place / "model")), info)
            self.parents[name] = Parent(name, loaded, task, info, cpu_accelerator(), tensors)
            self.given.append(tensors)
            self.folders.append(_encoder(tensors, place / "model", self.work / name))
        start = load_file(Path(minilm()) / "model.safetensors")
        first = self.given[0]
        base = {f"bert.{name}": tensor for name, tensor in start.items() if f"bert.{name}" in first}
        self.base = _encoder(base, Path(minilm()), self.work / "base")

    def merged(self, method: MergeMethod) -> dict[str, torch.Tensor]:
        """The encoder that a method makes."""
        names, target = list(TASKS), self.work / "merged"
        run_ = merging.MergeRun(len(names), names, True, lambda w: 0.0, lambda i: self.parents[names[i]])
        stats: list[Any] = []
        if method.measures_on is not None:
            found = [parent.in_files(method.measure(parent, run_)) for parent in self.parents.values()]
            stats = [{n: t for n, t in one.items() if not n.startswith(HEAD)} for one in found]
        with merging.Parents(self.folders, names) as parents, merging.Parents([self.base], ["base"]) as base:
            shutil.rmtree(target, ignore_errors=True)
            merging.merge(method, parents, base if method.needs_base else None, target, sync=False, stats=stats)
        return load_file(target / "model.safetensors")

    def right(self, name: str, split: str, encoder: dict[str, torch.Tensor]) -> np.ndarray:
        """Which rows of a split are answered right by this encoder with the task's head."""
        parent = self.parents[name]
        own = {n: t.clone() for n, t in parent.model.state_dict().items()}
        missing = parent.model.load_state_dict(encoder, strict=False)
        assert not missing.unexpected_keys and all(n.startswith(HEAD) for n in missing.missing_keys)
        bundle = Bundle(parent.loaded, parent.task, {}).eval()
        found = evaluation.predict(bundle, bundle, parent.accelerator, parent.info, split, 64)
        parent.model.load_state_dict(own)
        return (found["scores"].argmax(1) == found["label"]).astype(float)


def _task() -> Any:
    from kt_hf import registry

    return registry.load("task", "text-classification")(**TEXTS["text-classification"])


def _encoder(tensors: dict[str, torch.Tensor], source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "config.json", folder / "config.json")
    kept = {name: tensor for name, tensor in sorted(tensors.items()) if not name.startswith(HEAD)}
    save_file({n: t for n, t in kept.items() if t.is_floating_point()}, folder / "model.safetensors")
    return folder


def measure(folder: Path, out: Path, seeds: int) -> list[dict[str, Any]]:
    """Rows of the table: every method with its accuracies as shares of those of the own fine-tunings."""
    run(recipe(folder, seeds), out / "trained")
    right: dict[str, dict[str, list[np.ndarray]]] = {}
    chosen: dict[str, list[float]] = {name: [] for name in SCALED}
    for seed in range(seeds):
        encoders = Encoders(folder, out, seed)
        made = {"own fine-tuning": None, "encoder before fine-tuning": load_file(encoders.base / "model.safetensors")}
        made |= {name: encoders.merged(build()) for name, build in PLAIN.items()}
        for name, build in SCALED.items():
            best, made[name] = _scaled(encoders, build)
            chosen[name].append(best)
        for method, encoder in made.items():
            for place, name in enumerate(TASKS):
                own = encoder if encoder is not None else {n: t for n, t in _own(encoders, place)}
                right.setdefault(method, {}).setdefault(name, []).append(encoders.right(name, "test", own))
        logger.warning("seed %d of %d is done", seed + 1, seeds)
    own = right["own fine-tuning"]
    rows = []
    for method, found in right.items():
        shares = {name: float(np.mean(found[name]) / np.mean(own[name])) for name in TASKS}
        accuracies = {name: float(np.mean(found[name])) for name in TASKS}
        row = {"name": method, "tasks": shares, "accuracies": accuracies, "normalized": _normalized(found, own)}
        rows.append({**row, "scaling": chosen[method]} if method in chosen else row)
    return rows


def _own(encoders: Encoders, place: int) -> list[tuple[str, torch.Tensor]]:
    tensors = encoders.given[place].items()
    return [(n, t) for n, t in tensors if not n.startswith(HEAD) and t.is_floating_point()]


def _scaled(encoders: Encoders, build: Scaled) -> tuple[float, dict[str, torch.Tensor]]:
    """The scaling with the best mean accuracy on validation data, and its encoder."""
    found = []
    for scaling in SCALINGS:
        encoder = encoders.merged(build(scaling))
        score = np.mean([encoders.right(name, "validation", encoder).mean() for name in TASKS])
        found.append((float(score), scaling, encoder))
    _, scaling, encoder = max(found, key=lambda item: item[0])
    return scaling, encoder


def _normalized(found: dict[str, list[np.ndarray]], own: dict[str, list[np.ndarray]]) -> tuple[float, float, float]:
    """(mean over tasks of the shares, low, high): rows are drawn within each task, the same for both models."""
    points, draws = [], []
    for i, name in enumerate(TASKS):
        a, b = (ratios(np.stack(values[name]), seed=i) for values in (found, own))
        points.append(a.point_S / b.point_S)
        draws.append(a.draws_BS / b.draws_BS)
    fewest = min(len(values[0]) for values in own.values())
    return bounds(Replicates(np.mean(points, 0), np.mean(draws, 0), fewest))
