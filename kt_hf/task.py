"""The task contract: what is predicted. Strategies, merges and ensembles know tasks only by these methods.

Shapes: B rows of a batch, N scored units (examples, tokens), C classes, D width of features.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from kt_hf.errors import NotMeaningful, RecipeError

if TYPE_CHECKING:
    import datasets

    from kt_hf.data import DataInfo
    from kt_hf.inference import Predictor
    from kt_hf.recipe import Model

Batch = dict[str, Any]
Part = tuple[torch.Tensor, torch.Tensor | None, str]
"""A part of a loss: values, weight, unit."""
FILL = -100
"""What fills predictions with two dimensions where a batch's are narrower than the widest."""
FACTS = "kt_hf.json"
"""What an adapter's folder records beside peft's own files."""


@dataclass(frozen=True)
class Role:
    """A column that a task reads. kinds: feature kinds it may have (see `roles.kinds`);
    aliases: usual column names, most telling first. predicted: it holds what is to be found out, so that new rows have
    none (a `label` always does)."""

    name: str
    kinds: tuple[str, ...]
    required: bool = True
    aliases: tuple[str, ...] = ()
    predicted: bool = False


@dataclass
class Loaded:
    """A model with what belongs to it.

    labels: its class names, in the order of its outputs. label_ids: class of the data set -> class of the model.
    origin: what was loaded, for lineage (`path`, `revision`). kind: how it is saved (`transformers`, `adapter`,
    `open_clip`).
    """

    model: nn.Module
    processor: Any = None
    labels: list[str] | None = None
    label_ids: list[int] | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    kind: str = "transformers"
    new_parameters: list[str] = field(default_factory=list)


@dataclass
class Scores:
    """A measurement: `metrics` by name, and per metric that is a mean over examples, (values_N, weights_N).

    Where a metric is no mean over examples, `statistics` gives it as a function of example weights_N, for resampling.
    notes: what must be said of how a metric was computed, such as a signature.
    """

    metrics: dict[str, float]
    examples: dict[str, tuple[np.ndarray, np.ndarray | None]] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@functools.cache
def auto_classes(auto: str) -> frozenset[str]:
    """Names of all classes that an `AutoModel...` of transformers may give."""
    import transformers

    names = getattr(transformers, auto)._model_mapping._model_mapping.values()
    return frozenset(name for found in names for name in ([found] if isinstance(found, str) else found))


class Task:
    """Base of every task. Its settings are the constructor's keyword arguments."""

    api_version: ClassVar[int] = 1
    auto_class: ClassVar[str] = ""
    """The class of transformers that loads its models, such as `AutoModelForImageClassification`."""
    adapter_type: ClassVar[str] = ""
    """What peft calls the task in an adapter's folder, such as `SEQ_CLS`."""
    classes_from: ClassVar[Literal["model", "user"] | None] = None
    """Who names the classes that `kt-hf predict` chooses from."""
    sketches: ClassVar[bool] = True
    """Whether `load` matches the labels of a checkpoint without its weights where torch's default device is meta, as
    `loading.load_model` does. The plan then finds what does not go together."""
    conformance: ClassVar[dict[str, Any]] = {}
    """How the kit tries it: `model`, settings of a tiny fresh model; `roles`, names of the columns that its rows have,
    where those that are required do not do; `settings`, where the constructor needs some."""
    roles: ClassVar[tuple[Role, ...]] = ()
    unit: str = "example"
    """What the loss and the scores are counted in."""
    has_loss: bool = True
    """False where only a strategy can give an objective (dual encoders)."""
    metric: str = "accuracy"
    """The metric that decides, for selection and in the report."""
    greater_is_better: bool = True
    metrics: Sequence[str] = ()
    """Names of what `measure` gives, where the data do not decide that."""
    lower_metrics: ClassVar[tuple[str, ...]] = ()
    """Other metrics of which lower is better."""
    cache_rows: ClassVar[bool] = True
    """Whether preprocessed rows are kept on disk (text) or made on the fly (images)."""
    augments: ClassVar[str] = ""
    """What `data.augment` changes, one of `augmenting.MEDIA`, of which `preprocess` is given a callable; or nothing."""
    length_column: ClassVar[str | None] = None
    """Column of preprocessed rows whose length differs from row to row, if any: batches may be made by it."""
    packs: ClassVar[Literal["bins", "rows"] | None] = None
    """How `training.packing` saves padding. `bins`: several rows share one long row, which is then a row of the batch;
    the loss is about tokens, and `forward` heeds `sequence_ids`. `rows`: batches stay as they are, the model's layers
    leave padding out; `forward` adds `unpadding.arguments(model, batch)` to its call of the model."""
    label_kind: Literal["class", "classes", "number"] | None = None
    """What kind of label the column is to be read as; by default, what it looks like."""
    derived: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Columns of a batch that `collate` derives from others, where looking costs nothing, and those others. A derived
    column is left out where a strategy's `batch` puts something else in the place of one of these: the task must do
    without it, too."""
    waits: ClassVar[dict[str, str]] = {}
    """Operations of the loss that a GPU has to be waited for, and why that cannot be helped. The conformance kit finds
    all others (`kt_hf.testing.waits`); what has the shape of a batch, with weight 0 where nothing counts, waits for
    nothing."""
    random_rows: bool = False
    """Whether training rows are preprocessed anew in every epoch, because `preprocess` draws (a caption out of
    several)."""

    @classmethod
    def architectures(cls) -> frozenset[str]:
        """Names of the classes of transformers that are for this task, by which a model's own files name it."""
        return auto_classes(cls.auto_class) if cls.auto_class else frozenset()

    @classmethod
    def sample(cls, count: int, random: np.random.Generator) -> datasets.Dataset | None:
        """Made-up rows for the conformance kit, with roles for columns. None: it makes them by the roles' kinds."""
        return None

    def fits(self, roles: dict[str, str]) -> bool:
        """Whether rows with these roles (role -> column) are this task's, for a recipe without `task`."""
        return False

    def settle(self, info: DataInfo) -> None:
        """What follows from the data: the deciding metric, the kind of labels. Called once they are read; the same
        again for the same data."""

    def load(self, ref: Model, info: DataInfo) -> Loaded:
        """Load or build the model and its processor, with labels mapped by name."""
        raise RecipeError(f"{type(self).__name__} cannot load models", "choose another task")

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        """Columns by role, N rows -> model inputs, N rows each. `augment` is a callable on what `augments` names, or
        None.

        Raises `RowError` for a row that cannot be used.
        """
        raise NotImplementedError

    def check(self, row: dict[str, Any]) -> None:
        """Raises `RowError` (place 0) for a row, columns by role, that `preprocess` would refuse, as far as that can be
        told without a model and beside files that cannot be decoded. `data.drop=[unreadable]` asks it."""

    def row_limit(self, loaded: Loaded) -> int:
        """The most elements of the `length_column` that a row may have."""
        raise NotImplementedError

    def pack(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Several preprocessed rows in one: lists one after the other, `sequence_ids` counting the rows from 1."""
        lists = [key for key in rows[0] if key != "index"]
        joined: dict[str, Any] = {key: [value for row in rows for value in row[key]] for key in lists}
        sizes = [len(row[lists[0]]) for row in rows]
        return {
            **joined,
            "sequence_ids": [number for number, size in enumerate(sizes, 1) for _ in range(size)],
            "index": rows[0]["index"],
        }

    def collate(self, rows: Sequence[dict[str, Any]], loaded: Loaded) -> Batch:
        """Preprocessed rows -> a flat batch, always with `index`: tensors, and lists with an entry for each row of what
        Python has to know, which stay on the host."""
        raise NotImplementedError

    def part(self, batch: Batch, start: int, stop: int) -> Batch:
        """The rows from `start` to `stop` of a batch, for running it in chunks. To be told by tasks for which the model
        sees several rows (windows of a text) for one of the data."""
        rows = len(batch["index"])
        tensors = {k for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() > 0 and len(v) == rows}
        own = tensors | {k for k, v in batch.items() if isinstance(v, list)}
        return {k: v[start:stop] if k in own else v for k, v in batch.items()}

    def current(self, batch: Batch, before: Batch) -> Batch:
        """A batch without `derived` columns of what is not as it was before."""
        stale = {k for k, of in self.derived.items() if any(batch.get(name) is not before.get(name) for name in of)}
        return {k: v for k, v in batch.items() if k not in stale} if stale & batch.keys() else batch

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        """Run the model without labels."""
        raise NotImplementedError

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> Part | list[Part]:
        """(values, weight, unit), unreduced, in float32; or several of these, each a mean by its own unit, which are
        added."""
        raise NotImplementedError

    def class_counts(self, rows: datasets.Dataset, loaded: Loaded) -> np.ndarray | None:
        """counts_C: how many values of the loss these rows have of every class of the model. None where a value of the
        loss is not about one class."""
        if "label" not in rows.column_names or loaded.label_ids is None or self.unit == "class":
            return None
        flat = [y for row in rows["label"][:] for y in (row if isinstance(row, list) else [row])]
        known = [loaded.label_ids[y] for y in flat if y is not None and y >= 0]
        return np.bincount(known, minlength=len(loaded.labels or []))

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        """How many of each unit the batch holds; at least `example`."""
        return {"example": len(batch["index"])}

    def choose(self, model: nn.Module, batch: Batch) -> Batch:
        """What the model decides of a training batch before it is run on it, such as which of its rows make a hard
        pair. Without gradient, under a seed, once per micro-batch: teachers and chunks see the same."""
        return batch

    @property
    def has_scores(self) -> bool:
        """Whether it has `scores` of its own."""
        return type(self).scores is not Task.scores

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores_NC, weight_N): logits over classes for every unit, weight 0 where a unit does not count."""
        raise NotMeaningful(f"{type(self).__name__} has no scores over classes", "use another strategy or task")

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """features_BD: one vector per row."""
        raise NotMeaningful(f"{type(self).__name__} has no features", "use another strategy or task")

    def context(
        self, model: nn.Module, loaded: Loaded, info: DataInfo, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """What `predict` needs once per evaluation, such as the embeddings of the class names."""
        return {}

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Predictions with B rows each, compact, references included (`label`). Where they have two dimensions, the
        second may differ from batch to batch: narrower ones are filled with `FILL` on the right."""
        raise NotImplementedError

    def finish(
        self, predictions: dict[str, np.ndarray], loaded: Loaded, rows: datasets.Dataset
    ) -> dict[str, np.ndarray]:
        """What is done once to the gathered predictions of a split, because it takes the processor or the rows as they
        were before preprocessing: decoding, counts of matches. N rows each, in the order of `index`, as `rows` are;
        `measure` and `table` see the result, and have neither."""
        return predictions

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Predictions of an ensemble from its combined scores (log-probabilities)."""
        raise NotMeaningful(f"{type(self).__name__} has no output ensembles", "merge in weight space instead")

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: DataInfo) -> Scores:
        """Metrics of a whole evaluation set, predictions sorted by `index`."""
        raise NotImplementedError

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: DataInfo) -> dict[str, Any]:
        """Columns of predictions.parquet, N rows each, from which `measure` can be recomputed."""
        raise NotImplementedError

    def answer(self, predictor: Predictor, info: DataInfo, max_new_tokens: int) -> dict[str, list[Any]]:
        """Columns of `kt-hf predict` for the rows of `test`, N rows each, `prediction` first."""
        raise RecipeError(f"{type(self).__name__} does not predict rows", "use kt-hf evaluate")

    def majority(
        self, train: dict[str, Any], predictions: dict[str, np.ndarray], loaded: Loaded, info: DataInfo
    ) -> Scores | None:
        """What always answering the most frequent training label would score; None where that makes no sense."""
        return None

    def layers(self, model: nn.Module) -> list[list[str]]:
        """Parameter names of the backbone, layer by layer from the input (embeddings first); the head is not in it."""
        raise RecipeError(f"{type(self).__name__} does not know its layers", "freeze by pattern instead")

    def head(self, model: nn.Module) -> list[str]:
        """Module names of the head: what is new for a task and is trained in full beside adapters."""
        return []

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        """What teacher and student must agree on: `vocabulary`, `labels`, `normalisation`; compared key by key."""
        return {"labels": loaded.labels}

    def save(self, loaded: Loaded, folder: Path) -> None:
        """Write a model directory that plain `from_pretrained` loads."""
        loaded.model.save_pretrained(folder)  # type: ignore[operator]
        if hasattr(loaded.model, "peft_config"):  # an adapter's folder has no config.json to hold the labels
            (folder / FACTS).write_text(json.dumps({"labels": loaded.labels}))
        if loaded.processor is not None:
            loaded.processor.save_pretrained(folder)
