"""What a user is told when something is wrong: one line of cause, one of remedy, and an exit code.

The codes hold for the process that runs a recipe. `main` also writes them to `<output>/error.json`, because a launcher
may turn every failure into 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from contextlib import contextmanager


class KtError(ValueError):
    """A mistake or fault that the user can act on. `cause` says what was received, `remedy` what to do instead."""

    exit_code = 1

    def __init__(self, cause: str, remedy: str = ""):
        self.cause, self.remedy = cause, remedy
        super().__init__(f"{cause}\n{remedy}" if remedy else cause)


class RecipeError(KtError):
    """Recipe, settings, refused plan, refused resume, foreign output folder, lock held."""

    exit_code = 2


class NotMeaningful(RecipeError):
    """What was asked for has no meaning for a task, whatever its data and model; docs/grid.md says for which."""


class DataError(KtError):
    """The data cannot be used as they are."""

    exit_code = 3


LEAVE_OUT = "or leave out all that cannot be used: data.drop=[unreadable]"


class RowError(DataError):
    """What is wrong with one of the rows that `Task.preprocess` was given; its place among them, from 0. The loader
    says which row of the data that is."""

    def __init__(self, place: int, cause: str, remedy: str = ""):
        self.place = place
        super().__init__(cause, remedy)


class IntegrityError(KtError):
    """A file is not what it says it is, or would be unsafe to load."""

    exit_code = 4


class HubError(KtError):
    """The Hub or the network refused or failed."""

    exit_code = 5


class ResourceError(KtError):
    """Memory, disk, an unwritable folder, a killed data worker."""

    exit_code = 6


class NonFiniteError(KtError):
    """Training was stopped on non-finite numbers."""

    exit_code = 7


class Mistakes(RecipeError):
    """Several mistakes of one recipe, reported together."""

    def __init__(self, mistakes: Sequence[KtError]):
        self.mistakes = list(mistakes)
        lines = [f"{m.cause}" + (f"\n    {m.remedy}" if m.remedy else "") for m in mistakes]
        many = f"{len(lines)} mistakes in the recipe:\n  - " + "\n  - ".join(lines) if len(lines) > 1 else lines[0]
        super().__init__(many)


class Collector:
    """Gathers mistakes so that all are reported at once.

    >>> collect = Collector()
    >>> with collect():
    ...     raise RecipeError("first")
    >>> len(collect.mistakes)
    1
    """

    def __init__(self) -> None:
        self.mistakes: list[KtError] = []

    @contextmanager
    def __call__(self):
        try:
            yield
        except Mistakes as several:
            self.mistakes += several.mistakes
        except RecipeError as error:
            self.mistakes.append(error)

    def add(self, cause: str, remedy: str = "") -> None:
        self.mistakes.append(RecipeError(cause, remedy))

    def raise_if_any(self) -> None:
        if self.mistakes:  # stages that share data share its mistakes: say each once
            raise Mistakes(list({(m.cause, m.remedy): m for m in self.mistakes}.values()))


def nearest(word: str, valid: Iterable[str]) -> str:
    """A remedy that names the nearest valid word and lists the others (the nearest of them where there are many)."""
    words = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    shown = words
    if len(words) > 60:
        shown = [*difflib.get_close_matches(str(word), words, n=12, cutoff=0.0), f"... ({len(words)} in all)"]
    return f"{hint}valid: {', '.join(shown) if shown else '(none)'}"
