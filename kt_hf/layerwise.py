"""Settings of a merge that vary over a model, for every method and without any knowing of it.

Wherever a value stands in the settings, within lists too, there may stand instead

    {"depth": [0.2, 0.5, 0.8]}              numbers from the first block to the last, straight lines between them
    {"names": {"*mlp*": 0.3, "*": 0.5}}     that of the first pattern which fits the tensor's name

and a pattern's value may be a gradient. The plan then gives each tensor a method of its own, one for each set of plain
settings that occurs. Depth: kt_hf/blocks.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from kt_hf import settings
from kt_hf.blocks import depths
from kt_hf.errors import Collector, RecipeError
from kt_hf.merge import MergeMethod

DEPTH, NAMES = "depth", "names"


class _Uncovered(Exception):
    """No pattern fits a tensor."""


def varies(value: Any) -> bool:
    """Whether a setting is a gradient or patterns, or holds some."""
    if isinstance(value, list):
        return any(varies(inner) for inner in value)
    return isinstance(value, dict) and bool(value.keys() & {DEPTH, NAMES})


def gradient(values: Sequence[float], depth: float) -> float:
    """The piecewise linear function through values at equal distances, for a depth from 0 to 1."""
    last = len(values) - 1
    i = min(int(depth * last), max(last - 1, 0))
    part = depth * last - i
    if part == 0 or last == 0:
        return values[i]
    return values[i + 1] if part == 1 else values[i] + part * (values[i + 1] - values[i])


def at(value: Any, name: str, depth: float, fitted: set[tuple[str, str]], where: str = "") -> Any:
    """The plain value for one tensor. fitted: gets (place, pattern) of the patterns that fit."""
    if isinstance(value, list):
        return [at(inner, name, depth, fitted, f"{where}.{i}") for i, inner in enumerate(value)]
    if not varies(value):
        return value
    if DEPTH in value:
        return gradient(value[DEPTH], depth)
    for pattern, inner in value[NAMES].items():
        if fnmatchcase(name, pattern):
            fitted.add((where, pattern))
            return at(inner, name, depth, fitted, f"{where}.{pattern}")
    raise _Uncovered(where)


# --- what can be said before the names are known ----------------------------------------------------------------------


def validate(cls: type, given: Any, where: str, collect: Collector) -> dict[str, Any]:
    """`settings.validate` for settings that may vary: every value that can occur is checked."""
    if not isinstance(given, dict) or not any(varies(value) for value in given.values()):
        return settings.validate(cls, given, where, collect)
    before = len(collect.mistakes)
    for key, value in given.items():
        _check_form(value, f"{where}.{key}", collect)
    if len(collect.mistakes) > before:
        return {}
    plain = {key: _variants(value)[0][0] for key, value in given.items()}
    valid = settings.validate(cls, plain, where, collect)
    for key in [key for key, value in given.items() if varies(value)]:
        for variant, place in _variants(given[key])[1:]:
            if len(collect.mistakes) > before:
                break
            mine = Collector()
            settings.validate(cls, {**plain, key: variant}, where, mine)
            for mistake in mine.mistakes:
                collect.add(f"{mistake.cause} ({place})", mistake.remedy)
        valid[key] = given[key]
    return valid


def _check_form(value: Any, where: str, collect: Collector) -> None:
    if isinstance(value, list):
        for i, inner in enumerate(value):
            _check_form(inner, f"{where}.{i}", collect)
    elif varies(value) and len(value) > 1:
        collect.add(
            f"{where}: {' and '.join(map(str, value))} stand beside each other",
            'give one of {"depth": [...]} and {"names": {...}}; a gradient may be the value of a pattern',
        )
    elif varies(value) and DEPTH in value:
        values = value[DEPTH]
        numbers = isinstance(values, list) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or not values or any(isinstance(v, bool) for v in values):
            collect.add(
                f"{where}.depth: got {settings.shorten(values)}",
                "a list of numbers, from the first block to the last; what is no number can vary by names",
            )
    elif varies(value):
        patterns = value[NAMES]
        if not isinstance(patterns, dict) or not patterns or not all(isinstance(p, str) for p in patterns):
            collect.add(
                f"{where}.names: got {settings.shorten(patterns)}",
                'patterns of tensors\' names with their values, such as {"*mlp*": 0.3, "*": 0.5}',
            )
            return
        for pattern, inner in patterns.items():
            _check_form(inner, f"{where}.names.{pattern}", collect)


def _variants(value: Any) -> list[tuple[Any, str]]:
    """(plain value, where it occurs) of what a setting can be; of a gradient the corners and what is between them."""
    if isinstance(value, list):
        each = [_variants(inner) for inner in value]
        first = [variants[0][0] for variants in each]
        others = [([*first[:i], v, *first[i + 1 :]], p) for i, vs in enumerate(each) for v, p in vs[1:]]
        return [(first, ""), *others]
    if not varies(value):
        return [(value, "")]
    if DEPTH in value:
        return [(gradient(value[DEPTH], depth), f"at depth {depth:g}") for depth in _corners(value)]
    return [
        (v, " ".join(filter(None, [f"for '{pattern}'", place])))
        for pattern, inner in value[NAMES].items()
        for v, place in _variants(inner)
    ]


def _corners(value: Any) -> list[float]:
    """Depths where gradients bend, then those halfway between."""
    if isinstance(value, dict) and DEPTH in value:
        last = max(len(value[DEPTH]) - 1, 1)
        return [i / (2 * last) for i in (*range(0, 2 * last + 1, 2), *range(1, 2 * last, 2))]
    if isinstance(value, dict) and NAMES in value:
        return _corners(list(value[NAMES].values()))
    inside = [_corners(inner) for inner in value] if isinstance(value, list) else []
    return list(dict.fromkeys([0.0, 1.0, *(depth for places in inside for depth in places)]))


def _pattern_lists(value: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(value, list):
        for inner in value:
            yield from _pattern_lists(inner)
    elif varies(value) and NAMES in value:
        yield tuple(value[NAMES])
        yield from _pattern_lists(list(value[NAMES].values()))


# --- the method -------------------------------------------------------------------------------------------------------


def build(name: str, cls: type[MergeMethod], given: Mapping[str, Any]) -> MergeMethod:
    """A merge with settings that `validate` has passed; they may vary."""
    return Layerwise(name, cls, given) if any(varies(v) for v in given.values()) else cls(**given)


class Layerwise(MergeMethod):
    """A method whose settings vary: one instance for each set of plain settings."""

    def __init__(self, name: str, cls: type[MergeMethod], given: Mapping[str, Any]):
        self.name, self.cls, self.given = name, cls, dict(given)
        self.num_parents: int | None = None
        self._built: dict[str, MergeMethod] = {}
        for key in ("min_parents", "max_parents", "needs_base", "order_matters"):
            setattr(self, key, getattr(cls, key))
        if cls.needs_validation is True or _measures(cls):
            asks = "measures the parents" if _measures(cls) else "chooses on validation data"
            raise self._refusal(asks)
        for place in self._samples():
            self._build(*place)

    def _refusal(self, asks: str) -> RecipeError:
        key = next(key for key, value in self.given.items() if varies(value))
        return RecipeError(
            f"{self.name}.{key} varies over the model, and {self.name} {asks} once for all of it", "give one value"
        )

    def _samples(self) -> list[tuple[dict[str, Any], str]]:
        """Settings that are sure to occur together. Patterns are tried as names, which they fit; with several lists of
        patterns only the names tell what occurs."""
        lists = set(_pattern_lists(list(self.given.values())))
        names = [p for patterns in lists for p in patterns] if len(lists) == 1 else [] if lists else [""]
        found = []
        for name in names:
            for depth in _corners(list(self.given.values())):
                try:
                    plain = {key: at(value, name, depth, set()) for key, value in self.given.items()}
                except _Uncovered:
                    continue
                found.append((plain, f"for '{name}' at depth {depth:g}" if name else f"at depth {depth:g}"))
        return found

    def _build(self, plain: dict[str, Any], place: str) -> MergeMethod:
        key = json.dumps(plain, sort_keys=True, default=repr)
        if key not in self._built:
            collect = Collector()
            valid = settings.validate(self.cls, plain, self.name, collect)
            try:
                collect.raise_if_any()
                method = self.cls(**valid)
                if self.num_parents is not None:
                    method.check(self.num_parents)
            except RecipeError as error:
                raise RecipeError(f"{error.cause} ({place})", error.remedy) from None
            if method.needs_validation:
                raise self._refusal("chooses on validation data")
            self._built[key] = method
        return self._built[key]

    def check(self, num_parents: int) -> None:
        self.num_parents = num_parents
        for method in self._built.values():
            method.check(num_parents)

    def for_tensors(self, names: Sequence[str]) -> dict[str, MergeMethod]:
        collect, found, fitted = Collector(), {}, set[tuple[str, str]]()
        uncovered: dict[str, list[str]] = {}
        deep = depths(names)
        for name in names:
            try:
                plain = {k: at(value, name, deep[name], fitted, k) for k, value in self.given.items()}
            except _Uncovered as error:
                uncovered.setdefault(str(error), []).append(name)
                continue
            with collect():
                found[name] = self._build(plain, f"for {name}")
        for where, left in uncovered.items():
            many = f" and {len(left) - 1} more" if len(left) > 1 else ""
            default = settings.parameters(self.cls)[where.partition(".")[0]][1].default
            remedy = "add a last pattern '*'" + (f" ({self.name}'s default is {default})" if "." not in where else "")
            collect.add(f"{self.name}.{where}: no pattern fits {left[0]}{many}", remedy)
        for where, pattern in _patterns(self.given):
            if (where, pattern) not in fitted:
                collect.add(
                    f"{self.name}.{where}: the pattern '{pattern}' fits no tensor, or only such as fit one before it",
                    f"names are as in '{names[0]}'" if names else "the model has no tensors to merge",
                )
        collect.raise_if_any()
        return found


def _measures(cls: type) -> bool:
    """Whether a method asks each parent for something before the merge."""
    return getattr(cls, "measure", None) is not getattr(MergeMethod, "measure", None)


def _patterns(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(place, pattern) of all patterns, places as `at` names them."""

    def walk(value: Any, where: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, list):
            for i, inner in enumerate(value):
                yield from walk(inner, f"{where}.{i}")
        elif varies(value) and NAMES in value:
            for pattern, inner in value[NAMES].items():
                yield where, pattern
                yield from walk(inner, f"{where}.{pattern}")

    for key, value in given.items():
        yield from walk(value, key)
