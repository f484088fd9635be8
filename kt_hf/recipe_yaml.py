"""Recipes as YAML: plain values only, numbers and booleans as YAML 1.2 has them, duplicate keys refused.

YAML 1.1, which PyYAML reads by default, takes `1e-4` for text, `no` for a boolean and `1:30` for a number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from kt_hf.errors import IntegrityError, RecipeError

MAX_BYTES = 256_000
MAX_VALUES = 100_000

_PATTERNS = {
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", [*"-+0123456789"]),
    # The bounds of the last form keep revisions such as 12e45678 text.
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)|[-+]?[0-9]{1,4}[eE][-+]?[0-9]{1,3}",
        [*"-+0123456789."],
    ),
    "merge": (r"<<", ["<"]),
}
_REFERENCE = re.compile(r"(?<=[\[,{:\s])@[\w.-]+")


class _Loader(yaml.SafeLoader):
    """Plain values, each key once."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key_node.value}' stands there twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 would take for something else; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _PATTERNS.items():
    _expression = re.compile(f"(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _expression, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _expression, _first)


def from_yaml(path: str, start: str = "start with `stages:`") -> dict[str, Any]:
    """Read a recipe file, or another that holds a mapping, with the remedy `start` where it does not. Nothing but plain
    values is constructed, and no more than a recipe's size is read.

    Raises `RecipeError`, and `IntegrityError` where the file asks for Python objects.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"cannot read {path}: {text}", "name an existing YAML file") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES // 1000} kB", "this does not look like a recipe")
    try:
        raw = load(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        text = " ".join(str(error).split())
        if "python/" in text:
            cause = f"{path} asks for Python objects: {text[:300]}"
            raise IntegrityError(cause, "recipes hold plain values; use no tags") from error
        remedy = "write references in quotes: '@stage'" if "'@'" in text else "mend that line"
        raise RecipeError(f"{path} is not YAML: {text[:300]}", remedy) from error
    if not isinstance(raw, dict):
        got = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise RecipeError(f"{path} holds {got}, expected a mapping", start)
    if _unfolds_beyond(raw, MAX_VALUES):
        raise RecipeError(f"{path} unfolds to more than {MAX_VALUES} values", "use fewer aliases (*name)")
    raw.pop("kt_hf_version", None)
    return raw


def load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _unfolds_beyond(value: Any, limit: int) -> bool:
    """Whether a value holds more than so many others, aliases unfolded."""
    stack, seen = [value], 0
    while stack and seen <= limit:
        inner = stack.pop()
        seen += 1
        if isinstance(inner, (dict, list)):
            stack.extend(inner.values() if isinstance(inner, dict) else inner)
    return seen > limit


def to_yaml(raw: dict[str, Any]) -> str:
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_value(text: str) -> Any:
    """A value of the command line: a list, mapping or quoted text as YAML, else one scalar, whatever it contains."""
    bare = text.strip()
    if bare[:1] not in ("[", "{", '"', "'"):
        node = yaml.ScalarNode(_tag_of(bare), bare)
        return text if node.tag.endswith(":str") else _Loader("").construct_object(node)
    for attempt in (bare, _REFERENCE.sub(lambda match: f"'{match.group()}'", bare)):
        try:
            return load(attempt)
        except (yaml.YAMLError, RecursionError, ValueError):
            continue
    return text


def _tag_of(bare: str) -> str:
    for tag in ("null", "bool", "int", "float"):
        if re.fullmatch(_PATTERNS[tag][0], bare):
            return f"tag:yaml.org,2002:{tag}"
    return "tag:yaml.org,2002:str"
