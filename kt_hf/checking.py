"""All mistakes of a recipe, found together: the grammar and the plugins' names before torch is imported, the plugins'
settings as soon as the plugins are, and all of it before any model or data is loaded."""

from __future__ import annotations

import copy
import re
from typing import Any

from kt_hf import registry, search, settings
from kt_hf.errors import Collector, IntegrityError, RecipeError, nearest
from kt_hf.nouns import (
    BASELINES,
    PARENTS,
    STAGES,
    TOWERS,
    Data,
    Ensemble,
    Evaluate,
    Merge,
    Model,
    Noun,
    Recipe,
    Stage,
    Train,
    Training,
    name_of,
    named,
    plain,
    verb_of,
)
from kt_hf.overrides import REPLACES, several

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED = ("recipe.yaml", "report.json", "report.html", "error.json")

# --- the whole ------------------------------------------------------------------------------------------------------


def resolve(raw: dict[str, Any], collect: Collector) -> Recipe:
    """Check grammar and plugin names, without importing torch or any plugin, and return a recipe whose nouns are
    filled in.

    Mistakes go to `collect`; what has one is replaced by its default, so that the rest is checked, too. Stages that
    nobody uses and that say `when_used` are left out. Raises `IntegrityError` for names that lead out of the output
    folder.
    """
    top = settings.validate(Recipe, raw, "", collect)
    _check_name(raw.get("name"), "name", "recipe", collect)
    data = _data(raw.get("data"), collect)
    training, common = _training(raw.get("training"), {}, "training", collect)
    model = _model(raw.get("model"), "model", collect)
    if not _plugin_name("task", raw.get("task"), "task", collect):
        top["task"] = None
    listed = raw.get("stages")
    if isinstance(listed, list) and not listed:
        listed = None
        collect.add("stages: empty", "a recipe needs at least one stage, such as `- train: mine`")
    stages = [
        stage
        for i, item in enumerate(listed if isinstance(listed, list) else [])
        if (stage := _stage(item, f"stages.{i}", collect)) is not None
    ]
    for stage in stages:
        _fill_in(stage, top, data, model, common, collect)
    _check_order(stages, collect)
    stages = _prune(stages)
    check_seeds(stages, collect)
    recipe = Recipe(stages=stages)
    recipe.__dict__.update(top, stages=stages, data=data, model=model, training=training)
    return recipe


def _fill_in(
    stage: Stage,
    top: dict[str, Any],
    data: dict[str, Data],
    model: Model | None,
    common: dict[str, Any],
    collect: Collector,
) -> None:
    """Give a stage the recipe's defaults, and turn what it was given into nouns."""
    where = f"stages.{stage.name}"
    stage.data = _bind_data(stage.data, data, where, collect)
    own = _model(stage.model, f"{where}.model", collect) if "model" in stage.given else None
    stage.model = own or model
    if isinstance(stage, (Merge, Ensemble)):
        found = [_model(m, f"{where}.models", collect) for m in stage.models or []]
        stage.models, stage.model = [m for m in found if m is not None], None
        if not found:
            collect.add(f"{where}.models: empty", "name at least one model, for example '@finetune'")
    if isinstance(stage, Merge):
        stage.base = _model(stage.base, f"{where}.base", collect)
    if isinstance(stage, Train):
        stage.training, _ = _training(stage.training, common, f"{where}.training", collect)
        _check_search(stage, where, collect)
    if isinstance(stage, (Train, Evaluate)) and (stage.given.get("model") or top["model"]) is None:
        collect.add(f"{where}: no model", "give the recipe or the stage one: model=DIR_OR_HUB_ID or model.config=TYPE")
    if isinstance(stage, Evaluate) and stage.model is not None and stage.model.config:
        collect.add(f"{where}: a fresh model has learned nothing", "give model=DIR_OR_HUB_ID or '@stage'")
    stage.task = stage.task or top["task"]
    stage.seeds = stage.seeds or top["seeds"]


def raise_all(recipe: Recipe, collect: Collector) -> None:
    """Raise what `resolve` found, together with the mistakes in plugins' settings where there are such settings.

    Plugins are imported only then: a recipe with mistakes is refused without torch as long as nothing is missed.
    """
    if not collect.mistakes:
        return
    if any(given for stage in recipe.stages for _, item, _ in _plugins_of(stage) for given in [named(item)[1]]):
        check_plugins(recipe, collect)
    collect.raise_if_any()


# --- stages ---------------------------------------------------------------------------------------------------------


def _stage(item: Any, where: str, collect: Collector) -> Stage | None:
    verb = verb_of(item)
    if verb is None:
        found = [str(key) for key in item] if isinstance(item, dict) else [settings.shorten(item)]
        verbs = [key for key in found if key in STAGES]
        if len(verbs) > 1:
            collect.add(f"{where}: {' and '.join(verbs)} in one stage", "write one verb for each stage")
        else:
            remedy = nearest(found[0] if found else "", STAGES)
            collect.add(f"{where}: {', '.join(found) or 'nothing'} is no stage", f"start with its verb; {remedy}")
        return None
    cls, name = STAGES[verb], item[verb]
    if not _check_name(name, where, "stage", collect):
        return None
    given = {k: v for k, v in item.items() if k != verb}
    where = f"stages.{name}"
    stage = cls(**settings.validate(cls, {"name": name, **given}, where, collect))
    stage.given = {"name": name, **{k: v for k, v in given.items() if k in settings.parameters(cls)}}
    if isinstance(stage, Train):
        listed = stage.strategies or ["finetune"]
        stage.strategies = [s for s in listed if _plugin_name("strategy", s, f"{where}.strategies", collect)]
        names = [named(s)[0] for s in stage.strategies]
        for twice in sorted({n for n in names if names.count(n) > 1}):
            collect.add(f"{where}.strategies: '{twice}' stands there twice", "give a strategy once in a stage")
    elif isinstance(stage, (Merge, Ensemble)) and not _plugin_name(verb, stage.method, f"{where}.method", collect):
        stage.method = None
    if not _plugin_name("task", stage.task, f"{where}.task", collect):
        stage.task = None
    return stage


def _check_name(name: Any, where: str, what: str, collect: Collector) -> bool:
    """Names of recipes and stages become folders. Raises `IntegrityError` where one leads elsewhere."""
    if name is None and what == "recipe":
        return True
    if isinstance(name, str) and (".." in name.split("/") or "/" in name or "\\" in name or "\0" in name):
        raise IntegrityError(
            f"{where}: the name {settings.shorten(name)} leads out of the output folder",
            "names hold no '/' and are not '..'",
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        remedy = "use up to 64 letters, digits, '_', '-' and '.'"
        collect.add(f"{where}: {settings.shorten(name)} is no name for a {what}", remedy)
        return False
    if what == "stage" and name in _RESERVED:
        collect.add(f"{where}: the name '{name}' is taken by a file of the output folder", "choose another name")
        return False
    return True


def _plugin_name(kind: str, item: Any, where: str, collect: Collector) -> bool:
    if item is None:
        return False
    if not isinstance(item, (str, dict)) or (isinstance(item, dict) and len(item) != 1):
        collect.add(
            f"{where}: got {settings.shorten(item)}", "write a plugin as its name or as {name: {setting: value}}"
        )
        return False
    name, given = named(item)
    before = len(collect.mistakes)
    if not isinstance(given, dict):
        cause = f"{where}.{name}: got {settings.shorten(given)}, expected a mapping of settings"
        collect.add(cause, "write {name: {setting: value}}")
    try:
        registry.find(kind, name)
    except RecipeError as error:
        collect.add(f"{where}: {error.cause}", error.remedy)
    return len(collect.mistakes) == before


# --- data, model, training ------------------------------------------------------------------------------------------


def _noun(cls: type[Noun], given: Any, where: str, collect: Collector) -> Any:
    """The noun; a setting with a mistake has its default."""
    values = settings.validate(cls, given, where, collect, positional="path")
    noun: Any = cls(**values)
    if not isinstance(given, dict):
        given = {"path": given}
    noun.given = {key: values[key] for key in given if key in values}
    if cls is Data:
        _check_data(noun, where, collect)
    return noun


def _check_data(data: Data, where: str, collect: Collector) -> None:
    labels = [str(label) for label in data.labels or []]
    if data.labels is not None and not labels:
        collect.add(f"{where}.labels: an empty list", "name the classes to keep")
    for twice in sorted({label for label in labels if labels.count(label) > 1}):
        collect.add(f"{where}.labels: '{twice}' stands there twice", "name each class once")
    if data.validation_size >= 1 and data.validation_size != int(data.validation_size):
        remedy = "a fraction below 1, or a whole number of rows"
        collect.add(f"{where}.validation_size: got {data.validation_size}", remedy)
    if data.streaming:
        _check_streamed(data, where, collect)
    if data.path == "":
        collect.add(f"{where}.path: empty", "a folder, a file, a Hub id, or digits")


def _check_streamed(data: Data, where: str, collect: Collector) -> None:
    """What would need all training rows at hand."""
    if data.path == "digits":
        collect.add(f"{where}.streaming: digits are in memory", "leave streaming out")
    for name in ("k_shot", "label_noise"):
        if getattr(data, name):
            collect.add(f"{where}.streaming and {where}.{name} exclude each other", "leave one of them out")
    if isinstance(data.max_examples, int) or "train" in (data.max_examples or {}):
        remedy = f"limit the steps (training.max_steps), or other splits: {where}.max_examples.validation=500"
        collect.add(f"{where}.streaming: {where}.max_examples does not limit a stream", remedy)
    for kind in ("duplicates", "unreadable"):
        if kind in (data.drop or []):
            collect.add(f"{where}.streaming and {where}.drop=[{kind}] exclude each other", "leave one of them out")


def _data(given: Any, collect: Collector) -> dict[str, Data]:
    if given is None:
        return {}
    if several(given):
        return {str(name): _noun(Data, each, f"data.{name}", collect) for name, each in given.items()}
    return {"data": _noun(Data, given, "data", collect)}


def _bind_data(given: Any, data: dict[str, Data], where: str, collect: Collector) -> tuple[str, Data] | None:
    """(name, data set) of a stage."""
    if isinstance(given, dict) and set(given) == {"path"} and given["path"] in data:
        given = given["path"]
    if given is None:
        if len(data) > 1:
            collect.add(f"{where}: the recipe has several data sets", nearest("", [f"data: {name}" for name in data]))
        return next(iter(data.items()), None)
    if isinstance(given, str) and given in data:
        return given, data[given]
    if isinstance(given, str) and len(data) > 1 and given != "digits" and not set("/.") & set(given):
        collect.add(f"{where}.data: there is no data set '{given}'", nearest(given, data))
        return None
    noun = _noun(Data, given, f"{where}.data", collect)
    return str(noun.path).rstrip("/").rpartition("/")[2], noun


def _model(given: Any, where: str, collect: Collector) -> Model | None:
    if given is None:
        return None
    before = len(collect.mistakes)
    model: Model = _noun(Model, given, where, collect)
    kinds = [key for key in ("path", "config") if getattr(model, key)]
    kinds += [" and ".join(t for t in TOWERS if getattr(model, t))] if any(getattr(model, t) for t in TOWERS) else []
    if len(kinds) > 1:
        remedy = "a model is a checkpoint, a fresh config, or made of towers"
        collect.add(f"{where}: {' and '.join(kinds)} contradict each other", remedy)
    elif not kinds and len(collect.mistakes) == before:
        collect.add(f"{where}: neither path nor config", "model=DIR_OR_HUB_ID, or model.config=TYPE for a fresh one")
    if model.replace_head and model.cut_head:
        collect.add(f"{where}: replace_head and cut_head contradict each other", "choose one of them")
    for tower in TOWERS:
        if getattr(model, tower) is not None:
            setattr(model, tower, _model(getattr(model, tower), f"{where}.{tower}", collect))
    return model


def _training(given: Any, common: dict[str, Any], where: str, collect: Collector) -> tuple[Training, dict[str, Any]]:
    """(the settings of a training, those that were given); `common` holds what the recipe gives all trainings."""
    own = given if isinstance(given, dict) else {}
    values = settings.validate(Training, own, where, collect)
    own = {key: values[key] for key in own if key in values}
    inherited = {k: v for k, v in common.items() if k not in own and not (REPLACES.get(k) in own and own[REPLACES[k]])}
    training = Training(**{**inherited, **own})
    said = _contradictions(Training(**common)) if common else []
    for cause, remedy in _contradictions(training):
        if (cause, remedy) not in said:
            collect.add(f"{where}{cause}", remedy)
    training.given = own
    return training, own


def _check_search(stage: Train, where: str, collect: Collector) -> None:
    """Whether what a stage's search tries can be tried, alone and together."""
    before = len(collect.mistakes)
    search.check(stage, where, collect)
    if not stage.search or len(collect.mistakes) > before:
        return
    said = _contradictions(stage.training)
    for changes in search.trials(stage):
        for cause, remedy in _contradictions(search.training_of(stage, changes)):
            if (cause, remedy) not in said:
                said.append((cause, remedy))
                collect.add(f"{where}.search: with {search.words(changes)}, training{cause}", remedy)


def _contradictions(t: Training) -> list[tuple[str, str]]:
    """(cause, remedy) of settings that are right by themselves and wrong together."""
    found: list[tuple[str, str]] = []
    if t.warmup_ratio and t.warmup_steps:
        found.append((": warmup_ratio and warmup_steps contradict each other", "give one of them"))
    if t.max_steps == 0:
        remedy = "a number of steps, or -1 to train for num_train_epochs; to measure only, use an evaluate stage"
        found.append((".max_steps: got 0", remedy))
    if isinstance(t.learning_rate, list) and len(set(t.learning_rate)) != len(t.learning_rate):
        found.append((".learning_rate: a value stands there twice", "give each rate once"))
    if isinstance(t.learning_rate, list) and not t.learning_rate:
        found.append((".learning_rate: an empty list", "give one learning rate or several to choose from"))
    if t.fp16 and t.bf16:
        found.append((": fp16 and bf16 contradict each other", "choose one of them"))
    if t.momentum and t.optim != "sgd":
        found.append((f": momentum and optim={t.optim} contradict each other", "momentum is a setting of sgd"))
    if isinstance(t.report_to, list) and "none" in t.report_to and len(t.report_to) > 1:
        found.append((".report_to: 'none' and others contradict each other", "give one of them"))
    wants_evaluation = [k for k in ("load_best_model_at_end", "early_stopping_patience") if getattr(t, k)]
    if wants_evaluation and t.eval_steps == 0:
        found.append((f": {wants_evaluation[0]} and eval_steps=0 contradict each other", "set eval_steps"))
    return found


# --- order ----------------------------------------------------------------------------------------------------------


def model_refs(stage: Stage) -> dict[str, Any]:
    """Every earlier stage that a stage names: path of the setting -> `@stage`."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, str) and value.startswith("@"):
            found[path] = value
        elif isinstance(value, Noun):
            walk({k: getattr(value, k) for k in settings.parameters(type(value))}, path)
        elif isinstance(value, dict):
            for key, v in value.items():
                walk(v, f"{path}.{key}".strip("."))
        elif isinstance(value, list):
            for i, v in enumerate(value):
                walk(v, f"{path}.{i}".strip("."))

    for key in ("model", "models", "base", "strategies", "search", "method", "compare"):
        walk(getattr(stage, key, None), key)
    return found


def _check_order(stages: list[Stage], collect: Collector) -> None:
    earlier: dict[str, Stage] = {}
    for stage in stages:
        where = f"stages.{stage.name}"
        if stage.name in earlier:
            collect.add(f"{where}: two stages have this name", "stage names are unique")
        for path, ref in model_refs(stage).items():
            other = earlier.get(ref[1:])
            if other is None:
                later = any(ref[1:] == s.name for s in stages)
                cause = f"{where}.{path}: '{ref}' {'does not come before this stage' if later else 'is no stage'}"
                collect.add(cause, nearest(ref, [f"@{name}" for name in earlier]))
            else:
                _check_reference(stage, path, ref, other, where, collect)
        for baseline in stage.compare or []:
            known = [*BASELINES, *(PARENTS if isinstance(stage, Merge) else ())]
            if not baseline.startswith("@") and baseline not in known:
                remedy = nearest(baseline, [*known, *(f"@{n}" for n in earlier)])
                collect.add(f"{where}.compare: got '{baseline}'", remedy)
        earlier[stage.name] = stage


def _check_reference(stage: Stage, path: str, ref: str, other: Stage, where: str, collect: Collector) -> None:
    if path.startswith("compare"):
        if not _same_setting(stage, other):
            cause = f"{where}.compare: '{ref}' is measured on {_setting(other)}, this stage on {_setting(stage)}"
            collect.add(cause, "compare stages that share task and data")
    elif isinstance(other, Evaluate):
        cause = f"{where}.{path}: '{ref}' only evaluates and has no model of its own"
        collect.add(cause, "name the stage it evaluates")
    elif (
        isinstance(other, Ensemble)
        and not isinstance(stage, Evaluate)
        and path.split(".")[0] not in ("strategies", "search")
    ):
        cause = f"{where}.{path}: '{ref}' is an ensemble, a folder of models"
        collect.add(cause, "an ensemble can be evaluated, or teach; name its members instead")


def _same_setting(a: Stage, b: Stage) -> bool:
    """Task and data, as far as they are known before the data are read; the report compares the rows themselves."""
    same_task = a.task == b.task or a.task is None or b.task is None
    if a.data is None or b.data is None:
        return same_task
    return same_task and a.data[1].path == b.data[1].path and a.data[1].name == b.data[1].name


def _setting(stage: Stage) -> str:
    task = named(stage.task)[0] if stage.task else "the task of its data"
    return f"{task}, data '{stage.data[0] if stage.data else None}'"


def _prune(stages: list[Stage]) -> list[Stage]:
    used: set[str] = set()
    kept: list[Stage] = []
    for stage in reversed(stages):
        if not stage.when_used or stage.name in used:
            kept.append(stage)
            used |= {ref[1:] for ref in model_refs(stage).values()}
    return kept[::-1]


def check_seeds(stages: list[Stage], collect: Collector) -> None:
    """Seed i of a stage uses seed i of what it names: numbers of seeds must agree, or be 1."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if isinstance(stage, (Merge, Ensemble)) and merges_seeds(stage, by_name):
            if "seeds" not in stage.given:
                stage.seeds = 1
            continue
        for path, ref in model_refs(stage).items():
            other = by_name.get(ref[1:])
            if other is None or other.seeds in (1, stage.seeds) or (path.startswith("compare") and stage.seeds == 1):
                continue
            cause = f"stages.{stage.name}.{path}: '{ref}' has {other.seeds} seeds, this stage {stage.seeds}"
            collect.add(cause, "give both the same number of seeds")


def merges_seeds(stage: Stage, by_name: dict[str, Stage]) -> bool:
    """Whether a Merge or Ensemble takes all seeds of one stage as its parents; a Merge with seeds of its own takes one
    for each."""
    own = stage.given.get("seeds") if isinstance(stage, Merge) else None
    if len(stage.models) != 1 or (isinstance(own, int) and own > 1):
        return False
    path = stage.models[0].path
    return isinstance(path, str) and path.startswith("@") and path[1:] in by_name and by_name[path[1:]].seeds > 1


# --- plugins --------------------------------------------------------------------------------------------------------


def _plugins_of(stage: Stage) -> list[tuple[str, Any, str]]:
    """(kind, plugin as written, path of the setting) of every plugin that a stage names."""
    found = (
        [("task", stage.task, f"stages.{stage.name}.task" if "task" in stage.given else "task")] if stage.task else []
    )
    if isinstance(stage, Train):
        found += [("strategy", item, f"stages.{stage.name}.strategies") for item in stage.strategies]
    elif isinstance(stage, (Merge, Ensemble)) and stage.method is not None:
        found.append((stage.verb, stage.method, f"stages.{stage.name}.method"))
    return found


def _layerwise() -> Any:
    from kt_hf import layerwise  # it imports torch, as merges do

    return layerwise.validate


def check_plugins(recipe: Recipe, collect: Collector) -> dict[tuple[str, str], dict[str, Any]]:
    """Import the plugins that the recipe names and validate their settings against their signatures.

    Returns (stage, kind:name) -> settings with defaults.
    """
    checked: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in recipe.stages:
        for kind, item, where in _plugins_of(stage):
            name, given = named(item)
            with collect():
                plugin = registry.load(kind, name)
                validate = _layerwise() if kind == "merge" else settings.validate
                checked[stage.name, f"{kind}:{name}"] = validate(plugin, given, f"{where}.{name}", collect)
        if isinstance(stage, Train):
            search.check_strategies(stage, checked, collect)
    return checked


# --- the resolved recipe --------------------------------------------------------------------------------------------


def resolved_yaml(
    recipe: Recipe, raw: dict[str, Any], checked: dict[tuple[str, str], dict[str, Any]]
) -> dict[str, Any]:
    """What `recipe.yaml` holds: the recipe as run, with the defaults of training and of the plugins written out."""
    from kt_hf import __version__

    out = copy.deepcopy(raw)
    kept = {stage.name: stage for stage in recipe.stages}
    out["stages"] = [item for item in out["stages"] if name_of(item) in kept]
    out["training"] = {k: getattr(recipe.training, k) for k in settings.parameters(Training)}
    for item in out["stages"]:
        stage = kept[name_of(item)]
        item.pop("when_used", None)
        if isinstance(stage, Train):
            names = [named(s)[0] for s in stage.strategies]
            item["strategies"] = [{name: checked[stage.name, f"strategy:{name}"]} for name in names]
            if stage.training.given:
                item["training"] = dict(stage.training.given)
        elif isinstance(stage, (Merge, Ensemble)):
            name = named(stage.method)[0]
            item["method"] = {name: checked[stage.name, f"{stage.verb}:{name}"]}
    return {"kt_hf_version": __version__, **plain(out)}
