"""Evaluation: every example counted once, on any number of processes.

Shapes: N examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from kt_hf import randomness, signals
from kt_hf.loader import Rows, evaluation_batches, load_batches
from kt_hf.task import FILL, Loaded, Scores, Task

if TYPE_CHECKING:
    from kt_hf.data import DataInfo


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return batch
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def predict(
    bundle: Any,
    inner: Any,
    accelerator: Any,
    info: DataInfo,
    split: str,
    batch_size: int,
    workers: int = 0,
    mode: str = "predict",
) -> dict[str, np.ndarray]:
    """Predictions on a split, sorted by `index`, equal on every process. `bundle` is the wrapped module, `inner` the
    bundle."""
    task, loaded = inner.task, inner.loaded
    with accelerator.main_process_first():  # the others find what it has preprocessed
        rows = Rows(info, split, task, loaded)
    batches = evaluation_batches(len(rows), batch_size, accelerator.num_processes, accelerator.process_index)
    inner.begin_evaluation()
    was_training = inner.training
    inner.eval()
    inner.evaluated().eval()
    found: list[dict[str, torch.Tensor]] = []
    try:
        with torch.no_grad():
            randomness.seed_all("predict", split)  # a task may sample
            context = bundle("context", {}, context=info)
            for items, batch in zip(batches, load_batches(rows, batches, workers, False), strict=True):
                out = bundle(mode, to_device(batch, accelerator.device), context=context)
                own = torch.tensor([epoch >= 0 for epoch, _ in items])
                index = torch.where(own, batch["index"].cpu(), -1)
                if accelerator.num_processes == 1:  # several could not agree here on where to stop
                    signals.check(" in an evaluation")
                found.append({**{k: v.cpu() for k, v in out.items()}, "index": index})
    finally:
        inner.end_evaluation()
        inner.train(was_training)
    gathered = _gather(found, accelerator)
    return gathered if mode == "scores" else task.finish(gathered, loaded, _ordered(info.splits[split]))


def _ordered(rows: Any) -> Any:
    """Rows in the order of `index`, as predictions are."""
    index = np.asarray(rows["index"][:])
    return rows if (np.diff(index) > 0).all() else rows.select(np.argsort(index, kind="stable"))


def _gather(found: list[dict[str, torch.Tensor]], accelerator: Any) -> dict[str, np.ndarray]:
    widths = _widths(found, accelerator)
    local = {key: torch.cat([_widen(part[key], widths.get(key)) for part in found]) for key in found[0]}
    if accelerator.num_processes > 1:
        local = {k: accelerator.gather(v.to(accelerator.device).contiguous()).cpu() for k, v in local.items()}
    real = local["index"] >= 0
    order = torch.argsort(local["index"][real], stable=True)
    return {
        key: value[real][order].float().numpy() if value.dtype == torch.bfloat16 else value[real][order].numpy()
        for key, value in local.items()
    }


def _widths(found: list[dict[str, torch.Tensor]], accelerator: Any) -> dict[str, int]:
    """The greatest width of every tensor with two dimensions, on all processes."""
    names = [key for key, value in found[0].items() if value.dim() == 2]
    widest = torch.tensor([max(part[key].shape[1] for part in found) for key in names], dtype=torch.int64)
    if accelerator.num_processes > 1 and names:
        widest = accelerator.gather(widest.to(accelerator.device)[None]).max(0).values
    return dict(zip(names, widest.tolist(), strict=True))


def _widen(value: torch.Tensor, width: int | None) -> torch.Tensor:
    return value if width is None else F.pad(value, (0, width - value.shape[1]), value=FILL)


def measure(task: Task, loaded: Loaded, info: DataInfo, predictions: dict[str, np.ndarray]) -> Scores:
    return task.measure(predictions, loaded, info)
