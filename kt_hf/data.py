"""Data sets: found, read, given roles, split, cleaned and cut down. What comes out has one column per role of the task,
and `index`, the row's number in its split as it was read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from kt_hf.errors import DataError, HubError, RecipeError, nearest
from kt_hf.recipe import Data
from kt_hf.task import Role, Task

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_SPLIT_ALIASES = {"train": ("training",), "validation": ("valid", "val", "dev", "development"), "test": ("testing", "eval")}
_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text", ".arrow": "arrow"}


@dataclass
class DataInfo:
    """A data set as a task sees it. `splits` hold the role columns and `index`; `counts` what was found or dropped."""

    name: str
    splits: dict[str, datasets.Dataset]
    roles: dict[str, str]
    labels: list[str] | None
    fingerprint: str
    counts: dict[str, int] = field(default_factory=dict)
    path: str = ""

    @property
    def evaluation_split(self) -> str:
        """The split that reports are made on: test, where it has labels, else validation."""
        for split in ("test", "validation"):
            if split in self.splits and ("label" not in self.roles or any(_labelled(self.splits[split]))):
                return split
        return "train"

    def texts(self) -> Iterator[str]:
        """The training texts, for a tokenizer that is trained on them."""
        train = self.splits.get("train") or next(iter(self.splits.values()))
        for role in ("text", "text_pair", "prompt", "completion", "messages"):
            if role not in self.roles:
                continue
            for value in train[role]:
                for text in value if isinstance(value, list) else [value]:
                    yield text["content"] if isinstance(text, dict) else text
        yield from self.labels or []

    def rows(self, split: str, limit: int | None = None) -> datasets.Dataset:
        return self.splits[split]


def _labelled(split: datasets.Dataset) -> list[bool]:
    return [y is not None and y >= 0 for y in split["label"]]


# --- reading -----------------------------------------------------------------------------------------------------------


def read(data: Data) -> datasets.DatasetDict:
    """The splits of a folder, a file, a Hub data set or `digits`, named as ours. Nothing is cut or renamed yet."""
    if data.path == "digits" and not Path("digits").exists():
        from kt_hf import digits

        if data.name not in (None, *digits.NAMES):
            raise RecipeError(f"data.name: digits has no '{data.name}'", nearest(data.name, digits.NAMES))
        return digits.load(data.name)
    path = Path(data.path)
    try:
        if path.is_file():
            found = _read_files({"train": path})
        elif path.is_dir():
            files = _split_files(path, data.splits or {})
            found = _read_files(files) if files else datasets.load_dataset(str(path), data.name)
        else:
            found = datasets.load_dataset(data.path, data.name, revision=data.revision)
    except (DataError, RecipeError):
        raise
    except Exception as error:
        raise _unreadable(data, error) from error
    found = found if isinstance(found, dict) else datasets.DatasetDict({"train": found})
    named = datasets.DatasetDict()
    for split in SPLITS:
        for theirs in ((data.splits or {}).get(split, split), *_SPLIT_ALIASES[split]):
            if theirs in found:
                named[split] = found[theirs]
                break
        else:
            if split in (data.splits or {}):
                raise RecipeError(f"data.splits.{split}: there is no split '{data.splits[split]}'", nearest(data.splits[split], found))
    if not named:
        raise DataError(f"data '{data.path}' has the splits {', '.join(found)}, none of which is known", "name them: data.splits.train=...")
    for split, rows in named.items():
        if len(rows) == 0:
            raise DataError(f"data '{data.path}': the split {split} is empty", "remove the file or fill it")
    return named


def _split_files(folder: Path, names: dict[str, str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for split in SPLITS:
        for stem in (names.get(split, split), *_SPLIT_ALIASES[split]):
            match = [p for suffix in _READERS if (p := folder / f"{stem}{suffix}").is_file()]
            if match:
                files[split] = match[0]
                break
    return files


def _read_files(files: dict[str, Path]) -> datasets.DatasetDict:
    readers = {_READERS.get(path.suffix) for path in files.values()}
    if None in readers or len(readers) > 1:
        raise DataError(f"cannot read {', '.join(p.name for p in files.values())} as one data set", f"use one of {', '.join(_READERS)}")
    reader = str(readers.pop())
    options = {"sep": "\t"} if next(iter(files.values())).suffix == ".tsv" else {}
    return datasets.load_dataset(reader, data_files={split: str(path) for split, path in files.items()}, **options)


def _unreadable(data: Data, error: Exception) -> Exception:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, (ConnectionError, OSError)) and "ffline" in text or "doesn't exist on the Hub" in text or "Couldn't reach" in text:
        return HubError(f"data '{data.path}' is no folder or file, and not on the Hub as far as it can be reached ({text[:120]})", "check data.path, or the network")
    return DataError(f"data '{data.path}' cannot be read: {text}", "a folder with train.parquet, validation.parquet, test.parquet works as it is")


# --- roles -------------------------------------------------------------------------------------------------------------


def kinds(feature: Any) -> tuple[str, ...]:
    """What a column can serve as."""
    if isinstance(feature, datasets.Image):
        return ("image",)
    if isinstance(feature, datasets.ClassLabel):
        return ("class",)
    inner = getattr(feature, "feature", None)
    if inner is None and isinstance(feature, list):
        inner = feature[0]
    if isinstance(inner, dict) and {"role", "content"} <= set(inner):
        return ("messages",)
    if inner is not None and getattr(inner, "dtype", None) in ("string", "large_string"):
        return ("strings",)
    dtype = getattr(feature, "dtype", None)
    if dtype in ("string", "large_string"):
        return ("string", "class?")
    if isinstance(dtype, str) and (dtype.startswith(("int", "uint")) or dtype == "bool"):
        return ("class?",)
    return ()


def find_roles(features: Any, roles: Sequence[Role], columns: dict[str, str] | None = None, strict: bool = True) -> dict[str, str]:
    """role -> column: those named, then columns of the role's own name or a usual one, then the only one of a fitting kind.

    Raises `RecipeError` that lists the candidates when a required role stays open and `strict` is set.
    """
    columns = columns or {}
    for role, column in columns.items():
        if role not in {r.name for r in roles}:
            raise RecipeError(f"data.columns.{role}: the task has no such role", nearest(role, [r.name for r in roles]))
        if column not in features:
            raise RecipeError(f"data.columns.{role}: there is no column '{column}'", nearest(column, features))
    found = dict(columns)
    for role in roles:
        for name in (role.name, *role.aliases):
            if role.name not in found and name in features and name not in found.values() and _suits(features[name], role, named=True):
                found[role.name] = name
    for role in roles:
        if role.name in found or not role.required:
            continue
        free = [c for c in features if c not in found.values() and _suits(features[c], role, named=False)]
        if len(free) == 1:
            found[role.name] = free[0]
        elif strict:
            what = f"several columns could be the {role.name}: {', '.join(free)}" if free else f"no column can be the {role.name}"
            raise RecipeError(f"{what} (columns: {', '.join(features)})", f"name it: data.columns.{role.name}=COLUMN")
    return found


def _suits(feature: Any, role: Role, named: bool) -> bool:
    offered = kinds(feature)
    return any(kind in offered or (named and f"{kind}?" in offered) for kind in role.kinds)


# --- preparing ---------------------------------------------------------------------------------------------------------


def prepare(name: str, data: Data, task: Task) -> DataInfo:
    """Read a data set and make it fit a task: roles, labels by name, subsets, splits, cleaning."""
    splits = dict(read(data))
    columns = data.columns
    roles = find_roles(next(iter(splits.values())).features, task.roles, columns)
    splits = {split: _filter(rows, data.where, split) for split, rows in splits.items()}
    splits = {split: rows.add_column("index", np.arange(len(rows))) if "index" not in rows.column_names else rows for split, rows in splits.items()}
    splits = {split: _rename(rows, roles) for split, rows in splits.items()}
    labels = None
    if "label" in roles:
        splits, labels = _name_labels(splits, data.labels)
    elif data.labels:
        raise RecipeError("data.labels: the data have no class column", "name it: data.columns.label=COLUMN")
    hashes = {split: _row_hashes(rows, roles) for split, rows in splits.items()}
    splits, counts, hashes = _clean(splits, hashes, roles, set(data.drop or []), name)
    splits = _hold_out(splits, data)
    splits = {split: _limit(rows, split, data) for split, rows in splits.items()}
    digest = hashlib.sha256()
    for split in sorted(splits):
        digest.update(split.encode())
        digest.update(_row_hashes(splits[split], roles, label=True).tobytes())
        counts[split] = len(splits[split])
        if len(splits[split]) == 0:
            raise DataError(f"data '{name}': no rows are left in {split}", "loosen data.where, data.labels or data.drop")
    if labels is not None and "train" in splits and len({y for y in splits["train"]["label"] if y >= 0}) < 2:
        logger.warning("data '%s': the training rows have a single class", name)
    return DataInfo(name, splits, roles, labels, digest.hexdigest()[:16], counts, data.path)


def _filter(rows: datasets.Dataset, where: dict[str, Any] | None, split: str) -> datasets.Dataset:
    for column, wanted in (where or {}).items():
        if column not in rows.column_names:
            raise RecipeError(f"data.where.{column}: there is no such column", nearest(column, rows.column_names))
        values = set(wanted if isinstance(wanted, list) else [wanted])
        keep = [i for i, value in enumerate(rows[column]) if value in values]
        if not keep:
            raise DataError(f"data.where.{column}: no row of {split} has {wanted!r}", nearest(str(wanted), {str(v) for v in list(rows[column])[:1000]}))
        rows = rows.select(keep)
    return rows


def _rename(rows: datasets.Dataset, roles: dict[str, str]) -> datasets.Dataset:
    rows = rows.select_columns([*roles.values(), "index"])
    moves = {column: role for role, column in roles.items() if column != role}
    aside = {column: f"{column}__" for column in moves if column in moves.values()}
    return rows.rename_columns(aside).rename_columns({aside.get(c, c): r for c, r in moves.items()}) if moves else rows


def _name_labels(splits: dict[str, datasets.Dataset], keep: list[Any] | None) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Labels as numbers of one list of names; with `keep`, only those classes, in that order."""
    first = next(iter(splits.values()))
    feature = first.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        values = {split: list(rows["label"]) for split, rows in splits.items()}
    else:
        raw = {split: list(rows["label"]) for split, rows in splits.items()}
        present = {v for values_ in raw.values() for v in values_ if v is not None and v != -1}
        order = sorted(present)
        names = [str(v) for v in order]
        position = {v: i for i, v in enumerate(order)}
        values = {split: [position.get(v, -1) for v in vs] for split, vs in raw.items()}
    chosen = list(range(len(names)))
    if keep:
        unknown = [str(k) for k in keep if str(k) not in names]
        if unknown:
            raise RecipeError(f"data.labels: there is no class '{unknown[0]}'", nearest(unknown[0], names))
        chosen = [names.index(str(k)) for k in keep]
    new = {old: i for i, old in enumerate(chosen)}
    out = {}
    for split, rows in splits.items():
        numbers = [-1 if v is None else v for v in values[split]]
        rows = rows.remove_columns("label").add_column("label", [new.get(v, -1) for v in numbers])
        out[split] = rows.select([i for i, v in enumerate(numbers) if v in new]) if keep else rows
    return out, [names[i] for i in chosen]


def _row_hashes(rows: datasets.Dataset, roles: dict[str, str], label: bool = False) -> np.ndarray:
    """64-bit hashes of what a row holds, images as their encoded bytes; the label only on request."""
    columns = [role for role in roles if role != "label" or label]
    plain = rows
    for role in columns:
        if isinstance(rows.features[role], datasets.Image):
            plain = plain.cast_column(role, datasets.Image(decode=False))
    hashes = np.empty(len(plain), dtype=np.uint64)
    start = 0
    for batch in plain.select_columns([*columns, *(["index"] if label else [])]).iter(1000):
        for row in zip(*batch.values(), strict=True):
            hashes[start] = int.from_bytes(hashlib.blake2b(repr([_content(v) for v in row]).encode(), digest_size=8).digest(), "little")
            start += 1
    return hashes


def _content(value: Any) -> Any:
    if isinstance(value, dict) and "bytes" in value:
        return value["bytes"] if value["bytes"] is not None else value["path"]
    return value


def _clean(
    splits: dict[str, datasets.Dataset], hashes: dict[str, np.ndarray], roles: dict[str, str], drop: set[str], name: str
) -> tuple[dict[str, datasets.Dataset], dict[str, int], dict[str, np.ndarray]]:
    """Count empty, duplicate and overlapping rows; drop those kinds that `drop` names. Duplicates and overlaps leave `train`."""
    masks: dict[str, dict[str, np.ndarray]] = {split: {} for split in splits}
    held_out = [hashes[split] for split in splits if split != "train"]
    for split, rows in splits.items():
        masks[split]["empty"] = _empty(rows, roles)
        if split == "train":
            _, first = np.unique(hashes[split], return_index=True)
            masks[split]["duplicates"] = ~np.isin(np.arange(len(rows)), first)
            masks[split]["overlap"] = np.isin(hashes[split], np.concatenate(held_out)) if held_out else np.zeros(len(rows), dtype=bool)
    counts = {kind: int(sum(m[kind].sum() for m in masks.values() if kind in m)) for kind in ("empty", "duplicates", "overlap")}
    for kind, what in (("empty", "empty rows"), ("duplicates", "repeated training rows"), ("overlap", "training rows that are also in validation or test")):
        if counts[kind]:
            logger.warning("data '%s': %d %s%s", name, counts[kind], what, ", dropped" if kind in drop else "; data.drop can drop them")
    for split in list(splits):
        bad = np.zeros(len(splits[split]), dtype=bool)
        for kind in drop:
            bad |= masks[split].get(kind, bad)
        if bad.any():
            keep = np.flatnonzero(~bad)
            splits[split], hashes[split] = splits[split].select(keep), hashes[split][keep]
    return splits, counts, hashes


def _empty(rows: datasets.Dataset, roles: dict[str, str]) -> np.ndarray:
    bad = np.zeros(len(rows), dtype=bool)
    for role in ("text", "prompt", "completion"):
        if role in roles:
            bad |= np.array([value is None or len(value if isinstance(value, list) else value.strip()) == 0 for value in rows[role]])
    return bad


def _hold_out(splits: dict[str, datasets.Dataset], data: Data) -> dict[str, datasets.Dataset]:
    """A validation split from the training rows where there is none; stratified by class as far as rows allow."""
    if "validation" in splits or "train" not in splits:
        return splits
    rows = splits["train"]
    size = int(data.validation_size) if data.validation_size >= 1 else max(1, round(len(rows) * data.validation_size))
    if size >= len(rows):
        raise DataError(f"validation_size asks for {size} of {len(rows)} training rows", "give fewer, or a validation split")
    order = np.random.default_rng([data.seed, 1]).permutation(len(rows))
    if "label" in rows.column_names:
        labels = np.asarray(rows["label"])[order]
        rank = np.zeros(len(order))
        for c in np.unique(labels):  # take the same share of every class
            members = np.flatnonzero(labels == c)
            rank[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(rank, kind="stable")]
    return {**splits, "train": rows.select(np.sort(order[size:])), "validation": rows.select(np.sort(order[:size]))}


def _limit(rows: datasets.Dataset, split: str, data: Data) -> datasets.Dataset:
    random = np.random.default_rng([data.seed, 2])
    if split == "train" and data.k_shot:
        if "label" not in rows.column_names:
            raise RecipeError("data.k_shot: the data have no classes", "use data.max_examples")
        labels = np.asarray(rows["label"])
        order = random.permutation(len(rows))
        keep = np.concatenate([order[labels[order] == c][: data.k_shot] for c in np.unique(labels[labels >= 0])])
        short = [int(c) for c in np.unique(labels[labels >= 0]) if (labels == c).sum() < data.k_shot]
        if short:
            logger.warning("data.k_shot=%d: %d classes have fewer training rows", data.k_shot, len(short))
        rows = rows.select(np.sort(keep))
    limits = data.max_examples or {}
    limit = limits if isinstance(limits, int) else limits.get(split)
    if limit and limit < len(rows):
        rows = rows.select(np.sort(random.permutation(len(rows))[:limit]))
    return rows
