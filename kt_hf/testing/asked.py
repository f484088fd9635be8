"""A task and a model of exactly the kit's tensors, so that merges which run their parents can be tried on them.

Shapes: B rows, L numbers of a row, D width.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from kt_hf.data import DataInfo
from kt_hf.measuring import Parent
from kt_hf.task import Batch, Loaded, Task
from kt_hf.testing.bench import cpu_accelerator

NUMBERS, WIDTH, CLASSES = 12, 6, 3


class Tiny(nn.Module):
    """Numbers to classes, by way of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(NUMBERS, WIDTH)
        self.layer = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, numbers_BL: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer[0](self.embeddings(numbers_BL)).tanh().mean(1))


class Numbers(Task):
    """Which class a few numbers are of."""

    cache_rows = False

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        return {"numbers": rows["numbers"], "labels": rows["label"]}

    def collate(self, rows: Any, loaded: Loaded) -> Batch:
        return {key: torch.tensor([row[key] for row in rows]) for key in ("numbers", "labels", "index")}

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=model(batch["numbers"]))

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> Any:
        values_B = nn.functional.cross_entropy(outputs.logits, batch["labels"], reduction="none")
        return values_B, torch.ones_like(values_B), "example"

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs.logits, torch.ones(len(outputs.logits))

    def layers(self, model: nn.Module) -> list[list[str]]:
        return [["embeddings.weight"], ["layer.0.weight", "layer.0.bias"]]


def data() -> DataInfo:
    random, splits = np.random.default_rng(0), {}
    for split, count in (("train", 24), ("validation", 16)):
        numbers = random.integers(0, NUMBERS, (count, 5))
        rows = {"numbers": numbers.tolist(), "label": (numbers.sum(1) % CLASSES).tolist()}
        splits[split] = datasets.Dataset.from_dict({**rows, "index": np.arange(count)})
    return DataInfo("numbers", splits, {"numbers": "numbers", "label": "label"}, ["a", "b", "c"], "numbers")


def parent(label: str, tensors: dict[str, torch.Tensor]) -> Parent:
    """The model of these tensors, with rows to ask it on."""
    model = Tiny()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return Parent(label, Loaded(model, labels=["a", "b", "c"]), Numbers(), data(), cpu_accelerator(), tensors)
