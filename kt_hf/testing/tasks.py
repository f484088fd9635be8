"""A light set of rules for tasks: rows in, outputs out, units that agree, and a folder that loads again.

Shapes: B rows, N scored units, C classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kt_hf import evaluation
from kt_hf.bundle import Bundle
from kt_hf.errors import KtError
from kt_hf.loader import Collate, Rows
from kt_hf.recipe import Model
from kt_hf.task import Loaded, Part
from kt_hf.testing import exports, waits
from kt_hf.testing.bench import Bench, cpu_accelerator
from kt_hf.testing.plugin import Case
from kt_hf.testing.rules import NotApplicable, demand, rule


class TaskCase(Case):
    """A task with tiny rows; `conformance["model"]` holds settings of a tiny model where the kit knows none."""

    def __init__(self, name: str, cls: type, given: dict[str, Any], folder: Path):
        super().__init__("task", name, cls, given, folder)

    @functools.cached_property
    def bench(self) -> Bench:
        return Bench(self.name, self.folder)

    @functools.cached_property
    def loaded(self) -> Loaded:
        loaded = self.bench.load(self.bench.saved("start"))
        loaded.model.eval()
        return loaded

    @functools.cached_property
    def batch(self) -> dict[str, Any]:
        return exports.rows(self.bench, self.loaded)

    @functools.cached_property
    def training_batch(self) -> dict[str, Any]:
        rows = Rows(self.bench.info, "train", self.bench.task, self.loaded, train=True)
        return Collate(self.bench.task, self.loaded)(rows.__getitems__([(0, i) for i in range(4)]))

    @functools.cached_property
    def outputs(self) -> Any:
        with torch.no_grad():
            return self.bench.task.forward(self.loaded.model, self.batch)


@rule("task", "makes-batches", needs=("builds",))
def makes_batches(case: TaskCase) -> None:
    """Rows become a flat batch of tensors with `index`; its units are counted, `example` among them."""
    demand("index" in case.batch, "the batch has no `index`")
    demand(not (odd := [k for k, v in case.batch.items() if isinstance(v, dict)]), f"the batch is not flat: {odd}")
    units = case.bench.task.units(case.batch)
    demand(
        "example" in units and case.bench.task.unit in units,
        f"units are {list(units)}, expected example and {case.bench.task.unit}",
    )


@rule("task", "loss-is-unreduced", needs=("makes-batches",))
def loss_is_unreduced(case: TaskCase) -> None:
    """`loss` gives one finite value per unit that `units` counts, in float32, with a gradient.

    Of several parts, each adds up over the halves of a batch.
    """
    task = case.bench.task
    if not task.has_loss:
        raise NotApplicable("it has no loss of its own")
    parts, units = _parts(case, case.batch), task.units(case.batch)
    for values, _, unit in parts:
        demand(unit in units, f"the loss is per {unit}, which `units` does not count")
        finite = bool(values.isfinite().all())
        demand(values.dtype == torch.float32 and finite, f"losses are {values.dtype} or not finite")
        demand(values.dim() >= 1 and values.requires_grad, "the loss is reduced, or has no gradient")
    if len(parts) == 1:
        values, weight, unit = parts[0]
        counted = float(weight.sum()) if weight is not None else float(values.numel())
        demand(counted == float(units[unit]), f"the loss counts {counted:g} {unit}s, `units` {float(units[unit]):g}")
        return
    rows = len(case.batch["index"])
    halves = [task.part(case.batch, *ends) for ends in ((0, rows // 2), (rows // 2, rows))]
    demand(
        all(float(units[u]) == sum(float(task.units(half)[u]) for half in halves) for u in units),
        f"`units` of two halves do not add up to {units}",
    )
    sums = [torch.stack([_total(part) for part in _parts(case, half)]).detach() for half in halves]
    whole = torch.stack([_total(part) for part in parts]).detach()
    demand(
        torch.allclose(whole, sums[0] + sums[1], rtol=1e-4, atol=1e-5),
        f"the parts of the loss are {whole.tolist()} of a batch, {(sums[0] + sums[1]).tolist()} of its halves",
    )


def _parts(case: TaskCase, batch: dict[str, Any]) -> list[Part]:
    task = case.bench.task
    return _parts_of(task.loss(task.forward(case.loaded.model, batch), batch))


def _parts_of(found: Part | list[Part]) -> list[Part]:
    return found if isinstance(found, list) else [found]


def _total(part: Part) -> torch.Tensor:
    values, weight, _ = part
    return (values if weight is None else values * weight).sum()


@rule("task", "scores-fit-weights", needs=("makes-batches",))
def scores_fit_weights(case: TaskCase) -> None:
    """`scores` gives as many weights as rows of scores."""
    try:
        scores_NC, weight_N = case.bench.task.scores(case.outputs, case.batch)
    except KtError as error:
        raise NotApplicable(error.cause) from None
    demand(
        scores_NC.dim() == 2 and weight_N.shape == scores_NC.shape[:1],
        f"scores {tuple(scores_NC.shape)}, weights {tuple(weight_N.shape)}",
    )


@rule("task", "waits-for-no-device", needs=("makes-batches",))
def waits_for_no_device(case: TaskCase) -> None:
    """On a GPU a training step waits for nothing that the task does, but for what `waits` declares.

    That is the counting, the choosing, the loss, the scores, and their gradients; not what the model does by itself.
    """
    task, batch = case.bench.task, case.training_batch
    model = copy.deepcopy(case.loaded.model)
    with waits.watching(model) as watch:
        _train(case, model.train(), batch)
        task.part(batch, 0, 2)
        with torch.no_grad():  # as a teacher
            _scores(case, task.forward(model.eval(), batch), batch)
    odd = [wait for wait in watch.found if wait.name not in task.waits]
    demand(
        not odd,
        f"a GPU has to be waited for in {', '.join(map(str, odd))}: give what does not count the weight 0, let "
        "`collate` look, or declare it in `waits`",
    )


def _train(case: TaskCase, model: nn.Module, batch: dict[str, Any]) -> None:
    """What a task does between the log points, with gradients back to the model's outputs."""
    task = case.bench.task
    task.units(batch)
    with torch.no_grad():
        batch = task.choose(model, batch)
    outputs = task.forward(model, batch)
    found = [_total(part) for part in _parts_of(task.loss(outputs, batch))] if task.has_loss else []
    scores = _scores(case, outputs, batch)
    found += [(scores[0].log_softmax(-1).mean(-1) * scores[1]).sum()] if scores is not None else []
    given = [tensor for tensor in _tensors(outputs) if tensor.requires_grad]
    for total in found:
        torch.autograd.grad(total, given, allow_unused=True, retain_graph=True)


def _scores(case: TaskCase, outputs: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    try:
        return case.bench.task.scores(outputs, batch)
    except KtError:
        return None


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    """All that a model gives, whatever it is in."""
    if isinstance(outputs, torch.Tensor):
        yield outputs
        return
    inner = vars(outputs).values() if hasattr(outputs, "__dataclass_fields__") else outputs
    inner = inner.values() if isinstance(inner, dict) else inner
    if not isinstance(inner, (str, int, float, bool, type(None))):
        for each in inner:
            yield from _tensors(each)


@rule("task", "measures-its-metric", needs=("makes-batches",))
def measures_its_metric(case: TaskCase) -> None:
    """Predictions have one row per example; `measure` knows the task's metric, `table` has a row for each."""
    task, info, loaded = case.bench.task, case.bench.info, case.loaded
    bundle = Bundle(loaded, task, {}).eval()
    found = evaluation.predict(bundle, bundle, cpu_accelerator(), info, "test", 4)
    count = len(info.splits["test"])
    demand(
        all(len(v) == count for v in found.values()),
        f"predictions have {[len(v) for v in found.values()]} rows, the split {count}",
    )
    metrics = task.measure(found, loaded, info).metrics
    demand(task.metric in metrics, f"metrics are {list(metrics)}, without {task.metric}")
    table = task.table(found, loaded, info)
    demand(all(len(v) == count for v in table.values()), "the table has another number of rows")


@rule("task", "saves-and-loads", needs=("makes-batches",))
def saves_and_loads(case: TaskCase) -> None:
    """What `save` writes is loaded by `load` and gives the same outputs."""
    folder = case.folder / "again"
    folder.mkdir(parents=True, exist_ok=True)
    case.bench.task.save(case.loaded, folder)
    again = case.bench.task.load(Model(path=str(folder)), case.bench.info)
    with torch.no_grad():
        outputs = case.bench.task.forward(again.model.eval(), case.batch)
    for name in exports.OUTPUTS:
        if isinstance(getattr(case.outputs, name, None), torch.Tensor):
            demand(
                torch.allclose(getattr(case.outputs, name), getattr(outputs, name), atol=1e-5),
                f"{name} differ after loading",
            )
