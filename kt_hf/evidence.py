"""The evidence of a run: what was measured, against what, with which certainty, at what cost. Its schema is in
docs/report.md.

The runner fills `StageEvidence`s with plain arrays; `build` returns the report as a dict that JSON holds; `table`
shows it in a terminal.

Shapes: S seeds, N test examples, B bootstrap replicates, C classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kt_hf.errors import RecipeError
from kt_hf.functional import statistics

SCHEMA = "kt_hf.report/1"
MAX_CLASSES = 50
"""Confusion and figures per class are left out beyond: nobody reads them, and they grow with the square."""
FEW_EXAMPLES = 30
BUILT_IN = {
    "majority": "the majority class",
    "zero_shot": "its own model before training (zero-shot)",
    "best_parent": "its best parent on validation data",
    "parents_ensemble": "the mean of its parents' outputs",
}
SHORT = {"best_parent": "best parent", "parents_ensemble": "their ensemble"}
COSTS = (
    "seconds",
    "examples_per_second",
    "optimizer_steps",
    "skipped_steps",
    "peak_memory_bytes",
    "trained_parameters",
    "total_parameters",
    "size_on_disk_bytes",
)


@dataclass
class SeedEvidence:
    """What one seed of a stage, or a built-in baseline, left behind.

    index_N: ids of the test examples. metrics: scalars. examples: per metric that is a mean over examples (values_N,
    weights_N or None). statistics: per metric that is none, a function of example weights_N. references_N,
    predictions_N: class numbers, negative for unknown. curve: points {step, loss, learning_rate, terms}. evaluations:
    points {step, metric: value} on validation data. cost: the keys of `COSTS`, and `phases`.
    trials: {settings, learning_rate, metric, validation, seconds, chosen}. range_test: {learning_rate, rates, losses,
    smoothed, seconds} of a learning rate that was found by a test.
    """

    seed: int
    index_N: np.ndarray
    metrics: Mapping[str, float] = field(default_factory=dict)
    examples: Mapping[str, tuple[np.ndarray, np.ndarray | None]] = field(default_factory=dict)
    statistics: Mapping[str, Callable[[np.ndarray], float]] = field(default_factory=dict)
    references_N: np.ndarray | None = None
    predictions_N: np.ndarray | None = None
    curve: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    cost: Mapping[str, float | None] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    range_test: Mapping[str, Any] | None = None


@dataclass
class StageEvidence:
    """One stage with all its seeds.

    kind: train, merge, ensemble or evaluate. description: one line per strategy, or of the method. data: name, path,
    split, fingerprint, counts (rows per split and what cleaning found). metric: the one that decides. lower_metrics:
    others of which lower is better. compare: `@stage`, or one of `BUILT_IN`. baselines: the measurements behind those
    that are no stage, one for all seeds or one each, or in words why there are none. fixed: nothing in it is random, so
    that one row stands for every seed; by default an evaluate stage of an outside model. validation_uses: what
    validation labels were used for besides learning rates ("early stopping", "the greedy soup").
    """

    name: str
    kind: str
    task: str
    data: Mapping[str, Any]
    metric: str
    higher_is_better: bool
    seeds: Sequence[SeedEvidence]
    description: Sequence[str] = ()
    labels: Sequence[str] | None = None
    lower_metrics: Sequence[str] = ()
    compare: Sequence[str] = ()
    baselines: Mapping[str, SeedEvidence | Sequence[SeedEvidence] | str] = field(default_factory=dict)
    fixed: bool | None = None
    validation_uses: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def higher(self, metric: str) -> bool:
        return self.higher_is_better if metric == self.metric else metric not in self.lower_metrics

    def measured(self, reference: str) -> list[SeedEvidence]:
        """The measurements behind a baseline that is no stage; none where there are none."""
        found = self.baselines.get(reference, ())
        return [found] if isinstance(found, SeedEvidence) else [] if isinstance(found, str) else list(found)

    @property
    def is_fixed(self) -> bool:
        if self.fixed is not None:
            return self.fixed
        return self.kind == "evaluate" and not str(self.seeds[0].lineage.get("model", "")).startswith("@")


@dataclass
class Baseline:
    """A baseline as it is compared with: in words, its seeds, and whether one row of it stands for every seed."""

    reference: str
    words: str
    seeds: Sequence[SeedEvidence]
    fixed: bool
    labels: Sequence[str] | None


@dataclass
class Sampler:
    """How intervals are made; remembers the replicates, which several comparisons need."""

    level: float = 0.95
    replicates: int = 2000
    seed: int = 0
    known: dict[tuple[int, str], statistics.Replicates] = field(default_factory=dict)

    def __call__(self, seeds: Sequence[SeedEvidence], metric: str) -> statistics.Replicates:
        key = (id(seeds[0]), metric)
        if key not in self.known:
            if metric in seeds[0].examples:
                pairs = [s.examples[metric] for s in seeds]
                values_SN = np.stack([np.asarray(v, dtype=np.float64) for v, _ in pairs])
                weights_SN = np.stack(
                    [np.ones(values_SN.shape[1]) if w is None else np.asarray(w, dtype=np.float64) for _, w in pairs]
                )
                self.known[key] = statistics.ratios(values_SN, weights_SN, self.replicates, self.seed)
            else:
                self.known[key] = statistics.resample(
                    [s.statistics[metric] for s in seeds], len(seeds[0].index_N), min(self.replicates, 1000), self.seed
                )
        return self.known[key]

    def bounds(self, found: statistics.Replicates) -> tuple[float, float, float]:
        return statistics.bounds(found, self.level, self.seed)


def build(
    name: str,
    stages: Sequence[StageEvidence],
    *,
    seconds: float | None = None,
    created: str | None = None,
    versions: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The report of a run. Raises `RecipeError` where a baseline does not share task, data, seeds or evaluation rows
    with its stage."""
    sampler = Sampler(level, replicates, seed)
    by_name = {stage.name: stage for stage in stages}
    found: dict[str, list[str]] = {}
    entries = [_stage(stage, by_name, sampler, found) for stage in stages]
    report = {
        "schema": SCHEMA,
        "name": name,
        "created": created,
        "seconds": seconds,
        "interval": {
            "level": level,
            "replicates": replicates,
            "seed": seed,
            "method": "two-level bootstrap: seeds, then examples",
        },
        "versions": dict(versions or {}),
        "notes": [
            *notes,
            *(f"{what}: {_listed(names)}." for what, names in found.items()),
            *_notes(stages, entries, level),
        ],
        "stages": entries,
    }
    return plain(report)


def plain(value: Any) -> Any:
    """As JSON holds it: numpy values as Python's, what is not finite as null, anything else as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


# --- one stage ------------------------------------------------------------------------------------------------


def _stage(
    stage: StageEvidence, by_name: Mapping[str, StageEvidence], sampler: Sampler, notes: dict[str, list[str]]
) -> dict[str, Any]:
    _check_seeds(stage)
    metrics = {metric: _metric(stage, metric, sampler, notes) for metric in _metrics(stage)}
    gains = []
    for reference in stage.compare:
        baseline = _baseline(stage, reference, by_name, notes)
        if baseline is not None:
            gains += _gains(stage, baseline, metrics, sampler)
    entry: dict[str, Any] = {
        "name": stage.name,
        "kind": stage.kind,
        "description": list(stage.description),
        "task": stage.task,
        "data": dict(stage.data),
        "metric": stage.metric,
        "higher_is_better": stage.higher_is_better,
        "seeds": [s.seed for s in stage.seeds],
        "examples": len(stage.seeds[0].index_N),
        "rows": hashlib.sha256(np.asarray(stage.seeds[0].index_N, dtype=np.int64).tobytes()).hexdigest()[:16],
        "metrics": metrics,
        "gains": gains,
        "confusion": _confusion(stage.seeds, stage.labels),
        "per_class": _per_class(stage.seeds, stage.labels, sampler),
        "cost": _cost(stage.seeds),
        "lineage": dict(stage.seeds[0].lineage),
        "settings": dict(stage.settings),
        "summary": dict(stage.seeds[0].summary),
        "trials": [list(s.trials) for s in stage.seeds],
        "range_test": stage.seeds[0].range_test,
        "curves": [{"seed": s.seed, "training": list(s.curve), "evaluation": list(s.evaluations)} for s in stage.seeds],
    }
    entry["baselines"] = {
        reference: _baseline_classes(stage, reference, sampler)
        for reference in stage.compare
        if stage.measured(reference)
    }
    entry["sentence"] = _stage_sentence(entry, sampler.level)
    return entry


def _check_seeds(stage: StageEvidence) -> None:
    first = stage.seeds[0]
    for other in stage.seeds[1:]:
        if not np.array_equal(first.index_N, other.index_N):
            raise RecipeError(
                f"stage '{stage.name}': seeds {first.seed} and {other.seed} were measured on different rows",
                "run the stage again",
            )


def _metrics(stage: StageEvidence) -> list[str]:
    """Names of all metrics, the one that decides first."""
    names = [stage.metric, *stage.seeds[0].metrics, *stage.seeds[0].examples, *stage.seeds[0].statistics]
    return list(dict.fromkeys(names))


def _metric(stage: StageEvidence, metric: str, sampler: Sampler, notes: dict[str, list[str]]) -> dict[str, Any]:
    """Value and interval over seeds and examples; a metric of which only scalars are known has their mean and no
    interval."""
    scalars = [float(s.metrics[metric]) for s in stage.seeds if metric in s.metrics]
    value, low, high, per_seed = float(np.mean(scalars)) if scalars else math.nan, None, None, scalars
    if metric in stage.seeds[0].examples or metric in stage.seeds[0].statistics:
        try:
            found = sampler(stage.seeds, metric)
            value, low, high = sampler.bounds(found)
            per_seed = found.point_S.tolist()
        except ValueError as error:
            notes.setdefault(f"No interval of {metric}, because {error}", []).append(stage.name)
    higher = stage.higher(metric)
    unit = "share" if higher and all(-1 <= v <= 1 for v in per_seed) else ""
    return {
        "value": value,
        "low": low,
        "high": high,
        "seeds": len(stage.seeds),
        "per_seed": per_seed,
        "unit": unit,
        "higher_is_better": higher,
    }


def _cost(seeds: Sequence[SeedEvidence]) -> dict[str, Any]:
    """Means over seeds, the values behind them, and the seconds of the trials made in vain."""
    per_seed = {key: [s.cost.get(key) for s in seeds] for key in COSTS}
    means = {
        key: float(np.mean([v for v in values if v is not None])) if any(v is not None for v in values) else None
        for key, values in per_seed.items()
    }
    # Other seeds take over seed 0's choice, and the chosen trial is the run itself.
    vain = float(sum(t.get("seconds") or 0.0 for t in seeds[0].trials if not t.get("chosen")))
    vain += float((seeds[0].range_test or {}).get("seconds", 0.0))
    shares: list[Mapping[str, float]] = [s.cost.get("phases") or {} for s in seeds]  # type: ignore[misc]
    phases = {name: float(np.mean([share.get(name, 0.0) for share in shares])) for name in shares[0]}
    return {**means, "trials_seconds": vain, "phases": phases, "per_seed": per_seed}


# --- classes --------------------------------------------------------------------------------------------------


def _classified(seeds: Sequence[SeedEvidence], labels: Sequence[str] | None) -> bool:
    return (
        labels is not None
        and 1 < len(labels) <= MAX_CLASSES
        and all(s.references_N is not None and s.predictions_N is not None for s in seeds)
    )


def _confusion(seeds: Sequence[SeedEvidence], labels: Sequence[str] | None) -> dict[str, Any] | None:
    """counts[reference][prediction], summed over seeds."""
    if labels is None or not _classified(seeds, labels):
        return None
    counts_CC = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for s in seeds:
        assert s.references_N is not None and s.predictions_N is not None
        known = (s.references_N >= 0) & (s.predictions_N >= 0)
        np.add.at(counts_CC, (s.references_N[known], s.predictions_N[known]), 1)
    return {"labels": list(labels), "counts": counts_CC.tolist()}


def _class_replicates(
    seeds: Sequence[SeedEvidence], truth_N: np.ndarray, num_classes: int, sampler: Sampler
) -> list[statistics.Replicates | None]:
    """Replicates of the share of right answers on each class, made in one pass; none where a class does not occur."""
    hits_SN = np.stack([np.asarray(s.references_N == s.predictions_N, dtype=np.float64) for s in seeds])
    present = [c for c in range(num_classes) if (truth_N == c).any()]
    masks_RN = np.repeat(np.stack([truth_N == c for c in present]).astype(np.float64), len(seeds), axis=0)
    every = statistics.ratios(
        np.tile(hits_SN, (len(present), 1)), masks_RN, min(sampler.replicates, 1000), sampler.seed
    )
    found: list[statistics.Replicates | None] = [None] * num_classes
    for i, c in enumerate(present):
        own = slice(i * len(seeds), (i + 1) * len(seeds))
        found[c] = statistics.Replicates(every.point_S[own], every.draws_BS[:, own], every.num_examples, (0.0, 1.0))
    return found


def _per_class(
    seeds: Sequence[SeedEvidence],
    labels: Sequence[str] | None,
    sampler: Sampler,
    against: Sequence[SeedEvidence] | None = None,
) -> list[dict[str, Any]] | None:
    """Share of right answers on each class, or its paired difference from another's."""
    if labels is None or not _classified(seeds, labels) or (against is not None and not _classified(against, labels)):
        return None
    truth_N = np.asarray(seeds[0].references_N)
    if not (truth_N >= 0).any():
        return None
    own = _class_replicates(seeds, truth_N, len(labels), sampler)
    other = _class_replicates(against, truth_N, len(labels), sampler) if against is not None else own
    rows = []
    for label, c, a, b in zip(labels, range(len(labels)), own, other, strict=True):
        value, low, high = (
            (None, None, None) if a is None or b is None else sampler.bounds(a if against is None else a - b)
        )
        rows.append({"label": label, "examples": int((truth_N == c).sum()), "value": value, "low": low, "high": high})
    return rows


def _baseline_classes(stage: StageEvidence, reference: str, sampler: Sampler) -> dict[str, Any]:
    """Of a built-in baseline, which is no stage of its own: its metrics, confusion and accuracy per class."""
    seeds = stage.measured(reference)
    names = seeds[0].metrics
    return {
        "metrics": {name: float(np.mean([seed.metrics[name] for seed in seeds])) for name in names},
        "confusion": _confusion(seeds, stage.labels),
        "per_class": _per_class(seeds, stage.labels, sampler),
    }


# --- gains ----------------------------------------------------------------------------------------------------


def _baseline(
    stage: StageEvidence, reference: str, by_name: Mapping[str, StageEvidence], notes: dict[str, list[str]]
) -> Baseline | None:
    if not reference.startswith("@"):
        given = stage.baselines.get(reference, "it was not measured")
        if isinstance(given, str):
            notes.setdefault(f"No comparison with {reference}, because {given}", []).append(stage.name)
            return None
        seeds, fixed = stage.measured(reference), isinstance(given, SeedEvidence)
        _check_rows(stage, reference, seeds[0])
        return Baseline(reference, BUILT_IN.get(reference, reference), seeds, fixed, stage.labels)
    if reference[1:] not in by_name:
        raise RecipeError(
            f"stages.{stage.name}.compare: there is no stage '{reference[1:]}'", f"name one of {', '.join(by_name)}"
        )
    other = by_name[reference[1:]]
    _check_alike(stage, other)
    return Baseline(reference, other.name, other.seeds, other.is_fixed, other.labels)


def _refuse(stage: StageEvidence, other: str, what: str) -> RecipeError:
    return RecipeError(
        f"stages.{stage.name}.compare: '{stage.name}' and '{other}' differ in {what}",
        "compare stages that share task, data, seeds and evaluation rows",
    )


def _check_alike(stage: StageEvidence, other: StageEvidence) -> None:
    """A paired difference needs the same question, asked of the same examples."""
    if stage.task != other.task:
        raise _refuse(stage, other.name, f"task: {stage.task} and {other.task}")
    for key in ("name", "split", "fingerprint"):
        if stage.data.get(key) != other.data.get(key):
            raise _refuse(stage, other.name, f"data ({key}): {stage.data.get(key)} and {other.data.get(key)}")
    if stage.metric != other.metric:
        raise _refuse(stage, other.name, f"metric: {stage.metric} and {other.metric}")
    _check_rows(stage, other.name, other.seeds[0])
    mine, theirs = [s.seed for s in stage.seeds], [s.seed for s in other.seeds]
    if mine != theirs and 1 not in (len(mine), len(theirs)):
        raise _refuse(stage, other.name, f"seeds: {mine} and {theirs}")
    if stage.labels is not None and other.labels is not None and set(stage.labels) != set(other.labels):
        raise _refuse(
            stage,
            other.name,
            f"labels: {', '.join(sorted(set(stage.labels) ^ set(other.labels))[:5])} belong to only one of them",
        )


def _check_rows(stage: StageEvidence, other: str, seed: SeedEvidence) -> None:
    mine_N, theirs_N = np.asarray(stage.seeds[0].index_N), np.asarray(seed.index_N)
    if not np.array_equal(mine_N, theirs_N):
        only = len(np.setxor1d(mine_N, theirs_N))
        how = f"{only} rows belong to only one of them" if only else "their order"
        raise _refuse(stage, other, f"evaluation rows: {len(mine_N)} and {len(theirs_N)}; {how}")


def _gains(
    stage: StageEvidence, baseline: Baseline, metrics: Mapping[str, Any], sampler: Sampler
) -> list[dict[str, Any]]:
    """One entry per metric that both have with an interval."""
    counts = len(stage.seeds), len(baseline.seeds)
    # One seed of a trained baseline says nothing of its other seeds, however many the stage has.
    num_seeds = counts[0] if baseline.fixed else min(counts)
    found = []
    for metric, facts in metrics.items():
        first = baseline.seeds[0]
        if facts["low"] is None or not (metric in first.examples or metric in first.statistics):
            continue
        try:
            value, low, high = sampler.bounds(sampler(stage.seeds, metric) - sampler(baseline.seeds, metric))
        except ValueError:
            continue
        entry = {
            "baseline": baseline.reference,
            "metric": metric,
            "value": value,
            "low": low,
            "high": high,
            "unit": facts["unit"],
            "higher_is_better": facts["higher_is_better"],
            "verdict": statistics.verdict(low, high, num_seeds, facts["higher_is_better"]),
            "seeds": num_seeds,
            "examples": len(first.index_N),
        }
        entry["sentence"] = gain_sentence(stage.name, baseline.words, entry, sampler.level)
        if metric == stage.metric:
            same_order = list(baseline.labels or []) == list(stage.labels or [])
            entry["per_class"] = _per_class(stage.seeds, stage.labels, sampler, baseline.seeds) if same_order else None
        found.append(entry)
    return found


# --- sentences ------------------------------------------------------------------------------------------------


def amount(value: float | None, unit: str, signed: bool = False) -> str:
    """A figure as people read it: shares in percent with one digit after the point, others with three significant
    digits."""
    if value is None:
        return "not finite"
    if unit == "share":
        text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    else:
        digits = 0 if value == 0 else max(0, min(6, 2 - math.floor(math.log10(abs(value)))))
        text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if signed and value and float(text) == 0:  # on which side of 0 it lies decides what may be claimed
        return f"{(100 if unit == 'share' else 1) * value:+.1g}"
    return text.replace("-0.0", "0.0") if float(text) == 0 else text


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def gain_sentence(name: str, against: str, gain: Mapping[str, Any], level: float) -> str:
    """A gain in plain English; amounts are positive where something won or lost, signed where nothing can be
    claimed."""
    metric, unit, value, low, high = (gain[k] for k in ("metric", "unit", "value", "low", "high"))
    facts = f"{plural(gain['seeds'], 'seed')}, {plural(gain['examples'], 'test example')}"
    of = f"points of {metric}" if unit == "share" else f"in {metric}"
    if value == low == high == 0:
        return f"{name} and {against} are equal in {metric} ({facts}): {gain['verdict']}."
    settled = gain["verdict"] in ("helped", "hurt")
    if settled and value < 0:
        low, high = -high, -low
    span = percent(level) + f" interval {amount(low, unit, not settled)} to {amount(high, unit, not settled)}, {facts}"
    size = amount(abs(value), unit)
    if not gain["higher_is_better"]:
        verb = ("lowers" if value < 0 else "raises") if settled else ("is lower" if value < 0 else "is higher")
        if settled:
            return f"{name} {verb} {metric} by {size} against {against} ({span}): {gain['verdict']}."
        return f"{metric} of {name} {verb} by {size} than that of {against} ({span}): {gain['verdict']}."
    if settled:
        return f"{name} {'beats' if value > 0 else 'trails'} {against} by {size} {of} ({span}): {gain['verdict']}."
    return f"{name} is {size} {of} {'above' if value >= 0 else 'below'} {against} ({span}): {gain['verdict']}."


def _stage_sentence(entry: Mapping[str, Any], level: float) -> str:
    found = entry["metrics"][entry["metric"]]
    sign = " %" if found["unit"] == "share" else ""
    text = f"{entry['name']} reaches {amount(found['value'], found['unit'])}{sign} {entry['metric']}"
    if found["low"] is not None:
        span = f"{amount(found['low'], found['unit'])} to {amount(found['high'], found['unit'])}"
        count = f"{plural(found['seeds'], 'seed')}, {plural(entry['examples'], 'test example')}"
        text += f" ({percent(level)} interval {span}, {count})"
    own = [g["sentence"] for g in entry["gains"] if g["metric"] == entry["metric"]]
    return " ".join([f"{text}.", *own]) if own else f"{text}. It was compared with nothing."


# --- notes ----------------------------------------------------------------------------------------------------


def _notes(stages: Sequence[StageEvidence], entries: Sequence[Mapping[str, Any]], level: float) -> list[str]:
    """What a reader must know to judge the figures."""
    notes = []
    tuned = [s for s in stages if s.seeds[0].trials]
    if tuned:
        by_what: dict[str, list[str]] = {}
        for s in tuned:
            by_what.setdefault(_chosen(s), []).append(s.name)
        told = _listed([f"the {w}{'s' * (w == 'setting')} of {_listed(names)}" for w, names in by_what.items()])
        notes.append(f"Validation labels were used to choose {told}; test labels only to measure.")
    for use in dict.fromkeys(use for s in stages for use in s.validation_uses):
        notes.append(
            f"Validation labels were used for {use} of {_listed([s.name for s in stages if use in s.validation_uses])}."
        )
    notes += _unequal_choices(stages)
    if any(s.kind in ("merge", "ensemble") for s in stages):
        notes.append(
            "Seconds are those of the stage itself: what it builds on (source, teacher, parents) is not in them."
        )
    single = [s.name for s in stages if len(s.seeds) == 1 and not s.is_fixed]
    if single:
        notes.append(
            f"One seed only: {_listed(single)}. Intervals then cover the test examples, not training again, "
            "and no claim is made."
        )
    few = [f"{e['name']} ({e['examples']})" for e in entries if e["examples"] < FEW_EXAMPLES]
    if few:
        notes.append(f"Few test examples: {_listed(few)}. Intervals are too narrow there.")
    many = [s.name for s in stages if s.labels is not None and len(s.labels) > MAX_CLASSES]
    if many:
        notes.append(f"More than {MAX_CLASSES} classes: no confusion and no figures per class for {_listed(many)}.")
    claims = sum(g["metric"] == e["metric"] for e in entries for g in e["gains"])
    if claims >= 5:
        notes.append(
            f"{claims} comparisons were made, each at {percent(level)}; "
            f"chance alone would make about {claims * (1 - level):.1f} of them look like a difference."
        )
    return notes


def _unequal_choices(stages: Sequence[StageEvidence]) -> list[str]:
    """A baseline is fair only if it had the same choice of settings."""
    by_name = {s.name: s for s in stages}
    notes = []
    for stage in stages:
        for other in (by_name[r[1:]] for r in stage.compare if r.startswith("@") and r[1:] in by_name):
            mine, theirs = (
                {json.dumps(t["settings"], sort_keys=True) for t in s.seeds[0].trials} for s in (stage, other)
            )
            if stage.kind == other.kind == "train" and mine != theirs:
                told = [
                    f"{s.name} had {plural(max(1, len(r)), _chosen(s))} to choose from"
                    for s, r in ((stage, mine), (other, theirs))
                ]
                fair = "not the same; their comparison is fair in their number alone"
                notes.append(
                    f"Unequal tuning: {told[0]}, {told[1]}"
                    + (f", {fair}." if len(mine) == len(theirs) else "; their comparison is not fair.")
                )
    return notes


def _chosen(stage: StageEvidence) -> str:
    """What the trials of a stage are about: `learning rate`, or `setting` where they are about more."""
    paths = {path for trial in stage.seeds[0].trials for path in trial["settings"]}
    return "learning rate" if paths <= {"training.learning_rate"} else "setting"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- the terminal ---------------------------------------------------------------------------------------------


def short(count: float | None) -> str:
    """1234567 as 1.23M."""
    if count is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def table(report: Mapping[str, Any]) -> str:
    """The stages as a table of at most 120 columns; one line more for every further baseline."""
    rows = [
        ("stage", "seeds", "metric", "value (interval)", "against", "gain (interval)", "verdict", "trained", "seconds")
    ]
    for stage in report["stages"]:
        found = stage["metrics"][stage["metric"]]
        shown = amount(found["value"], found["unit"])
        if found["low"] is not None:
            shown += f" ({amount(found['low'], found['unit'])} to {amount(found['high'], found['unit'])})"
        gains = [g for g in stage["gains"] if g["metric"] == stage["metric"]] or [None]
        seconds = stage["cost"]["seconds"]
        for i, g in enumerate(gains):
            left = (
                (cut(stage["name"], 18), str(len(stage["seeds"])), cut(stage["metric"], 12), shown)
                if i == 0
                else ("", "", "", "")
            )
            middle = ("-", "", "")
            if g is not None:
                value, low, high = (amount(g[key], g["unit"], signed=True) for key in ("value", "low", "high"))
                span = f"{value} ({low} to {high})"
                against = cut(SHORT.get(g["baseline"], g["baseline"]), 14)
                middle = (against, span, "no claim" if g["seeds"] == 1 else g["verdict"])
            right = (
                (short(stage["cost"]["trained_parameters"]), "-" if seconds is None else f"{seconds:.1f}")
                if i == 0
                else ("", "")
            )
            rows.append((*left, *middle, *right))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i in (1, 7, 8) else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * min(120, max(len(line) for line in lines))
    level = percent(report["interval"]["level"])
    foot = f"shares in percent; {level} intervals over seeds and test examples; seconds per seed"
    return "\n".join([lines[0], rule, *lines[1:], rule, foot])
