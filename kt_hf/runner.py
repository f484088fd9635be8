"""Running a recipe: prepare, plan, then stage by stage and seed by seed; finished stages are verified and skipped."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from kt_hf import (
    augmenting,
    heads,
    range_test,
    registry,
    search,
    sharding,
    skeleton,
    stages,
    streaming,
    trainer,
    vocabularies,
    zero3,
)
from kt_hf import data as data_module
from kt_hf import folder as folders
from kt_hf import recipe as grammar
from kt_hf.errors import Collector, RecipeError
from kt_hf.loading import local
from kt_hf.merge import MergeMethod, check_parents
from kt_hf.recipe import Data, Ensemble, Evaluate, Merge, Model, Recipe, Stage, Train
from kt_hf.roles import fitting_tasks
from kt_hf.task import Task
from kt_hf.tensor_files import read_size

logger = logging.getLogger(__name__)


@dataclass
class Context:
    """What all stages of a run share."""

    accelerator: Any
    root: Path
    recipe: Recipe
    settings: dict[tuple[str, str], dict[str, Any]]
    setups: dict[str, Any] = field(default_factory=dict)
    infos: dict[tuple[str, str], data_module.DataInfo] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    until: float = 1.0

    def stage(self, name: str) -> Stage:
        return next(s for s in self.recipe.stages if s.name == name)

    def task(self, stage: Stage) -> Any:
        return self.tasks[stage.name]

    def info(self, stage: Stage) -> data_module.DataInfo:
        """The stage's data, as its task sees them; read once per data set and task."""
        assert stage.data is not None
        name, data = stage.data
        return self.named_info(name, data, self.task(stage))

    def named_info(self, name: str, data: Data, task: Any) -> data_module.DataInfo:
        key = (json.dumps(data.plain(), sort_keys=True, default=str), type(task).__name__)
        if key not in self.infos:
            with self.accelerator.main_process_first():
                self.infos[key] = data_module.prepare(name, data, task)
        return self.infos[key]

    def changed(self, stage: Train, changes: search.Changes) -> tuple[Context, Train]:
        """The stage with other settings, and what it runs in."""
        trial, settings = search.apply(stage, self.settings, changes)
        return (self if trial is stage else dataclasses.replace(self, settings=settings)), trial

    def trials(self, stage: Train) -> list[tuple[str, Context, Train]]:
        """(what an error calls it, context, stage) of every trial of a search; without one, of the stage itself."""
        found, where = search.trials(stage), f"stages.{stage.name}"
        names = [f"{where} with {search.words(changes)}" if len(found) > 1 else where for changes in found]
        return [(name, *self.changed(stage, changes)) for name, changes in zip(names, found, strict=True)]

    def resolve(self, ref: Any, seed: int) -> Model:
        """A model reference with `@stage` replaced by that stage's folder: seed i of it, or its only one."""
        model = ref if isinstance(ref, Model) else Model(**ref) if isinstance(ref, dict) else Model(path=ref)
        given = dict(model.given)
        for key in ("path", "config", "processor"):
            value = given.get(key)
            if isinstance(value, str) and value.startswith("@"):
                other = self.stage(value[1:])
                given[key] = str(folders.stage_folder(self.root, other.name, seed if other.seeds > 1 else 0) / "model")
        for tower in grammar.TOWERS:
            if given.get(tower) is not None:
                given[tower] = self.resolve(getattr(model, tower), seed)
        return Model(**given)


def run(
    recipe: Any,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    allow_changed: Sequence[str] = (),
    until: float = 1.0,
) -> dict[str, Any]:
    """Run a recipe (a `Recipe`, or its mapping) in this process and return the report.

    Raises `KtError`s. `until` stops every training early, at that fraction of its planned steps.
    """
    collect = Collector()
    raw = grammar.normalise(recipe)
    resolved = grammar.resolve(raw, collect)
    grammar.raise_all(resolved, collect)
    return (
        run_resolved(resolved, raw, Path(output_dir), overwrite=overwrite, allow_changed=allow_changed, until=until)
        or {}
    )


def run_resolved(
    recipe: Recipe,
    raw: dict[str, Any],
    root: Path,
    *,
    print_only: bool = False,
    time_steps: bool = False,
    overwrite: bool = False,
    allow_changed: Sequence[str] = (),
    until: float = 1.0,
) -> dict[str, Any] | None:
    """Everything after the grammar: plugins' settings, the plan, the stages, the report."""
    collect = Collector()
    settings = grammar.check_plugins(recipe, collect)
    if not collect.mistakes:
        check_plugins_build(recipe, settings, collect)
    collect.raise_if_any()
    quiet_libraries()
    accelerator = make_accelerator()
    context = Context(accelerator, root, recipe, settings, until=until)
    written = grammar.resolved_yaml(recipe, raw, settings)
    refuse_tokens(grammar.to_yaml(written))
    if print_only:
        plan(context, collect)
        collect.raise_if_any()
        needs = foresee(context, time_steps)
        if accelerator.is_main_process:
            print(grammar.to_yaml(written) + "\n" + describe(context, needs), flush=True)
        return None
    if accelerator.is_main_process:
        with folders.lock(root):
            folders.open_folder(root, written, overwrite, allow_changed)
            return _execute(context, collect)
    accelerator.wait_for_everyone()
    return _execute(context, collect)


def refuse_tokens(written: str) -> None:
    """What a recipe says is kept in its output folder and told to trackers."""
    from kt_hf.hub import scrub

    if scrub(written) != written:
        raise RecipeError(
            "a setting holds an access token, which recipe.yaml would keep",
            "take it out of the recipe; log in with HF_TOKEN or `hf auth login`",
        )


def make_accelerator() -> Accelerator:
    """Accelerate's view of where we run. Under plain torchrun without an accelerator it must be told that ranks on CPUs
    are meant, or every rank would think that it is alone."""
    sharding.check_installed()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    on_cpu = ranks > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    zero3.load_whole(accelerator)
    assert accelerator.num_processes == ranks, (
        f"{ranks} processes were started, accelerate sees {accelerator.num_processes}"
    )
    return accelerator


def _execute(context: Context, collect: Collector) -> dict[str, Any]:
    accelerator = context.accelerator
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()
    plan(context, collect)
    collect.raise_if_any()
    for line in describe(context).splitlines():
        logger.info("%s", line)
    started = time.perf_counter()
    jobs = [(stage, seed) for stage in context.recipe.stages for seed in range(stage.seeds)]
    results: dict[str, list[dict[str, Any]]] = {}
    for i, (stage, seed) in enumerate(jobs):
        begun = time.perf_counter()
        folder = folders.stage_folder(context.root, stage.name, seed)
        done = folders.finished(folder)
        if done is not None and accelerator.is_main_process:
            shutil.rmtree(folder / "trials", ignore_errors=True)  # where a run was killed before it did
        if done is None:
            done = stages.perform(context, stage, seed)
            how = f"{time.perf_counter() - begun:.1f} s"
        else:
            how = "finished before"
        results.setdefault(stage.name, []).append(done)
        metric = done["primary_metric"]
        value = done["metrics"].get(metric, float("nan"))
        logger.info(
            "[%d/%d] %s%s: %s %.4f (%s)",
            i + 1,
            len(jobs),
            stage.name,
            f" seed {seed}" if stage.seeds > 1 else "",
            metric,
            value,
            how,
        )
    from kt_hf import reporting

    report = reporting.finish(context, results, time.perf_counter() - started)
    return report


def quiet_libraries() -> None:
    """Progress bars, advice and deprecations of the libraries below are not ours to show."""
    for library in ("accelerate", "transformers", "peft", "torch", "datasets"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)


# --- the plan
# ----------------------------------------------------------------------------------------------------------


def parents(context: Context, stage: Merge | Ensemble, seed: int) -> tuple[list[str], list[Model]]:
    """(names, models) of the parents of a merge or the members of an ensemble."""
    by_name = {s.name: s for s in context.recipe.stages}
    if grammar.merges_seeds(stage, by_name):
        ref = stage.models[0]
        count = by_name[ref.path[1:]].seeds
        return [f"{ref.path}[{i}]" for i in range(count)], [context.resolve(ref, i) for i in range(count)]
    return [str(m.path) for m in stage.models], [local(context.resolve(m, seed)) for m in stage.models]


def check_plugins_build(recipe: Recipe, settings: dict[tuple[str, str], dict[str, Any]], collect: Collector) -> None:
    """Build every plugin once, and refuse stacks that cannot be right; nothing is loaded yet."""
    for stage in recipe.stages:
        with collect():
            task = stages.build("task", stage.task, stage, settings) if stage.task else None
            if isinstance(stage, Train):
                for where, around, trial in Context(None, Path(), recipe, settings).trials(stage):
                    stack = stages.build_stack(trial, around.settings)
                    if task is not None:
                        trainer.check_stack(stack, trial.training, task, where)
                    if stage.data is not None:
                        streaming.check(stage.data[1], trial.training, stack, task, where)
                    check_streams(trial, stack, recipe, collect)
                    with torch.device("cpu"):
                        trainer.optimizer.schedule(trial.training, 1)
                medium = task.augments if task is not None else None
                augmenting.transforms(stage.data[1].augment if stage.data else None, medium)
            elif isinstance(stage, (Merge, Ensemble)):
                method = stages.build(stage.verb, stage.method, stage, settings)
                if isinstance(stage, Merge):
                    _check_merge(stage, method, recipe)


def _check_merge(stage: Merge, method: MergeMethod, recipe: Recipe) -> None:
    by_name = {s.name: s for s in recipe.stages}
    names = [str(m.path) for m in stage.models]
    if grammar.merges_seeds(stage, by_name):
        names *= by_name[names[0][1:]].seeds
    base = str(stage.base.path) if stage.base is not None else None
    try:
        check_parents(grammar.named(stage.method)[0], method, names, base)
        if stage.max_shard_size is not None:
            read_size(stage.max_shard_size)
        if stage.head is not None:
            heads.place(stage.head, names)
        vocabularies.check(stage.vocabulary, names, "base" if base else None, stage.new_rows)
    except RecipeError as error:
        raise RecipeError(f"stages.{stage.name}: {error.cause}", error.remedy) from None


def check_streams(stage: Train, stack: dict[str, Any], recipe: Recipe, collect: Collector) -> None:
    for owner, strategy in stack.items():
        for name, stream in strategy.streams().items():
            if stream.data != "train" and stream.data not in (recipe.data or {}):
                collect.add(
                    f"stages.{stage.name}: '{owner}' needs the stream '{name}' of a data set '{stream.data}'",
                    f"add it: data.{stream.data}.path=...",
                )


def plan(context: Context, collect: Collector) -> None:
    """Read what data there are, settle every stage's task and check what can be checked without weights."""
    for stage in context.recipe.stages:
        with collect():
            context.tasks[stage.name] = _settle_task(context, stage)
            if stage.data is None and isinstance(stage, (Train, Evaluate)):
                raise RecipeError(
                    f"stages.{stage.name}: no data",
                    "give the recipe or the stage some: data.path=FOLDER_OR_FILE_OR_HUB_ID",
                )
            if stage.data is None:
                raise RecipeError(
                    f"stages.{stage.name}: no data to measure the result on", "give the recipe or the stage data"
                )
            info = context.info(stage)
            context.task(stage).settle(info)
            if isinstance(stage, Train):
                augmenting.transforms(stage.data[1].augment, context.task(stage).augments)
                if "train" not in info.splits:
                    raise RecipeError(
                        f"stages.{stage.name}: the data have no training split", "name it: data.splits.train=..."
                    )
                if len(search.trials(stage)) > 1 and not info.can_measure("validation"):
                    raise RecipeError(
                        f"stages.{stage.name}: choosing settings needs labelled validation rows, and there are none",
                        "hold training rows out (data.validation_size), or give one value each",
                    )
                _plan_training(context, stage)
            if isinstance(stage, Ensemble):
                _plan_ensemble(context, stage)
            if isinstance(stage, Merge):
                stages.check_data(context, stage)
            if isinstance(stage, Evaluate) and stage.model is not None and stage.model.path is None:
                raise RecipeError(
                    f"stages.{stage.name}: a fresh model has learned nothing", "give model=DIR_OR_HUB_ID or @stage"
                )
    if not collect.mistakes:
        for stage in context.recipe.stages:
            with collect():
                _check_compare(context, stage)


def _plan_training(context: Context, stage: Train) -> None:
    """Check every trial of a stage, or the stage itself, against its task and its model; keeps the first one's
    setup."""
    task, sketched = context.task(stage), set[str]()
    for where, around, trial in context.trials(stage):
        assert trial.data is not None
        stack = stages.build_stack(trial, around.settings)
        trainer.check_stack(stack, trial.training, task, where)
        streaming.check(trial.data[1], trial.training, stack, task, where)
        if trial.training.learning_rate == "auto":
            range_test.num_steps(_steps(around, trial))
        rows, plain = around.info(trial).num_training_rows, all(s.batches is None for s in stack.values())
        if trial.training.cache_frozen is True and rows is not None and plain:
            per_epoch = trainer.steps_of_epoch(trial.training, rows, context.accelerator.num_processes)
            if _steps(around, trial) < 2 * per_epoch:
                raise RecipeError(
                    f"{where}: training.cache_frozen: the training has fewer than two epochs",
                    "train for at least two epochs, or set cache_frozen=auto",
                )
        key = json.dumps(trial.strategies, sort_keys=True, default=str)
        if key not in sketched:  # setup depends on strategies alone
            sketched.add(key)
            setup = skeleton.plan_setup(around, trial)
            context.setups.setdefault(stage.name, setup)


def _plan_ensemble(context: Context, stage: Ensemble) -> None:
    """Whether the task has output ensembles, and the data what their weights are fitted to."""
    task, info = context.task(stage), context.info(stage)
    if type(task).from_scores is Task.from_scores:
        raise RecipeError(
            f"stages.{stage.name}: {type(task).__name__} has no output ensembles", "merge in weight space instead"
        )
    fits = stages.build("ensemble", stage.method, stage, context.settings).needs_validation
    classes = task.unit == "example" and info.labels is not None
    if fits and not (classes and "validation" in info.splits):
        raise RecipeError(
            f"stages.{stage.name}: fitting weights needs validation data and one class per example", "give the weights"
        )


def _check_compare(context: Context, stage: Stage) -> None:
    for ref in [c for c in stage.compare or [] if c.startswith("@")]:
        other = context.stage(ref[1:])
        if type(context.task(other)) is not type(context.task(stage)):
            raise RecipeError(
                f"stages.{stage.name}.compare: '{ref}' is {type(context.task(other)).__name__}, "
                f"this stage {type(context.task(stage)).__name__}",
                "compare stages of one task",
            )


def _settle_task(context: Context, stage: Stage) -> Any:
    if stage.task:
        return stages.build("task", stage.task, stage, context.settings)
    if stage.data is None:
        source = next((s for s in context.recipe.stages if s.name != stage.name), None)
        if source is None:
            raise RecipeError(f"stages.{stage.name}: neither task nor data", "set task=...")
        return context.tasks[source.name]
    features = next(iter(data_module.read(stage.data[1]).values())).features
    fitting = fitting_tasks(features, stage.data[1].columns)
    if len(fitting) != 1:
        found = f"could be {' or '.join(name for name, _ in fitting)}" if fitting else "does not decide the task"
        raise RecipeError(
            f"data '{stage.data[0]}' with columns {', '.join(features)} {found}",
            f"set task=..., one of {', '.join(registry.names('task'))}",
        )
    return fitting[0][1]


def _steps(context: Context, stage: Train) -> int:
    count = context.info(stage).num_training_rows
    return trainer.planned_steps(stage.training, count, context.accelerator.num_processes)


def foresee(context: Context, time_steps: bool) -> dict[str, list[str]]:
    """Lines for the plan by stage: the memory that a training will take, and, where that is asked for, its minutes."""
    from kt_hf import estimate, timing

    lines: dict[str, list[str]] = {}
    found: list[timing.Timing | str] = []
    for stage in [s for s in context.recipe.stages if isinstance(s, Train)]:
        sketch = context.setups.get(stage.name)
        if sketch is None:
            lines[stage.name] = ["memory: unknown, the model has no configuration here to build it from"]
        else:
            _, around, first = context.trials(stage)[0]
            lines[stage.name] = [str(estimate.memory(around, first, sketch))]
        if time_steps:
            found.append(timing.measure(context, stage))
            lines[stage.name] += timing.describe(context, stage, found[-1])
    if time_steps:
        known = [f for f in found if not isinstance(f, str)]
        total = timing.minutes(sum(f.seconds + f.evaluation for f in known))
        lines[""] = [
            f"timed: about {total} for {len(known)} of {len(found)} trainings; loading, preprocessing and "
            "saving come on top"
        ]
    return lines


def describe(context: Context, needs: dict[str, list[str]] | None = None) -> str:
    """The plan in words. needs: further lines by stage, and under '' for all."""
    needs = needs or {}
    lines = [
        f"plan: {len(context.recipe.stages)} stages, {sum(s.seeds for s in context.recipe.stages)} runs of them, "
        f"into {context.root}"
    ]
    for stage in context.recipe.stages:
        info, seeds = context.info(stage), f" x {stage.seeds} seeds" if stage.seeds > 1 else ""
        sizes = ", ".join(f"{len(rows)} {split}" for split, rows in info.splits.items() if split in info.counts)
        sizes = f"train streamed, {sizes}" if info.stream is not None else sizes
        head = f"  {stage.verb} {stage.name}{seeds}: {type(context.task(stage)).__name__} on {info.name} ({sizes})"
        if isinstance(stage, Train):
            steps = _steps(context, stage)
            bins = stage.training.packing and context.task(stage).packs == "bins"
            most = "at most " if bins and stage.training.max_steps <= 0 else ""
            head += (
                f", {most}{steps} steps of {trainer.global_batch(stage.training, context.accelerator.num_processes)}"
            )
            head += _examples(context, stage, steps)
            setup = context.setups.get(stage.name)
            stack = setup.stack if setup else stages.build_stack(stage, context.settings)
            head += f", trains {setup.trained:,} of {setup.total:,} parameters" if setup else ""
            head += "".join(f"\n    {name}: {strategy.describe()}" for name, strategy in stack.items())
            if stage.training.learning_rate == "auto":
                head += f"\n    {range_test.describe(stage.training, steps)}"
            head += "".join(f"\n    {line}" for line in needs.get(stage.name, []))
            if len(found := search.trials(stage)) > 1:
                head += f"\n    {search.describe(stage, found, sum(_steps(c, t) for _, c, t in context.trials(stage)))}"
        elif isinstance(stage, (Merge, Ensemble)):
            head += f", {grammar.named(stage.method)[0]} of {', '.join(str(m.path) for m in stage.models)}"
        lines.append(head)
    return "\n".join([*lines, *(f"  {line}" for line in needs.get("", []))])


def _examples(context: Context, stage: Train, steps: int) -> str:
    """How many rows the steps see; an epoch's last batch may be smaller."""
    if stage.training.packing:
        return ""
    rows = context.info(stage).num_training_rows
    size = trainer.global_batch(stage.training, context.accelerator.num_processes)
    if rows is None:
        return f" (at most {steps * size:,} examples)"
    per_epoch = trainer.steps_of_epoch(stage.training, rows, context.accelerator.num_processes)
    epochs, rest = divmod(steps, per_epoch)
    seen = epochs * min(rows, per_epoch * size) + rest * size
    return f" ({seen:,} examples, {seen / rows:.3g} epochs)"
