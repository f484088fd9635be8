"""`Train(search=...)`: settings of a stage, of which the best on validation data are taken.

    search={"training.learning_rate": [1e-3, 3e-3], "strategies.finetune.freeze_layers": [0, 2]}
    search={"training.weight_decay": {"low": 1e-4, "high": 0.1, "log": True}, "trials": 8}

A setting goes by its path and has a list of values, or a range. All combinations are tried, or `trials` of them, drawn
with the training's seed (Bergstra & Bengio 2012, JMLR 13). A list as `training.learning_rate` is such a search, too. A
trial is the stage with other settings: what trains it, saves it and measures it is what does that for every stage.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Sequence
from typing import Any

from kt_hf import registry, settings
from kt_hf.errors import Collector, nearest
from kt_hf.nouns import Train, Training, named
from kt_hf.overrides import REPLACES

Changes = dict[str, Any]
"""Path of a setting -> its value."""
Settings = dict[tuple[str, str], dict[str, Any]]
"""(stage, kind:plugin) -> its settings, as `checking.check_plugins` gives them."""

LIMIT = 256
"""Trials of one stage."""
SHARED = ("seed", "report_to", "num_threads", "profile_steps", "metric_for_best_model", "greater_is_better")
"""Settings of a training that are no choice: trials would not be comparable, or would not differ."""
_RATE = "training.learning_rate"
_RANGE = {"low", "high", "log"}


def axes(search: dict[str, Any] | None) -> dict[str, Any]:
    """Path of a setting -> its list of values, or its range."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value and not _is_range(value):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}".strip("."))
        elif path and path != "trials" and value != {}:
            found[path] = value

    walk(search or {}, "")
    return found


def _is_range(value: Any) -> bool:
    return isinstance(value, dict) and {"low", "high"} <= set(value) <= _RANGE


def trials(stage: Train) -> list[Changes]:
    """What every trial of a stage changes, in order; one without changes where there is nothing to choose."""
    found, wanted = axes(stage.search), (stage.search or {}).get("trials")
    if isinstance(stage.training.learning_rate, list):
        found.setdefault(_RATE, stage.training.learning_rate)
    choices = {path: _choices(values) for path, values in found.items()}
    size = _size(choices)
    if wanted is None or wanted >= size:
        return [dict(zip(choices, combination, strict=True)) for combination in itertools.product(*choices.values())]
    draw, drawn = random.Random(stage.training.seed), dict[str, Changes]()
    for _ in range(100 * wanted):  # a combination may come again
        one = {path: _pick(values, draw.random()) for path, values in choices.items()}
        drawn.setdefault(json.dumps(one, default=str), one)
        if len(drawn) == wanted:
            break
    return list(drawn.values())


def _choices(values: Any) -> Any:
    """A list as it is; a range of whole numbers as a list; any other range is drawn from."""
    if isinstance(values, dict) and not values.get("log") and _whole(values) and _span(values) < 10**4:
        return list(range(values["low"], values["high"] + 1))
    return values


def _size(choices: dict[str, Any]) -> float:
    return math.prod(len(values) if isinstance(values, list) else math.inf for values in choices.values())


def _whole(bounds: dict[str, Any]) -> bool:
    return isinstance(bounds["low"], int) and isinstance(bounds["high"], int)


def _span(bounds: dict[str, Any]) -> float:
    return bounds["high"] - bounds["low"]


def _pick(values: Any, u: float) -> Any:
    """The value at `u` in [0, 1) of a list or a range; numbers of a range have four digits."""
    if isinstance(values, list):
        return values[int(u * len(values))]
    low, high = values["low"], values["high"]
    value = low * (high / low) ** u if values.get("log") else low + u * (high - low)
    return round(value) if _whole(values) else float(f"{value:.4g}")


# --- checked with the grammar ---------------------------------------------------------------------------------------


def check(stage: Train, where: str, collect: Collector) -> None:
    """What can be said of a search without its strategies' settings; mistakes go to `collect`."""
    before, where, found = len(collect.mistakes), f"{where}.search", axes(stage.search)
    for path, values in found.items():
        if _check_path(stage, path, where, collect) and _check_values(path, values, where, collect):
            root, key, *deeper = path.split(".")
            for value in _ends(values) if root == "training" and not deeper else []:
                settings.validate(Training, {key: value}, f"{where}.training", collect)
    for path in found:
        if f"training.{REPLACES.get(path.removeprefix('training.'))}" in list(found)[: list(found).index(path)]:
            collect.add(f"{where}: {path} replaces what another of its settings chooses", "leave one of them out")
    wanted = (stage.search or {}).get("trials")
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or not 0 < wanted <= LIMIT):
        collect.add(f"{where}.trials: got {settings.shorten(wanted)}", f"a number of trials from 1 to {LIMIT}")
    rates = stage.training.learning_rate
    if found and isinstance(rates, list) and len(rates) > 1:
        remedy = f"move the rates into the search: search.{_RATE}={rates}"
        collect.add(f"{where} and a list of training.learning_rate contradict each other", remedy)
    if rates == "auto" and _RATE in found:
        collect.add(f"{where}.{_RATE} and training.learning_rate=auto contradict each other", "leave one of them out")
    if len(collect.mistakes) > before or wanted is not None:
        return
    if drawn := [path for path, values in found.items() if not isinstance(values, list)]:
        collect.add(f"{where}.{drawn[0]}: a range is drawn from, but how often?", f"say it: {where}.trials=8")
    elif _size(found) > LIMIT:
        cause = f"{where}: {_size(found):,.0f} combinations, more than {LIMIT}"
        collect.add(cause, f"leave values out, or draw some of them: {where}.trials=16")


def _check_path(stage: Train, path: str, where: str, collect: Collector) -> bool:
    root, *rest = path.split(".")
    if root == "training" and rest:
        valid = [key for key in settings.parameters(Training) if key not in SHARED]
        if rest[0] in SHARED:
            collect.add(f"{where}.{path}: trials share {rest[0]}", nearest("", valid))
        elif rest[0] not in valid:
            collect.add(f"{where}.{path}: unknown setting", nearest(rest[0], valid))
        return rest[0] in valid
    if root == "strategies" and len(rest) > 1:
        names = [named(item)[0] for item in stage.strategies]
        if rest[0] not in names:
            collect.add(f"{where}.{path}: the stage has no strategy '{rest[0]}'", nearest(rest[0], names))
        return rest[0] in names
    remedy = "write training.SETTING or strategies.NAME.SETTING; all trials share task, data, model and seed"
    collect.add(f"{where}.{path}: this is no setting to choose", remedy)
    return False


def _check_values(path: str, values: Any, where: str, collect: Collector) -> bool:
    before, what = len(collect.mistakes), f"{where}.{path}"
    if isinstance(values, list):
        if not values:
            collect.add(f"{what}: an empty list", "give the values to try")
        if len({repr(value) for value in values}) < len(values):
            collect.add(f"{what}: a value stands there twice", "give each value once")
        if path == _RATE and any(isinstance(value, list) for value in values):
            collect.add(f"{what}: a list in a list", "give the rates in one list")
    elif _is_range(values):
        low, high, log = values["low"], values["high"], values.get("log", False)
        numbers = all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in (low, high))
        if not numbers or not low < high or not isinstance(log, bool) or (log and low <= 0):
            remedy = "low < high, both numbers; log: true or false, and then low > 0"
            collect.add(f"{what}: got {settings.shorten(values)}", remedy)
    else:
        collect.add(f"{what}: got {settings.shorten(values)}", "give a list of values, or {low: ..., high: ...}")
    return len(collect.mistakes) == before


def _ends(values: Any) -> Sequence[Any]:
    """The values that decide whether all are right."""
    return values if isinstance(values, list) else (values["low"], values["high"])


def check_strategies(stage: Train, checked: Settings, collect: Collector) -> None:
    """Validate what a search tries of the strategies' settings, each value on top of the stage's own."""
    for path, values in axes(stage.search).items():
        root, name, *rest = path.split(".")
        given = checked.get((stage.name, f"strategy:{name}"))
        if root == "strategies" and rest and given is not None and (isinstance(values, list) or _is_range(values)):
            for value in _ends(values):
                tried = copy.deepcopy(given)
                _put(tried, rest, value)
                where = f"stages.{stage.name}.search.strategies.{name}"
                settings.validate(registry.load("strategy", name), tried, where, collect)


# --- applied --------------------------------------------------------------------------------------------------------


def training_of(stage: Train, changes: Changes) -> Training:
    """The settings of a trial's training. What replaces another (`max_steps`, `num_train_epochs`) takes its place."""
    values = {key: copy.deepcopy(getattr(stage.training, key)) for key in settings.parameters(Training)}
    own = {path.partition(".")[2]: value for path, value in changes.items() if path.startswith("training.")}
    for path, value in own.items():
        values.pop(REPLACES.get(path, ""), None)
        _put(values, path.split("."), value)
    collect = Collector()
    found = settings.validate(Training, values, f"stages.{stage.name}.training", collect)
    collect.raise_if_any()
    return Training(**found)


def apply(stage: Train, given: Settings, changes: Changes) -> tuple[Train, Settings]:
    """The stage and the plugins' settings of a trial; neither argument is changed."""
    if not changes:
        return stage, given
    trial, found, collect = copy.copy(stage), dict(given), Collector()
    trial.training, trial.strategies, trial.search = training_of(stage, changes), [], None
    for item in stage.strategies:
        name, own = named(item)
        own, key = copy.deepcopy(own), (stage.name, f"strategy:{name}")
        checked = copy.deepcopy(given.get(key, own))
        for path, value in changes.items():
            root, owner, *rest = path.split(".")
            if root == "strategies" and owner == name:
                _put(own, rest, value)
                _put(checked, rest, value)
        trial.strategies.append({name: own})
        where = f"stages.{stage.name}.strategies.{name}"
        found[key] = settings.validate(registry.load("strategy", name), checked, where, collect)
    collect.raise_if_any()
    return trial, found


def _put(node: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *above, last = path
    for part in above:
        node[part] = dict(node[part]) if isinstance(node.get(part), dict) else {}
        node = node[part]
    node[last] = copy.deepcopy(value)


# --- in words -------------------------------------------------------------------------------------------------------


def words(changes: Changes) -> str:
    """`learning_rate 0.001, freeze_layers 2`: settings by their last names."""
    return ", ".join(f"{path.rpartition('.')[2]} {_short(value)}" for path, value in changes.items())


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else settings.shorten(value, 60)


def describe(stage: Train, found: Sequence[Changes], steps: int) -> str:
    """One line for the plan. steps: optimizer steps of all trials together."""
    tried = axes(stage.search) or {_RATE: stage.training.learning_rate}
    listed = "; ".join(
        f"{path} {'of' if isinstance(values, list) else 'in'} {values}" for path, values in tried.items()
    )
    return f"search: the best of {len(found)} trials on validation data, {steps:,} steps in all ({listed})"
