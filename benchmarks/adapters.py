"""What an adapter keeps of a fine-tuning, and what two adapters make together, on real sentences: sst2 with MiniLM-L6.

    python benchmarks/adapters.py DATA [--out DIR]

DATA holds a folder `sst2`. A model is fine-tuned in full, two adapters of rank 8 are trained with two seeds; then
adapters of several ranks are extracted from the first, and the two are merged in several ways, by `kt-hf`. Accuracy on
the 1,821 sentences of the test split with a 95 % interval over them; one training of each kind, so that
differences of a percent between rows that were trained apart mean nothing. Continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from ratios import report
from task_rows import minilm

from kt_hf import Data, Evaluate, Recipe, Train, merge_command, run

TASK = {"text-classification": {"max_length": 48}}
TRAINING = {"per_device_train_batch_size": 16, "warmup_ratio": 0.1, "eval_steps": 0, "report_to": "none"}
RANKS = (1, 2, 4, 8, 16, 32, 64)
ERRORS = (0.5, 0.2)
MERGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mean, exact (rank 16)": ("uniform_soup", {}, {}),
    "mean, rank 8": ("uniform_soup", {}, {"rank": 8}),
    "mean, rank 4": ("uniform_soup", {}, {"rank": 4}),
    "mean, A and B apart (rank 8)": ("uniform_soup", {}, {"combine": "factors"}),
    "sum, exact (rank 16)": ("task_arithmetic", {}, {"in_full": "mean"}),
    "ties, density 0.2, rank 16": ("ties", {"density": 0.2}, {"in_full": "mean", "rank": 16}),
    "ties, density 0.2, rank 64": ("ties", {"density": 0.2}, {"in_full": "mean", "rank": 64}),
    "dare, density 0.5, rank 16": ("dare", {"scaling": 0.5}, {"in_full": "mean", "rank": 16}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="adapters-"))
    data = Data(str(options.data / "sst2"), max_examples={"train": 3000})
    full, lora = train(data, out)
    made = {**extracted(full, out), **merged(lora, out)}
    folders = {"fine-tuned in full": full, "adapter of seed 0": lora[0], "adapter of seed 1": lora[1]}
    folders |= {name: found[0] for name, found in made.items()}
    stages = {f"model{i}": name for i, name in enumerate(folders)}
    # paths of models are looked up in the recipe, so each stage names its own
    measured = run(
        Recipe([Evaluate(stage, model=str(folders[name])) for stage, name in stages.items()], task=TASK, data=data),
        out / "measured",
    )
    rows = []
    for entry in measured["stages"]:
        name, figure = stages[entry["name"]], entry["metrics"]["accuracy"]
        said = made[name][1] if name in made else ""
        size = sum(p.stat().st_size for p in folders[name].glob("*.safetensors"))
        accuracy = f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"
        rows.append({"model": name, "accuracy": accuracy, "kept": kept(said), "MB": f"{size / 1e6:.3g}"})
    report("adapters", rows)


def train(data: Data, out: Path) -> tuple[Path, list[Path]]:
    lora = {"lora": {"r": 8, "lora_alpha": 16, "save": "adapter"}}
    stages = [
        Train("full", strategies=["finetune"], training={**TRAINING, "max_steps": 150, "learning_rate": 1e-4}),
        Train("lora", strategies=[lora], training={**TRAINING, "max_steps": 150, "learning_rate": 1e-3}, seeds=2),
    ]
    run(Recipe(stages, task=TASK, data=data, model=minilm()), out / "trained")
    folder = out / "trained"
    return folder / "full" / "model", [folder / "lora" / "model", folder / "lora" / "seeds" / "1" / "model"]


def extracted(model: Path, out: Path) -> dict[str, tuple[Path, str]]:
    ways: dict[str, dict[str, Any]] = {f"extracted, rank {r}": {"rank": r} for r in RANKS}
    ways |= {f"extracted, error {e}": {"error": e} for e in ERRORS}
    ways["extracted, rank 8, only low rank"] = {"rank": 8, "only_low_rank": True}

    def extract(how: dict[str, Any], folder: Path) -> str:
        return merge_command.extract_lora(str(model), minilm(), folder, **how)

    return {name: once(out / "extracted", name, extract, how) for name, how in ways.items()}


def merged(adapters: list[Path], out: Path) -> dict[str, tuple[Path, str]]:
    def merge(way: tuple[str, dict[str, Any], dict[str, Any]], folder: Path) -> str:
        method, given, how = way
        return merge_command.merge(method, [str(a) for a in adapters], folder, given=given, **how)

    return {name: once(out / "merged", name, merge, way) for name, way in MERGES.items()}


def once(root: Path, name: str, make: Any, how: Any) -> tuple[Path, str]:
    """A folder and what was said of it, made if it is not there."""
    folder = root / re.sub(r"\W+", "-", name)
    note = folder.with_suffix(".json")
    if not note.is_file():
        said = make(how, folder)
        print(said)
        note.write_text(json.dumps(said))
    return folder, json.loads(note.read_text())


def kept(said: str) -> str:
    """Of the squared norm of the change, and the ranks."""
    share, ranks = re.search(r"([\d.]+ ?%|all|off by [\d.]+) of", said), re.search(r"of (ranks? [^,]*)", said)
    return f"{share[1] if share else '-'}, {ranks[1]}" if ranks else ""


if __name__ == "__main__":
    main()
