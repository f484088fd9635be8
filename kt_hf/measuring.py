"""What a merge may ask of its parents before their tensors are merged: each with its model and rows at hand. What was
measured is kept beside the stage's result, until that is finished, under a name that tells what it depends on.

Shapes: B rows of a batch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from kt_hf import checkpoint, evaluation, randomness, signals, sources
from kt_hf.errors import IntegrityError, NotMeaningful, RecipeError
from kt_hf.loader import Plan, Rows, Windows, load_batches, preprocessing_key
from kt_hf.merge import MergeMethod
from kt_hf.progress import Progress
from kt_hf.task import Batch, Loaded, Task
from kt_hf.tensor_files import opened, weight_files

if TYPE_CHECKING:
    from kt_hf.data import DataInfo
    from kt_hf.merging import MergeRun

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


class Parent:
    """A model that goes into a merge, loaded and in eval mode, with the data that it can be asked on.

    label: how it is named. info: of the stage that trained it, else of the merge. tensors: of its files, by name.
    """

    def __init__(
        self,
        label: str,
        loaded: Loaded,
        task: Task,
        info: DataInfo,
        accelerator: Any,
        tensors: Mapping[str, torch.Tensor],
    ):
        if loaded.new_parameters:
            raise RecipeError(
                f"parent '{label}' has nothing trained for this task ({', '.join(loaded.new_parameters[:2])} are new)",
                "name models with trained heads, or a merge that does not run its parents",
            )
        self.label, self.loaded, self.task, self.info = label, loaded, task, info
        self.accelerator, self.tensors = accelerator, tensors
        self.model: nn.Module = loaded.model.to(accelerator.device).eval()
        self._forward = _Forward(self.model, task)
        self._rows: dict[str, Rows] = {}

    # --- rows ---

    def rows(self, split: str) -> Rows:
        """The rows of a split, as in training, but for augmentation."""
        if split not in self._rows:
            with self.accelerator.main_process_first():  # the others find what it has preprocessed
                self._rows[split] = Rows(self.info, split, self.task, self.loaded, train=True)
        return self._rows[split]

    def sample(self, split: str, count: int, size: int = 1) -> Iterator[Batch]:
        """This process' share of `count` rows of a split, or of all if there are fewer, in batches of `size`: always
        the same rows, drawn once. Rows one by one have no padding, whatever the task."""
        rows, rank, world = self.rows(split), self.accelerator.process_index, self.accelerator.num_processes
        drawn = np.random.default_rng(0).permutation(len(rows))[:count]
        own = np.array_split(drawn, world)[rank].tolist()
        items = [[(0, row) for row in own[i : i + size]] for i in range(0, len(own), size)]
        logger.info("asking '%s' on %d rows of %s", self.label, len(drawn), split)
        with closing(Progress(f"asking {self.label}", len(items), 0, rank == 0)) as progress:
            for batch in load_batches(rows, items, 0, False):
                yield self._ready(batch)
                progress.step()
                if world == 1:  # several could not agree here on where to stop
                    signals.check(" while a merge asked its parents")

    def steps(self, split: str, count: int, size: int, seed: int = 0) -> Iterator[tuple[Batch, int]]:
        """`count` batches of `size` rows on all processes, which are shuffled in every epoch, and how many rows of this
        process' share count: 0 where it got one to stay in step."""
        rows, rank, world = self.rows(split), self.accelerator.process_index, self.accelerator.num_processes
        windows = Windows(Plan(len(rows), min(size, len(rows)), seed), 0, count, world, rank, 1)
        for batch in load_batches(rows, windows, 0, False):
            shares, _ = windows.passed.popleft()
            yield self._ready(batch), shares[0][rank]

    def _ready(self, batch: Batch) -> Batch:
        batch = evaluation.to_device(batch, self.accelerator.device)
        if type(self.task).choose is not Task.choose:
            randomness.seed_all("choose", batch["index"].tolist())
            with torch.no_grad():
                batch = self.task.choose(self.model, batch)
        return batch

    # --- the model ---

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def forward(self, batch: Batch, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
        """The task's outputs; under other weights (and buffers) where they are given, by the model's names."""
        if weights is None:
            return self._forward(batch)
        return functional_call(self._forward, {f"model.{n}": t for n, t in weights.items()}, (batch,))

    def losses(self, outputs: Any, batch: Batch) -> list[tuple[torch.Tensor, str]]:
        """The parts of the task's loss, each summed over the batch, and the unit that it is a mean over.

        Raises `NotMeaningful` for a task that has no loss of its own.
        """
        if not self.task.has_loss:
            raise NotMeaningful(
                f"{type(self.task).__name__} has no loss of its own that parents could be asked for",
                "take a merge that does not need one",
            )
        found = self.task.loss(outputs, batch)
        parts = found if isinstance(found, list) else [found]
        return [((values if weight is None else values * weight).sum(), unit) for values, weight, unit in parts]

    def sum(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of all processes, as each has them."""
        if self.accelerator.num_processes == 1:
            return list(tensors)
        return [self.accelerator.reduce(tensor.contiguous(), "sum") for tensor in tensors]

    # --- names ---

    @functools.cached_property
    def names(self) -> dict[str, list[str]]:
        """Parameter of the model -> its names in the files, several where weights are tied. Those are not in it that
        the files hold in another form (experts one by one), or not at all. A name counts if the numbers agree."""
        prefix = getattr(self.model, "base_model_prefix", "")
        places: dict[tuple[Any, ...], list[str]] = {}
        for name, tensor in _as_written(self.model).items():
            spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))  # a head's model has it, a bare not
            found = next((s for s in spellings if s in self.tensors and _equal(self.tensors[s], tensor)), None)
            if found is not None:
                places.setdefault(_place(tensor), []).append(found)
        named = {name: places.get(_place(p), []) for name, p in self.model.named_parameters()}
        return {name: found for name, found in named.items() if found}

    def in_files(self, found: Mapping[str, torch.Tensor]) -> Tensors:
        """What was found, by the names that the parameters have in the files."""
        known = dict(self.model.named_parameters())
        if unknown := [name for name in found if name not in known]:
            raise RecipeError(
                f"'{unknown[0]}' was measured, and the model of '{self.label}' has no such parameter",
                "mend the merge: `measure` returns tensors by the names of `parent.model.named_parameters()`",
            )
        if lacking := [name for name in found if name not in self.names]:
            logger.warning(
                "the files of '%s' hold %d weights in another form than the model: what was measured of them is left "
                "out (%s)",
                self.label,
                len(lacking),
                ", ".join(lacking[:3]),
            )
        if len(lacking) == len(found):
            raise RecipeError(
                f"nothing that was measured of '{self.label}' belongs to a tensor in its files",
                "load and save the model with this version of transformers, or take another merge",
            )
        return {place: tensor for name, tensor in found.items() for place in self.names.get(name, [])}


class _Forward(nn.Module):
    """The task's forward as a module's, for `functional_call`."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> Any:
        return self.task.forward(self.model, batch)


def _as_written(model: nn.Module) -> Tensors:
    """The model's tensors under the names that its library writes."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    return revert_weight_conversion(model, state) if isinstance(model, PreTrainedModel) else state


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tells the parameters of a model apart, and not its tied names."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _equal(stored: torch.Tensor, tensor: torch.Tensor) -> bool:
    return stored.shape == tensor.shape and torch.equal(stored.to(tensor.dtype), tensor.cpu())


# --- kept beside the result ------------------------------------------------------------------------------------------


def measured(
    method: MergeMethod, folders: Sequence[Path], folder: Path, run: MergeRun, accelerator: Any
) -> list[Mapping[str, torch.Tensor]]:
    """What `method.measure` finds of every parent, by the names in its files; mapped from files in `folder`, of which
    those that are there already are taken if they are of the same weights, rows and settings. Nothing on processes
    other than the main one.

    folders: of the parents' files.
    """
    assert method.measures_on is not None
    found: list[Mapping[str, torch.Tensor]] = []
    kept: set[Path] = set()
    for i, source in enumerate(folders):
        parent = run.parent(i)
        path = folder / f"{i}-{_key(method, parent, source)}.safetensors"
        kept.add(path)
        if not _agreed(path, accelerator):
            tensors = parent.in_files(method.measure(parent, run))
            if accelerator.is_main_process:
                _write(path, tensors)
        else:
            logger.info("what was measured of '%s' before is taken", run.names[i])
        del parent  # before the next one is loaded
        if accelerator.is_main_process:
            found.append(opened(path))
    if accelerator.is_main_process:
        for path in set(folder.iterdir()) - kept:
            path.unlink()
    return found


def _key(method: MergeMethod, parent: Parent, source: Path) -> str:
    """All that a measurement depends on."""
    digests = []
    for path in [*weight_files(source), *(p for p in (source / "config.json",) if p.is_file())]:
        with open(path, "rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    rows = preprocessing_key(parent.info, str(method.measures_on), parent.task, parent.loaded, True)
    settings = json.dumps(method.measured_by(), sort_keys=True)
    code = sources.digest({type(method).__module__})
    parts = repr((digests, rows, type(method).__qualname__, settings, code, torch.__version__))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _agreed(path: Path, accelerator: Any) -> bool:
    """Whether the main process has this file, sound: what it says holds for all."""
    there = False
    if accelerator.is_main_process and path.is_file():
        try:
            opened(path)
            there = True
        except IntegrityError as error:
            logger.warning("%s: it is measured again", error.cause)
    if accelerator.num_processes == 1:
        return there
    return bool(accelerator.gather(torch.tensor([there], dtype=torch.int64, device=accelerator.device))[0])


def _write(path: Path, tensors: Tensors) -> None:
    with checkpoint.disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.partial")
        checkpoint.write(staged, checkpoint.tensor_chunks(tensors))
        os.replace(staged, path)
        checkpoint.fsync_folder(path.parent)


def refuse_lacking_data(where: str, name: str, method: MergeMethod, asked: Sequence[tuple[Task, DataInfo]]) -> None:
    """Refuse a merge that asks on rows, or for a loss, which there are not. asked: task and data of every parent."""
    split = method.measures_on
    for task, info in asked if split is not None else ():
        assert split is not None
        if split not in info.splits:
            word = "training" if split == "train" else split
            raise RecipeError(
                f"{where}: {name} asks its parents on {word} data, and there are none",
                f"give data with a {word} split",
            )
        if method.takes_loss(task):
            refuse_lacking_loss(where, name, task, info, split)


def refuse_lacking_loss(where: str, name: str, task: Task, info: DataInfo, split: str) -> None:
    if not task.has_loss:
        raise NotMeaningful(f"{where}: {name} takes the task's loss, and {type(task).__name__} has none of its own")
    if not info.can_measure(split):
        raise RecipeError(f"{where}: {name} needs labelled {split} data", "give the data their labels")
