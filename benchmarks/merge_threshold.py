"""The threshold that TIES, DELLA and Breadcrumbs need, the k-th largest magnitude of a tensor of 4.2 million elements:
by counting bit patterns, by `kthvalue`, by a partition, by sorting; and whole merges of three such tensors.

    python benchmarks/merge_threshold.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from ratios import compare, paired, report

from kt_hf import MergeMethod, registry
from kt_hf.functional.averaging import weighted_mean
from kt_hf.functional.magnitude import magnitude_threshold

SIDE, DENSITY, M = 2048, 0.2, 3


def thresholds(values: torch.Tensor, k: int) -> dict[str, Callable[[], Any]]:
    return {
        "counting": lambda: magnitude_threshold(values, k).magnitude,
        "kthvalue": lambda: values.abs().flatten().kthvalue(values.numel() - k + 1).values.item(),
        "topk": lambda: values.abs().flatten().topk(k, sorted=False).values.min().item(),
        "argsort": lambda: values.abs().flatten()[values.abs().flatten().argsort(descending=True)[k - 1]].item(),
    }


METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"density": DENSITY},
    "breadcrumbs": {"density": DENSITY, "outliers": 0.01},
    "dare": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "model_stock": {},
}


def merges(tensors_M: list[torch.Tensor], base: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What each method computes, given the tensors in float32."""

    def of(method: MergeMethod) -> Callable[[], Any]:
        return lambda: method.tensor("w", tensors_M, base, None)

    found: dict[str, Callable[[], Any]] = {"linear": lambda: weighted_mean(tensors_M, [1.0] * M)}
    for name, given in METHODS.items():
        plugin: Any = registry.load("merge", name)
        found[name] = of(plugin(**given))
    return found


def rows(candidates: dict[str, Callable[[], Any]], against: str, rounds: int) -> list[dict[str, Any]]:
    seconds = compare({name: _unheard(run) for name, run in candidates.items()}, rounds)
    found = []
    for name, values in seconds.items():
        ratio, low, high = paired(values, seconds[against])
        middle = sorted(values)[len(values) // 2]
        found.append({"what": name, "ms": 1e3 * middle, f"of {against}": ratio, "low": low, "high": high})
    return found


def _unheard(run: Callable[[], Any]) -> Callable[[], None]:
    """A number that comes back would be taken for seconds."""

    def call() -> None:
        run()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SIDE, SIDE, generator=generator) * 0.02
    tensors_M = [base + 1e-3 * torch.randn(SIDE, SIDE, generator=generator) for _ in range(M)]
    values, k = tensors_M[0] - base, int(DENSITY * base.numel())
    by = thresholds(values, k)
    assert len({find() for find in by.values()}) == 1, "they find other thresholds"
    report("merge_threshold", rows(by, "kthvalue", rounds), elements=base.numel(), k=k)
    print()
    report("merge_methods", rows(merges(tensors_M, base), "linear", rounds), elements=base.numel(), parents=M)


if __name__ == "__main__":
    main()
