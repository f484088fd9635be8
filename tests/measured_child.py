"""What merges measure and learn on any number of processes: `measured_child.py FOLDER` merges the kit's parents by each
of them on every rank, and writes to FOLDER."""

import sys
from pathlib import Path

import conftest  # noqa: F401  the environment first
import torch

from kt_hf import measuring, merging, registry
from kt_hf.testing import asked
from kt_hf.testing.bench import cpu_accelerator
from kt_hf.testing.merges import state, write

METHODS = {
    "fisher": {"examples": 13},
    "regmean": {"examples": 13},
    "learned_soup": {"steps": 5, "batch_size": 5, "by": "layer"},
}


def merge_all(folder: Path) -> None:
    states, accelerator = [state(i) for i in range(3)], cpu_accelerator()
    names = [f"parent{i}" for i in range(3)]
    folders = [folder / name for name in names]
    if accelerator.is_main_process:
        for tensors, place in zip(states, folders, strict=True):
            write(tensors, place)
    accelerator.wait_for_everyone()
    for name, given in METHODS.items():
        method = registry.load("merge", name)(**given)
        run = merging.MergeRun(3, names, True, lambda w: 0.0, lambda i: asked.parent(names[i], states[i]))
        stats = []
        if method.measures_on is not None:
            stats = measuring.measured(method, folders, folder / f"{name}-measured", run, accelerator)
            assert bool(stats) == accelerator.is_main_process
        method.fit(run)
        if accelerator.is_main_process:
            with merging.Parents(folders, names) as parents:
                merging.merge(method, parents, None, folder / name, stats=stats)
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    merge_all(Path(sys.argv[1]))
