"""Time to the first optimizer step: a recipe against a script by hand that does the same, both as whole processes.

    python benchmarks/first_step.py --model DIR --data DIR [--rounds 7] [--cold]

`--model` is a folder with a text encoder (MiniLM-L6, say), `--data` one with train, validation and test .parquet files
that have the columns `sentence` and `label` (sst2). Both processes end by themselves after the first step, and both
import, read, tokenise and load everything anew, but for the cache of the data library, which is filled by a turn that
does not count (`warm`) or emptied before every turn (`cold`). The aim: at most 1.15.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ratios import compare, paired, report

BARE = """
import os, sys, torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler
model_path, data_path = sys.argv[1:]
torch.manual_seed(42)
files = {split: f"{data_path}/{split}.parquet" for split in ("train", "validation", "test")}
data = load_dataset("parquet", data_files=files)
labels = data["train"].features["label"].names
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=len(labels))
rows = data["train"].map(
    lambda batch: tokenizer(batch["sentence"], truncation=True, max_length=128), batched=True,
    remove_columns=[c for c in data["train"].column_names if c != "label"],
)
def collate(batch):
    y = torch.tensor([row.pop("label") for row in batch])
    return {**tokenizer.pad(batch, return_tensors="pt"), "labels": y}
loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
scheduler = get_scheduler("linear", optimizer, 0, 3 * len(loader))
model.train()
for batch in loader:
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    break
os._exit(0)
"""
"""What one writes by hand. It ends at once after the step, so that both sides leave the interpreter alike."""

OURS = """
import os, sys
from kt_hf import Data, Recipe, Strategy, Train, main, register
model_path, data_path, output = sys.argv[1:]
sys.argv[1:] = ["--output-dir", output]
@register("strategy", "stop")
class Stop(Strategy):
    def after_step(self, model, progress):
        os._exit(0)
recipe = Recipe(
    data=Data(data_path), model=model_path, task="text-classification",
    stages=[Train("a", strategies=["finetune", "stop"])],
)
main(recipe)
"""
"""A recipe file, with a strategy that ends the process at the end of the first step. The first epoch's evaluation and
the report do not take part."""


def run(
    script: Path, environment: dict[str, str], caches: list[Path], arguments: list[str], processor: list[float]
) -> float:
    """Seconds of one process; those of the processor, which depend less on who else is busy, go to a list."""
    for cache in caches:
        subprocess.run(["rm", "-rf", str(cache)], check=True)
    with tempfile.TemporaryDirectory() as output:
        more = [str(Path(output) / "out")] if script.stem == "ours" else []
        command = [sys.executable, str(script), *arguments, *more]
        began, used = time.perf_counter(), _processor()
        done = subprocess.run(command, env=environment, cwd=output, capture_output=True, text=True)
        took = time.perf_counter() - began
        processor.append(_processor() - used)
    if done.returncode:
        sys.exit(f"{script.stem} failed:\n{done.stderr[-3000:]}")
    return took


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="also with the data library's cache emptied before each")
    options = parser.parse_args()
    caches = ("warm", "cold") if options.cold else ("warm",)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        turns, processor = {}, {}
        for side, text in (("ours", OURS), ("bare", BARE)):
            script = Path(folder) / f"{side}.py"
            script.write_text(text)
            home = Path(folder) / f"{side}-home"
            environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
            environment |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
            arguments = [str(Path(options.model).resolve()), str(Path(options.data).resolve())]
            for cache in caches:
                processor[side, cache] = []
                turns[side, cache] = functools.partial(
                    run, script, environment, [home] if cache == "cold" else [], arguments, processor[side, cache]
                )
        for cache in caches:
            took = compare({side: turns[side, cache] for side in ("ours", "bare")}, options.rounds)
            rows.append(
                {
                    "cache": cache,
                    "bare s": sorted(took["bare"])[options.rounds // 2],
                    "ours s": sorted(took["ours"])[options.rounds // 2],
                    "ratio": paired(took["ours"], took["bare"]),
                    "ratio of processor time": paired(
                        *(processor[side, cache][-options.rounds :] for side in ("ours", "bare"))
                    ),
                    "more s": paired(took["ours"], took["bare"], lambda a, b: a - b),
                }
            )
    report("first_step", rows, rounds=options.rounds, model=Path(options.model).name, data=Path(options.data).name)


if __name__ == "__main__":
    main()
