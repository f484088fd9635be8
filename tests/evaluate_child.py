"""`kt-hf evaluate` in this process or on every rank: `evaluate_child.py OUT.json MODEL DATA TASK SETTING...`."""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  the environment first

from kt_hf import inference


def main(out: str, model: str, data: str, task: str, settings: list[str]) -> None:
    found = inference.evaluate(model, data, settings, task=task)
    if inference._accelerator().is_main_process:
        Path(out).write_text(json.dumps(found["metrics"]))


if __name__ == "__main__":
    main(*sys.argv[1:5], sys.argv[5:])
