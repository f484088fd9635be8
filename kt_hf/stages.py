"""What each kind of stage does for one seed: train, merge, ensemble, evaluate. Each ends in a folder with evidence."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kt_hf import (
    beside,
    checkpoint,
    elastic,
    ensembling,
    evaluation,
    heads,
    layerwise,
    measuring,
    merging,
    randomness,
    registry,
    search,
    trainer,
    vocabularies,
)
from kt_hf import folder as folders
from kt_hf import recipe as grammar
from kt_hf.bundle import Bundle
from kt_hf.errors import NonFiniteError, RecipeError
from kt_hf.facts import Run
from kt_hf.feed import training_rows
from kt_hf.loader import Plan, Rows, Windows, load_batches
from kt_hf.loading import is_adapter, local, recorded
from kt_hf.progress import title
from kt_hf.recipe import Ensemble, Evaluate, Merge, Model, Stage, Train, Training
from kt_hf.task import FACTS, Loaded, Scores
from kt_hf.tensor_files import read_size
from kt_hf.tracking import tracking

if TYPE_CHECKING:
    from kt_hf.runner import Context

logger = logging.getLogger(__name__)

MEASURED = "measured"
"""Folder in a merge's stage for what was measured of its parents, until the stage is finished."""


def build(kind: str, item: Any, stage: Stage, settings: dict[tuple[str, str], dict[str, Any]]) -> Any:
    name, given = grammar.named(item)
    cls: Any = registry.load(kind, name)
    given = settings.get((stage.name, f"{kind}:{name}"), given)
    return layerwise.build(name, cls, given) if kind == "merge" else cls(**given)


def build_stack(stage: Train, settings: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    return {grammar.named(s)[0]: build("strategy", s, stage, settings) for s in stage.strategies}


def perform(context: Context, stage: Stage, seed: int) -> dict[str, Any]:
    """Run one stage with one seed; returns the facts that `stage.json` holds."""
    folder = folders.stage_folder(context.root, stage.name, seed)
    if context.accelerator.is_main_process:
        with checkpoint.disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / "model", ignore_errors=True)
    context.accelerator.wait_for_everyone()
    kinds: dict[type, Callable[..., dict[str, Any]]] = {
        Train: _train,
        Merge: _merge,
        Ensemble: _ensemble,
        Evaluate: _evaluate,
    }
    with peak_memory(context.accelerator.device) as peak:
        facts = kinds[type(stage)](context, stage, seed, folder)
    facts["cost"]["peak_memory_bytes"] = peak["bytes"]
    facts["cost"]["size_on_disk_bytes"] = sum(p.stat().st_size for p in (folder / "model").rglob("*") if p.is_file())
    facts.update(stage=stage.name, seed=seed, verb=stage.verb)
    if context.accelerator.is_main_process:
        facts = folders.finish(folder, facts)
        for left in ("trials", MEASURED):
            shutil.rmtree(folder / left, ignore_errors=True)
    context.accelerator.wait_for_everyone()
    return facts


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Peak of the device's allocations, or of this process' resident memory where Linux lets us reset that."""
    found = {"bytes": 0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
    yield found
    if device.type == "cuda":
        found["bytes"] = torch.cuda.max_memory_allocated(device)
    else:
        found["bytes"] = _resident_peak()


def _resident_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- train
# -------------------------------------------------------------------------------------------------------------


def _train(context: Context, stage: Train, seed: int, folder: Path) -> dict[str, Any]:
    zero_shot = _measure_start(context, stage, folder) if seed == 0 and "zero_shot" in (stage.compare or []) else None
    changes = search.trials(stage)
    trials: list[dict[str, Any]] = []
    place = folder
    if len(changes) > 1:
        trials = _try_all(context, stage, folder, changes) if seed == 0 else _first_seed(context, stage)["trials"]
        best = next(i for i, trial in enumerate(trials) if trial["chosen"])
        place = _place(folder, best, len(changes)) if seed == 0 else folder
        changes = [trials[best]["settings"]]
    context, stage = context.changed(stage, changes[0])
    if stage.training.learning_rate == "auto" and seed > 0:  # found with the first seed, as what a search chooses
        found = _first_seed(context, stage)["learning_rate"]
        context, stage = context.changed(stage, {"training.learning_rate": found})
    result = _train_once(context, stage, seed, place)
    loaded, task = result.loaded, context.task(stage)
    if context.accelerator.is_main_process:
        save_model(task, loaded, folder / "model", described(context, stage))
    facts = measured(context, stage, loaded, folder, loaded.model)
    facts["cost"] = {**result.cost, **facts["cost"]}
    tested = result.range_test
    facts.update(
        curve=result.curve,
        evaluations=result.evaluations,
        trials=trials,
        learning_rate=tested["learning_rate"] if tested else stage.training.learning_rate,
        range_test=tested,
        best_step=result.best_step,
        validation=_validation(task, stage.training, result),
    )
    facts["lineage"] = _train_lineage(context, stage, loaded, result.revisions)
    facts["zero_shot"] = zero_shot
    return facts


def _validation(task: Any, training: Training, result: trainer.Result) -> float | None:
    """What the model that was exported scores on validation data, where the training has measured just that: in the
    precision in which stages measure."""
    if training.bf16 or training.fp16:
        return None
    step = result.best_step if training.load_best_model_at_end else result.cost["optimizer_steps"]
    return next((found.get(task.metric) for found in result.evaluations if found["step"] == step), None)


def _first_seed(context: Context, stage: Train) -> dict[str, Any]:
    found = folders.finished(folders.stage_folder(context.root, stage.name, 0))
    assert found is not None
    return found


def _measure_start(context: Context, stage: Train, folder: Path) -> str | None:
    """Measure the stage's model before training, for the baseline `zero_shot`; in words why that cannot be."""
    task, info = context.task(stage), context.info(stage)
    randomness.seed_all("load", stage.training.seed)
    loaded = task.load(context.resolve(stage.model, 0), info)
    if loaded.new_parameters:
        return f"the model has nothing trained for this task ({', '.join(loaded.new_parameters[:2])} are new)"
    found = _predict(context, task, loaded, loaded.model, info, info.evaluation_split)
    beside.keep(context, found, folder / "zero_shot.safetensors")
    return None


def _train_once(context: Context, stage: Train, seed: int, folder: Path, keep: bool = False) -> trainer.Result:
    """keep: leave a checkpoint of the end, from which the same call takes the result again."""
    made = make_trainer(context, stage, seed, folder, lambda ref: context.resolve(ref, seed))
    made.save_end = keep
    with tracking(context, stage, made) as made.track:
        return made.run()


def make_trainer(
    context: Context, stage: Train, seed: int, folder: Path, resolve: Callable[[Any], Model]
) -> trainer.Trainer:
    """A training of a stage with one seed, with its model loaded."""
    task, info, data = context.task(stage), context.info(stage), stage.data[1]  # type: ignore[index]
    training = Training(**{k: getattr(stage.training, k) for k in grammar.settings.parameters(Training)})
    training.seed = stage.training.seed + seed
    if training.full_determinism:
        torch.use_deterministic_algorithms(True)
    stack, world = build_stack(stage, context.settings), context.accelerator.num_processes
    whole_batch = any(strategy.scope == "batch" for strategy in stack.values())
    training = elastic.fit(training, world, folder / "checkpoints", whole_batch)
    randomness.seed_all("load", training.seed)
    loaded = task.load(resolve(stage.model), info)
    count = info.num_training_rows
    if training.packing and task.packs == "bins":  # how many they make
        rows = training_rows(context.accelerator, task, loaded, info, training, data.augment, training.seed)
        count = len(rows)  # type: ignore[arg-type]
    steps = trainer.planned_steps(training, count, world)
    half = trainer.half(training)
    run = Run(context.accelerator, training.seed, folder, task, loaded, info, steps, resolve, half)

    def stream_info(name: str) -> Any:
        return context.named_info(name, context.recipe.data[name], task)

    return trainer.Trainer(run, loaded, stack, training, data, None, stream_info, context.until)


def _try_all(context: Context, stage: Train, folder: Path, changes: list[search.Changes]) -> list[dict[str, Any]]:
    """Train with the settings of every trial, with the first seed; what each scores on validation data.

    A finished trial leaves its score and a checkpoint, of which that of the best so far is kept: a search that is
    continued goes on in the trial that was interrupted, and the chosen one is taken from its checkpoint.
    """
    higher, accelerator = context.task(stage).greater_is_better, context.accelerator
    trials: list[dict[str, Any]] = []
    for i, change in enumerate(changes):
        place = _place(folder, i, len(changes))
        trials.append(_try(context, stage, place, change))
        best = _best([trial["validation"] for trial in trials], higher)
        logger.info("%s: %s: %s", title(place), search.words(change), _told(trials[i], i == best))
        if accelerator.is_main_process:
            for j in set(range(i + 1)) - {best}:
                shutil.rmtree(_place(folder, j, len(changes)) / "checkpoints", ignore_errors=True)
        accelerator.wait_for_everyone()
    if best is None:
        raise NonFiniteError(
            f"stages.{stage.name}: none of {len(trials)} trials had a finite {context.task(stage).metric}: "
            f"{trials[-1].get('failed', 'not a number')}",
            "search among lower learning rates",
        )
    return [{**trial, "chosen": i == best} for i, trial in enumerate(trials)]


def _place(folder: Path, i: int, count: int) -> Path:
    return folder / "trials" / f"{i + 1}-of-{count}"


def _best(scores: list[float | None], higher: bool) -> int | None:
    """The first of the best; None where nothing is finite."""
    finite = [i for i, score in enumerate(scores) if score is not None]
    return (max if higher else min)(finite, key=lambda i: scores[i], default=None)  # type: ignore[arg-type, return-value]


def _told(trial: dict[str, Any], best: bool) -> str:
    if trial["validation"] is None:
        return f"failed ({trial.get('failed', 'not a number')})"
    return f"{trial['metric']} {trial['validation']:.4f} on validation data{', the best so far' if best else ''}"


def _try(context: Context, stage: Train, folder: Path, changes: search.Changes) -> dict[str, Any]:
    """One trial, or what it found when it was run before."""
    path, info = folder / "trial.json", context.info(stage)
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("settings") == changes and known.get("data") == info.fingerprint:
        return known
    context, stage = context.changed(stage, changes)
    task, split, batch_size = context.task(stage), "validation", stage.training.per_device_eval_batch_size
    trial: dict[str, Any] = {"settings": changes, "metric": task.metric, "validation": None, "seconds": None}
    began = time.perf_counter()
    try:
        result = _train_once(context, stage, 0, folder, keep=True)
    except NonFiniteError as error:  # of the settings, not of the recipe
        trial.update(
            seconds=time.perf_counter() - began, failed=error.cause, learning_rate=stage.training.learning_rate
        )
    else:
        found = _predict(context, task, result.loaded, result.loaded.model, info, split, batch_size)
        score = float(task.measure(found, result.loaded, info).metrics[task.metric])
        rate = result.range_test["learning_rate"] if result.range_test else stage.training.learning_rate
        trial.update(seconds=result.cost["seconds"], learning_rate=rate, validation=score if isfinite(score) else None)
    trial["data"] = info.fingerprint
    context.accelerator.wait_for_everyone()
    if context.accelerator.is_main_process:
        staged = path.with_name(f".{path.name}.partial")
        with checkpoint.disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(staged, trial)
            os.replace(staged, path)
            checkpoint.fsync_folder(folder)
    context.accelerator.wait_for_everyone()
    return trial


def _train_lineage(context: Context, stage: Train, loaded: Loaded, revisions: dict[str, str]) -> dict[str, Any]:
    """Where the model comes from, as the recipe names it, with the revision that was found."""
    resolved = stage.model
    lineage: dict[str, Any] = {"data": stage.data[0] if stage.data else None}
    if resolved.path:
        lineage["base_model"] = str(resolved.path)
        lineage["revision"] = loaded.origin.get("revision") or resolved.revision
    elif resolved.config:
        lineage["config"] = resolved.config
    else:
        towers = {name: getattr(resolved, name) for name in grammar.TOWERS}
        lineage |= {name: str(t.path or t.config) for name, t in towers.items() if t is not None}
    for item in stage.strategies:
        name, given = grammar.named(item)
        for key, ref in grammar.settings.references(registry.load("strategy", name), given, "model").items():
            lineage[key] = ref if isinstance(ref, str) else ref.get("path") or ref.get("config")
            named = ref.get("revision") if isinstance(ref, dict) else None
            if revision := revisions.get(str(ref)) or named:
                lineage[f"{key}_revision"] = revision
    return lineage


# --- merge, ensemble, evaluate
# -----------------------------------------------------------------------------------------


def _merge(context: Context, stage: Merge, seed: int, folder: Path) -> dict[str, Any]:
    from kt_hf.runner import parents as find_parents

    task, info, accelerator = context.task(stage), context.info(stage), context.accelerator
    names, given = find_parents(context, stage, seed)
    method = build("merge", stage.method, stage, context.settings)
    started = time.perf_counter()
    head = heads.place(stage.head, names) if stage.head is not None else None
    models = _fold(context, stage, given, folder / ".folded")
    loaded = task.load(models[head or 0], info)
    base = local(context.resolve(stage.base, seed)) if stage.base is not None else None
    named = [(n, Path(str(m.path))) for n, m in zip(names, models, strict=True)]
    named += [("base", Path(str(base.path)))] if base is not None else []
    common = vocabularies.choose(stage.vocabulary, named, "base" if base is not None else None, rows=stage.new_rows)
    if head is None:
        _check_kinship(task, loaded, models, names, info, words=common is None)
    statistics = merging.batch_statistics(loaded.model)
    if statistics and "train" not in info.splits:
        raise RecipeError(
            f"stages.{stage.name}: the parents keep batch statistics, and no training data are there to estimate them",
            "give the stage data with a training split",
        )
    parent_folders = [Path(str(m.path)) for m in models]
    start = merging.Parents([Path(str(base.path))], ["base"], vocabulary=common) if base is not None else None
    with merging.Parents(parent_folders, names, head, vocabulary=common) as parents:
        if start is not None:
            merging.base_tensors(parents, start)
            start.check_finite()
        parents.check_finite()
        kinship = parents.kinship(start)
        kinship.warn()

        def score(weights: list[float]) -> float:
            # through a folder and the task's own loading: tensors in a file may have other names than in the model
            candidate = folder / ".candidate"
            if accelerator.is_main_process:
                shutil.rmtree(candidate, ignore_errors=True)
                own = start if len(weights) > len(models) else None
                merging.merge(merging.WeightedMean(weights), parents, own, candidate, sync=False)
            accelerator.wait_for_everyone()
            soup = task.load(Model(path=str(candidate)), info)
            _refresh_statistics(context, stage, soup)
            found = _predict(context, task, soup, soup.model, info, "validation")
            return task.measure(found, soup, info).metrics[task.metric]

        def parent(i: int) -> measuring.Parent:
            own, rows = _asked_on(context, stage, i)
            randomness.seed_all("load", seed)
            return measuring.Parent(names[i], own.load(models[i], rows), own, rows, accelerator, parents.models[i])

        known = _known_scores(context, stage, seed)
        merge_run = merging.MergeRun(len(models), names, task.greater_is_better, score, parent, known)
        stats: list[Any] = []
        if method.measures_on is not None:
            stats = measuring.measured(method, parent_folders, folder / MEASURED, merge_run, accelerator)
        method.fit(merge_run)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(folder / ".candidate", ignore_errors=True)
            merging.merge(method, parents, start, folder / "model", stats=stats, **_written(stage))
    accelerator.wait_for_everyone()
    loaded = task.load(Model(path=str(folder / "model")), info)
    if statistics:
        _refresh_statistics(context, stage, loaded)
        if accelerator.is_main_process:
            save_model(task, loaded, folder / "model", described(context, stage))
    seconds = time.perf_counter() - started
    figures = beside.measure(context, stage, loaded, names, models, folder, known)
    falls_back = stage.fallback is not None and figures.loses
    if falls_back:
        kept = names.index(figures.names[figures.best or 0])
        _keep_parent(context, stage, parent_folders[kept], folder)
        loaded = task.load(Model(path=str(folder / "model")), info)
    if accelerator.is_main_process:
        shutil.rmtree(folder / ".folded", ignore_errors=True)
    facts = measured(context, stage, loaded, folder, loaded.model)
    total = sum(p.numel() for p in loaded.model.parameters())
    facts["cost"].update(seconds=seconds, total_parameters=total, trained_parameters=0, optimizer_steps=0)
    summary = {**method.summary(), "validation_scores": merge_run.scores, **figures.summary(falls_back)}
    summary["kinship of the parents"] = kinship.summary()
    facts.update(figures.absent, kinship=kinship.rows())
    facts.update(
        summary=summary,
        lineage={
            "parents": names,
            "revisions": _revisions(names, given),
            "method": grammar.named(stage.method)[0],
            **({"base": str(stage.base.path)} if stage.base else {}),
        },
    )
    return facts


def _written(stage: Merge) -> dict[str, Any]:
    """How the result is written."""
    return {
        "out_dtype": getattr(torch, stage.dtype) if stage.dtype else None,
        "compute": getattr(torch, stage.compute),
        "shard_bytes": read_size(stage.max_shard_size) if stage.max_shard_size is not None else None,
    }


def _keep_parent(context: Context, stage: Merge, parent: Path, folder: Path) -> None:
    """Write a parent in place of the merge."""
    if context.accelerator.is_main_process:
        with merging.Parents([parent], [str(parent)]) as opened:
            merging.merge(merging.WeightedMean([1.0]), opened, None, folder / "model", **_written(stage))
    context.accelerator.wait_for_everyone()


def _source(context: Context, stage: Merge, i: int) -> tuple[Stage | None, int]:
    """The stage that a parent comes from, if it does, and how many seeds that has: one alone stands for all its
    seeds."""
    ref = str(stage.models[min(i, len(stage.models) - 1)].path)
    source = context.stage(ref[1:]) if ref.startswith("@") else None
    return source, source.seeds if source is not None else 1


def _asked_on(context: Context, stage: Merge, i: int) -> tuple[Any, Any]:
    """Task and data that a parent is asked on: those of the stage it comes from, else the merge's own."""
    source = _source(context, stage, i)[0] or stage
    return context.task(source), context.info(source)


def _known_scores(context: Context, stage: Merge, seed: int) -> dict[int, float]:
    """Validation scores of parents that were measured at the end of their training, on the same rows by the same
    task."""
    known: dict[int, float] = {}
    every = grammar.merges_seeds(stage, {s.name: s for s in context.recipe.stages})
    for i in range(_source(context, stage, 0)[1] if every else len(stage.models)):
        (source, seeds), ref = _source(context, stage, i), stage.models[0 if every else i]
        if not isinstance(source, Train) or len(ref.given) > 1 or source.task != stage.task:
            continue
        place = folders.stage_folder(context.root, source.name, i if every else seed if seeds > 1 else 0)
        facts = json.loads((place / "stage.json").read_text())
        same = facts["data"]["fingerprint"] == context.info(stage).fingerprint
        if same and facts["primary_metric"] == context.task(stage).metric and facts.get("validation") is not None:
            known[i] = facts["validation"]
    return known


def check_data(context: Context, stage: Merge) -> None:
    """Refuse a merge that looks at data which are not there."""
    method, name = build("merge", stage.method, stage, context.settings), grammar.named(stage.method)[0]
    where, info = f"stages.{stage.name}", context.info(stage)
    for asks, what in ((method.needs_validation, f"{name} selects"), (stage.fallback, "fallback=best_parent chooses")):
        if asks and "validation" not in info.splits:
            raise RecipeError(
                f"{where}: {what} on validation data, and there are none",
                "give data with a validation split, or hold training rows out: data.validation_size",
            )
    if method.needs_validation and method.takes_loss(context.task(stage)):
        measuring.refuse_lacking_loss(where, name, context.task(stage), info, "validation")
    asked = [_asked_on(context, stage, i) for i in range(len(stage.models))]
    measuring.refuse_lacking_data(where, name, method, asked)


def _fold(context: Context, stage: Merge, models: list[Model], room: Path) -> list[Model]:
    """The parents as full models: adapters are written into `room` with their bases, as the task loads them."""
    task, accelerator, full = context.task(stage), context.accelerator, []
    if accelerator.is_main_process:
        shutil.rmtree(room, ignore_errors=True)
    for i, model in enumerate(models):
        if is_adapter(model):
            if accelerator.is_main_process:
                save_model(task, task.load(model, context.info(stage)), room / str(i), described(context, stage))
            model = Model(path=str(room / str(i)))
        full.append(model)
    accelerator.wait_for_everyone()
    return full


def _revisions(names: list[str], models: list[Model]) -> dict[str, str]:
    """Commits of the parents that came from the Hub, by name."""
    return {name: model.revision for name, model in zip(names, models, strict=True) if model.revision}


WORDS = ("vocabulary", "vocabulary_size", "num_scores")
"""What a task's signature says of the vocabulary."""


def _check_kinship(
    task: Any, loaded: Loaded, models: list[Model], names: list[str], info: Any, words: bool = True
) -> None:
    """Parents must agree on what their outputs and inputs mean, not only on shapes. words: on those, too."""
    first = task.signature(loaded)
    for name, model in zip(names[1:], models[1:], strict=True):
        other = task.signature(task.load(model, info))
        for key in first.keys() & other.keys():
            if first[key] != other[key] and (words or key not in WORDS):
                raise RecipeError(
                    f"'{names[0]}' and '{name}' differ in {key}",
                    "bring them to one vocabulary: vocabulary=union, first, or one of the models"
                    if key in WORDS
                    else "merge models of the same labels, vocabulary and preprocessing",
                )


def _refresh_statistics(context: Context, stage: Stage, loaded: Loaded) -> None:
    if not merging.batch_statistics(loaded.model):
        return
    task, info, accelerator = context.task(stage), context.info(stage), context.accelerator
    loaded.model.to(accelerator.device)
    rows = Rows(info, "train", task, loaded, train=False)
    plan = Plan(len(rows), 64, 0)
    count = min(plan.steps_per_epoch, 100)

    def batches() -> Iterator[Any]:
        for batch in load_batches(rows, Windows(plan, 0, count, 1, 0, 1), 0, False):
            yield evaluation.to_device(batch, accelerator.device)

    merging.reestimate(loaded.model, batches, lambda batch: task.forward(loaded.model, batch))


def _ensemble(context: Context, stage: Ensemble, seed: int, folder: Path) -> dict[str, Any]:
    from kt_hf.runner import parents as find_parents

    task, info, accelerator = context.task(stage), context.info(stage), context.accelerator
    names, models = find_parents(context, stage, seed)
    method_name = grammar.named(stage.method)[0]
    method = build("ensemble", stage.method, stage, context.settings)
    started = time.perf_counter()
    members = ensembling.load(models, task, info)
    bundle = ensembling.EnsembleBundle(members, task, method.combine).to(accelerator.device)
    if method.needs_validation:
        found = evaluation.predict(bundle, bundle, accelerator, info, "validation", 64, mode="scores")
        method.fit(torch.from_numpy(found["scores"]).transpose(0, 1), torch.from_numpy(found["label"]))
    if accelerator.is_main_process:
        paths, labels = [Path(str(m.path)) for m in models], members.joined.labels
        ensembling.save(folder / "model", paths, method_name, method, type(task).__name__, labels)
    found = evaluation.predict(bundle, bundle, accelerator, info, info.evaluation_split, 64)
    facts = record(context, stage, members.joined, folder, found)
    total = sum(p.numel() for p in bundle.parameters())
    facts["cost"] = {
        "seconds": time.perf_counter() - started,
        "total_parameters": total,
        "trained_parameters": 0,
        "optimizer_steps": 0,
    }
    facts.update(
        summary=method.state(),
        lineage={"members": names, "revisions": _revisions(names, models), "method": method_name},
    )
    return facts


def _evaluate(context: Context, stage: Evaluate, seed: int, folder: Path) -> dict[str, Any]:
    task, info = context.task(stage), context.info(stage)
    model, revision = context.resolve(stage.model, seed), stage.model.revision
    started = time.perf_counter()
    if ensembling.is_ensemble(Path(str(model.path))):
        paths, combine = ensembling.members(Path(str(model.path)))
        members = ensembling.load([Model(path=str(p)) for p in paths], task, info)
        bundle = ensembling.EnsembleBundle(members, task, combine).to(context.accelerator.device)
        found = evaluation.predict(bundle, bundle, context.accelerator, info, info.evaluation_split, 64)
        facts, total = (
            record(context, stage, members.joined, folder, found),
            sum(p.numel() for p in bundle.parameters()),
        )
    else:
        randomness.seed_all("load", seed)
        loaded = task.load(model, info)
        _refuse_untrained_head(stage.name, task, loaded)
        facts = measured(context, stage, loaded, folder, loaded.model)
        total, revision = sum(p.numel() for p in loaded.model.parameters()), loaded.origin.get("revision") or revision
    facts["cost"] = {
        "seconds": time.perf_counter() - started,
        "total_parameters": total,
        "trained_parameters": 0,
        "optimizer_steps": 0,
    }
    facts["lineage"] = {"model": str(stage.model.path), "revision": revision}
    return facts


def _refuse_untrained_head(where: str, task: Any, loaded: Loaded) -> None:
    if loaded.new_parameters:
        names = ", ".join(loaded.new_parameters[:3])
        raise RecipeError(
            f"{where}: the model has no trained head for these labels ({names} are new)",
            "a model without its head cannot be measured before training",
        )


# --- measuring and saving
# ----------------------------------------------------------------------------------------------


def described(context: Context, stage: Stage) -> dict[str, Any]:
    """What a model's folder tells of its task, so that `kt-hf predict` and `evaluate` do as the stage did: its name and
    settings, but for defaults and for paths, which are of this machine alone."""
    if stage.task is None:
        return {"task": registry.name_of("task", type(context.task(stage)))}
    name, given = grammar.named(stage.task)
    given = context.settings.get((stage.name, f"task:{name}"), given)
    defaults = {key: p.default for key, (_, p) in grammar.settings.parameters(registry.load("task", name)).items()}
    kept = {k: v for k, v in given.items() if v != defaults[k] and not (isinstance(v, str) and os.path.exists(v))}
    return {"task": name, **({"settings": kept} if kept else {})}


def save_model(task: Any, loaded: Loaded, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model's folder as `task.save` says, staged, so that it is there as a whole or not at all. facts: of
    the task, beside those that it writes itself."""
    staged = folder.with_name(f".{folder.name}.partial")
    with checkpoint.disk(folder):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        task.save(loaded, staged)
        (staged / FACTS).write_text(json.dumps({**recorded(staged), **facts}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)


def _predict(
    context: Context, task: Any, loaded: Loaded, model: Any, info: Any, split: str, batch_size: int = 64
) -> dict[str, np.ndarray]:
    loaded.model = model
    bundle = Bundle(loaded, task, {}).to(context.accelerator.device).eval()
    return evaluation.predict(bundle, bundle, context.accelerator, info, split, batch_size)


def measured(context: Context, stage: Stage, loaded: Loaded, folder: Path, model: Any) -> dict[str, Any]:
    """Predict and measure on the evaluation split; returns facts with metrics."""
    task, info = context.task(stage), context.info(stage)
    found = _predict(context, task, loaded, model, info, info.evaluation_split)
    return record(context, stage, loaded, folder, found)


def record(
    context: Context, stage: Stage, loaded: Loaded, folder: Path, found: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Write predictions.parquet and the arrays behind the figures; returns facts with metrics."""
    task, info = context.task(stage), context.info(stage)
    scores: Scores = task.measure(found, loaded, info)
    if context.accelerator.is_main_process:
        import pyarrow as pa
        import pyarrow.parquet as pq

        seed = int(folder.name) if folder.parent.name == "seeds" else 0
        table = {"index": found["index"], "seed": np.full(len(found["index"]), seed), **task.table(found, loaded, info)}
        pq.write_table(
            pa.table({k: pa.array(v) if not isinstance(v, list) else pa.array(list(v)) for k, v in table.items()}),
            folder / "predictions.parquet",
        )
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in found.items()}
        checkpoint.write(folder / "arrays.safetensors", checkpoint.tensor_chunks(tensors))
    return {
        "metrics": scores.metrics,
        "primary_metric": task.metric,
        "greater_is_better": task.greater_is_better,
        "split": info.evaluation_split,
        "data": {"name": info.name, "path": info.path, "fingerprint": info.fingerprint, "counts": info.counts},
        "labels": loaded.labels,
        "label_ids": loaded.label_ids,
        "cost": {},
        "curve": [],
        "evaluations": [],
        "trials": [],
        "summary": {},
        "task": type(task).__name__,
    }
