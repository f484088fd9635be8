"""Data sets as tasks see them: read, given roles, split, cleaned and cut down. What comes out has one column per role
of the task, and `index`, the row's number in its split as it was read.

Shapes: N rows of a split.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kt_hf import labels, unusable
from kt_hf.errors import DataError, RecipeError, nearest
from kt_hf.labels import Labels
from kt_hf.nouns import Data
from kt_hf.reading import HEAD, SPLITS, arrow, ends, in_memory, mixed_row, reached, read, read_counted, read_streamed
from kt_hf.roles import find_roles, kinds
from kt_hf.streaming import Row, Source
from kt_hf.task import Task

__all__ = ["SPLITS", "DataInfo", "find_roles", "kinds", "prepare", "read"]

logger = logging.getLogger(__name__)

_TEXT_ROLES = ("text", "prompt", "completion", "messages", "tokens", "question", "context", "source", "target")
_FILES = (datasets.Image, datasets.Audio, datasets.Video)
"""Columns of encoded files."""
_HEAD = 65536
"""Bytes of an image file that is not embedded in the data set by which copies are recognised, with its size."""


@dataclass
class DataInfo:
    """A data set as a task sees it. `splits` hold the role columns and `index`; `counts` what was found or dropped.
    stream: the training rows, where they are read as they are used; `splits` then has the first of them."""

    name: str
    splits: dict[str, datasets.Dataset]
    roles: dict[str, str]
    labels: list[str] | None
    fingerprint: str
    counts: dict[str, int] = field(default_factory=dict)
    path: str = ""
    stream: Source | None = None

    @property
    def num_training_rows(self) -> int | None:
        """None where nobody knows, because they are streamed."""
        return None if self.stream is not None else len(self.splits["train"])

    @property
    def evaluation_split(self) -> str:
        """The split that reports are made on: test, where it has labels, else validation."""
        return next((split for split in ("test", "validation") if self.can_measure(split)), "train")

    def can_measure(self, split: str) -> bool:
        """Whether there is such a split, with labels where the task has some."""
        return split in self.splits and ("label" not in self.roles or _has_label(self.splits[split]))

    def texts(self) -> Iterator[str]:
        """The training texts, for a tokenizer that is trained on them."""
        train = self.splits.get("train") or next(iter(self.splits.values()))
        for role in ("text", "text_pair", "prompt", "completion", *_TEXT_ROLES[3:]):
            if role not in self.roles:
                continue
            for value in train[role]:
                for part in value if isinstance(value, list) else [value]:
                    text = part.get("content") if isinstance(part, dict) else part
                    if isinstance(text, str):
                        yield text
        yield from self.labels or []

    def rows(self, split: str, limit: int | None = None) -> datasets.Dataset:
        return self.splits[split]


@dataclass
class _Part:
    """A split at work: its rows as they were read, and which of them are kept. Selected from once, at the end."""

    rows: datasets.Dataset
    keep: np.ndarray
    classes: np.ndarray | None = None
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    def narrow(self, mask_N: np.ndarray) -> None:
        self.keep = self.keep[mask_N[self.keep]]


def prepare(name: str, data: Data, task: Task) -> DataInfo:
    """Read a data set and make it fit a task: roles, labels by name, subsets, cleaning, splits.

    Raises `DataError` for data that cannot be used, `RecipeError` for settings that do not fit them.
    """
    if data.streaming:
        (found, opened), unreadable = read_streamed(data), 0
        logger.info(
            "data '%s': training rows are streamed; what is said of them beforehand is about the first %d",
            name,
            len(found["train"]),
        )
    else:
        (found, unreadable), opened = read_counted(data), None
    kept = next(iter(found.values())).features
    found = datasets.DatasetDict({split: reached(rows, data) for split, rows in found.items()})
    first = next(iter(found.values()))
    _refuse_mixed(first, task, data)
    roles = find_roles(first.features, task.roles, data.columns)
    parts: dict[str, _Part] = {}
    for split, rows in found.items():
        keep = _where(rows, data.where, split)
        parts[split] = _part(rows if rows._indices is None else rows.flatten_indices(), roles, split, keep)
    settled = _settle_labels(parts, roles, data, task)
    for part in parts.values():
        part.hashes = row_hashes(part.rows, [role for role in roles if role != "label"])
    drop = set(data.drop or [])
    counts = _clean(parts, roles, drop, name, task)
    if unreadable:
        counts["unreadable"] = counts.get("unreadable", 0) + unreadable
        logger.warning("data '%s': %d unreadable rows, dropped", name, unreadable)
    _hold_out(parts, data, name)
    stream = None
    if opened is not None:
        apart = [parts[split] for split in parts if split not in found or (split != "train" and "overlap" in drop)]
        held_out = np.concatenate([np.empty(0, np.uint64), *(part.hashes[part.keep] for part in apart)])
        refine = _Refine(name, data, kept, roles, settled, held_out)
        stream = Source(opened, refine, data.shuffle_buffer)
    for split, part in parts.items():
        _limit(part, split, data)
        if stream is None or split != "train":
            counts[split] = len(part.keep)
        if not len(part.keep):
            raise DataError(
                f"data '{name}': no rows are left in {split}", "loosen data.where, data.labels or data.drop"
            )
    if data.label_noise:
        _spoil_labels(parts, settled, data, name)
    names = settled.names if settled is not None else None
    if settled is not None and settled.kind == "class":
        _warn_of_classes(parts, settled.names or [], name, all_known=stream is None)
    splits = {split: _selected(part) for split, part in parts.items()}
    fingerprint = _fingerprint(parts, names, "" if opened is None else ends(data, opened))
    return DataInfo(name, splits, roles, names, fingerprint, counts, data.path, stream)


def _part(
    rows: datasets.Dataset, roles: dict[str, str], split: str, keep: np.ndarray, numbers_N: Sequence[int] | None = None
) -> _Part:
    numbers_N = range(len(rows)) if numbers_N is None else numbers_N
    return _Part(_rename(rows, roles, split).add_column("index", np.asarray(numbers_N)), keep)


def _selected(part: _Part) -> datasets.Dataset:
    return part.rows if len(part.keep) == len(part.rows) else part.rows.select(part.keep)


def _fingerprint(parts: dict[str, _Part], names: list[str] | None, more: str) -> str:
    """What preprocessed rows and resumed trainings depend on: the rows, their order, their classes."""
    digest = hashlib.sha256((repr(names) + more).encode())
    for split in sorted(parts):
        part = parts[split]
        digest.update(f"{split} {len(part.keep)} ".encode())
        digest.update(part.hashes[part.keep].tobytes() + part.keep.astype(np.int64).tobytes())
        if part.classes is not None:
            digest.update(part.classes[part.keep].tobytes())
        elif "label" in part.rows.column_names:
            digest.update(row_hashes(part.rows, ["label"])[part.keep].tobytes())
    return digest.hexdigest()[:16]


# --- columns --------------------------------------------------------------------------------------------------------


def _refuse_mixed(rows: datasets.Dataset, task: Task, data: Data) -> None:
    """JSON lines whose column holds numbers here and text there, where the task would read it."""
    wanted = set((data.columns or {}).values()) | {n for role in task.roles for n in (role.name, *role.aliases)}
    for column, feature in rows.features.items():
        if column in wanted and type(feature).__name__ == "Json":
            mixed = mixed_row(rows, column)
            if mixed is not None:
                cause = f"data '{data.path}': column '{column}' mixes {mixed[1]} (first in row {mixed[0]})"
                raise DataError(cause, "write one kind of value in a column")


def _where(rows: datasets.Dataset, where: dict[str, Any] | None, split: str, none_do: bool = False) -> np.ndarray:
    """Row numbers that have the wanted values. Classes go by name or number. none_do: there may be none."""
    keep = np.arange(len(rows))
    for column, wanted in (where or {}).items():
        if column not in rows.column_names:
            raise RecipeError(f"data.where.{column}: there is no such column", nearest(column, rows.column_names))
        feature = rows.features[column]
        names = {str(w) for w in (wanted if isinstance(wanted, list) else [wanted])}
        values = np.asarray(rows.select_columns([column]).with_format("arrow")[:][column].to_pylist(), dtype=object)
        unique = {repr(v): v for v in values}
        text = {key: str(value) for key, value in unique.items()}
        if isinstance(feature, datasets.ClassLabel):
            text = {k: feature.names[v] if v is not None and v >= 0 else str(v) for k, v in unique.items()}
        chosen = {k for k, v in unique.items() if text[k] in names or str(v) in names}
        mask_N = np.fromiter((repr(v) in chosen for v in values), dtype=bool, count=len(values))
        if not mask_N[keep].any() and not none_do:
            some = list(dict.fromkeys(text.values()))[:50]
            raise DataError(f"data.where.{column}: no row of {split} has {wanted!r}", nearest(sorted(names)[0], some))
        keep = keep[mask_N[keep]]
    return keep


def _rename(rows: datasets.Dataset, roles: dict[str, str], split: str) -> datasets.Dataset:
    """The role columns under the roles' names. Labels may be absent outside of training; nothing else may."""
    absent = [column for role, column in roles.items() if column not in rows.column_names and role != "label"]
    if absent or (split == "train" and "label" in roles and roles["label"] not in rows.column_names):
        column = absent[0] if absent else roles["label"]
        raise DataError(
            f"the split {split} has no column '{column}'", f"its columns are {', '.join(rows.column_names)}"
        )
    present = {role: column for role, column in roles.items() if column in rows.column_names}
    rows = rows.select_columns(list(present.values()))
    moves = {column: role for role, column in present.items() if column != role}
    aside = {column: f"{column}__" for column in moves if column in moves.values()}
    for column in present.values():
        feature = rows.features[column]
        if isinstance(feature, (datasets.Audio, datasets.Video)):  # decoded by the tasks, with what they have for it
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows.rename_columns(aside).rename_columns({aside.get(c, c): r for c, r in moves.items()}) if moves else rows


# --- labels ---------------------------------------------------------------------------------------------------------


def _settle_labels(parts: dict[str, _Part], roles: dict[str, str], data: Data, task: Task) -> Labels | None:
    """Give all rows labels as their kind has them; with `data.labels`, keep only rows of those classes."""
    if "label" not in roles:
        if data.labels:
            raise RecipeError("data.labels: the data have no class column", "name it: data.columns.label=COLUMN")
        return None
    splits = {split: part.rows for split, part in parts.items()}
    feature = next(rows.features["label"] for rows in splits.values() if "label" in rows.column_names)
    found = labels.settle(splits, labels.kind_of(feature, task.label_kind), data.labels, more=data.streaming)
    for part in parts.values():
        has = "label" in part.rows.column_names
        if not has and found.kind != "class":
            continue
        column = found.encode(part.rows) if has else np.full(len(part.rows), -1)
        part.rows = (part.rows.remove_columns("label") if has else part.rows).add_column("label", column)
        if found.kind == "class":
            part.classes = column
            if data.labels:
                part.narrow(part.classes >= 0)
    train = parts.get("train")
    if train is not None and len(train.keep) and not _has_label(train.rows.select(train.keep)):
        raise DataError("no training row has a label", "name the column of the classes: data.columns.label=COLUMN")
    return found


def _has_label(rows: datasets.Dataset) -> bool:
    """Whether any row has one."""
    if "label" not in rows.column_names:
        return False
    values = rows.select_columns(["label"]).with_format("arrow")[:]["label"]
    if pa.types.is_integer(values.type):
        return bool(pc.any(pc.greater_equal(values, 0)).as_py())
    return values.null_count < len(values)


def _warn_of_classes(parts: dict[str, _Part], names: list[str], name: str, all_known: bool) -> None:
    """all_known: whether the training rows here are all that there are."""
    for split, part in parts.items():
        assert part.classes is not None
        counts = np.bincount(part.classes[part.keep][part.classes[part.keep] >= 0], minlength=len(names))
        if (counts > 0).sum() == 1 and counts.sum() > 1:
            only = names[int(counts.argmax())]
            logger.warning("data '%s': all %d rows of %s have a single class, '%s'", name, counts.sum(), split, only)
        elif split == "train" and all_known and (counts == 0).any():
            missing = [label for label, count in zip(names, counts, strict=True) if not count]
            shown = ", ".join(missing[:5])
            logger.warning("data '%s': %d classes have no training rows: %s", name, len(missing), shown)


# --- rows -----------------------------------------------------------------------------------------------------------


def row_hashes(rows: datasets.Dataset, roles: list[str]) -> np.ndarray:
    """64-bit hashes of what a row holds, images as their encoded bytes."""
    total = np.zeros(len(rows), dtype=np.uint64)
    for role in roles:
        digests = bytearray()
        for values in _contents(rows, role):
            for value in values:
                digests += hashlib.blake2b(value, digest_size=8).digest()
        total = total * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(bytes(digests), dtype="<u8")
    return total


def _contents(rows: datasets.Dataset, role: str, size: int = 1000) -> Iterator[list[bytes]]:
    """A column's values as bytes, some rows at a time."""
    image = isinstance(rows.features[role], _FILES)
    for chunk in arrow(rows, role).chunks:
        for start in range(0, len(chunk), size):
            values = chunk.slice(start, size).to_pylist()
            yield [
                _image_content(v) if image else v.encode() if isinstance(v, str) else repr(v).encode() for v in values
            ]


def _image_content(value: dict[str, Any] | None) -> bytes:
    if value is None or value["bytes"] is not None:
        return b"" if value is None else value["bytes"]
    try:
        with open(value["path"], "rb") as file:
            return str(file.seek(0, 2)).encode() + (file.seek(0), file.read(_HEAD))[1]
    except OSError:
        return str(value["path"]).encode()


def _clean(parts: dict[str, _Part], roles: dict[str, str], drop: set[str], name: str, task: Task) -> dict[str, int]:
    """Count rows that are empty, without a label, repeated or shared between splits; drop the kinds that `drop` names.

    Repeated and shared rows, and those without a label, leave `train` only: what is measured on stays as it is.
    """
    masks: dict[str, dict[str, np.ndarray]] = {
        split: {"empty": _empty(part.rows, roles)} for split, part in parts.items()
    }
    train = parts.get("train")
    if train is not None:
        inside = np.zeros(len(train.rows), dtype=bool)
        inside[train.keep] = True
        _, first = np.unique(train.hashes[train.keep], return_index=True)
        repeated = inside.copy()
        repeated[train.keep[first]] = False
        held_out = [part.hashes[part.keep] for split, part in parts.items() if split != "train"]
        shared = np.isin(train.hashes, np.concatenate(held_out)) if held_out else np.zeros(len(inside), dtype=bool)
        masks["train"].update(duplicates=repeated, overlap=shared & inside)
        if train.classes is not None:
            masks["train"]["unlabelled"] = (train.classes < 0) & inside
    if "unreadable" in drop:  # decodes every file
        for split, part in parts.items():
            masks[split]["unreadable"] = unusable.find(part.rows, part.keep, task, f"{split} of '{name}'")
    counts = {}
    for kind, what in (
        ("unreadable", "rows that cannot be used"),
        ("empty", "empty rows"),
        ("unlabelled", "training rows without a label"),
        ("duplicates", "repeated training rows"),
        ("overlap", "training rows that are also in validation or test"),
    ):
        if kind == "unreadable" and kind not in drop:  # nobody has looked
            continue
        counts[kind] = int(sum(m[kind][parts[split].keep].sum() for split, m in masks.items() if kind in m))
        if counts[kind]:
            end = ", dropped" if kind in drop else f"; data.drop=[{kind}] drops them"
            logger.warning("data '%s': %d %s%s", name, counts[kind], what, end)
    for split, part in parts.items():
        for kind in drop & set(masks[split]):
            part.narrow(~masks[split][kind])
        _fill_gaps(part, split, name)
    return counts


def _empty(rows: datasets.Dataset, roles: dict[str, str]) -> np.ndarray:
    """Rows without an image, a sound, a clip or a table, or with nothing in one of their texts."""
    bad_N = np.zeros(len(rows), dtype=bool)
    for role in roles:
        column = arrow(rows, role)
        if isinstance(rows.features[role], _FILES):
            bad_N |= _no_image(column)
        elif role != "label" and {kind.rstrip("?") for kind in kinds(rows.features[role])} & {"images", "numbers"}:
            bad_N |= _mask(pc.equal(pc.fill_null(pc.list_value_length(column), 0), 0))
        elif role in _TEXT_ROLES:
            if _is_text(column):
                bad_N |= _mask(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)).fill_null(0), 0))
            else:
                bad_N |= np.fromiter((_says_nothing(turns) for turns in column.to_pylist()), bool, len(column))
    return bad_N


def _says_nothing(turns: list[Any] | None) -> bool:
    """A list of captions or a chat without a word: nothing in it, or nothing with content."""
    contents = [turn.get("content") if isinstance(turn, dict) else turn for turn in turns or []]
    return not any(content.strip() if isinstance(content, str) else content for content in contents)


def _mask(values: Any) -> np.ndarray:
    return np.asarray(values.to_numpy() if isinstance(values, pa.ChunkedArray) else values, dtype=bool)


def _is_text(column: Any) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _no_image(column: Any) -> np.ndarray:
    neither = pc.and_(pc.is_null(pc.struct_field(column, "bytes")), pc.is_null(pc.struct_field(column, "path")))
    return _mask(pc.or_(neither, pc.is_null(column)))


def _fill_gaps(part: _Part, split: str, name: str) -> None:
    """Missing texts become empty ones; a missing image cannot be made up."""
    order = part.rows.column_names
    for role, feature in list(part.rows.features.items()):
        column = arrow(part.rows, role)
        if isinstance(feature, _FILES):
            gaps = part.keep[_no_image(column)[part.keep]]
            if len(gaps):
                first = part.rows.select_columns(["index"])[int(gaps[0])]["index"]
                raise DataError(
                    f"data '{name}': {len(gaps)} rows of {split} have no {role}, row {first} the first of them",
                    "leave them out: data.drop=[empty]",
                )
        elif column.null_count and _is_text(column):
            filled = pc.fill_null(column, "").combine_chunks()
            part.rows = part.rows.remove_columns(role).add_column(role, filled, feature=feature).select_columns(order)


# --- splits ---------------------------------------------------------------------------------------------------------


def _hold_out(parts: dict[str, _Part], data: Data, name: str) -> None:
    """A validation split from the training rows where there is none: stratified by class as far as rows allow; copies
    of a row
    stay together."""
    if "validation" in parts or "train" not in parts:
        return
    train = parts["train"]
    count = len(train.keep)
    size = int(data.validation_size) if data.validation_size >= 1 else max(1, round(count * data.validation_size))
    if size >= count:
        cause = f"data '{name}': validation_size asks for {size} of {count} training rows"
        raise DataError(cause, "give fewer, or a validation split")
    order = train.keep[np.random.default_rng([data.seed, 1]).permutation(count)]
    if train.classes is not None:
        classes = train.classes[order]
        rank = np.zeros(count)
        for c in np.unique(classes):  # take the same share of every class
            members = np.flatnonzero(classes == c)
            rank[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(rank, kind="stable")]
    held = np.isin(train.hashes[train.keep], train.hashes[order[:size]])
    if held.all():
        raise DataError(f"data '{name}': all training rows are copies of one another", "give a validation split")
    parts["validation"] = _Part(train.rows, train.keep[held], train.classes, train.hashes)
    train.keep = train.keep[~held]
    logger.info("data '%s': no validation split; %d training rows serve (data.validation_size)", name, int(held.sum()))


def _limit(part: _Part, split: str, data: Data) -> None:
    """`k_shot` training rows of every class, and at most `max_examples` of a split, drawn with the data's seed."""
    random = np.random.default_rng([data.seed, 2])
    if split == "train" and data.k_shot:
        if part.classes is None:
            raise RecipeError("data.k_shot: the data have no classes", "use data.max_examples")
        order = random.permutation(part.keep)
        classes = part.classes[order]
        present = np.unique(classes[classes >= 0])
        part.keep = np.sort(np.concatenate([order[classes == c][: data.k_shot] for c in present]))
        short = sum(int((classes == c).sum() < data.k_shot) for c in present)
        if short:
            logger.warning("data.k_shot=%d: %d classes have fewer training rows", data.k_shot, short)
    limits = data.max_examples or {}
    limit = limits if isinstance(limits, int) else limits.get(split)
    if limit and limit < len(part.keep):
        part.keep = np.sort(random.permutation(part.keep)[:limit])


def _spoil_labels(parts: dict[str, _Part], settled: Labels | None, data: Data, name: str) -> None:
    """Give `label_noise` of the training rows another class, any of the others, drawn with the data's seed."""
    part = parts.get("train")
    if part is None or part.classes is None or settled is None or len(settled.names or []) < 2:
        raise RecipeError("data.label_noise: the training rows have no classes to confuse", "leave it out")
    random = np.random.default_rng([data.seed, 3])
    labelled = part.keep[part.classes[part.keep] >= 0]
    chosen = random.permutation(labelled)[: round(data.label_noise * len(labelled))]
    part.classes = part.classes.copy()
    count = len(settled.names or [])
    part.classes[chosen] = (part.classes[chosen] + random.integers(1, count, len(chosen))) % count
    part.rows = part.rows.remove_columns("label").add_column("label", part.classes)
    logger.warning("data '%s': %d training labels were replaced by others (data.label_noise)", name, len(chosen))


# --- streams --------------------------------------------------------------------------------------------------------


@dataclass
class _Refine:
    """What `prepare` does to training rows, done to some of a stream's.

    held_out: hashes of rows that are not to be trained on.
    """

    name: str
    data: Data
    features: datasets.Features
    roles: dict[str, str]
    labels: Labels | None
    held_out: np.ndarray

    def __call__(self, rows: list[Row], numbers: Sequence[int]) -> list[Row]:
        found = reached(in_memory(rows, self.features), self.data)
        keep = _where(found, self.data.where, "train", none_do=True)
        part = _part(found, self.roles, "train", keep, numbers)
        leave_out = np.isin(row_hashes(part.rows, [role for role in self.roles if role != "label"]), self.held_out)
        drop = self.data.drop or []
        if "empty" in drop:
            leave_out |= _empty(part.rows, self.roles)
        if self.labels is not None:
            column = self._encoded(part.rows)
            part.rows = part.rows.remove_columns("label").add_column("label", column)
            if self.labels.kind == "class" and (self.data.labels or "unlabelled" in drop):
                leave_out |= column < 0
        part.narrow(~leave_out)
        _fill_gaps(part, "train", self.name)
        return _selected(part).with_format("arrow")[:].to_pylist()

    def _encoded(self, rows: datasets.Dataset) -> Any:
        assert self.labels is not None
        if self.labels.kind == "number":
            return self.labels.encode(rows)
        strange, column = self.labels.encode(rows, unknown=-2), arrow(rows, "label")
        is_strange = np.asarray(strange.flatten() if self.labels.kind == "classes" else strange) == -2
        values = labels.flatten(column)[0] if self.labels.kind == "classes" else column
        found = values.take(pa.array(np.flatnonzero(is_strange))).to_pylist()
        found = [value for value in found if value != -1]  # by custom, -1 is a row without a label
        if found and not self.data.labels:
            raise DataError(
                f"data '{self.name}': the streamed rows have a class '{found[0]}', which their first {HEAD} had not",
                "name all classes: data.labels=[...]",
            )
        return self.labels.encode(rows)
