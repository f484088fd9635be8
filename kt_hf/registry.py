"""One registry for the four kinds of plugins.

Plugins come in through Python entry points (groups `kt_hf.task`, `kt_hf.strategy`, `kt_hf.merge`, `kt_hf.ensemble`) and
are imported only when named. In a notebook or a recipe file, `@register(kind, name)` does the same. Listing reads
metadata alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from kt_hf.errors import RecipeError, nearest

KINDS = ("task", "strategy", "merge", "ensemble")
API_VERSION = 1
OWN_DISTRIBUTION = "kt_hf"


@dataclass(frozen=True)
class Entry:
    """What is known of a plugin without importing it. `problem` is empty when nothing is known to be wrong."""

    kind: str
    name: str
    target: str
    distribution: str
    problem: str = ""
    plugin: Any = None

    def load(self) -> type:
        """Import the plugin. Raises `RecipeError` that names the plugin, its package and what went wrong."""
        if self.problem:
            raise RecipeError(
                f"{self.kind} '{self.name}' is unavailable: {self.problem}", "uninstall one of the packages"
            )
        if self.plugin is not None:
            return self.plugin
        module, _, attribute = self.target.partition(":")
        try:
            plugin: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
        except (Exception, SystemExit) as error:  # a module that ends the process is broken, too
            raise RecipeError(
                f"{self.kind} '{self.name}' of package {self.distribution} cannot be imported: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                "repair or uninstall that package; other plugins are not affected",
            ) from error
        version = getattr(plugin, "api_version", API_VERSION)
        if version != API_VERSION:
            raise RecipeError(
                f"{self.kind} '{self.name}' of {self.distribution} is for plugin API {version}, not {API_VERSION}",
                f"install a release of {self.distribution} for API {API_VERSION}",
            )
        return plugin


_registered: dict[tuple[str, str], Entry] = {}


def register(kind: str, name: str, paper: str | None = None) -> Callable[[type], type]:
    """Class decorator that registers a plugin for this process.

    Raises `ValueError` for an unknown kind and for a name that another plugin already has.
    """
    if kind not in KINDS:
        raise RecipeError(f"unknown kind of plugin '{kind}'", nearest(kind, KINDS))

    def decorate(cls: type) -> type:
        target = f"{cls.__module__}:{cls.__qualname__}"
        taken = entries().get((kind, name))
        if taken is not None and taken.target != target:
            raise RecipeError(f"{kind} '{name}' is already registered by {taken.distribution}", "choose another name")
        if paper is not None:
            cls.paper = paper  # type: ignore[attr-defined]
        _registered[kind, name] = Entry(kind, name, target, "(this process)", plugin=cls)
        return cls

    return decorate


@functools.cache
def _installed() -> dict[tuple[str, str], Entry]:
    found: dict[tuple[str, str], list[Entry]] = {}
    points = metadata.entry_points()
    for kind in KINDS:
        for point in points.select(group=f"kt_hf.{kind}"):
            entry = Entry(kind, point.name, point.value, point.dist.name if point.dist else "(unknown)")
            same = found.setdefault((kind, point.name), [])
            if entry not in same:  # one distribution can be seen twice, on two entries of sys.path
                same.append(entry)
    return {key: _settle(candidates) for key, candidates in found.items()}


def _settle(candidates: list[Entry]) -> Entry:
    """A name that several packages declare: ours wins, otherwise nobody gets it."""
    own = [entry for entry in candidates if entry.distribution.replace("-", "_") == OWN_DISTRIBUTION]
    if len(candidates) == 1 or own:
        return (own or candidates)[0]
    packages = sorted(entry.distribution for entry in candidates)
    return replace(
        candidates[0], distribution=" and ".join(packages), problem=f"declared by {' and by '.join(packages)}"
    )


def shadowed() -> list[Entry]:
    """Plugins of other packages that hide behind a built-in name, for `kt-hf list`."""
    points = metadata.entry_points()
    return [
        Entry(kind, p.name, p.value, p.dist.name, f"the name is taken by {OWN_DISTRIBUTION}")
        for kind in KINDS
        for p in points.select(group=f"kt_hf.{kind}")
        if p.dist is not None
        and p.dist.name.replace("-", "_") != OWN_DISTRIBUTION
        and _installed()[kind, p.name].distribution.replace("-", "_") == OWN_DISTRIBUTION
    ]


def entries() -> dict[tuple[str, str], Entry]:
    """Every known plugin by (kind, name), installed or registered, without importing any."""
    return {**_installed(), **_registered}


def refresh() -> None:
    """Forget what was read of the installed packages; for processes in which packages come and go."""
    _installed.cache_clear()


def names(kind: str) -> list[str]:
    return sorted(name for k, name in entries() if k == kind)


def name_of(kind: str, cls: type) -> str:
    """The name under which a class is registered; its own where it is not."""
    found = entries().items()
    return next((n for (k, n), e in found if k == kind and e.target.endswith(f":{cls.__name__}")), cls.__name__)


def find(kind: str, name: str) -> Entry:
    """The entry of that name. Raises `RecipeError` with the nearest name."""
    entry = entries().get((kind, name))
    if entry is None:
        raise RecipeError(f"there is no {kind} called '{name}'", nearest(name, names(kind)))
    return entry


def load(kind: str, name: str) -> type:
    """Import and return the plugin class."""
    return find(kind, name).load()
