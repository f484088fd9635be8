"""Rules for plugins of every kind, and the case they are judged on: a class with the settings to build it."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from kt_hf import registry, settings
from kt_hf.errors import Collector
from kt_hf.testing.rules import NotApplicable, demand, rule


class Case:
    """A plugin under examination.

    `given` are settings of the caller; what the class declares in `conformance["settings"]` comes before the defaults.
    """

    def __init__(self, kind: str, name: str, cls: type, given: dict[str, Any], folder: Path):
        self.kind, self.name, self.cls, self.folder = kind, name, cls, folder
        self.declared: dict[str, Any] = getattr(cls, "conformance", None) or {}
        self.given = {**self.declared.get("settings", {}), **given}

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Validated settings, as a recipe's would be."""
        collect = Collector()
        values = settings.validate(self.cls, {**self.given, **changes}, self.name, collect)
        collect.raise_if_any()
        return values

    def build(self, **changes: Any) -> Any:
        return self.cls(**self.settings(**changes))


@rule("plugin", "builds")
def builds(case: Case) -> None:
    """It builds with its defaults, or with the settings that its `conformance` declares."""
    case.build()


@rule("plugin", "says-what-it-does", needs=("builds",))
def says_what_it_does(case: Case) -> None:
    """The class has a docstring of its own; a strategy describes what it will do in one line."""
    demand((case.cls.__dict__.get("__doc__") or "").strip(), f"{case.cls.__name__} has no docstring")
    if case.kind == "strategy":
        line = case.build().describe()
        demand(
            isinstance(line, str) and line.strip() and "\n" not in line.strip(),
            f"describe() gave {line!r}, expected one line",
        )


@rule("plugin", "settings-are-typed-keywords")
def settings_are_typed_keywords(case: Case) -> None:
    """Every setting is keyword-only and typed, with a plain default; there is no catch-all."""
    if "__init__" not in case.cls.__dict__:
        return  # no settings
    constructor = case.cls.__dict__["__init__"]
    for name, p in list(inspect.signature(constructor).parameters.items())[1:]:
        demand(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD), f"'{name}' takes anything: name every setting")
        demand(p.kind == p.KEYWORD_ONLY, f"'{name}' is positional: put it behind `*`")
        demand(name in constructor.__annotations__, f"'{name}' has no type")
        if p.default is not p.empty:
            try:
                json.dumps(p.default, allow_nan=False)
            except (TypeError, ValueError):
                demand(False, f"the default of '{name}' is {p.default!r}, which YAML cannot hold")
    settings.schema(case.cls)


@rule("plugin", "imports-no-other-plugin")
def imports_no_other_plugin(case: Case) -> None:
    """The plugin's module imports kt_hf and libraries, never another plugin."""
    module = sys.modules.get(case.cls.__module__)
    try:
        tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    except (TypeError, OSError, SyntaxError):
        raise NotApplicable("its source cannot be read") from None
    package = getattr(module, "__package__", "") or ""
    others = {e.target.partition(":")[0] for e in registry.entries().values()} - {case.cls.__module__}
    for name in sorted(imported(tree, package)):
        demand(name not in others, f"it imports {name}, another plugin")


def imported(tree: ast.AST, package: str) -> set[str]:
    """Full names of all modules that a source imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (start, node.module or "") if part)
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names
