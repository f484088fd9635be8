"""Rules by name, the findings about one plugin, and how a rule is judged."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """How a plugin stands to one rule. passed: None where the rule does not apply; `note` then says why."""

    rule: str
    passed: bool | None
    note: str = ""

    def __str__(self) -> str:
        sign = {True: "ok", False: "BROKEN", None: "-"}[self.passed]
        return f"{sign:7}{self.rule}{': ' if self.note else ''}{self.note}"


class NotConforming(AssertionError):
    """A plugin breaks rules of its contract; `findings` are all of them, `broken` the names of the broken ones."""

    def __init__(self, plugin: str, findings: Sequence[Finding]):
        self.findings = list(findings)
        self.broken = [f.rule for f in findings if f.passed is False]
        lines = "\n  ".join(f"{f.rule}: {f.note}" for f in findings if f.passed is False)
        super().__init__(f"{plugin} breaks {len(self.broken)} of {len(self.findings)} rules:\n  {lines}")


class Broken(Exception):
    """Raised by a rule; the text says what was found."""


class NotApplicable(Exception):
    """Raised by a rule; the text says why it does not apply."""


@dataclass(frozen=True)
class Rule:
    """A named demand on one kind of plugin. needs: rules whose breach says all that this one could say."""

    kind: str
    name: str
    check: Callable[[Any], None]
    needs: tuple[str, ...] = ()
    thorough: bool = False

    @property
    def text(self) -> str:
        return (self.check.__doc__ or "").strip().splitlines()[0]


RULES: list[Rule] = []


def rule(kind: str, name: str, needs: tuple[str, ...] = (), thorough: bool = False) -> Callable[..., Any]:
    """Register a function of a case as a rule; its docstring is what `kt-hf check-plugin --rules` shows."""

    def decorate(check: Callable[[Any], None]) -> Callable[[Any], None]:
        RULES.append(Rule(kind, name, check, needs, thorough))
        return check

    return decorate


def demand(condition: Any, note: str) -> None:
    if not condition:
        raise Broken(note)


def judge(kind: str, case: Any, thorough: bool) -> list[Finding]:
    """Try every rule of a kind; none keeps another from being tried, except those that it needs."""
    found: dict[str, Finding] = {}
    with quiet():
        for r in [r for r in RULES if r.kind in ("plugin", kind)]:
            if r.thorough and not thorough:
                found[r.name] = Finding(r.name, None, "only with --thorough")
                continue
            missing = [n for n in r.needs if (n in found and found[n].passed is False) or n not in found]
            if missing:
                found[r.name] = Finding(r.name, None, f"not judged, because {missing[0]} is broken")
                continue
            found[r.name] = _judge_one(r, case)
    return list(found.values())


def _judge_one(r: Rule, case: Any) -> Finding:
    try:
        r.check(case)
    except Broken as broken:
        return Finding(r.name, False, str(broken))
    except NotApplicable as reason:
        return Finding(r.name, None, str(reason))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        first_line = str(error).splitlines()[0][:300] if str(error) else ""
        return Finding(
            r.name, False, f"{type(error).__name__}: {first_line} ({last.filename.rpartition('/')[2]}:{last.lineno})"
        )
    return Finding(r.name, True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log of many short trainings, and on one thread: waiting for others costs more than tiny tensors."""
    import torch

    logger, threads = logging.getLogger("kt_hf"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)
