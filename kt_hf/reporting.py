"""The end of a run: evidence from what the stages left on disk, the report, model cards and pushes."""

from __future__ import annotations

import datetime
import json
import logging
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from kt_hf import checkpoint, evidence, hub, registry, search, skeleton, stages
from kt_hf import folder as folders
from kt_hf import recipe as grammar
from kt_hf.evidence import SeedEvidence, StageEvidence
from kt_hf.model_card import model_card
from kt_hf.recipe import Ensemble, Merge, Stage, Train, Training
from kt_hf.task import Loaded, Scores

if TYPE_CHECKING:
    from kt_hf.runner import Context

logger = logging.getLogger(__name__)

Results = dict[str, list[dict[str, Any]]]


def finish(context: Context, results: Results, seconds: float) -> dict[str, Any]:
    """Write report.json, report.html and the model cards, push what is to be pushed, and show the table."""
    if not context.accelerator.is_main_process:
        context.accelerator.wait_for_everyone()
        return {}
    found = [stage_evidence(context, stage, results[stage.name]) for stage in context.recipe.stages]
    names = ("kt_hf", "torch", "transformers", "datasets", "peft", "accelerate", "open_clip_torch")
    report = evidence.build(
        context.recipe.name or context.root.name,
        found,
        seconds=seconds,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: metadata.version(name) for name in names},
    )
    checkpoint.write_json(context.root / "report.json", report)
    from kt_hf import report as page

    page.write_html(report, context.root / "report.html")
    for stage in context.recipe.stages:
        write_cards(context, stage, results[stage.name], report)
    print(evidence.table(report), flush=True)
    print(f"\nreport: {context.root / 'report.html'}", flush=True)
    push(context)
    context.accelerator.wait_for_everyone()
    return report


def stage_evidence(context: Context, stage: Stage, results: list[dict[str, Any]]) -> StageEvidence:
    """What `evidence.build` needs of a stage, read back from its folders."""
    task, info, first = context.task(stage), context.info(stage), results[0]
    labels = _names(info.labels, first)
    seeds = [_seed_evidence(context, stage, facts, labels) for facts in results]
    chosen: dict[str, Any] = next((trial["settings"] for trial in first["trials"] if trial["chosen"]), {})
    setup, searched = context.setups.get(stage.name), search.axes(getattr(stage, "search", None))
    if chosen and isinstance(stage, Train):
        searched = searched or {"training.learning_rate": stage.training.learning_rate}
        context, stage = context.changed(stage, chosen)
        setup = skeleton.plan_setup(context, stage) if setup else None
    compare = list(stage.compare or [])
    if isinstance(stage, Merge):
        compare += [name for name in grammar.PARENTS if name not in compare and not first.get(name)]
    description = [f"{name}: {s.describe()}" for name, s in setup.stack.items()] if setup else _description(stage)
    return StageEvidence(
        name=stage.name,
        kind=stage.verb,
        task=registry.name_of("task", type(task)),
        data={
            "name": info.name,
            "path": info.path,
            "split": first["split"],
            "fingerprint": info.fingerprint,
            "counts": info.counts,
        },
        metric=task.metric,
        higher_is_better=task.greater_is_better,
        seeds=seeds,
        description=description,
        labels=labels,
        lower_metrics=task.lower_metrics,
        compare=compare,
        baselines={
            name: _baseline(context, stage, results, labels, name) for name in compare if not name.startswith("@")
        },
        validation_uses=_validation_uses(context, stage),
        settings=_settings(context, stage) | ({"search": searched} if chosen else {}),
    )


def _description(stage: Stage) -> list[str]:
    if isinstance(stage, Train):
        return [grammar.named(s)[0] for s in stage.strategies]
    if isinstance(stage, (Merge, Ensemble)):
        return [f"{grammar.named(stage.method)[0]} of {', '.join(str(m.path) for m in stage.models)}"]
    return [f"measures {stage.model.path}"] if stage.model is not None else []


def _names(data: list[str] | None, facts: dict[str, Any]) -> list[str] | None:
    """Class names in the data's order, then those which only the model has."""
    if data is None:
        return None
    ids = facts["label_ids"] or []
    return [*data, *(name for i, name in enumerate(facts["labels"] or []) if i not in ids)]


def _seed_evidence(context: Context, stage: Stage, facts: dict[str, Any], labels: list[str] | None) -> SeedEvidence:
    task, info = context.task(stage), context.info(stage)
    folder = folders.stage_folder(context.root, stage.name, facts["seed"])
    found = load_file(str(folder / "arrays.safetensors"))
    loaded = Loaded(None, None, facts["labels"], facts["label_ids"])  # type: ignore[arg-type]  # measuring needs no weights
    scores = task.measure(found, loaded, info)
    extra = {
        "curve": facts["curve"],
        "evaluations": facts["evaluations"],
        "cost": facts["cost"],
        "trials": facts["trials"],
        "range_test": facts.get("range_test"),
    }
    summary = {**facts["summary"], **scores.notes}
    return _evidence(
        scores, found, facts, labels, seed=facts["seed"], lineage=facts["lineage"], summary=summary, **extra
    )


def _evidence(
    scores: Scores,
    found: dict[str, np.ndarray],
    facts: dict[str, Any],
    labels: list[str] | None,
    seed: int = 0,
    **extra: Any,
) -> SeedEvidence:
    references, guesses = None, None
    has_classes = "scores" in found and "label" in found and found["scores"].ndim == 2 and found["label"].ndim == 1
    if labels is not None and has_classes:
        order = _order(facts, len(labels))
        references = np.where(found["label"] >= 0, order[found["label"]], -1)
        guesses = order[found["scores"].argmax(1)]
    return SeedEvidence(
        seed, found["index"], scores.metrics, scores.examples, scores.statistics, references, guesses, **extra
    )


def _order(facts: dict[str, Any], count: int) -> np.ndarray:
    """Class of the model -> class in the order of `_names`."""
    ids = facts["label_ids"]
    rest = [i for i in range(len(facts["labels"])) if i not in ids]
    order = np.empty(len(facts["labels"]), dtype=np.int64)
    order[[*ids, *rest]] = np.arange(len(ids) + len(rest))
    return order


def _baseline(
    context: Context, stage: Stage, results: list[dict[str, Any]], labels: list[str] | None, name: str
) -> SeedEvidence | list[SeedEvidence] | str:
    """A built-in baseline, or in words why there is none."""
    task, info, facts = context.task(stage), context.info(stage), results[0]
    folder = folders.stage_folder(context.root, stage.name, 0)
    loaded = Loaded(None, None, facts["labels"], facts["label_ids"])  # type: ignore[arg-type]
    if name == "majority":
        if "train" not in info.splits or "label" not in info.roles:
            return "the data have no training labels"
        found = load_file(str(folder / "arrays.safetensors"))
        scores = task.majority({"label": list(info.splits["train"]["label"])}, found, loaded, info)
        if scores is None:
            return "the task has no majority class"
        constant = dict(found)
        if labels is not None and "scores" in found and found["label"].ndim == 1:
            most = np.bincount([y for y in info.splits["train"]["label"] if y >= 0]).argmax()
            constant["scores"] = np.zeros_like(found["scores"])
            constant["scores"][:, facts["label_ids"][most]] = 1
        return _evidence(scores, constant, facts, labels)
    if not (folder / f"{name}.safetensors").is_file():
        kind = "a merge has parents" if name in grammar.PARENTS else "a train stage has a model before training"
        return str(facts.get(name) or f"only {kind}")

    def measured(seed: int) -> SeedEvidence:
        found = load_file(str(folders.stage_folder(context.root, stage.name, seed) / f"{name}.safetensors"))
        return _evidence(task.measure(found, loaded, info), found, facts, labels, seed)

    return measured(0) if name not in grammar.PARENTS else [measured(each["seed"]) for each in results]


def _validation_uses(context: Context, stage: Stage) -> list[str]:
    uses = []
    if isinstance(stage, Train):
        uses += ["early stopping"] if stage.training.early_stopping_patience else []
        uses += ["the choice of the best step"] if stage.training.load_best_model_at_end else []
    if isinstance(stage, (Merge, Ensemble)):
        method = stages.build(stage.verb, stage.method, stage, context.settings)
        uses += ["the choice of weights"] if method.needs_validation else []
        uses += ["the fallback to the best parent"] if isinstance(stage, Merge) and stage.fallback else []
        asked = isinstance(stage, Merge) and method.measures_on == "validation"
        uses += ["what the parents were asked"] if asked else []
    return uses


_ALWAYS_SHOWN = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "optim", "seed")


def _settings(context: Context, stage: Stage) -> dict[str, Any]:
    """The stage's settings as recipe.yaml has them; of its training what a reader looks for first, and what is not as
    by default, whether the stage or the recipe says so."""
    found: dict[str, Any] = {}
    for (name, plugin), values in context.settings.items():
        if name == stage.name:
            found[plugin.partition(":")[2]] = values
    if isinstance(stage, Train):
        defaults = {k: parameter.default for k, (_, parameter) in grammar.settings.parameters(Training).items()}
        shown = {k: getattr(stage.training, k) for k in defaults}
        replaced = "max_steps" if stage.training.max_steps < 0 else "num_train_epochs"
        found["training"] = {
            k: v for k, v in shown.items() if k != replaced and (k in _ALWAYS_SHOWN or v != defaults[k])
        }
    if stage.model is not None:
        found["model"] = {k: v.plain() if hasattr(v, "plain") else v for k, v in stage.model.given.items()}
    return found


# --- model cards and pushes
# --------------------------------------------------------------------------------------------


def write_cards(context: Context, stage: Stage, results: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """A README.md in every model folder of the stage."""
    entry = next(e for e in report["stages"] if e["name"] == stage.name)
    info = context.info(stage)
    for facts in results:
        folder = folders.stage_folder(context.root, stage.name, facts["seed"]) / "model"
        if not folder.is_dir():
            continue
        lineage = facts["lineage"]
        adapter = (folder / "adapter_config.json").is_file()
        relation = "adapter" if adapter else "merge" if isinstance(stage, Merge) else "finetune"
        metrics = [
            {"name": name, **{k: m[k] for k in ("value", "low", "high", "seeds")}}
            for name, m in entry["metrics"].items()
            if m["value"] is not None
        ]
        text = model_card(
            f"{report['name']}-{stage.name}",
            task=entry["task"],
            sentence=entry["sentence"],
            base_model=lineage.get("base_model"),
            base_revision=lineage.get("revision"),
            base_model_relation=relation if lineage.get("base_model") or lineage.get("parents") else None,
            parents=[
                (name, lineage.get("revisions", {}).get(name))
                for name in lineage.get("parents", lineage.get("members", []))
            ],
            teacher=[(lineage["teacher"], lineage.get("teacher_revision"))] if "teacher" in lineage else [],
            datasets=[(info.path or info.name, entry["data"]["split"], info.fingerprint)],
            metrics=metrics,
            settings=entry["settings"],
            library_name="peft"
            if adapter
            else "open_clip"
            if (folder / "open_clip_config.json").is_file()
            else "transformers",
        )
        (folder / "README.md").write_text(text)


def push(context: Context) -> None:
    """Publish what `push_to_hub` names: a stage's model, or the last stage's for the recipe's."""
    wanted = [(s, s.push_to_hub) for s in context.recipe.stages if getattr(s, "push_to_hub", None)]
    if context.recipe.push_to_hub:
        wanted.append((context.recipe.stages[-1], context.recipe.push_to_hub))
    for stage, repo in wanted:
        folder = Path(folders.stage_folder(context.root, stage.name, 0)) / "model"
        commit = hub.push(folder, str(repo))
        logger.info("%s is published as %s (%s)", stage.name, repo, commit.url)


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())
