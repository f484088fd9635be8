"""Labels as tasks see them: the number of a class, a list of such numbers (tags of tokens, several classes of a text),
or a number as it is. Class names are one list for all splits.

Shapes: N rows of a split, V values in all of its lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kt_hf.errors import DataError, RecipeError, nearest

if TYPE_CHECKING:
    import datasets

Kind = Literal["class", "classes", "number"]


@dataclass
class Labels:
    """kind: see the top of this file. names: of the classes, in their order; None for numbers. places: class name ->
    its number, -1 for one that is not wanted."""

    kind: Kind
    names: list[str] | None
    places: dict[str, int]

    def encode(self, rows: datasets.Dataset, unknown: int = -1) -> Any:
        """The column `label` with numbers for classes, -1 for a row without a label, `unknown` for a strange value."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column, feature = _column(rows), rows.features["label"]
        if self.kind == "number":
            return pc.cast(column, pa.float32())
        if self.kind == "class":
            return positions(column, feature, self.places, unknown)
        flat, lengths_N = flatten(column)
        numbers_V = positions(flat, inner(feature), self.places, unknown)
        offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers_V))


def kind_of(feature: Any, wanted: Kind | None = None) -> Kind:
    """What kind of label a column holds, unless the task says so."""
    if wanted is not None:
        return wanted
    if inner(feature) is not None:
        return "classes"
    return "number" if str(getattr(feature, "dtype", "")).startswith(("float", "double", "decimal")) else "class"


def inner(feature: Any) -> Any:
    """The feature of a list's values; None where it is no list."""
    found = getattr(feature, "feature", None)
    return feature[0] if found is None and isinstance(feature, list) else found


def flatten(column: Any) -> tuple[Any, np.ndarray]:
    """(values_V, lengths_N) of a column of lists; a missing list is an empty one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(column), 0)
    flat = pc.list_flatten(column)
    return flat, np.asarray(lengths.to_numpy() if isinstance(lengths, pa.ChunkedArray) else lengths)


def settle(splits: dict[str, datasets.Dataset], kind: Kind, wanted: list[Any] | None, more: bool) -> Labels:
    """Find the classes. wanted: those to keep, in this order. more: the rows may be only some of all, so that classes
    which they lack may be wanted.

    Raises `RecipeError` for a wanted class that is not there, `DataError` for a column that holds no classes.
    """
    if kind == "number":
        if wanted:
            raise RecipeError("data.labels: the labels are numbers, no classes", "leave data.labels out")
        return Labels(kind, None, {})
    import datasets

    names = class_names(splits, kind)
    if kind == "classes" and wanted:
        raise RecipeError("data.labels: rows have lists of classes, of which none can be left out", "leave it out")
    first = next(rows.features["label"] for rows in splits.values() if "label" in rows.column_names)
    if more and not isinstance(first, datasets.ClassLabel):
        names += [str(label) for label in wanted or [] if str(label) not in names]
    chosen = [_class_number(label, names) for label in wanted] if wanted else list(range(len(names)))
    table = np.full(len(names), -1)
    table[chosen] = np.arange(len(chosen))
    return Labels(kind, [names[i] for i in chosen], {name: int(table[i]) for i, name in enumerate(names)})


def class_names(splits: dict[str, datasets.Dataset], kind: Kind) -> list[str]:
    """Named classes keep their order, others are sorted; splits match by name."""
    import datasets
    import pyarrow.compute as pc

    with_labels = {split: rows for split, rows in splits.items() if "label" in rows.column_names}
    features = {split: rows.features["label"] for split, rows in with_labels.items()}
    columns: dict[str, Any] = {split: _column(rows) for split, rows in with_labels.items()}
    if kind == "classes":
        features = {split: inner(feature) for split, feature in features.items()}
        columns = {split: flatten(column)[0] for split, column in columns.items()}
    named = [feature for feature in features.values() if isinstance(feature, datasets.ClassLabel)]
    order: list[Any] = list(dict.fromkeys(name for feature in named for name in feature.names))
    if len(named) < len(features):
        values = {v for s in columns if features[s] not in named for v in pc.unique(columns[s]).to_pylist()} - {None}
        in_training = set(pc.unique(columns["train"]).to_pylist()) if "train" in columns else values
        if any(isinstance(v, int) for v in values) and -1 not in in_training:
            values.discard(-1)  # by custom, -1 is a row without a label; but not where training rows have it
        values = {str(v) for v in values} if named else values
        order += sorted(values - set(order), key=lambda v: (isinstance(v, str), v))
        _refuse_free_text(order, len(next(iter(columns.values()))))
    return [str(value) for value in order]


def positions(column: Any, feature: Any, places: dict[str, int], unknown: int) -> np.ndarray:
    """The number of every value's class; -1 for none, `unknown` for a value without a place."""
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    encoded = pc.dictionary_encode(column)
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    values = encoded.dictionary.to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        values = [feature.names[v] if v is not None and 0 <= v < feature.num_classes else None for v in values]
    table = np.array([-1 if value is None else places.get(str(value), unknown) for value in values] + [-1])
    return table[encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)]


def _column(rows: datasets.Dataset) -> Any:
    from kt_hf.reading import arrow

    return arrow(rows, "label")


def _class_number(label: Any, names: list[str]) -> int:
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise RecipeError(f"data.labels: there is no class '{label}'", nearest(str(label), names))


def _refuse_free_text(names: list[Any], values: int) -> None:
    if len(names) > max(100, values // 2):
        cause = f"the column of the classes holds {len(names)} different values in {values} rows"
        raise DataError(cause, "this looks like no class; name another: data.columns.label=COLUMN")
