"""Settings are constructor signatures: one description, read by people, validated by pydantic.

The same mechanism serves the plugins and the nouns of the grammar (`Data`, `Model`, `Train`, ...).
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from typing import Annotated, Any

import pydantic

from kt_hf.errors import Collector, nearest


class _Reference:
    """Marks a setting that names a model or a data set; order, lineage and existence checks read it."""

    def __init__(self, kind: str):
        self.kind = kind


ModelRef = Annotated[str | dict[str, Any], _Reference("model")]
"""A folder, a Hub id, or `@stage`."""
DataRef = Annotated[str | dict[str, Any], _Reference("data")]
"""The name of one of the recipe's data sets, or a path."""

_CHOICE = re.compile(r"'([^']*)'")
_CONFIG = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=(), validate_default=False)


def parameters(cls: Any) -> dict[str, tuple[Any, inspect.Parameter]]:
    """Name -> (annotation, parameter) of the constructor's settings; `self` and `**catch_all` are left out."""
    return _parameters(cls)


@functools.cache
def _parameters(cls: Any) -> dict[str, tuple[Any, inspect.Parameter]]:
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    found = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        found[name] = (hints.get(name, Any), parameter)
    return found


@functools.cache
def schema(cls: type, partial: bool = False) -> type[pydantic.BaseModel]:
    """The pydantic model of a constructor's signature. `partial`: nothing is required."""
    fields: dict[str, Any] = {}
    for name, (annotation, parameter) in parameters(cls).items():
        required = parameter.default is parameter.empty
        fields[name] = (annotation, (None if partial else ...) if required else parameter.default)
    prefixed = {name: f"setting_{name}" for name in fields if hasattr(pydantic.BaseModel, name)}
    for name, inner in prefixed.items():  # a setting called `copy` or `schema` must not collide with pydantic's methods
        annotation, default = fields.pop(name)
        fields[inner] = (annotation, pydantic.Field(default, alias=name))
    return pydantic.create_model(cls.__name__, __config__=_CONFIG, **fields)


def validate(cls: type, given: Any, where: str, collect: Collector, positional: str = "") -> dict[str, Any]:
    """Check `given` against the signature of `cls`; mistakes go to `collect`, named by the dotted path `where`.

    Returns the settings with defaults filled in and strings converted; a setting with a mistake has its default (None
    where there is none). A bare value stands for the setting named `positional`.
    """
    if given is None:
        given = {}
    if not isinstance(given, dict):
        if not positional:
            collect.add(f"{where}: got {shorten(given)}, expected a mapping of settings", nearest("", parameters(cls)))
            given = {}
        else:
            given = {positional: given}
    for key in [key for key in given if not isinstance(key, str)]:
        collect.add(f"{where}: setting names are strings, got {shorten(key)}", nearest("", parameters(cls)))
    given = {key: _adapted(cls, key, value) for key, value in given.items() if isinstance(key, str)}
    try:
        model = schema(cls).model_validate(given)
    except pydantic.errors.PydanticUserError as error:
        collect.add(
            f"{where}: the settings of {cls.__name__} cannot be checked: {_line(error)}", "annotate plain values"
        )
        return {}
    except pydantic.ValidationError as error:
        # A union reports each of its members: one line for each place is enough.
        places: dict[str, list[Any]] = {}
        for item in error.errors(include_url=False):
            places.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(item)
        for items in places.values():
            _explain(cls, items, where, collect)
        model = schema(cls, partial=True).model_validate({k: v for k, v in given.items() if k not in places})
    return dict(model.model_dump(by_alias=True))


class _NotABoolean:
    """Stands for a boolean where a number is expected, which pydantic would take for 0 or 1."""

    def __init__(self, value: bool):
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def _adapted(cls: type, key: str, value: Any) -> Any:
    """A number where text is expected becomes text (a revision of digits); a boolean does not become a number."""
    if key not in parameters(cls) or not isinstance(value, (bool, int)):
        return value
    members = set(_members(parameters(cls)[key][0]))
    if isinstance(value, bool):
        return _NotABoolean(value) if members & {int, float} and not members & {bool, Any, object} else value
    return str(value) if str in members and not members & {int, float, bool, Any, object} else value


def _members(annotation: Any) -> list[Any]:
    """The types of a union, limits taken off."""
    if typing.get_origin(annotation) is Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def shorten(value: Any, limit: int = 120) -> str:
    """What was received, for a message; never a page of it."""
    try:
        text = repr(value)
    except Exception as error:  # integers beyond Python's limit of digits, deep nesting
        text = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= limit else f"{text[:limit]}..."


def _explain(cls: type, items: list[Any], where: str, collect: Collector) -> None:
    item = items[0]
    path = ".".join([where, *(str(part) for part in item["loc"][:1])]).strip(".")
    if item["type"] == "extra_forbidden":
        collect.add(f"{path}: unknown setting", nearest(str(item["loc"][0]), parameters(cls)))
    elif item["type"] == "missing":
        collect.add(f"{path}: missing", describe_type(parameters(cls)[str(item["loc"][0])][0]))
    else:
        received = shorten(item["input"]) + (f" within {item['loc'][0]}" if len(item["loc"]) > 1 else "")
        collect.add(f"{path}: got {received}", _expected(items))


def _expected(items: list[Any]) -> str:
    choices = [c for i in items if i["type"] == "literal_error" for c in _CHOICE.findall(i["ctx"]["expected"])]
    if choices and all(i["type"] in ("literal_error", "list_type", "dict_type", "int_type") for i in items):
        return nearest(str(items[0]["input"]), dict.fromkeys(choices))
    return " or ".join(dict.fromkeys(_plain(i["msg"]) for i in items))


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def _plain(message: str) -> str:
    return message.replace("Input should be", "it should be").replace("Value error, ", "")


def describe_type(annotation: Any) -> str:
    """A short text for a setting's type, for `kt-hf show`."""
    if typing.get_origin(annotation) is Annotated:
        base, *extras = typing.get_args(annotation)
        for extra in extras:
            if isinstance(extra, _Reference):
                return "model (folder, Hub id or @stage)" if extra.kind == "model" else "data set (name or path)"
        limits = [
            f"{sign} {getattr(meta, attribute)}"
            for extra in extras
            for meta in (getattr(extra, "metadata", None) or [extra])
            for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
            if getattr(meta, attribute, None) is not None
        ]
        return describe_type(base) + (f", {' and '.join(limits)}" if limits else "")
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(annotation)))
    if (typing.get_args(annotation) and "|" in str(annotation)) or typing.get_origin(annotation) is typing.Union:
        return " | ".join(describe_type(part) for part in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any"
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def references(cls: type, settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """The settings that are annotated `ModelRef` (kind "model") or `DataRef` (kind "data"), with their values."""
    found = {}
    for name, (annotation, _) in parameters(cls).items():
        if _is_reference(annotation, kind) and settings.get(name) is not None:
            found[name] = settings[name]
    return found


def _is_reference(annotation: Any, kind: str) -> bool:
    if typing.get_origin(annotation) is Annotated:
        base, *extras = typing.get_args(annotation)
        return any(isinstance(e, _Reference) and e.kind == kind for e in extras) or _is_reference(base, kind)
    return any(_is_reference(part, kind) for part in typing.get_args(annotation))
