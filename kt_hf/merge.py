"""The merge contract: weight space, no training loop. The engine streams over the parents' tensors and calls `tensor`.

Shapes: M parents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from kt_hf.errors import RecipeError

if TYPE_CHECKING:
    from kt_hf.measuring import Parent
    from kt_hf.merging import MergeRun
    from kt_hf.task import Task


class MergeMethod:
    """Base of every merge. Its settings are the constructor's keyword arguments."""

    api_version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    needs_validation: ClassVar[bool] = False
    """Whether `fit` chooses on validation data."""
    measures_on: ClassVar[Literal["train", "validation"] | None] = None
    """The split on whose rows `measure` asks every parent; None: there is nothing to ask."""
    min_parents: ClassVar[int] = 1
    max_parents: ClassVar[int | None] = None
    """None: any number."""
    needs_base: ClassVar[bool] = False
    """Whether it is about task vectors: `tensor` then always gets the base's tensor."""
    order_matters: ClassVar[bool] = False
    """Whether the parents in another order may give another model."""
    elementwise: ClassVar[bool] = False
    """Whether an element of the result depends on that element of the inputs and on the name alone. The engine then
    hands out flat pieces of a tensor, in buffers that it uses again, and memory does not grow with the tensors; else
    `tensor` gets whole tensors."""
    as_stored: ClassVar[bool] = False
    """Whether `tensor` takes the parents' tensors whole as their files have them, in any precision, and converts them
    itself, part by part, to that of the base or, without `needs_base`, of the first parent, which is that of the
    result: the memory of a copy of each is then spared. They are mapped from the files: writing into them would end the
    process."""

    linear: ClassVar[bool] = False
    """Whether the result is a weighted sum of the inputs, with weights that go by the name alone. Such a merge of
    adapters is exact without a decomposition."""

    def check(self, num_parents: int) -> None:
        """Refuse, by a `RecipeError`, settings that do not fit so many parents. Called before anything is read."""

    def takes_loss(self, task: Task) -> bool:
        """Whether `measure`, or what `fit` does with the parents, takes the task's loss, and with it the rows' labels.
        What has none of its own is then refused before anything is run."""
        return False

    def measure(self, parent: Parent, run: MergeRun) -> dict[str, torch.Tensor]:
        """What a parent must be asked before the tensors are merged: name of a parameter of `parent.model` -> what was
        found, of any shape. Called where `measures_on` names a split, on all processes, each with its share of the
        rows (`parent.sample`); it returns the same on all (`parent.sum`). What it found is kept until the stage is
        finished, so that a merge which was killed does not ask again."""
        raise NotImplementedError

    def measured_by(self) -> dict[str, Any]:
        """The settings that `measure` heeds: what was measured under others is not taken."""
        return {}

    def fit(self, run: MergeRun) -> None:
        """Before the tensors: choose weights. `run.score(weights_M)` is the validation metric of that weighted mean,
        `run.parent(i)` a parent, loaded, with its data."""

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        """The merged tensor from the parents' (float32, same shape) and the base's, in their dtype: float64 where the
        user asked for it. stats: None, or what `measure` found for this name, of every parent; None for a parent of
        which it found nothing, as for buffers. They are not to be written to, and no pieces: what measures is not
        `elementwise`. Called from several threads, and in any order of names."""
        raise NotImplementedError

    def for_tensors(self, names: Sequence[str]) -> Mapping[str, MergeMethod]:
        """name -> the method that merges that tensor: this one, unless its settings vary (kt_hf/layerwise.py)."""
        return dict.fromkeys(names, self)

    def summary(self) -> dict[str, Any]:
        """What `fit` decided, for the report."""
        return {}


def check_parents(name: str, method: MergeMethod, parents: Sequence[str], base: str | None) -> None:
    """Refuse a merge of these parents (as they are written) onto this base; nothing is read for it."""
    least, most = method.min_parents, method.max_parents
    if len(parents) < least:
        raise RecipeError(f"{len(parents)} parents, {name} needs {least}", "name more models")
    if most is not None and len(parents) > most:
        raise RecipeError(f"{len(parents)} parents, {name} takes {most} at most", "name fewer models")
    if method.needs_base and base is None:
        raise RecipeError(
            f"no base, and {name} merges what the parents have learnt since",
            "name the model that they were trained from: base=DIR_OR_HUB_ID or @stage",
        )
    if method.needs_base and base in parents:
        raise RecipeError(f"the base '{base}' is among the parents, where it has learnt nothing", "leave it out there")
    method.check(len(parents))


def check_weights(name: str, weights: Sequence[float] | None, num_parents: int, positive: bool = False) -> None:
    """Refuse weights that are not one per parent, that are all 0, or, where they are shares of a mean, that do not add
    up to something or hold negative ones."""
    if weights is None:
        return
    if len(weights) != num_parents:
        raise RecipeError(
            f"{name}.weights: {len(weights)} weights for {num_parents} parents", "give one weight per parent"
        )
    if not any(weights):
        raise RecipeError(f"{name}.weights: all are 0", "give a parent another weight")
    if positive and min(weights) < 0:
        raise RecipeError(f"{name}.weights: {min(weights)} as a share of a mean", "give weights of 0 or more")


def check_fraction(name: str, value: float, above: float = 0.0) -> None:
    """Refuse a fraction outside of (above, 1]."""
    if not above < value <= 1:
        raise RecipeError(f"{name}: got {value}", f"a number above {above:g}, 1 at most")
