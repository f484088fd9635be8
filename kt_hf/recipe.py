"""The grammar: `Recipe`, `Data`, `Model`, `Training` and the four stages.

The nouns only record what they are given, so that a recipe file never fails half-way: all mistakes of a recipe are found
together by `resolve`, before torch is imported. What a noun accepts is its constructor's signature.
"""

from __future__ import annotations

import copy
import inspect
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from kt_hf import registry, settings
from kt_hf.errors import Collector, KtError, RecipeError, nearest

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Named = str | dict[str, Any]


class Noun:
    """Records the settings it was given. After `resolve`, its settings are attributes with defaults filled in."""

    given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Noun:
        noun = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(noun, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        given.update(given.pop("unknown", {}))
        noun.given = given
        noun.__dict__.update({name: p.default for name, (_, p) in settings.parameters(cls).items()}, **given)
        return noun

    def __getattr__(self, name: str) -> Any:  # settings are attributes; this tells type checkers so
        raise AttributeError(f"{type(self).__name__} has no setting '{name}'")

    def __deepcopy__(self, memo: dict[int, Any]) -> Noun:
        return type(self)(**copy.deepcopy(self.given, memo))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.given.items())})"

    def plain(self) -> dict[str, Any]:
        return plain(self.given)


class Data(Noun):
    """A data set.

    path: a folder with train/validation/test files, one file, a Hub id, or `digits` (scikit-learn's, for trying things out).
    name: configuration of that data set. columns: role -> column, where they are ambiguous. splits: our split -> theirs.
    where: column -> value or values to keep. labels: names of the classes to keep. k_shot: training examples per class.
    max_examples: at most so many rows per split. validation_size: fraction or number of training rows held out when there
    is no validation split. drop: kinds of rows to drop (all are counted). augment: torchvision v2 transforms, by name.
    seed: of the subsets and splits.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        *,
        revision: str | None = None,
        columns: dict[str, str] | None = None,
        splits: dict[Literal["train", "validation", "test"], str] | None = None,
        where: dict[str, Any] | None = None,
        labels: list[str | int] | None = None,
        k_shot: Positive | None = None,
        max_examples: Positive | dict[Literal["train", "validation", "test"], Positive] | None = None,
        validation_size: Annotated[float, Field(gt=0)] = 0.1,
        drop: list[Literal["empty", "duplicates", "overlap"]] | None = None,
        augment: list[Named] | None = None,
        seed: NotNegative = 0,
        **unknown: Any,
    ): ...


class Model(Noun):
    """A model: a checkpoint (`path`), or a fresh one (`config`).

    path: a folder, a Hub id, or `@stage`. config: a model type such as `vit` or a folder or Hub id with a config.json;
    `config_overrides` changes its fields. processor: where the tokenizer or image processor comes from, if not from the model;
    replace_head: give the model a new head when its labels differ from the data's. image, text, projection_dim: the two
    towers of a dual encoder and the width of the space they share.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str | None = None,
        config: str | None = None,
        config_overrides: dict[str, Any] | None = None,
        processor: str | None = None,
        processor_overrides: dict[str, Any] | None = None,
        replace_head: bool = False,
        image: Named | None = None,
        text: Named | None = None,
        projection_dim: Positive = 512,
        **unknown: Any,
    ): ...


class Training(Noun):
    """Settings of the training loop, with the names and meanings of transformers' `TrainingArguments`.

    learning_rate: one, or a list from which the best on validation data is taken (tried with the stage's first seed).
    eval_steps, save_steps: every so many optimizer steps; a value below 1 is a fraction of the run, 0 is never. Without
    a value, evaluation is after every epoch but at most ten times, and nothing is saved before the end. metric_for_best_model: with
    load_best_model_at_end or early_stopping_patience; the task's first metric by default. num_threads: CPU threads of a rank.
    """

    def __init__(
        self,
        *,
        learning_rate: Annotated[float, Field(gt=0, le=100)] | list[Annotated[float, Field(gt=0, le=100)]] = 5e-5,
        num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0,
        max_steps: Annotated[int, Field(ge=-1, le=10**9)] = -1,
        per_device_train_batch_size: Annotated[int, Field(gt=0, le=10**6)] = 8,
        per_device_eval_batch_size: Annotated[int, Field(gt=0, le=10**6)] = 64,
        gradient_accumulation_steps: Annotated[int, Field(gt=0, le=10**6)] = 1,
        weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0,
        adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999,
        adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8,
        max_grad_norm: Annotated[float, Field(ge=0)] = 1.0,
        optim: Literal["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"] = "adamw_torch_fused",
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        lr_scheduler_type: str = "linear",
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        warmup_ratio: Fraction = 0.0,
        warmup_steps: NotNegative = 0,
        label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        bf16: bool = False,
        gradient_checkpointing: bool = False,
        forward_chunk_size: NotNegative = 0,
        eval_steps: Annotated[float, Field(ge=0)] | None = None,
        save_steps: Annotated[float, Field(ge=0)] = 0,
        save_total_limit: Positive = 2,
        logging_steps: Positive = 10,
        load_best_model_at_end: bool = False,
        metric_for_best_model: str | None = None,
        greater_is_better: bool | None = None,
        early_stopping_patience: Positive | None = None,
        report_to: list[str] | str | None = None,
        dataloader_num_workers: NotNegative = 0,
        dataloader_drop_last: bool = False,
        full_determinism: bool = False,
        num_threads: NotNegative = 0,
        seed: NotNegative = 42,
        **unknown: Any,
    ): ...


class Stage(Noun):
    """What the four stages share: a name, and the settings that override the recipe's."""

    verb = ""


class Train(Stage):
    """Trains a model with a stack of strategies, each written as its name or as `{name: settings}`.

    compare: baselines of the report: `majority`, `zero_shot` (this stage's model before training), or `@stage`.
    when_used: leave the stage out unless another one refers to it. push_to_hub: repository for the stage's model.
    """

    verb = "train"

    def __init__(
        self,
        name: str,
        strategies: list[Named] | None = None,
        *,
        task: Named | None = None,
        data: settings.DataRef | None = None,
        model: settings.ModelRef | None = None,
        training: dict[str, Any] | None = None,
        seeds: Positive | None = None,
        compare: list[str] | None = None,
        when_used: bool = False,
        push_to_hub: str | None = None,
        **unknown: Any,
    ): ...


class Merge(Stage):
    """Merges models in weight space. Over one seeded stage it takes all seeds as parents; over several, seed i of each."""

    verb = "merge"

    def __init__(
        self,
        name: str,
        method: Named,
        *,
        models: list[settings.ModelRef],
        base: settings.ModelRef | None = None,
        task: Named | None = None,
        data: settings.DataRef | None = None,
        seeds: Positive | None = None,
        compare: list[str] | None = None,
        when_used: bool = False,
        push_to_hub: str | None = None,
        **unknown: Any,
    ): ...


class Ensemble(Stage):
    """Combines models in output space; the result is a folder of members."""

    verb = "ensemble"

    def __init__(
        self,
        name: str,
        method: Named = "mean",
        *,
        models: list[settings.ModelRef],
        task: Named | None = None,
        data: settings.DataRef | None = None,
        seeds: Positive | None = None,
        compare: list[str] | None = None,
        when_used: bool = False,
        **unknown: Any,
    ): ...


class Evaluate(Stage):
    """Measures a model that it does not change (zero-shot, a published checkpoint)."""

    verb = "evaluate"

    def __init__(
        self,
        name: str,
        *,
        model: settings.ModelRef | None = None,
        task: Named | None = None,
        data: settings.DataRef | None = None,
        seeds: Positive | None = None,
        compare: list[str] | None = None,
        when_used: bool = False,
        **unknown: Any,
    ): ...


class Recipe(Noun):
    """The whole: stages, and the defaults that a stage may override.

    data: one data set, or a mapping of names to data sets. seeds: repetitions of every stage. push_to_hub: repository for the
    last stage's model.
    """

    def __init__(
        self,
        stages: list[Any],
        *,
        name: str | None = None,
        task: Named | None = None,
        data: Any = None,
        model: Named | None = None,
        training: dict[str, Any] | None = None,
        seeds: Annotated[int, Field(gt=0, le=1000)] = 1,
        push_to_hub: str | None = None,
        **unknown: Any,
    ): ...


STAGES: dict[str, type[Stage]] = {cls.verb: cls for cls in (Train, Merge, Ensemble, Evaluate)}
BASELINES = ("majority", "zero_shot")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_IDENTITY = {"data": {"path"}, "model": {"path", "config", "image", "text"}}


def plain(value: Any) -> Any:
    """Nouns to mappings, tuples to lists: what YAML can hold. A stage becomes `{verb: name, ...}`."""
    if isinstance(value, Noun):
        given = {key: plain(v) for key, v in value.given.items()}
        if isinstance(value, Stage):
            return {value.verb: given.pop("name", ""), **given}
        return given
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def normalise(recipe: Any) -> dict[str, Any]:
    """The recipe as nested mappings, with short forms written out, so that overrides find their way."""
    raw = plain(recipe)
    if not isinstance(raw, dict):
        raise RecipeError(f"a recipe is a mapping, got {type(raw).__name__}", "start with `stages:`")
    raw = copy.deepcopy(raw)
    if isinstance(raw.get("data"), str):
        raw["data"] = {"path": raw["data"]}
    elif isinstance(raw.get("data"), dict) and "path" not in raw["data"]:
        raw["data"] = {k: {"path": v} if isinstance(v, str) else v for k, v in raw["data"].items()}
    if isinstance(raw.get("model"), str):
        raw["model"] = {"path": raw["model"]}
    for stage in raw.get("stages") or [] if isinstance(raw.get("stages"), list) else []:
        if isinstance(stage, dict):
            if isinstance(stage.get("model"), str):
                stage["model"] = {"path": stage["model"]}
            if isinstance(stage.get("strategies"), list):
                stage["strategies"] = [{s: {}} if isinstance(s, str) else s for s in stage["strategies"]]
            for key in ("method", "task"):
                if isinstance(stage.get(key), str):
                    stage[key] = {stage[key]: {}}
    if isinstance(raw.get("task"), str):
        raw["task"] = {raw["task"]: {}}
    return raw


# --- overrides ---------------------------------------------------------------------------------------------------------


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=value` -> (["a", "b"], value), the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"cannot read the argument '{text}'", "settings are written key=value, options start with --")
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip().split("."), value


def override(raw: dict[str, Any], changes: list[tuple[list[str], Any]], collect: Collector) -> None:
    """Apply dotted changes to a normalised recipe in place. Lists are entered by index or by name.

    Another data path or model starts from blank settings of that data or model, because the recipe's describe the old one.
    `training.x` from outside holds for all Train stages, also for those which the recipe gives a value of their own.
    """
    changes = [(["task", str(v), ""] if p == ["task"] and isinstance(v, str) else p, v) for p, v in changes]
    for noun, identity in _IDENTITY.items():
        for i, (path, value) in enumerate(changes):
            if path and path[-1] == noun and isinstance(value, str):
                changes[i] = ([*path, "path"], value)
        for path, _ in sorted(changes, key=lambda change: change[0]):
            if len(path) >= 2 and path[-1] in identity and (path[-2] == noun or (len(path) == 3 and path[0] == noun)):
                _blank(raw, path[:-1], identity)
    for path, value in changes:
        if path[0] == "task" and path[-1] == "":
            raw["task"] = {path[1]: {}}
            continue
        if path[0] == "training" and len(path) == 2:
            own = any(p[0] == "stages" and p[2:] == path for p, _ in changes)
            for stage in raw.get("stages") or []:
                if isinstance(stage, dict) and isinstance(stage.get("training"), dict) and not own:
                    stage["training"].pop(path[1], None)
                    if path[1] == "num_train_epochs":
                        stage["training"].pop("max_steps", None)
            if path[1] == "num_train_epochs" and not any(p == ["training", "max_steps"] for p, _ in changes):
                (raw.get("training") or {}).pop("max_steps", None)
        _set(raw, path, value, collect)


def _blank(raw: dict[str, Any], path: list[str], identity: set[str]) -> None:
    node: Any = raw
    for part in path:
        node = _step(node, part)
        if node is None:
            return
    if isinstance(node, dict):
        if path[-1] == "data" and "path" not in node:
            return  # a mapping of several data sets
        for key in list(node):
            del node[key]


def _step(node: Any, part: str) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list):
        if part.lstrip("-").isdigit():
            return node[int(part)] if -len(node) <= int(part) < len(node) else None
        for item in node:
            if _name(item) == part:
                return item[part] if isinstance(item, dict) and part in item else item
    return None


def _name(item: Any) -> str:
    """A stage's own name, or the single key of a strategy."""
    if isinstance(item, dict):
        for verb in STAGES:
            if verb in item:
                return str(item[verb])
        if len(item) == 1:
            return str(next(iter(item)))
    return str(item)


def _set(raw: dict[str, Any], path: list[str], value: Any, collect: Collector) -> None:
    node: Any = raw
    for depth, part in enumerate(path[:-1]):
        below = _step(node, part)
        if below is None:
            if isinstance(node, list):
                names = [_name(item) for item in node]
                collect.add(f"{'.'.join(path[: depth + 1])}: there is no '{part}'", nearest(part, names))
                return
            if isinstance(node, dict):
                below = node[part] = {}
        if not isinstance(below, (dict, list)):
            if isinstance(node, dict) and isinstance(below, str):  # `model: DIR` with `model.dtype=...`
                below = node[part] = {"path": below}
            else:
                collect.add(f"{'.'.join(path)}: '{'.'.join(path[: depth + 1])}' is a single value", "set that instead")
                return
        node = below
    if isinstance(node, list):
        if path[-1].isdigit() and int(path[-1]) < len(node):
            node[int(path[-1])] = value
        else:
            collect.add(f"{'.'.join(path)}: there is no '{path[-1]}'", nearest(path[-1], [_name(i) for i in node]))
    elif path == ["data", "path"] and isinstance(node, dict) and node and "path" not in node and _several(node):
        names = ", ".join(f"data.{key}.path" for key in node)
        collect.add("data.path: this recipe has several data sets", f"name one of them: {names}")
    else:
        node[path[-1]] = value


def _several(node: dict[str, Any]) -> bool:
    return all(isinstance(value, dict) and "path" in value for value in node.values())


# --- reading and writing -----------------------------------------------------------------------------------------------


def from_yaml(path: str) -> dict[str, Any]:
    """Read a recipe file. Nothing but plain values is constructed; at most 1 MB is read."""
    try:
        with open(path, "rb") as file:
            content = file.read(1_000_001)
        if len(content) > 1_000_000:
            raise RecipeError(f"{path} is larger than 1 MB", "this does not look like a recipe")
        raw = yaml.safe_load(content.decode("utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", "name an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text", "save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        if "python/" in str(error):
            raise _UnsafeYaml(f"{path} asks for Python objects: {_one_line(error)}", "recipes hold plain values") from error
        raise RecipeError(f"{path} is not YAML: {_one_line(error)}", "mend that line") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds {type(raw).__name__}, expected a mapping", "start with `stages:`")
    raw.pop("kt_hf_version", None)
    return raw


class _UnsafeYaml(KtError):
    exit_code = 4


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def to_yaml(raw: dict[str, Any]) -> str:
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=120)


# --- checking ----------------------------------------------------------------------------------------------------------


def resolve(raw: dict[str, Any], collect: Collector) -> Recipe:
    """Check grammar and plugin names, without importing torch or any plugin, and return a recipe whose nouns are filled in.

    Mistakes go to `collect`. Stages that nobody uses and that say `when_used` are left out.
    """
    top = settings.validate(Recipe, {k: v for k, v in raw.items()}, "", collect)
    data = _data(raw.get("data"), collect)
    training = _training(raw.get("training"), "training", collect)
    model = _model(raw.get("model"), "model", collect)
    _plugin_name("task", raw.get("task"), "task", collect)
    stages: list[Stage] = []
    listed = raw.get("stages")
    if not isinstance(listed, list) or not listed:
        collect.add("stages: a recipe needs a list of at least one stage", "for example `stages: [{train: mine, strategies: [finetune]}]`")
        listed = []
    for i, item in enumerate(listed):
        stage = _stage(item, f"stages.{i}", collect)
        if stage is not None:
            stages.append(stage)
    seeds = top.get("seeds", 1)
    for stage in stages:
        where = f"stages.{stage.name}"
        stage.data = _bind_data(stage.data, data, where, collect)
        stage.model = _model(stage.model, f"{where}.model", collect) if "model" in stage.given else model
        if isinstance(stage, (Merge, Ensemble)):
            stage.models = [_model(m, f"{where}.models", collect) for m in stage.models]
            stage.model = None
        if isinstance(stage, Merge):
            stage.base = _model(stage.base, f"{where}.base", collect)
        if isinstance(stage, Train):
            stage.training = _training({**(raw.get("training") or {}), **(stage.training or {})}, f"{where}.training", collect)
            _check_training(stage, where, collect)
        if isinstance(stage, (Train, Evaluate)) and stage.model is None:
            collect.add(f"{where}: no model", "give the recipe or the stage one: model=DIR_OR_HUB_ID or model.config=TYPE")
        stage.task = stage.task or raw.get("task")
        stage.seeds = stage.seeds or (seeds if isinstance(seeds, int) else 1)
    _check_order(stages, collect)
    stages = _prune(stages)
    recipe = Recipe(stages=stages)
    recipe.__dict__.update(top, stages=stages, data=data, model=model, training=training)
    return recipe


def _stage(item: Any, where: str, collect: Collector) -> Stage | None:
    verbs = [verb for verb in STAGES if isinstance(item, dict) and verb in item]
    if len(verbs) != 1:
        got = f"'{next(iter(item), '')}'" if isinstance(item, dict) else repr(item)
        collect.add(f"{where}: {got} is no stage", nearest(got.strip("'"), STAGES))
        return None
    cls, name = STAGES[verbs[0]], item[verbs[0]]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        collect.add(f"{where}: '{name}' is no name for a stage", "use letters, digits, '_', '-' and '.'")
        return None
    given = {k: v for k, v in item.items() if k != verbs[0]}
    where = f"stages.{name}"
    values = settings.validate(cls, {"name": name, **given}, where, collect)
    stage = cls(**{**(values or {"name": name}), **({} if values else {k: v for k, v in given.items() if k in settings.parameters(cls)})})
    stage.given = {k: v for k, v in stage.given.items() if k == "name" or k in given}
    if isinstance(stage, Train):
        stage.strategies = [s for s in (stage.strategies or ["finetune"]) if _plugin_name("strategy", s, f"{where}.strategies", collect)]
        names = [named(s)[0] for s in stage.strategies]
        for twice in sorted({n for n in names if names.count(n) > 1}):
            collect.add(f"{where}.strategies: '{twice}' stands there twice", "give a strategy once in a stage")
    elif isinstance(stage, (Merge, Ensemble)):
        _plugin_name(stage.verb, stage.method, f"{where}.method", collect)
        if not isinstance(stage.models, list) or not stage.models:
            collect.add(f"{where}.models: empty", "name at least one model, for example ['@finetune']")
            stage.models = []
    _plugin_name("task", stage.task, f"{where}.task", collect)
    return stage


def named(item: Any) -> tuple[str, dict[str, Any]]:
    """`"lora"` or `{"lora": {...}}` -> (name, settings)."""
    if isinstance(item, str):
        return item, {}
    name, given = next(iter(item.items()))
    return str(name), given or {}


def _plugin_name(kind: str, item: Any, where: str, collect: Collector) -> bool:
    if item is None:
        return False
    if not isinstance(item, (str, dict)) or (isinstance(item, dict) and len(item) != 1):
        collect.add(f"{where}: got {item!r}", "write a plugin as its name or as {name: {setting: value}}")
        return False
    name, given = named(item)
    before = len(collect.mistakes)
    if not isinstance(given, dict):
        collect.add(f"{where}.{name}: got {given!r}, expected a mapping of settings", "write {name: {setting: value}}")
    with collect():
        try:
            registry.find(kind, name)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error.cause}", error.remedy) from None
    return len(collect.mistakes) == before


def _noun(cls: type[Noun], given: Any, where: str, collect: Collector, positional: str) -> Any:
    values = settings.validate(cls, given, where, collect, positional)
    noun = cls(**values) if values else None
    if noun is not None:
        noun.given = {k: v for k, v in values.items() if isinstance(given, dict) and k in given} or {positional: given}
    return noun


def _data(given: Any, collect: Collector) -> dict[str, Data]:
    if given is None:
        return {}
    if isinstance(given, dict) and "path" not in given and given and all(isinstance(v, (dict, str)) for v in given.values()):
        if not set(given) & set(settings.parameters(Data)):
            nouns = {str(k): _noun(Data, v, f"data.{k}", collect, "path") for k, v in given.items()}
            return {k: v for k, v in nouns.items() if v is not None}
    noun = _noun(Data, given, "data", collect, "path")
    return {"data": noun} if noun is not None else {}


def _bind_data(given: Any, data: dict[str, Data], where: str, collect: Collector) -> tuple[str, Data] | None:
    """(name, data set) of a stage."""
    if given is None:
        if len(data) > 1:
            collect.add(f"{where}: the recipe has several data sets", nearest("", [f"data: {name}" for name in data]))
        return next(iter(data.items()), None)
    if isinstance(given, str) and given in data:
        return given, data[given]
    if isinstance(given, str) and len(data) > 1 and "/" not in given and given != "digits" and "." not in given:
        collect.add(f"{where}.data: there is no data set '{given}'", nearest(given, data))
        return None
    noun = _noun(Data, given, f"{where}.data", collect, "path")
    return (str(noun.path).rstrip("/").rpartition("/")[2], noun) if noun is not None else None


def _model(given: Any, where: str, collect: Collector) -> Model | None:
    if given is None:
        return None
    model = _noun(Model, given, where, collect, "path")
    if model is None:
        return None
    kinds = [key for key in ("path", "config") if getattr(model, key)] + (["image and text"] if model.image or model.text else [])
    if len(kinds) > 1:
        collect.add(f"{where}: {' and '.join(kinds)} contradict each other", "a model is a checkpoint, a fresh config, or two towers")
    elif not kinds:
        collect.add(f"{where}: neither path nor config", "model=DIR_OR_HUB_ID, or model.config=TYPE for a fresh one")
    if (model.image is None) != (model.text is None):
        collect.add(f"{where}: a dual encoder needs both image and text", "give both towers")
    for tower in ("image", "text"):
        if getattr(model, tower) is not None:
            setattr(model, tower, _model(getattr(model, tower), f"{where}.{tower}", collect))
    return model


def _training(given: Any, where: str, collect: Collector) -> Training:
    values = settings.validate(Training, given or {}, where, collect)
    training = Training(**values)
    training.given = {k: v for k, v in values.items() if k in (given or {})}
    if given and given.get("warmup_ratio") and given.get("warmup_steps"):
        collect.add(f"{where}: warmup_ratio and warmup_steps contradict each other", "give one of them")
    if training.max_steps == 0:
        collect.add(f"{where}.max_steps: got 0", "a number of steps, or -1 to train for num_train_epochs; to measure only, use an evaluate stage")
    rates = training.learning_rate
    if isinstance(rates, list) and not rates:
        collect.add(f"{where}.learning_rate: an empty list", "give one learning rate or several to choose from")
    return training


def _check_training(stage: Train, where: str, collect: Collector) -> None:
    t = stage.training
    wants_evaluation = [k for k in ("load_best_model_at_end", "early_stopping_patience") if getattr(t, k)]
    if wants_evaluation and t.eval_steps == 0:
        collect.add(f"{where}.training: {wants_evaluation[0]} and eval_steps=0 contradict each other", "set eval_steps")


def model_refs(stage: Stage) -> dict[str, Any]:
    """Every model a stage names: setting path -> reference as given. Strategies' references are found by key `teacher`-like
    annotations later; here a value that starts with `@` counts wherever it stands."""
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

    for key in ("model", "models", "base", "strategies", "method", "compare"):
        if key in settings.parameters(type(stage)) or key == "model":
            walk(getattr(stage, key, None), key)
    return found


def _check_order(stages: list[Stage], collect: Collector) -> None:
    earlier: dict[str, Stage] = {}
    for stage in stages:
        where = f"stages.{stage.name}"
        if stage.name in earlier:
            collect.add(f"{where}: two stages have this name", "stage names are unique")
        for path, ref in model_refs(stage).items():
            if ref[1:] not in earlier:
                later = any(ref[1:] == s.name for s in stages)
                cause = f"{where}.{path}: '{ref}' {'does not come before this stage' if later else 'is no stage'}"
                collect.add(cause, nearest(ref, [f"@{name}" for name in earlier]))
            elif isinstance(earlier[ref[1:]], Evaluate) and not path.startswith("compare"):
                collect.add(f"{where}.{path}: '{ref}' only evaluates and has no model of its own", "name the stage it evaluates")
            elif path.startswith("compare") and not _same_setting(stage, earlier[ref[1:]]):
                other = earlier[ref[1:]]
                collect.add(
                    f"{where}.compare: '{ref}' is measured on {_setting(other)}, this stage on {_setting(stage)}",
                    "compare stages that share task and data",
                )
        for baseline in stage.compare or []:
            if not baseline.startswith("@") and baseline not in BASELINES:
                collect.add(f"{where}.compare: got '{baseline}'", nearest(baseline, [*BASELINES, *(f"@{n}" for n in earlier)]))
        earlier[stage.name] = stage


def _same_setting(a: Stage, b: Stage) -> bool:
    """Task and data, as far as they are known before the data are read; the report compares the rows themselves."""
    same_task = a.task == b.task or a.task is None or b.task is None
    return same_task and (a.data is None or b.data is None or a.data[1].path == b.data[1].path and a.data[1].name == b.data[1].name)


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


def check_plugins(recipe: Recipe, collect: Collector) -> dict[tuple[str, str], dict[str, Any]]:
    """Import the plugins that the recipe names and validate their settings against their signatures.

    Returns (stage, kind:name) -> settings with defaults.
    """
    checked: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in recipe.stages:
        items = [("task", stage.task, "task")] if stage.task else []
        if isinstance(stage, Train):
            items += [("strategy", s, "strategies") for s in stage.strategies]
        elif isinstance(stage, (Merge, Ensemble)):
            items.append((stage.verb, stage.method, "method"))
        for kind, item, key in items:
            name, given = named(item)
            with collect():
                plugin = registry.load(kind, name)
                where = f"stages.{stage.name}.{key}.{name}" if kind != "task" else f"task.{name}"
                checked[stage.name, f"{kind}:{name}"] = settings.validate(plugin, given, where, collect)
    unique: dict[str, KtError] = {m.cause: m for m in collect.mistakes}
    collect.mistakes[:] = list(unique.values())
    return checked


def resolved_yaml(recipe: Recipe, raw: dict[str, Any], checked: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """What `recipe.yaml` holds: the recipe as run, with the defaults of training and of the plugins written out."""
    from kt_hf import __version__

    out = copy.deepcopy(raw)
    kept = {stage.name: stage for stage in recipe.stages}
    out["stages"] = [item for item in out["stages"] if _name(item) in kept]
    out["training"] = {k: getattr(recipe.training, k) for k in settings.parameters(Training)}
    for item in out["stages"]:
        stage = kept[_name(item)]
        item.pop("when_used", None)
        if isinstance(stage, Train):
            item["strategies"] = [{named(s)[0]: checked[stage.name, f"strategy:{named(s)[0]}"]} for s in stage.strategies]
        elif isinstance(stage, (Merge, Ensemble)):
            name = named(stage.method)[0]
            item["method"] = {name: checked[stage.name, f"{stage.verb}:{name}"]}
    return {"kt_hf_version": __version__, **out}
