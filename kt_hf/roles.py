"""Which column plays which role of a task: those named in the recipe, then those that are unambiguous."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from kt_hf import registry
from kt_hf.errors import RecipeError, nearest
from kt_hf.task import Role, Task


def kinds(feature: Any) -> tuple[str, ...]:
    """What a column can serve as; a kind with `?` only where the column is named.

    image, audio, video, string, class, number; strings, classes, numbers, images: lists of them; messages: a chat;
    struct: a mapping of fields, of which a task knows the names.
    """
    media = {datasets.Image: "image", datasets.Audio: "audio", datasets.Video: "video"}
    if type(feature) in media:
        return (media[type(feature)],)
    if isinstance(feature, datasets.ClassLabel):
        return ("class",)
    inner = getattr(feature, "feature", None)
    if inner is None and isinstance(feature, list):
        inner = feature[0]
    if isinstance(inner, dict):
        return ("messages",) if {"role", "content"} <= set(inner) else ("struct",)
    if isinstance(feature, dict):
        return ("struct",)
    if inner is not None:
        found = [kind.rstrip("?") for kind in kinds(inner)]
        lists = {"string": "strings", "class": "classes", "number": "numbers", "image": "images"}
        sure = [f"{lists[kind]}{'?' if f'{kind}?' in kinds(inner) else ''}" for kind in found if kind in lists]
        return tuple(sure)
    dtype = getattr(feature, "dtype", None)
    if dtype in ("string", "large_string"):
        return ("string", "class?")
    if isinstance(dtype, str) and (dtype.startswith(("int", "uint")) or dtype == "bool"):
        return ("class?", "number?")
    if isinstance(dtype, str) and dtype.startswith("float"):
        return ("number",)
    return ()


def find_roles(
    features: Any, roles: Sequence[Role], columns: dict[str, str] | None = None, strict: bool = True
) -> dict[str, str]:
    """role -> column: those named, then columns of the role's own name or a usual one, then the only one of a fitting
    kind.

    Raises `RecipeError` that lists the candidates when a required role stays open, or several columns have a usual
    name of it, and `strict` is set.
    """
    found = _named(features, roles, columns or {})
    for role in roles:
        if role.name in found:
            continue
        free = [c for c in (role.name, *role.aliases) if c in features and c not in found.values()]
        fitting = [c for c in free if _suits(features[c], role, named=True)]
        if fitting:
            found[role.name] = fitting[0]
    for role in roles:
        if role.name in found and strict and found[role.name] != role.name and role.name not in (columns or {}):
            rivals = [c for c in role.aliases if c in features and c not in found.values()]
            rivals = [c for c in rivals if _suits(features[c], role, named=True)]
            if rivals:
                raise _open(role, [found[role.name], *rivals], features)
        if role.name in found or not role.required:
            continue
        free = [c for c in features if c not in found.values() and _suits(features[c], role, named=False)]
        if len(free) == 1:
            found[role.name] = free[0]
        elif strict:
            raise _open(role, free, features)
    if strict and roles and not found:
        listed = ", ".join(f"{name} ({describe(feature)})" for name, feature in features.items())
        valid = ", ".join(role.name for role in roles)
        raise RecipeError(
            f"no column has a name that the task knows; the columns are {listed}",
            f"name one: data.columns.ROLE=COLUMN, with a role of {valid}",
        )
    return found


def fitting_tasks(features: Any, columns: dict[str, str] | None = None) -> list[tuple[str, Task]]:
    """(name, task with its defaults) of the tasks that these features could be for.

    A task that would leave an image or a list of words aside gives way to one that looks at it, and where there are
    sounds or several images in a row, features decide only for a task that takes these.
    """
    found = []
    for name in registry.names("task"):
        try:
            task = registry.load("task", name)()
        except (RecipeError, TypeError):
            continue  # a broken or demanding task of somebody else's cannot be the one that features decide
        if set(columns or {}) <= {role.name for role in task.roles}:
            roles = find_roles(features, task.roles, columns, strict=False)
            if task.fits(roles):
                found.append((name, task, roles))
    telling = [c for c in features if {"image", "strings"} & set(kinds(features[c]))]
    seeing = [item for item in found if set(telling) <= set(item[2].values())]
    aside = {
        name: [c for c in features if _is_media(features[c]) and c not in roles.values()] for name, _, roles in found
    }
    return [(name, task) for name, task, _ in seeing or found if not aside[name]]


def _is_media(feature: Any) -> bool:
    """Sounds, videos, or lists of images."""
    return isinstance(feature, (datasets.Audio, datasets.Video)) or "image" in kinds(getattr(feature, "feature", None))


def _named(features: Any, roles: Sequence[Role], columns: dict[str, str]) -> dict[str, str]:
    by_name = {role.name: role for role in roles}
    for name, column in columns.items():
        if name not in by_name:
            raise RecipeError(f"data.columns.{name}: the task has no such role", nearest(name, by_name))
        if column not in features:
            raise RecipeError(f"data.columns.{name}: there is no column '{column}'", nearest(column, features))
        if not _suits(features[column], by_name[name], named=True):
            wanted = " or ".join(by_name[name].kinds)
            raise RecipeError(
                f"data.columns.{name}: '{column}' is {describe(features[column])}, not {wanted}", "name another column"
            )
        same = [other for other, c in columns.items() if c == column and other != name]
        if same:
            raise RecipeError(f"data.columns: '{column}' is named for {name} and for {same[0]}", "name a column once")
    return dict(columns)


def _open(role: Role, candidates: Sequence[str], features: Any) -> RecipeError:
    what = f"several columns could be the {role.name}: {', '.join(candidates)}"
    if not candidates:
        what = f"no column can be the {role.name}"
    listed = ", ".join(f"{name} ({describe(feature)})" for name, feature in features.items())
    return RecipeError(f"{what}; the columns are {listed}", f"name it: data.columns.{role.name}=COLUMN")


def describe(feature: Any) -> str:
    """A feature in a word or two."""
    if isinstance(feature, datasets.ClassLabel):
        return f"class of {feature.num_classes}"
    dtype = getattr(feature, "dtype", None)
    if isinstance(feature, datasets.Value) and dtype:
        return str(dtype).removeprefix("large_")
    inner = getattr(feature, "feature", None)
    return f"list of {describe(inner)}" if inner is not None else type(feature).__name__.lower()


def _suits(feature: Any, role: Role, named: bool) -> bool:
    offered = kinds(feature)
    return any(kind in offered or (named and f"{kind}?" in offered) for kind in role.kinds)
