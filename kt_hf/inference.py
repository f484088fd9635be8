"""`kt-hf predict` and `kt-hf evaluate`: what a finished model says, without a recipe.

A model is a folder (an adapter's or an ensemble's, too) or a Hub id.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from kt_hf import ensembling, evaluation, launch, loading, registry, stages
from kt_hf import recipe as grammar
from kt_hf.bundle import Bundle
from kt_hf.data import DataInfo, prepare, read
from kt_hf.errors import Collector, DataError, RecipeError, nearest
from kt_hf.functional import statistics
from kt_hf.reading import in_memory
from kt_hf.recipe import Data, Model
from kt_hf.roles import find_roles, fitting_tasks, kinds
from kt_hf.task import Loaded, Role, Task

Table = dict[str, list[Any]]
"""Columns by name, N rows each."""
MEDIA = {
    "image": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
    "video": (".mp4", ".avi", ".mkv", ".mov", ".webm"),
}
"""Kind of a role -> how files that are one row of it end."""
TABLES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow", ".txt")


@dataclass
class Predictor:
    """One model, or the members of an ensemble with the rule that combines them and what they are together."""

    task: Task
    members: list[Loaded]
    combine: Any = None
    together: ensembling.Members | None = None

    @property
    def loaded(self) -> Loaded:
        """The model, or what stands for all members: their processor and classes."""
        return self.members[0] if self.together is None else self.together.joined

    def scores(self, info: DataInfo, split: str, batch_size: int = 64) -> dict[str, np.ndarray]:
        """Predictions of a split, as the task's `predict` gives them."""
        accelerator = _accelerator()
        inner: Any = (
            Bundle(self.members[0], self.task, {})
            if self.together is None
            else ensembling.EnsembleBundle(self.together, self.task, self.combine)
        )
        bundle = inner.to(accelerator.device).eval()
        return evaluation.predict(bundle, bundle, accelerator, info, split, batch_size)


def _accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator()


def _settle_model(model: str) -> str:
    """A stage's folder stands for the model in it."""
    from kt_hf.runner import quiet_libraries

    quiet_libraries()
    folder = Path(model)
    known = ("config.json", "ensemble.json", loading.ADAPTER, "open_clip_config.json")
    inside = not any((folder / name).is_file() for name in known) and (folder / "model").is_dir()
    return str(folder / "model") if inside else model


# --- which task ------------------------------------------------------------------------------------------------------


def infer_task(model: str) -> str | None:
    """The task that a model's own files name; None where they name none that is known."""
    folder, told = Path(model), recorded(model).get("task")
    if told in registry.names("task"):
        return str(told)
    if ensembling.is_ensemble(folder):
        wanted = ensembling.describe(folder)["task"]
        known = {e.target.rpartition(":")[2]: e.name for (kind, _), e in registry.entries().items() if kind == "task"}
        return known.get(wanted, wanted if wanted in known.values() else None)
    if (folder / "open_clip_config.json").is_file():
        return "zero-shot-image-classification"
    if (folder / loading.ADAPTER).is_file():
        adapter = json.loads((folder / loading.ADAPTER).read_text())
        kind = adapter.get("task_type")
        named = next((name for name, task in _tasks().items() if kind and task.adapter_type == kind), None)
        return named or infer_task(adapter["base_model_name_or_path"])
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RecipeError(f"'{model}' has no config.json", "name a model's folder or a Hub id")
    names = set(loading.config_of(Model(path=model)).architectures or [])
    fitting = {name: task.architectures() for name, task in _tasks().items()}
    fitting = {name: classes for name, classes in fitting.items() if classes & names}
    return min(fitting, key=lambda name: len(fitting[name]), default=None)  # the most special one


def recorded(model: str) -> dict[str, Any]:
    """What a stage wrote beside the model that it made; of an ensemble, beside its first member."""
    folder = Path(model)
    return loading.recorded(ensembling.members(folder)[0][0] if ensembling.is_ensemble(folder) else model)


def trained_with(model: str, task: str) -> dict[str, Any]:
    """Settings of the task that the model was made with, as far as its folder tells them."""
    found = recorded(model)
    return dict(found.get("settings") or {}) if found.get("task") == task else {}


def _tasks() -> dict[str, type[Task]]:
    """The tasks that can be imported."""
    found: dict[str, type[Task]] = {}
    for name in registry.names("task"):
        try:
            found[name] = registry.load("task", name)
        except RecipeError:
            continue  # somebody's broken task hurts nobody else
    return found


def model_labels(model: str) -> list[str] | None:
    """The class names that a model itself knows."""
    folder = Path(model)
    if ensembling.is_ensemble(folder):
        facts = ensembling.describe(folder)
        return facts["labels"] if "labels" in facts else model_labels(str(folder / facts["members"][0]))
    return loading.known_labels(Model(path=model))


def load(model: str, task: Task, info: DataInfo) -> Predictor:
    """The model or the ensemble's members. Refuses a model whose head would be new."""
    folder = Path(model)
    if ensembling.is_ensemble(folder):
        paths, combine = ensembling.members(folder)
        found = ensembling.load([Model(path=str(path)) for path in paths], task, info)
        return Predictor(task, [_settled(member) for member in found.each], combine, found)
    loaded = task.load(Model(path=model), info)
    if loaded.new_parameters:
        names = ", ".join(loaded.new_parameters[:3])
        raise RecipeError(
            f"model '{model}' has no trained head for this task ({names} are new)",
            "train it first, or name another --task",
        )
    return Predictor(task, [_settled(loaded)])


def _settled(loaded: Loaded) -> Loaded:
    loaded.model.to(_accelerator().device).eval()
    return loaded


# --- predict ---------------------------------------------------------------------------------------------------------


def predict(
    model: str,
    inputs: Sequence[str],
    *,
    task: str | None = None,
    labels: list[str] | None = None,
    split: str | None = None,
    max_new_tokens: int = 64,
    settings: Sequence[str] = (),
) -> Table:
    """A row for each input: texts and image files are one row, data files and folders as many as they have.

    What comes besides `prediction` is the task's to say (`Task.answer`). settings: `data.columns.ROLE=COLUMN` or
    `task.NAME.KEY=VALUE`; the task's are those that the model was trained with, where its folder tells them.
    """
    model = _settle_model(model)
    name = task or infer_task(model)
    if name is None:
        raise RecipeError(
            f"the files of '{model}' do not say for which task it is",
            f"set --task, one of {', '.join(registry.names('task'))}",
        )
    stage, checked = _stage(model, "inputs", settings, {name: trained_with(model, name)})
    settled: Task = stages.build("task", stage.task, stage, checked)
    rows, roles, shown = read_inputs(inputs, settled, split, stage.data[1].columns)
    if settled.classes_from == "user" and not labels:
        raise RecipeError("this model has to be told what to look for", "name the classes: --labels cat,dog,owl")
    if settled.classes_from != "user" and labels:
        raise RecipeError("--labels: this model has classes of its own, or none", "leave --labels out")
    classes = model_labels(model) if settled.classes_from == "model" else labels
    info = DataInfo("inputs", {"test": rows}, roles, classes, f"inputs-{rows._fingerprint}")
    return {"input": shown, **settled.answer(load(model, settled, info), info, max_new_tokens)}


def read_inputs(
    inputs: Sequence[str], task: Task, split: str | None, columns: dict[str, str] | None = None
) -> tuple[datasets.Dataset, dict[str, str], list[str]]:
    """(rows with the task's role columns and `index`, role -> column, what is shown of each row)."""
    tables = [item for item in inputs if Path(item).suffix.lower() in TABLES or os.path.isdir(item)]
    files = {*TABLES, *(suffix for suffixes in MEDIA.values() for suffix in suffixes)}
    missing = [i for i in inputs if Path(i).suffix.lower() in files and " " not in i and not os.path.exists(i)]
    if missing:
        raise DataError(f"there is no file '{missing[0]}'", "name an existing file, or a text")
    if tables and len(inputs) > 1:
        raise DataError(f"'{tables[0]}' and other inputs are given", "predict on one data file or folder at a time")
    rows = _table(tables[0], split) if tables else _single(inputs, task)
    roles = find_roles(rows.features, given_roles(task), columns)
    if not roles:
        raise DataError(
            f"no column of {', '.join(rows.column_names)} is an input of {type(task).__name__}",
            "rename the column that is",
        )
    by_column: dict[str, str] = {column: role for role, column in roles.items()}
    rows = rows.select_columns(list(by_column))
    for column in by_column:
        feature = rows.features[column]
        if isinstance(feature, (datasets.Audio, datasets.Video)):
            rows = rows.cast_column(column, type(feature)(decode=False))
    rows = rows.rename_columns({c: f"__{r}" for c, r in by_column.items()}).rename_columns({f"__{r}": r for r in roles})
    shown = list(inputs) if not tables else [f"{Path(tables[0]).name}[{i}]" for i in range(len(rows))]
    text = next((role for role in roles if kinds(rows.features[role])[:1] == ("string",)), None)
    if tables and text is not None and not set(MEDIA) & set(roles):
        shown = [str(value) for value in rows[text]]
    return rows.add_column("index", np.arange(len(rows))), {role: role for role in roles}, shown


def given_roles(task: Task) -> list[Role]:
    """The roles that new rows have."""
    return [role for role in task.roles if role.name != "label" and not role.predicted]


def _table(path: str, split: str | None) -> datasets.Dataset:
    found = read(Data(path))
    if split is not None and split not in found:
        raise DataError(f"'{path}' has no split '{split}'", nearest(split, found))
    return found[split or ("test" if "test" in found else list(found)[-1])]


def _single(inputs: Sequence[str], task: Task) -> datasets.Dataset:
    """Texts, or files of one kind, for the one column that the task reads."""
    found = [_medium(item) for item in inputs]
    wanted = [role for role in given_roles(task) if role.required]
    wanted = wanted or [role for role in task.roles if role.name == "text"]
    kind = found[0]
    role = next((role for role in wanted if kind in role.kinds), None)
    if role is None or len(set(found)) > 1 or len(wanted) > 1:
        fits = [any(kind in role.kinds for role in wanted) for kind in found]
        odd = inputs[fits.index(False) if False in fits else 0]
        needed = " and ".join(f"{role.name} ({role.kinds[0]})" for role in wanted)
        ends = ", ".join(suffix for r in wanted for suffix in MEDIA.get(r.kinds[0], ())[:3])
        medium = len(wanted) == 1 and wanted[0].kinds[0] in MEDIA
        what = f"no {wanted[0].kinds[0]} file" if medium else f"not all that the task reads: {needed}"
        raise DataError(
            f"'{odd[:80]}' is {what}",
            f"name {f'files that end in {ends}, or ' if ends else ''}a data file or folder",
        )
    undecoded = {"audio": datasets.Audio(decode=False), "video": datasets.Video(decode=False)}
    features: dict[str, Any] = {"image": datasets.Image(), **undecoded}
    kinds = datasets.Features({role.name: features.get(kind, datasets.Value("string"))})
    values: list[Any] = [{"path": item, "bytes": None} if kind in features else item for item in inputs]
    return in_memory([{role.name: value} for value in values], kinds)


def _medium(item: str) -> str:
    """The kind of role that an input is for."""
    suffix = Path(item).suffix.lower()
    return next((kind for kind, ends in MEDIA.items() if suffix in ends and os.path.isfile(item)), "string")


# --- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(model: str, data: str, settings: Sequence[str] = (), *, task: str | None = None) -> dict[str, Any]:
    """Metrics of a model on a data set's test split, or validation where that has the labels.

    Intervals are 95 %, over examples. settings: `data.KEY=VALUE`, as for a recipe.
    """
    model = _settle_model(model)
    known = task or recorded(model).get("task")
    stage, checked = _stage(model, data, settings, {known: trained_with(model, known)} if known else None)
    name = grammar.named(stage.task)[0] if stage.task else infer_task(model)
    if name is None:
        fitting = fitting_tasks(next(iter(read(stage.data[1]).values())).features, stage.data[1].columns)
        if len(fitting) != 1:
            raise RecipeError(
                "neither the model nor the data say which task it is",
                f"set --task, one of {', '.join(registry.names('task'))}",
            )
        name = fitting[0][0]
    settled: Task = stages.build("task", stage.task or {name: {}}, stage, checked)
    info = prepare(stage.data[0], stage.data[1], settled)
    settled.settle(info)
    predictor = load(model, settled, info)
    split = info.evaluation_split
    found = predictor.scores(info, split)
    if "label" in info.roles and "label" in found and not (found["label"] >= 0).any():
        raise DataError(f"no row of {split} has a label", "evaluate on labelled data, or use kt-hf predict")
    scores = settled.measure(found, predictor.loaded, info)
    metrics = {
        metric: _with_interval(scores, metric, value, len(found["index"])) for metric, value in scores.metrics.items()
    }
    return {
        "model": model,
        "task": name,
        "data": {
            "path": info.path,
            "split": split,
            "num_examples": len(found["index"]),
            "fingerprint": info.fingerprint,
        },
        "primary_metric": settled.metric,
        "metrics": metrics,
        **({"notes": scores.notes} if scores.notes else {}),
    }


def _stage(
    model: str, data: str, settings: Sequence[str], task: str | dict[str, Any] | None
) -> tuple[Any, dict[tuple[str, str], dict[str, Any]]]:
    """An evaluate stage, checked as a recipe's would be."""
    raw = grammar.normalise(
        {
            "data": {"path": data},
            "model": {"path": model},
            "stages": [{"evaluate": "evaluate"}],
            **({"task": task} if task else {}),
        }
    )
    collect = Collector()
    for text in settings:
        if not text.startswith(("data.", "task.")):
            collect.add(
                f"cannot read the argument '{text}'", "settings are of the data or the task: data.columns.text=sentence"
            )
    collect.raise_if_any()
    raw = launch.read_changes(argparse.Namespace(config=None, settings=list(settings)), raw, collect)
    resolved = grammar.resolve(raw, collect)
    collect.raise_if_any()
    checked = grammar.check_plugins(resolved, collect)
    collect.raise_if_any()
    return resolved.stages[0], checked


def _with_interval(scores: Any, metric: str, value: float, count: int) -> dict[str, float]:
    if metric in scores.examples:
        values_N, weights_N = scores.examples[metric]
        replicates = statistics.ratios(values_N[None], None if weights_N is None else weights_N[None])
    elif metric in scores.statistics:
        replicates = statistics.resample([scores.statistics[metric]], count, replicates=500)
    else:
        return {"value": value}
    _, low, high = statistics.bounds(replicates)
    return {"value": value, "low": low, "high": high}


def figures(found: dict[str, Any]) -> str:
    """What a terminal shows of an evaluation."""
    data = found["data"]
    lines = [f"{found['task']} on {data['path']} ({data['num_examples']} rows of {data['split']})"]
    width = max(len(metric) for metric in found["metrics"])
    for metric, figure in sorted(found["metrics"].items(), key=lambda item: item[0] != found["primary_metric"]):
        interval = f"  [{figure['low']:.4f}, {figure['high']:.4f}]" if "low" in figure else ""
        lines.append(f"  {metric:{width}}  {figure['value']:.4f}{interval}")
    return "\n".join([*lines, "  value [95 % interval over examples]"])


# --- writing ---------------------------------------------------------------------------------------------------------


def length(table: Table) -> int:
    return len(next(iter(table.values())))


def text(table: Table, width: int = 60) -> str:
    """Columns side by side; long cells are cut."""
    cells = [[_cell(value, width) for value in values] for values in table.values()]
    widths = [max(len(name), *map(len, column)) for name, column in zip(table, cells, strict=True)]
    head = "  ".join(f"{name:{w}}" for name, w in zip(table, widths, strict=True)).rstrip()
    rows = [
        "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in zip(*cells, strict=True)
    ]
    return "\n".join([head, *rows])


def _cell(value: Any, width: int) -> str:
    shown = f"{value:.4f}" if isinstance(value, float) else " ".join(str(value).split())
    return shown if len(shown) <= width else f"{shown[: width - 3]}..."


def write(table: Table, path: str) -> None:
    """Parquet, JSON lines or CSV, by the file's ending."""
    writers = {".parquet": "to_parquet", ".jsonl": "to_json", ".csv": "to_csv"}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise RecipeError(f"--output: '{path}' ends in none of {', '.join(writers)}", "choose one of them")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    options = {"force_ascii": False} if suffix == ".jsonl" else {}
    getattr(datasets.Dataset.from_dict(table), writers[suffix])(path, **options)


def write_json(found: dict[str, Any], path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(found, indent=1), encoding="utf-8")
