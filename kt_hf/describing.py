"""What `kt-hf show` says of a plugin: everything is read from the class itself."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from kt_hf import settings
from kt_hf.registry import Entry

HOOKS = (
    "streams",
    "task_weight",
    "setup",
    "ready",
    "lr_scale",
    "batch",
    "weigh",
    "loss",
    "after_step",
    "eval_model",
    "export",
    "batches",
    "backward",
)
SCOPES = {
    "example": "about single examples; goes with gradient accumulation",
    "batch": "about the batch as a whole; gradient accumulation is refused, forward_chunk_size saves memory instead",
    "weights": "about the weights; goes with gradient accumulation",
}


def describe(entry: Entry) -> str:
    """Name, purpose, settings, paper and composition."""
    cls = entry.load()
    parts = [
        f"{entry.name} ({entry.kind}) of {entry.distribution}",
        textwrap.indent(inspect.getdoc(cls) or "(no description)", "  "),
    ]
    parts.append(_settings(cls))
    if getattr(cls, "paper", ""):
        parts.append(f"paper:\n{textwrap.indent(textwrap.fill(cls.paper, 110), '  ')}")  # type: ignore[attr-defined]
    composition = {"strategy": _strategy, "merge": _merge, "ensemble": _ensemble, "task": _task}[entry.kind](cls)
    parts.append("composition:\n" + "\n".join(f"  {line}" for line in composition))
    return "\n\n".join(parts)


def _settings(cls: type) -> str:
    rows = []
    for name, (annotation, parameter) in settings.parameters(cls).items():
        default = "required" if parameter.default is parameter.empty else f"default {_plain(parameter.default)}"
        rows.append((name, settings.describe_type(annotation), default))
    if not rows:
        return "settings: none"
    width = max(len(row[0]) for row in rows)
    return "settings:\n" + "\n".join(f"  {name:{width}}  {kind}; {default}" for name, kind, default in rows)


def _plain(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if value is None or isinstance(value, bool)
        else repr(value)
    )


def _strategy(cls: Any) -> list[str]:
    from kt_hf.strategy import Strategy

    used = [hook for hook in HOOKS if getattr(cls, hook) is not getattr(Strategy, hook)]
    lines = [f"scope: {cls.scope}, {SCOPES.get(cls.scope, '')}", f"hooks: {', '.join(used) or 'none'}"]
    exclusive = [hook for hook in ("batches", "backward") if hook in used]
    if exclusive:
        lines.append(f"excludes other strategies that decide the {' or the '.join(exclusive)}")
    if cls.forward_kwargs:
        lines.append(f"asks the model for {', '.join(cls.forward_kwargs)}")
    if cls.adds_objective:
        lines.append("adds an objective: trains tasks that have no loss of their own")
    if cls.neutral is not None:
        lines.append(f"equals its absence with {', '.join(f'{k}={v}' for k, v in cls.neutral.items())}")
    return lines


def _merge(cls: Any) -> list[str]:
    least, most = cls.min_parents, cls.max_parents
    count = f"{least} or more models" if most is None else "one model" if most == 1 else f"{least} to {most} models"
    if least == most and most > 1:
        count = f"{most} models"
    base = ["needs their base: the model that they were trained from"] if cls.needs_base else []
    needs = cls.needs_validation
    when = "depends on its settings" if not isinstance(needs, bool) else "yes"
    asked = {"train": "training", "validation": "validation"}.get(cls.measures_on)
    asks = [f"runs every parent on {asked} data first"] if asked else []
    chooses = [f"chooses on validation data: {when}"] if needs else []
    return [f"takes {count} of one architecture", *base, *asks, *chooses]


def _ensemble(cls: Any) -> list[str]:
    needs = cls.needs_validation
    when = "depends on its settings" if not isinstance(needs, bool) else "yes" if needs else "no"
    return ["takes models with the same classes", f"needs validation data: {when}"]


def _task(cls: Any) -> list[str]:
    roles = [f"{r.name} ({', '.join(r.kinds)}{'' if r.required else ', optional'})" for r in cls.roles]
    lines = [
        f"columns: {'; '.join(roles)}",
        f"counts {cls.unit}s; decides by {cls.metric if isinstance(cls.metric, str) else 'its own metric'}",
    ]
    if not cls.has_loss:
        lines.append("has no loss of its own: needs a strategy that adds an objective")
    return lines
