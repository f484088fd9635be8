"""A first and a second run's preprocessing of 20,000 texts with a tokenizer, in processes of their own.

    python benchmarks/preprocessing.py [--rounds 5]

Reach: the second one is a cache hit and takes at most 0.3 s. Timed is what a run does between the loaded data and the
first row: from the key to the table that is ready; imports and reading the data are the same for both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from ratios import paired, report

CHILD = """
import sys, time
import datasets
from kt_hf.data import DataInfo
from kt_hf.loader import Rows
from kt_hf.recipe import Model
from kt_hf_plugins.text_classification import TextClassification

datasets.disable_progress_bars()
source = datasets.load_dataset("parquet", data_files=sys.argv[1], cache_dir=sys.argv[2], split="train")
info = DataInfo("texts", {"train": source}, {"text": "text", "label": "label"}, ["a", "b"], sys.argv[3])
task = TextClassification()
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
loaded = task.load(Model(config="bert", config_overrides=shape), info)
began = time.perf_counter()
rows = Rows(info, "train", task, loaded, train=True)
rows[(0, 0)]
print(time.perf_counter() - began)
"""


def write(path: Path, count: int) -> None:
    import datasets
    import numpy as np

    random = np.random.default_rng(0)
    words = np.asarray(["".join(random.choice(list("abcdefghij"), 5)) for _ in range(500)])
    rows = {
        "text": [" ".join(random.choice(words, n)) for n in random.lognormal(3, 0.8, count).astype(int).clip(1, 400)],
        "label": random.integers(0, 2, count),
        "index": np.arange(count),
    }
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["a", "b"]), index=datasets.Value("int64")
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    seconds: dict[str, list[float]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "texts.parquet", 20_000)
        for number in range(given.rounds):
            for name in seconds:
                command = [sys.executable, "-c", CHILD, f"{folder}/texts.parquet", f"{folder}/cache", f"round {number}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds[name].append(float(done.stdout.split()[-1]))
    share, low, high = paired(seconds["second"], seconds["first"])
    second, low_s, high_s = paired(seconds["second"], [0.0] * given.rounds, lambda a, b: a)
    rows = [
        {"measured": "second / first", "median": share, "low": low, "high": high},
        {"measured": "second (s)", "median": second, "low": low_s, "high": high_s},
    ]
    report("preprocessing", rows, rounds=given.rounds, seconds=seconds)


if __name__ == "__main__":
    main()
