"""The report for people: one self-contained page, the same of several runs side by side, and what a terminal shows.

A page needs no script, no font and nothing from a network. Whatever comes from the data is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kt_hf import plots
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.evidence import SCHEMA, amount, cut, percent, plural, short, table

Report = Mapping[str, Any]
Stage = Mapping[str, Any]
STYLES = {"helped": "helped", "hurt": "hurt"}
"""Style of a verdict; any other is neutral."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page's own promise that it loads nothing and runs nothing."""

COST_AXIS = "seconds per seed, plus the settings tried in vain (logarithmic)"
EXPLAINED = (
    '<p class="soft">Paired difference on each test example; the whisker is its interval over seeds and examples. '
    "Helped or hurt is said when it excludes 0 and there are at least 3 seeds.</p>"
)


# --- reading and writing --------------------------------------------------------------------------------------


def load(folder: str | Path) -> dict[str, Any]:
    """The report of a run's folder, or of a file. `RecipeError` without one, `IntegrityError` for another schema."""
    path = Path(folder)
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise RecipeError(f"{folder}: no report.json there", "name the output folder of a finished run")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON: {error}", "run the recipe again to write it anew") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise IntegrityError(f"{path} has the schema {schema!r}, this version reads '{SCHEMA}'", "run the recipe again")
    return report


def write_html(report: Report, path: str | Path) -> None:
    """Write the page of one run."""
    Path(path).write_text(html(report), encoding="utf-8")


def compare_html(reports: Sequence[Report], path: str | Path, folders: Sequence[str | Path] = ()) -> None:
    """Write a page that puts several runs side by side, stage by stage. `folders` tell runs of one name apart."""
    names = _distinct(reports, folders)
    parts = [
        f"<h1>{escape(plural(len(reports), 'run'))} compared</h1>",
        f'<p class="soft">{escape(", ".join(names))}</p>',
    ]
    parts.append(
        _notes_block(
            ["Runs are put side by side, not tested against each other: a claim needs both stages in one recipe."]
        )
    )
    for key, rows in _across(reports, names).items():
        parts += [f"<h2>{escape(_group_title(key))}</h2>", _across_plot(key, rows), _across_table(rows, names)]
    for name, report in zip(names, reports, strict=True):
        parts += [f"<h2>{escape(name)}</h2>", _notes_block(report["notes"])]
        for members in _groups(report).values():
            parts += [_stages_table(members)]
    Path(path).write_text(_page("Comparison of runs", parts), encoding="utf-8")


def show(folders: Sequence[str | Path]) -> str:
    """What `kt-hf report OUT...` prints: the table and notes of one run, or several runs stage by stage."""
    reports = [load(folder) for folder in folders]
    if len(reports) == 1:
        return "\n".join(
            [str(reports[0]["name"]), "", table(reports[0]), *([""] + [f"- {n}" for n in reports[0]["notes"]])]
        )
    names = _distinct(reports, folders)
    lines: list[str] = []
    for key, rows in _across(reports, names).items():
        lines += ([""] if lines else []) + [_group_title(key), *_across_text(rows, names)]
    return "\n".join([*lines, "", "Runs are put side by side, not tested against each other."])


def html(report: Report) -> str:
    """The page of one run."""
    groups = _groups(report)
    parts = [*_header(report), _notes_block(report["notes"])]
    for key, members in groups.items():
        if len(groups) > 1:
            parts.append(f"<h2>{escape(_group_title(key))}</h2>")
        parts += [_findings(members), _stages_table(members), *_group_plots(members)]
    parts += ["<h2>Stages in detail</h2>", *(_details(stage) for stage in report["stages"]), *_foot(report)]
    return _page(str(report["name"]), parts)


def _page(title: str, parts: Sequence[str]) -> str:
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(p for p in parts if p)
        + "\n</body></html>\n"
    )


# --- arranging ------------------------------------------------------------------------------------------------


def _key(stage: Stage) -> tuple[str, str, str, str]:
    data = stage["data"]
    return stage["task"], str(data.get("name", "")), str(data.get("fingerprint", "")), stage["metric"]


def _group_title(key: tuple[str, str, str, str]) -> str:
    return f"{key[0]} on {key[1]}: {key[3]}"


def _groups(report: Report) -> dict[tuple[str, str, str, str], list[Stage]]:
    """Stages that answer the same question, best first."""
    found: dict[tuple[str, str, str, str], list[Stage]] = {}
    for stage in report["stages"]:
        found.setdefault(_key(stage), []).append(stage)
    return {key: sorted(members, key=_rank) for key, members in found.items()}


def _rank(stage: Stage) -> float:
    value = _main(stage)["value"]
    return float("inf") if value is None else -value if stage["higher_is_better"] else value


def _main(stage: Stage) -> Mapping[str, Any]:
    return stage["metrics"][stage["metric"]]


def _own_gains(stage: Stage) -> list[Mapping[str, Any]]:
    return [g for g in stage["gains"] if g["metric"] == stage["metric"]]


def _scale(unit: str) -> float:
    return 100.0 if unit == "share" else 1.0


def _axis(metric: str, unit: str, higher: bool) -> str:
    return metric + (" (%)" if unit == "share" else "") + ("" if higher else ", lower is better")


def _shown(found: Mapping[str, Any], signed: bool = False) -> str:
    """A figure with its interval."""
    value, low, high = (
        None if found[k] is None else amount(found[k], found["unit"], signed) for k in ("value", "low", "high")
    )
    if value is None:
        return "not finite"
    return value if low is None else f"{value} ({low} to {high})"


def _style(verdict: str) -> str:
    return STYLES.get(verdict, "nothing")


def _baseline_name(reference: str) -> str:
    names = {"zero_shot": "zero-shot", "best_parent": "best parent", "parents_ensemble": "parents' ensemble"}
    return names.get(reference, reference.removeprefix("@"))


# --- the page of one run --------------------------------------------------------------------------------------


def _header(report: Report) -> list[str]:
    runs = sum(len(s["seeds"]) for s in report["stages"])
    facts = [plural(len(report["stages"]), "stage"), f"{plural(runs, 'run')} of them with all seeds"]
    if report["seconds"] is not None:
        facts.append(_duration(report["seconds"]))
    if report["created"]:
        facts.append(str(report["created"]))
    return [f"<h1>{escape(str(report['name']))}</h1>", f'<p class="soft">{escape(" · ".join(facts))}</p>']


def _notes_block(notes: Sequence[str]) -> str:
    return f'<div class="note"><ul>{"".join(f"<li>{escape(str(n))}</li>" for n in notes)}</ul></div>' if notes else ""


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(count: float | None) -> str:
    if count is None:
        return "-"
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= size:
            return f"{count / size:.1f} {unit}" if unit == "GiB" else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def _findings(members: Sequence[Stage]) -> str:
    """The best stage in words, and what all comparisons came to."""
    verdicts = [g["verdict"] for s in members for g in _own_gains(s)]
    told = "; ".join(
        f"{verdicts.count(v)} {v}" for v in ("helped", "hurt", "no evidence", "one seed: no claim") if v in verdicts
    )
    total = f'<p class="soft">{escape(plural(len(verdicts), "comparison"))}: {escape(told)}.</p>' if verdicts else ""
    return f'<p class="lead">{"Best: " if len(members) > 1 else ""}{escape(members[0]["sentence"])}</p>{total}'


def _stages_table(members: Sequence[Stage]) -> str:
    metric, found = members[0]["metric"], _main(members[0])
    heads = [
        "stage",
        "seeds",
        _axis(metric, found["unit"], members[0]["higher_is_better"]),
        "gain",
        "trained",
        "in total",
        "time per seed",
        "peak memory",
    ]
    cells = "".join(f"<th{' class=n' if i in (1, 4, 5, 6, 7) else ''}>{escape(h)}</th>" for i, h in enumerate(heads))
    return _stage_rows(cells, "".join(_row(s) for s in members))


def _stage_rows(head: str, body: str) -> str:
    table = f'<table class="stages"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _row(stage: Stage) -> str:
    gains = "".join(
        f'<span class="against">{escape(_shown(g, True))} over {escape(_baseline_name(g["baseline"]))}: '
        f'<span class="mark {_style(g["verdict"])}">{escape(g["verdict"])}</span></span>'
        for g in _own_gains(stage)
    )
    gains = gains or "<span class=soft>compared with nothing</span>"
    cost = stage["cost"]
    numbers = [
        short(cost["trained_parameters"]),
        short(cost["total_parameters"]),
        _duration(cost["seconds"]),
        _bytes(cost["peak_memory_bytes"]),
    ]
    return (
        f'<tr><td class="name"><b>{escape(stage["name"])}</b> <span class="soft">{escape(stage["kind"])}</span></td>'
        f'<td class="n">{len(stage["seeds"])}</td><td class="w">{escape(_shown(_main(stage)))}</td><td>{gains}</td>'
        + "".join(f'<td class="n">{escape(n)}</td>' for n in numbers)
        + "</tr>"
    )


def _group_plots(members: Sequence[Stage]) -> list[str]:
    best = members[0]
    unit, metric = _main(best)["unit"], best["metric"]
    axis = _axis(metric, unit, best["higher_is_better"])
    parts = []
    groups = _gain_groups(members)
    if groups:
        parts += ["<h3>Gain over each baseline</h3>", EXPLAINED]
    for reference, bars in groups:
        parts += [f"<h4>over {escape(reference)}</h4>", _wide(plots.gains(bars, _gain_axis(best)))]
    points = _points(members)  # one alone has nothing to be compared with
    if len(points) > 1 and (drawn := plots.scatter(points, COST_AXIS, axis)):
        parts += ["<h3>Quality against cost</h3>", _wide(drawn)]
    return parts + _curve_plots(members, axis) + _class_plots(members)


def _wide(drawn: str) -> str:
    return f'<div class="wide">{drawn}</div>'


def _gain_axis(stage: Stage) -> str:
    lower = "" if stage["higher_is_better"] else "; below 0 is better"
    return f"gain in {stage['metric']}" + (" (points)" if _main(stage)["unit"] == "share" else "") + lower


def _gain_groups(members: Sequence[Stage]) -> list[tuple[str, list[plots.Bar]]]:
    found: dict[str, list[plots.Bar]] = {}
    for stage in members:
        for g in _own_gains(stage):
            by = _scale(g["unit"])
            words = f"{amount(g['value'], g['unit'], True)}  {g['verdict']}"
            found.setdefault(g["baseline"], []).append(
                plots.Bar(
                    stage["name"],
                    by * g["value"],
                    by * g["low"],
                    by * g["high"],
                    words,
                    _style(g["verdict"]),
                    g["sentence"],
                )
            )
    # Stages before majority and zero-shot: they are the harder question.
    ordered = sorted(found.items(), key=lambda item: not item[0].startswith("@"))
    return [(_baseline_name(reference), bars) for reference, bars in ordered]


def _points(members: Sequence[Stage]) -> list[plots.Point]:
    found = []
    for i, stage in enumerate(members):
        main, cost = _main(stage), stage["cost"]
        if main["value"] is None or not cost["seconds"]:
            continue
        by, seconds = _scale(main["unit"]), cost["seconds"] + cost["trials_seconds"]
        low, high = (by * (main["value"] if main[k] is None else main[k]) for k in ("low", "high"))
        trained = f"{short(cost['trained_parameters'])} trained parameters"
        title = f"{stage['name']}: {_shown(main)}, {_duration(seconds)}, {trained}"
        found.append(
            plots.Point(stage["name"], seconds, by * main["value"], low, high, f"c{i % plots.NUM_COLOURS}", title)
        )
    return found


def _curve_plots(members: Sequence[Stage], axis: str) -> list[str]:
    metric, by = members[0]["metric"], _scale(_main(members[0])["unit"])
    trained = [s for s in members if any(c["training"] or c["evaluation"] for c in s["curves"])]
    if not trained:
        return []
    losses: list[plots.Curve] = []
    scores: list[plots.Curve] = []
    for i, stage in enumerate(trained):
        loss = [(c["seed"], _series(c["training"], "loss", 1.0)) for c in stage["curves"]]
        score = [(c["seed"], _series(c["evaluation"], metric, by)) for c in stage["curves"]]
        for target, found in ((losses, loss), (scores, score)):
            target += plots.with_mean(
                stage["name"], [(f"{stage['name']}, seed {seed}", points) for seed, points in found], i
            )
    drawn = [
        d
        for d in (
            plots.curves(losses, "optimizer step", "training loss"),
            plots.curves(scores, "optimizer step", f"{axis}, validation"),
        )
        if d
    ]
    names = plots.legend([(s["name"], i) for i, s in enumerate(trained)])
    told = (
        '<p class="soft">Bold: mean of the seeds. Faint: each seed.</p>'
        if any(len(s["curves"]) > 1 for s in trained)
        else ""
    )
    return [
        "<h3>Learning curves</h3>",
        told,
        f'<div class="pair">{"".join(f"<div>{d}</div>" for d in drawn)}</div>',
        names,
    ]


def _series(points: Sequence[Mapping[str, Any]], key: str, by: float) -> list[tuple[float, float]]:
    return [(p["step"], by * p[key]) for p in points if p.get(key) is not None]


def _compared(members: Sequence[Stage]) -> tuple[Stage, Mapping[str, Any] | None]:
    """The best stage, and that one of its gains which says most: over a named stage before a built-in baseline."""
    best = members[0]
    gains = sorted(_own_gains(best), key=lambda g: not g["baseline"].startswith("@"))
    return best, gains[0] if gains else None


def _class_plots(members: Sequence[Stage]) -> list[str]:
    best, gain = _compared(members)
    parts = []
    if gain and gain.get("per_class"):
        bars = [_class_bar(row) for row in gain["per_class"] if row["value"] is not None]
        against = _baseline_name(gain["baseline"])
        if drawn := plots.gains(bars, "gain in accuracy on the class (points)"):
            parts += [f"<h3>Gain per class: {escape(best['name'])} over {escape(against)}</h3>", _wide(drawn)]
    matrices = [(best["name"], best["confusion"])]
    if gain:
        matrices.append(_baseline_confusion(members, best, gain["baseline"]))
    shown = [
        f"<div><h4>{escape(name)}</h4>{plots.confusion(found['labels'], found['counts'])}</div>"
        for name, found in matrices
        if found
    ]
    if shown:
        parts += [
            "<h3>Confusion: best stage and its baseline</h3>",
            '<p class="soft">Test examples, summed over seeds; the shade is the share of the true class.</p>',
        ]
        parts.append(f'<div class="pair">{"".join(shown)}</div>')
    return parts


def _class_bar(row: Mapping[str, Any]) -> plots.Bar:
    # Ten intervals at once are a look, not ten tests: they are coloured by their sign only where they exclude 0.
    style = "nothing" if row["low"] <= 0 <= row["high"] else "helped" if row["low"] > 0 else "hurt"
    words = f"{amount(row['value'], 'share', True)}  ({row['examples']} examples)"
    value, low, high = (100 * row[k] for k in ("value", "low", "high"))
    return plots.Bar(str(row["label"]), value, low, high, words, style)


def _baseline_confusion(members: Sequence[Stage], best: Stage, reference: str) -> tuple[str, Mapping[str, Any] | None]:
    if reference.startswith("@"):
        return reference[1:], next((s["confusion"] for s in members if s["name"] == reference[1:]), None)
    return _baseline_name(reference), best["baselines"].get(reference, {}).get("confusion")


# --- details --------------------------------------------------------------------------------------------------


def _details(stage: Stage) -> str:
    facts: list[tuple[str, str]] = [
        ("what it does", "; ".join(stage["description"]) or stage["kind"]),
        ("data", _data(stage["data"])),
    ]
    facts += [(f"lineage: {k}", _plain(v)) for k, v in stage["lineage"].items()]
    facts += [(f"setting: {k}", _plain(v)) for k, v in stage["settings"].items()]
    facts += [(f"outcome: {k}", _plain(v)) for k, v in stage["summary"].items()]
    parts = [f"<p>{escape(stage['sentence'])}</p>", '<div class="pair">']
    parts += [f"<div><h4>Metrics</h4>{_metrics_table(stage)}</div>", f"<div><h4>Cost</h4>{_cost_table(stage)}</div>"]
    if trials := _trials_table(stage):
        parts.append(f"<div><h4>Settings tried</h4>{trials}</div>")
    parts.append("</div>")
    if test := stage.get("range_test"):
        drawn = plots.range_test(*(test[k] for k in ("rates", "losses", "smoothed", "learning_rate")))
        told = f"{len(test['rates'])} steps in {_duration(test['seconds'])}, undone before the training began."
        parts += ["<h4>Range test of the learning rate</h4>", f'<p class="soft">{escape(told)}</p>', drawn]
    parts += [*_way(stage), "<h4>Where it comes from</h4>", _pairs(facts)]
    found = f"{stage['kind']}, {stage['metric']} {_shown(_main(stage))}"
    head = f"<b>{escape(stage['name'])}</b> <span class=soft>{escape(found)}</span>"
    return f"<details><summary>{head}</summary><div>{''.join(parts)}</div></details>"


def _way(stage: Stage) -> list[str]:
    """A picture of the summary's `curve`, points {setting: value, "score": metric}; the setting's own value is there,
    too."""
    points, by = stage["summary"].get("curve") or [], _scale(_main(stage)["unit"])
    name = next((key for key in points[0] if key != "score"), "") if points else ""
    chosen = stage["summary"].get(name)
    found = [(p[name], by * p["score"]) for p in points if isinstance(p.get("score"), int | float)]
    if len(found) < 2 or not isinstance(chosen, int | float):
        return []
    axis = _axis(stage["metric"], _main(stage)["unit"], stage["higher_is_better"])
    told = "" if len(stage["seeds"]) == 1 else '<p class="soft">Of the first seed.</p>'
    return [f"<h4>Way along {escape(name)}</h4>", told, plots.way(found, chosen, name, f"{axis}, validation")]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data(data: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{v:,} {k}" for k, v in data.get("counts", {}).items())
    named = [f"{k} {data[k]}" for k in ("path", "split", "fingerprint") if data.get(k)]
    return f"{data.get('name', '')} ({', '.join(named)})" + (f": {counts}" if counts else "")


def _pairs(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><td class="k">{escape(k)}</td><td class="long"><code>{escape(v)}</code></td></tr>' for k, v in facts
    )
    return f"<table>{rows}</table>"


def _metrics_table(stage: Stage) -> str:
    rows = ""
    for name, m in stage["metrics"].items():
        each = ", ".join(amount(v, m["unit"]) for v in m["per_seed"])
        cells = (_axis(name, m["unit"], m["higher_is_better"]), _shown(m), each)
        rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    return f"<table><tr><th>metric</th><th>value</th><th>each seed</th></tr>{rows}</table>"


def _cost_table(stage: Stage) -> str:
    c = stage["cost"]
    rate = c["examples_per_second"]
    facts = [
        ("time per seed", _duration(c["seconds"])),
        ("settings tried in vain", _duration(c["trials_seconds"])),
        ("examples per second", "-" if rate is None else f"{rate:,.0f}"),
        ("optimizer steps", "-" if c["optimizer_steps"] is None else f"{c['optimizer_steps']:,.0f}"),
        ("trained parameters", "-" if c["trained_parameters"] is None else f"{c['trained_parameters']:,.0f}"),
        ("parameters in total", "-" if c["total_parameters"] is None else f"{c['total_parameters']:,.0f}"),
        ("peak memory", _bytes(c["peak_memory_bytes"])),
        ("size on disk", _bytes(c["size_on_disk_bytes"])),
    ]
    shares = {name: share for name, share in (c.get("phases") or {}).items() if share >= 0.005}
    if shares:
        facts.append(("time went to", ", ".join(f"{name} {share:.0%}" for name, share in shares.items())))
    if c.get("skipped_steps"):
        facts.append(("steps skipped as not finite", f"{c['skipped_steps']:,.0f}"))
    return (
        "<table>"
        + "".join(f'<tr><td class="k">{escape(k)}</td><td class="n">{escape(v)}</td></tr>' for k, v in facts)
        + "</table>"
    )


def _trials_table(stage: Stage) -> str:
    trials = stage["trials"][0] if stage["trials"] else []
    if not trials:
        return ""
    paths, rows = list(trials[0]["settings"]), ""
    for t in trials:
        tried = [_tried(t["settings"].get(path)) for path in paths]
        score = "not finite" if t.get("validation") is None else f"{t.get('metric', '')} {_number(t['validation'])}"
        cells = (*tried, score, _duration(t.get("seconds")), "chosen" if t.get("chosen") else "")
        rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    named = "".join(f"<th>{escape(path.partition('.')[2])}</th>" for path in paths)
    return f"<table><tr>{named}<th>on validation data</th><th>time</th><th></th></tr>{rows}</table>"


def _tried(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _plain(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _foot(report: Report) -> list[str]:
    how = report["interval"]
    told = (
        f"Intervals hold {percent(how['level'])} and come from {how['replicates']:,} draws of a bootstrap on "
        "two levels: the test examples, drawn once for all seeds, and the seeds, reweighted so that few of them do "
        "not look more certain than they are. Gains are paired example by example. "
        "Accuracy and other shares are in percent, their gains in points."
    )
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    return [
        "<h2>How to read this</h2>",
        f"<p>{escape(told)}</p>",
        f'<p class="soft">{escape(versions)}</p>' if versions else "",
    ]


# --- several runs ---------------------------------------------------------------------------------------------

Rows = dict[str, dict[str, Stage]]
"""Stage name -> run name -> stage."""


def _distinct(reports: Sequence[Report], folders: Sequence[str | Path] = ()) -> list[str]:
    """Names of runs; where they repeat, with the folder's own name, and numbered where that does not help."""
    names = [str(report["name"]) for report in reports]
    if folders:
        own = [(p.parent if p.is_file() else p).name for p in (Path(folder).resolve() for folder in folders)]
        names = [f"{n} ({o})" if names.count(n) > 1 else n for n, o in zip(names, own, strict=True)]
    return [f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _across(reports: Sequence[Report], names: Sequence[str]) -> dict[tuple[str, str, str, str], Rows]:
    """Stages by what they answer, then by name, then by run. Other data are another question, never the same row."""
    found: dict[tuple[str, str, str, str], Rows] = {}
    for name, report in zip(names, reports, strict=True):
        for key, members in _groups(report).items():
            for stage in members:
                found.setdefault(key, {}).setdefault(stage["name"], {})[name] = stage
    return found


def _across_text(rows: Rows, names: Sequence[str]) -> list[str]:
    cells = [["stage", *names]]
    cells += [
        [cut(stage, 24), *(_shown(_main(by_run[n])) if n in by_run else "-" for n in names)]
        for stage, by_run in rows.items()
    ]
    cells = [[cut(cell, 30) for cell in row] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]


def _across_table(rows: Rows, names: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(n)}</th>" for n in ("stage", *names))
    body = ""
    for stage, by_run in rows.items():
        cells = "".join(f"<td>{_across_cell(by_run.get(n))}</td>" for n in names)
        body += f'<tr><td class="long"><b>{escape(stage)}</b></td>{cells}</tr>'
    return _stage_rows(head, body)


def _across_cell(stage: Stage | None) -> str:
    if stage is None:
        return "<span class=soft>-</span>"
    facts = f"{plural(len(stage['seeds']), 'seed')}, {_duration(stage['cost']['seconds'])}"
    return f'{escape(_shown(_main(stage)))}<br><span class="soft">{escape(facts)}</span>'


def _across_plot(key: tuple[str, str, str, str], rows: Rows) -> str:
    points = []
    for stages in rows.values():
        for i, (run, stage) in enumerate(stages.items()):
            for p in _points([stage]):
                label = f"{cut(p.label, 20)} ({cut(run, 14)})"
                style = f"c{i % plots.NUM_COLOURS}"
                points.append(plots.Point(label, p.x, p.y, p.low, p.high, style, f"{run}: {p.title}"))
    first = next(iter(next(iter(rows.values())).values()))
    axis = _axis(key[3], _main(first)["unit"], first["higher_is_better"])
    return _wide(plots.scatter(points, COST_AXIS, axis))
