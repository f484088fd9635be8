"""Models without weights, for the plan: what strategies would match and train, before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kt_hf import ensembling, settings, stages
from kt_hf.errors import KtError
from kt_hf.facts import Run, load_frozen
from kt_hf.recipe import TOWERS, Merge, Model, Train
from kt_hf.task import Loaded

if TYPE_CHECKING:
    from kt_hf.runner import Context

logger = logging.getLogger(__name__)


@dataclass
class Sketch:
    """A stage's model without weights, after every `setup`, with its stack; trained, total: numbers of parameters."""

    loaded: Loaded
    stack: dict[str, Any]
    run: Run
    trained: int
    total: int


def plan_setup(context: Context, stage: Train) -> Sketch | None:
    """What a stage will train, or None where no skeleton can be built.

    Raises the `RecipeError` of a strategy that would do nothing or asks for what the model does not have.
    """
    loaded = _load(context, stage)
    if loaded is None:
        return None
    info, task = context.info(stage), context.task(stage)
    run = Run(context.accelerator, stage.training.seed, context.root, task, loaded, info, 1, resolver(context))
    stack = stages.build_stack(stage, context.settings)
    model = loaded.model
    with torch.device("meta"):
        for strategy in stack.values():
            model = strategy.setup(model, run)
    loaded.model = model
    _check_teachers(context, stage, stack, run)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Sketch(loaded, stack, run, sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def _check_teachers(context: Context, stage: Train, stack: dict[str, Any], run: Run) -> None:
    """Whether models on disk that strategies ask go with the student: vocabulary, labels, normalisation."""
    for name, strategy in stack.items():
        given = context.settings.get((stage.name, f"strategy:{name}"), {})
        for ref in settings.references(type(strategy), given, "model").values():
            model = context.resolve(ref, 0)
            folder = Path(str(model.path))
            if run.task.sketches and ((folder / "config.json").is_file() or ensembling.is_ensemble(folder)):
                with _quietly(f"the teacher of {stage.name}"), torch.device("meta"):
                    load_frozen(model, run.task, run.info, torch.device("meta"), run.loaded, str(ref))


@contextmanager
def _quietly(what: str) -> Iterator[None]:
    """Only mistakes are told: the same remarks come again with the real model, and some models cannot be built without
    their weights, which is no fault of the recipe."""
    level = logging.getLogger("kt_hf").level
    try:
        logging.getLogger("kt_hf").setLevel(logging.ERROR)
        yield
    except KtError:
        raise
    except Exception as error:
        logger.debug("no skeleton for %s: %s", what, error)
    finally:
        logging.getLogger("kt_hf").setLevel(level)


def resolver(context: Context) -> Any:
    """Model reference -> one without weights; what has no skeleton stays as it is."""

    def resolve(ref: Any) -> Model:
        model = ref if isinstance(ref, Model) else Model(**ref) if isinstance(ref, dict) else Model(path=ref)
        return fresh(context, model) or context.resolve(ref, 0)

    return resolve


def _load(context: Context, stage: Train) -> Loaded | None:
    ref, task = fresh(context, stage.model), context.task(stage)
    if ref is None:
        return None
    if task.sketches and stage.model is not None and stage.model.path is not None and Path(stage.model.path).is_dir():
        ref = stage.model  # a checkpoint itself, with its labels
    with _quietly(stage.name), torch.device("meta"):
        return task.load(ref, context.info(stage))
    return None


def fresh(context: Context, ref: Model | None) -> Model | None:
    """The reference with checkpoints replaced by their configurations; `@stage` by what that stage starts from."""
    if ref is None:
        return None
    if str(ref.processor).startswith("@"):  # where that stage has not run, the model's own will do
        found = context.resolve(ref, 0).processor
        kept = {k: v for k, v in ref.given.items() if k != "processor"}
        ref = Model(**kept, **({"processor": found} if Path(found).is_dir() else {}))
    if isinstance(ref.path, str) and ref.path.startswith("@"):
        other = context.stage(ref.path[1:])
        if isinstance(other, Merge):
            return fresh(context, other.models[0])
        return fresh(context, other.model) if isinstance(other, Train) else None
    if ref.path is not None:
        if not (Path(ref.path) / "config.json").is_file():
            return None
        return Model(**{**{k: v for k, v in ref.given.items() if k not in ("path", "revision")}, "config": ref.path})
    towers = {t: fresh(context, getattr(ref, t)) for t in TOWERS if getattr(ref, t) is not None}
    if None in towers.values():
        return None
    return Model(**{**ref.given, **towers})
