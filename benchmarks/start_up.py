"""Start-up: importing kt_hf and the commands that need no torch, against importing torch.

    python benchmarks/start_up.py [--rounds 9]

The aims: `import kt_hf` at most 0.05 s, `kt-hf --help` and `kt-hf list` at most 0.15 s.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ratios import compare, paired, report

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import kt_hf": ["-c", "import kt_hf"],
    "kt-hf --help": ["-m", "kt_hf.cli", "--help"],
    "kt-hf list": ["-m", "kt_hf.cli", "list"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    turns = {name: functools.partial(run, [sys.executable, *command]) for name, command in COMMANDS.items()}
    seconds = compare(turns, options.rounds)
    rows = [
        {
            "what": what,
            "seconds": sorted(took)[len(took) // 2],
            "seconds over python": paired(took, seconds["python alone"], lambda a, b: a - b),
            "ratio to import torch": paired(took, seconds["import torch"]),
        }
        for what, took in seconds.items()
    ]
    report("start_up", rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
