"""Saving a checkpoint: ours (written, hashed on the way, fsynced, renamed) against a copy and fsync of the same bytes.

    python benchmarks/checkpoint_save.py [--megabytes 512] [--rounds 7]

The aim is at most 1.3 times the copy with a free core, 2.0 without. Hashing alone is shown to say what is left to gain.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from ratios import compare, paired, report

from kt_hf import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    count = 64
    tensors = {f"layer{i}.weight": torch.randn(options.megabytes * 2**20 // 4 // count) for i in range(count)}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        source = checkpoint.save(folder / "source", 1, tensors, {}, 1) / "state.safetensors"

        def copy() -> None:
            target = folder / "copy"
            shutil.copyfile(source, target)
            with open(target, "rb+") as file:
                os.fsync(file.fileno())

        def ours() -> None:
            checkpoint.save(folder / "ours", 1, tensors, {}, 1)

        def hashing() -> None:
            with open(source, "rb") as file:
                hashlib.file_digest(file, "sha256")

        seconds = compare({"copy + fsync": copy, "kt_hf": ours, "sha256 alone": hashing}, options.rounds)
    rows = [
        {"what": what, "seconds": sorted(took)[len(took) // 2], "ratio to copy": paired(took, seconds["copy + fsync"])}
        for what, took in seconds.items()
    ]
    report("checkpoint_save", rows, megabytes=options.megabytes, rounds=options.rounds)


if __name__ == "__main__":
    main()
