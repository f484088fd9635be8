"""Changing a recipe from outside: dotted `key=value` settings and `--config` files, applied to the recipe as nested
mappings.

Another data path or model starts from blank settings of that data or model, because the recipe's describe the old
one; other overrides of the same noun still apply. `training.x` from outside holds for all Train stages, also for
those which the recipe gives a value of their own. A setting that replaces another (`max_steps` and
`num_train_epochs`) takes the other's place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from kt_hf import settings
from kt_hf.errors import Collector, RecipeError, nearest
from kt_hf.nouns import TOWERS, Data, name_of, plain, verb_of
from kt_hf.recipe_yaml import read_value

Change = tuple[list[str], Any]

REPLACES = {
    "num_train_epochs": "max_steps",
    "max_steps": "num_train_epochs",
    "warmup_ratio": "warmup_steps",
    "warmup_steps": "warmup_ratio",
}
_MODELS, _PLUGINS = ("model", "base"), ("task", "method")
_OF_ALL_TOWERS = (*TOWERS, "projection_dim", "dtype", "attn_implementation")


def normalise(recipe: Any) -> dict[str, Any]:
    """The recipe as nested mappings, with short forms written out, so that overrides find their way."""
    try:
        raw = copy.deepcopy(plain(recipe))
    except RecursionError as error:
        raise RecipeError("the recipe contains itself", "write it as plain mappings and lists") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"a recipe is a mapping, got {type(raw).__name__}", "start with `stages:`")
    if isinstance(raw.get("data"), str):
        raw["data"] = {"path": raw["data"]}
    elif several(raw.get("data")):
        raw["data"] = {k: {"path": v} if isinstance(v, str) else v for k, v in raw["data"].items()}
    _write_out(raw)
    for stage in raw["stages"] if isinstance(raw.get("stages"), list) else []:
        if isinstance(stage, dict):
            _write_out(stage)
            if isinstance(stage.get("strategies"), list):
                stage["strategies"] = [{s: {}} if isinstance(s, str) else s for s in stage["strategies"]]
            if isinstance(stage.get("search"), dict):
                stage["search"] = _nested(stage["search"])
    return raw


def _write_out(node: dict[str, Any]) -> None:
    if isinstance(node.get("model"), str):
        node["model"] = {"path": node["model"]}
    for key in _PLUGINS:
        if isinstance(node.get(key), str):
            node[key] = {node[key]: {}}


def _nested(search: dict[Any, Any]) -> dict[Any, Any]:
    """`{"a.b": values}` as `{a: {b: values}}`, where overrides find it."""
    found: dict[Any, Any] = {}
    for key, value in search.items():
        *above, last = key.split(".") if isinstance(key, str) else [key]
        node = found
        for part in above:
            node[part] = node[part] if isinstance(node.get(part), dict) else {}
            node = node[part]
        if isinstance(value, dict) and isinstance(node.get(last), dict):
            node[last].update(value)
        else:
            node[last] = value
    return found


def several(data: Any) -> bool:
    """Whether a recipe's `data` is a mapping of names to data sets."""
    if not isinstance(data, dict) or not data or set(data) & set(settings.parameters(Data)):
        return False
    return all(isinstance(value, (dict, str)) for value in data.values())


# --- reading changes ------------------------------------------------------------------------------------------------


def parse_override(text: str) -> Change:
    """`a.b=value` -> (["a", "b"], value). Raises `RecipeError`."""
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        remedy = "settings are written key=value, options start with --"
        raise RecipeError(f"cannot read the argument '{text}'", remedy)
    return path, read_value(value)


def leaves(value: Any, path: Sequence[str] = ()) -> list[Change]:
    """The settings of a `--config` file that holds no whole recipe."""
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, str(key)))]
    return [(list(path), value)]


# --- applying changes -----------------------------------------------------------------------------------------------


def override(raw: dict[str, Any], changes: Sequence[Change], collect: Collector, config: Sequence[Change] = ()) -> None:
    """Apply changes to a normalised recipe in place; those of `config` first. Lists are entered by index or by name."""
    changes, config = _spell_out(changes), _spell_out(config)
    anew = [path for path, _ in changes if _kind(path)]
    replaced = [path[:-1] for path, _ in config if _kind(path) and any(_under(a, path[:-1]) for a in anew)]
    config = [(path, value) for path, value in config if not any(_under(path, node) for node in replaced)]
    for path in sorted(anew + [path for path, _ in config if _kind(path)], key=len):
        _start_anew(raw, path)
    # Whatever holds for all stages comes before what holds for one, and a whole before its parts.
    for part in (config, changes):
        for path, _ in part:
            _make_way(raw, path)
        for path, value in sorted(part, key=lambda change: (change[0][0] == "stages", len(change[0]))):
            _set(raw, path, value, collect)


def _spell_out(changes: Sequence[Change]) -> list[Change]:
    """Short forms in full: `model=DIR` is `model.path=DIR`, `training={a: 1}` is `training.a=1`."""
    out: list[Change] = []
    for path, value in changes:
        noun = (
            path[-1] in ("model", "base", "training")
            or path == ["data"]
            or (path[-2:-1] == ["model"] and path[-1] in TOWERS)
        )
        named_set = path[:1] == ["data"] and len(path) == 2 and path[1] not in settings.parameters(Data)
        if isinstance(value, dict) and value and (noun or path[-1] == "data"):
            out += _spell_out(leaves(value, path))
        elif isinstance(value, str) and (noun or named_set) and path[-1] != "training":
            out.append(([*path, "path"], value))
        else:
            out.append((path, value))
    return out


def _kind(path: list[str]) -> str:
    """`whole` where a setting says which data or model is meant, `tower` for a part of a model, else
    nothing.
    """
    if len(path) < 2:
        return ""
    last, owner = path[-1], path[-2]
    tower = len(path) > 2 and owner in TOWERS and path[-3] == "model"
    if last == "path" and (owner == "data" or (path[0] == "data" and len(path) == 3)):
        return "whole"
    if last in ("path", "config") and (owner in _MODELS or tower):
        return "tower" if tower else "whole"
    return ""


def _under(path: list[str], node: list[str]) -> bool:
    return path[: len(node)] == node


def _start_anew(raw: dict[str, Any], path: list[str]) -> None:
    """Clear what described the former data or model."""
    node, outer = _at(raw, path[:-1]), _at(raw, path[:-2])
    if isinstance(node, dict) and not (path[-2] == "data" and several(node)):
        node.clear()
    if _kind(path) == "tower" and isinstance(outer, dict):
        for key in [key for key in outer if key not in _OF_ALL_TOWERS]:
            del outer[key]


def _make_way(raw: dict[str, Any], path: list[str]) -> None:
    """Take what a training setting replaces: on the spot, from all stages where it is the recipe's, and from what they
    search."""
    if (path[-2:-1] != ["training"] and path[:1] != ["training"]) or len(path) < 2:
        return
    key = path[path.index("training") + 1]
    other = REPLACES.get(key)
    nodes = [_at(raw, path[: path.index("training") + 1])]
    stages = raw["stages"] if path[0] == "training" and isinstance(raw.get("stages"), list) else []
    nodes += [stage.get("training") for stage in stages if isinstance(stage, dict)]
    nodes += [_at(raw, ["stages", name_of(stage), "search", "training"]) for stage in stages]
    if path[:1] == ["stages"] and path[2:3] == ["training"]:
        nodes.append(_at(raw, [*path[:2], "search", "training"]))
    for i, node in enumerate(nodes):
        if isinstance(node, dict):
            node.pop(other, None)
            if i > 0:
                node.pop(key, None)


def _position(items: list[Any], part: str) -> int | None:
    """Where in a list the item of that name or index is."""
    for i, item in enumerate(items):
        if name_of(item) == part:
            return i
    number = int(part) if part.lstrip("-").isdigit() and len(part) < 10 else None
    return number if number is not None and -len(items) <= number < len(items) else None


def _at(raw: dict[str, Any], path: list[str]) -> Any:
    """What a path leads to, without making it; None for nothing."""
    node: Any = raw
    for part in path:
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list):
            position = _position(node, part)
            node = None if position is None else node[position]
        else:
            return None
    return node


def _set(raw: dict[str, Any], path: list[str], value: Any, collect: Collector) -> None:
    node: Any = raw
    i = 0
    while i < len(path) - 1:
        below = _enter(raw, node, path, i)
        if below is None:
            _refuse(node, path, i, collect)
            return
        i += 1
        if _is_plugin(node, below, path[i - 2 : i - 1]):
            # Both `strategies.lora.r` and `strategies.0.lora.r` lead into an item `{lora: {...}}`.
            name = name_of(below)
            if path[i] == name and i == len(path) - 1:
                node = below
                break
            inner = below[name] = {} if below[name] is None else below[name]
            i += path[i] == name and isinstance(inner, dict) and name not in inner
            below = inner
        node = below
        if not isinstance(node, (dict, list)):
            _refuse(node, path, i, collect)
            return
    _put(node, path, value, collect)


def _is_plugin(node: Any, below: Any, owner: list[str]) -> bool:
    """Whether `below` is an item `{name: settings}` of a list."""
    single = isinstance(below, dict) and len(below) == 1 and verb_of(below) is None
    return isinstance(node, list) and single and owner != ["models"]


def _put(node: Any, path: list[str], value: Any, collect: Collector) -> None:
    last = path[-1]
    if isinstance(node, list):
        position = _position(node, last)
        if position is None:
            _refuse(node, path, len(path) - 1, collect)
        elif isinstance(node[position], dict) and name_of(node[position]) == last and isinstance(value, dict):
            node[position] = {last: value} if verb_of(node[position]) is None else value
        else:
            node[position] = value
    elif path == ["data", "path"] and several(node) and _are_parts(node):
        _move(node, value)
    elif path == ["data", "path"] and several(node):
        names = ", ".join(f"data.{key}.path" for key in node)
        collect.add("data.path: this recipe has several data sets", f"name one of them: {names}")
    else:
        node[last] = value


def _are_parts(data: dict[str, Any]) -> bool:
    """Whether several data sets are read from one place."""
    sets = [part if isinstance(part, dict) else {"path": part} for part in data.values()]
    return all((one.get("path"), one.get("name")) == (sets[0].get("path"), sets[0].get("name")) for one in sets)


def _move(data: dict[str, Any], path: Any) -> None:
    """Read all parts from another place. What they share described the old one; what tells them apart stays."""
    parts = [part for part in data.values() if isinstance(part, dict)]
    shared = [key for key in parts[0] if all(key in part and part[key] == parts[0][key] for part in parts)]
    for name, part in data.items():
        kept = {key: value for key, value in part.items() if key not in shared} if isinstance(part, dict) else {}
        data[name] = {"path": path, **kept}


def _enter(raw: dict[str, Any], node: Any, path: list[str], i: int) -> Any:
    """The mapping or list behind `path[i]`, made where it is missing, short forms written out. None where there is
    none.
    """
    part = path[i]
    if isinstance(node, list):
        position = _position(node, part)
        if position is None:
            return None
        if isinstance(node[position], str):
            node[position] = {"path": node[position]} if path[i - 1] == "models" else {node[position]: {}}
        return node[position]
    found = node.get(part)
    if found is None:
        found = node[part] = [{"finetune": {}}] if part == "strategies" and path[i - 1] != "search" else {}
    elif isinstance(found, str) and part == "data" and node is not raw:
        shared = raw.get("data")
        known = shared.get(found) if isinstance(shared, dict) and several(shared) else None
        found = node[part] = copy.deepcopy(known) if isinstance(known, dict) else {"path": found}
    elif isinstance(found, str) and (part in (*_MODELS, "data") or (path[i - 1 : i] == ["model"] and part in TOWERS)):
        found = node[part] = {"path": found}
    elif isinstance(found, str) and part in _PLUGINS:
        found = node[part] = {found: {}}
    return found if isinstance(found, (dict, list)) else None


def _refuse(node: Any, path: list[str], i: int, collect: Collector) -> None:
    where = ".".join(path[: i + 1])
    if isinstance(node, list):
        names = [name_of(item) for item in node]
        whole = f"; or give the whole list: {'.'.join(path[:i])}=[...]" if path[i - 1] == "strategies" else ""
        collect.add(f"{where}: there is no '{path[i]}'", nearest(path[i], names) + whole)
    else:
        single = ".".join(path[: i + 1] if isinstance(node, dict) else path[:i])
        collect.add(f"{'.'.join(path)}: '{single}' is a single value", "set that instead")
