"""The conformance kit: whether a plugin keeps its word. For the author of a plugin, one line of a test:

    from kt_hf.testing import check_strategy

    def test_it_conforms():
        check_strategy("my-strategy", weight=0.1)

Every rule has a name; `NotConforming.broken` lists those that are broken, and what was found. A class may say in an
attribute `conformance` how it is to be tried where its defaults do not do: `{"settings": {...}, "task": NAME}`. A
required setting that is annotated `ModelRef` or `DataRef` needs no such thing: a tiny teacher or data set is put in. A
plugin is named as it is registered, or given as a class.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kt_hf import registry
from kt_hf.errors import RecipeError, nearest
from kt_hf.testing.rules import RULES, Finding, NotConforming, Rule

__all__ = [
    "Finding",
    "NotConforming",
    "check_ensemble",
    "check_merge",
    "check_plugin",
    "check_strategy",
    "check_task",
    "examine",
    "rules",
]


def rules(kind: str) -> list[Rule]:
    """The rules that a plugin of this kind is judged by, in their order."""
    from kt_hf.testing import ensembles, merges, strategies, tasks  # noqa: F401  they register their rules

    return [r for r in RULES if r.kind in ("plugin", kind)]


def examine(
    kind: str, plugin: str | type, *, task: str | None = None, thorough: bool = False, **settings: Any
) -> list[Finding]:
    """How a plugin stands to every rule of its kind; raises nothing for broken ones.

    All is tried on the CPU. task: what a strategy is tried on; by default the first task that it does not refuse.
    thorough: also rules that start further processes (about a minute). settings: of the plugin, in place of its
    defaults.
    """
    from kt_hf.testing.bench import on_cpu
    from kt_hf.testing.rules import judge

    if kind not in registry.KINDS:
        raise RecipeError(f"unknown kind of plugin '{kind}'", nearest(kind, registry.KINDS))
    rules(kind)
    cls = registry.load(kind, plugin) if isinstance(plugin, str) else plugin
    name = plugin if isinstance(plugin, str) else _name_of(kind, plugin)
    with tempfile.TemporaryDirectory(prefix="kt-hf-check-") as folder, on_cpu():
        return judge(kind, _case(kind, name, cls, settings, Path(folder), task), thorough)


def check_plugin(
    kind: str, plugin: str | type, *, task: str | None = None, thorough: bool = False, **settings: Any
) -> list[Finding]:
    """`examine`, but raises `NotConforming` when a rule is broken."""
    found = examine(kind, plugin, task=task, thorough=thorough, **settings)
    if any(f.passed is False for f in found):
        raise NotConforming(f"{kind} '{plugin if isinstance(plugin, str) else plugin.__name__}'", found)
    return found


def check_strategy(
    plugin: str | type, *, task: str | None = None, thorough: bool = False, **settings: Any
) -> list[Finding]:
    """`check_plugin` for a strategy."""
    return check_plugin("strategy", plugin, task=task, thorough=thorough, **settings)


def check_merge(plugin: str | type, **settings: Any) -> list[Finding]:
    """`check_plugin` for a merge."""
    return check_plugin("merge", plugin, **settings)


def check_ensemble(plugin: str | type, **settings: Any) -> list[Finding]:
    """`check_plugin` for an ensemble."""
    return check_plugin("ensemble", plugin, **settings)


def check_task(plugin: str, **settings: Any) -> list[Finding]:
    """`check_plugin` for a task, by its registered name."""
    return check_plugin("task", plugin, **settings)


def _name_of(kind: str, cls: type) -> str:
    """The name under which a class is registered; its own in lower case where it is not."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    known = [e.name for e in registry.entries().values() if e.kind == kind and e.target == target]
    return known[0] if known else cls.__name__.lower()


def _case(kind: str, name: str, cls: type, settings: dict[str, Any], folder: Path, task: str | None) -> Any:
    from kt_hf.testing import ensembles, merges, strategies, tasks

    if kind == "strategy":
        return strategies.StrategyCase(name, cls, settings, folder, task)
    plain: dict[str, Any] = {"merge": merges.MergeCase, "ensemble": ensembles.EnsembleCase, "task": tasks.TaskCase}
    return plain[kind](name, cls, settings, folder)
