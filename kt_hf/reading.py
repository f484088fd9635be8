"""Finding and reading data sets: a folder, a file, a Hub id, or `digits`. Nothing is cut or renamed here.

Faults in CSV and JSON lines are named by file and line.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from kt_hf.errors import DataError, HubError, KtError, RecipeError, nearest
from kt_hf.nouns import Data

SPLITS = ("train", "validation", "test")
_ALIASES = {"train": ("training",), "validation": ("valid", "val", "dev", "development"), "test": ("testing", "eval")}
_READERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".arrow": "arrow",
}
_LAYOUT = "a folder with train.parquet, validation.parquet, test.parquet works as it is"
_read: dict[Any, tuple[datasets.DatasetDict, int]] = {}
_streamed: dict[Any, tuple[datasets.DatasetDict, datasets.IterableDataset]] = {}
HEAD = 1000
"""Rows at the beginning of a stream that stand for all of them, where something has to be known beforehand."""
_END = 65536
"""Bytes at the end of a file by which it is known again; Parquet keeps there what it holds."""
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
"""Only empty fields are missing: `NA` and `null` are text like any other."""


def read(data: Data) -> datasets.DatasetDict:
    """The splits of a data set, named as ours; of a streamed one, the first training rows."""
    found = read_streamed(data)[0] if data.streaming else read_counted(data)[0]
    return datasets.DatasetDict({split: reached(rows, data) for split, rows in found.items()})


def reached(rows: datasets.Dataset, data: Data) -> datasets.Dataset:
    """With a column for every field of a struct, where one is named (`data.columns.source=translation.en`)."""
    heads = {name.partition(".")[0] for name in (data.columns or {}).values() if name not in rows.column_names}
    return rows.flatten() if heads & set(rows.column_names) else rows


def read_counted(data: Data) -> tuple[datasets.DatasetDict, int]:
    """(the splits, how many unreadable rows were left out). Read once in a process, as long as the files do not change.

    Raises `DataError`, `HubError` where there is no such data set, and `RecipeError` for a split or name that is not
    there.
    """
    if data.path == "digits" and not Path("digits").exists():
        from kt_hf import digits

        if data.name not in (None, *digits.NAMES):
            raise RecipeError(f"data.name: digits has no '{data.name}'", nearest(data.name, digits.NAMES))
        return digits.load(data.name), 0
    skip = "unreadable" in (data.drop or [])
    key = (data.path, data.name, data.revision, repr(data.splits), skip, _state(Path(data.path)))
    if key not in _read:
        while len(_read) >= 16:
            _read.pop(next(iter(_read)))
        try:
            found, dropped = _load(data, skip)
        except KtError:
            raise
        except Exception as error:
            raise _unreadable(data, error) from error
        _read[key] = _name_splits(found, data), dropped
    return _read[key]


def read_streamed(data: Data) -> tuple[datasets.DatasetDict, datasets.IterableDataset]:
    """(the first training rows and the other splits whole, all training rows to be read when used, not decoded).

    Raises as `read_counted` does.
    """
    first = HEAD + (int(data.validation_size) if data.validation_size >= 1 else 0)
    key = (data.path, data.name, data.revision, repr(data.splits), repr(data.max_examples), first, state(data))
    if key not in _streamed:
        while len(_streamed) >= 16:
            _streamed.pop(next(iter(_streamed)))
        try:
            found = _open(data)
            opened = _split_of(found, data, "train")
            if opened is None:
                raise DataError(f"data '{data.path}' has no training split to stream", "name it: data.splits.train=...")
            head, opened = _head(opened, first)
            parts = {"train": head}
            for split in SPLITS[1:]:
                rows = _split_of(found, data, split)
                if rows is not None:
                    parts[split] = _whole(rows, (data.max_examples or {}).get(split))  # type: ignore[union-attr]
        except KtError:
            raise
        except Exception as error:
            raise _unreadable(data, error) from error
        _streamed[key] = _name_splits(datasets.DatasetDict(parts), Data(data.path)), opened
    return _streamed[key]


def state(data: Data) -> str:
    """What changes when the files do."""
    return str(_state(Path(data.path)))


def _state(path: Path) -> Any:
    """What changes when the files do."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in files if p.exists()].__repr__()


def _load(data: Data, skip: bool) -> tuple[Any, int]:
    path = Path(data.path)
    if path.is_file():
        return _read_files({"train": path}, skip)
    if path.is_dir():
        files = _split_files(path, data.splits or {})
        if files:
            return _read_files(files, skip)
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(path)), 0
        if not any(path.iterdir()):
            raise DataError(f"data '{data.path}': the folder is empty", _LAYOUT)
        return datasets.load_dataset(str(path), data.name), 0
    _refuse_missing(data)
    return datasets.load_dataset(data.path, data.name, revision=data.revision), 0


def _refuse_missing(data: Data) -> None:
    path = Path(data.path)
    if (
        path.is_absolute()
        or data.path.startswith(("./", "../", "~"))
        or data.path.count("/") > 1
        or path.suffix in _READERS
    ):
        raise DataError(f"data '{data.path}': there is no such folder or file", _siblings(path))


def _siblings(path: Path) -> str:
    """Names beside a path that does not exist, the nearest first."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return (
        f"did you mean '{folder / close[0]}'? " if close else ""
    ) + f"{folder} holds: {', '.join(names[:20]) or 'nothing'}"


def _name_splits(found: Any, data: Data) -> datasets.DatasetDict:
    found = found if isinstance(found, dict) else datasets.DatasetDict({"train": found})
    named = datasets.DatasetDict()
    for split in SPLITS:
        wanted = (data.splits or {}).get(split)
        for theirs in (wanted or split, split, *_ALIASES[split]):
            if theirs in found:
                named[split] = found[theirs]
                break
            if wanted:
                raise RecipeError(f"data.splits.{split}: there is no split '{wanted}'", nearest(wanted, found))
    if not named:
        cause = f"data '{data.path}' has the splits {', '.join(found)}, none of which is known"
        raise DataError(cause, "name them: data.splits.train=...")
    for split, rows in named.items():
        if len(rows) == 0:
            raise DataError(f"data '{data.path}': the split {split} is empty", "remove the file or fill it")
    return named


def _split_files(folder: Path, names: dict[str, str]) -> dict[str, Path]:
    """The folder's files that go by the name of a split, found under our names for it."""
    files: dict[str, Path] = {}
    for split in SPLITS:
        stems = (names[split],) if split in names else (split, *_ALIASES[split])
        for stem in stems:
            match = [p for suffix in _READERS if (p := folder / f"{stem}{suffix}").is_file()]
            if len(match) > 1:
                cause = f"{folder} has several files for {split}: {', '.join(p.name for p in match)}"
                raise DataError(cause, "keep one of them, or name the folder of one kind")
            if match:
                files[names.get(split, split)] = match[0]
                break
    return files


# --- files ----------------------------------------------------------------------------------------------------------


def _read_files(files: dict[str, Path], skip: bool) -> tuple[datasets.DatasetDict, int]:
    """Each file for itself, because a test file may lack labels that the training file has."""
    found, dropped = datasets.DatasetDict(), 0
    for split, path in files.items():
        found[split], count = _read_file(path, skip)
        dropped += count
    return found, dropped


def _read_file(path: Path, skip: bool) -> tuple[datasets.Dataset, int]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"cannot read {path.name}: unknown kind of file", f"use one of {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", "remove the file or fill it")
    if reader == "csv":
        return _read_csv(path, skip)
    if reader == "json":
        return _read_json(path, skip)
    return _with_reader(reader, path), 0


def _with_reader(reader: str, path: Path, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
    except Exception as error:
        if "corresponds to no data" in str(error) or isinstance(error, StopIteration):
            raise DataError(f"{path} holds no rows", "remove the file or fill it") from error
        raise DataError(f"{path} cannot be read: {_chain(error)}", "mend the file, or write it again") from error


def _read_csv(path: Path, skip: bool) -> tuple[datasets.Dataset, int]:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    options = {"sep": separator, **_CSV}
    bad = list(_bad_csv_lines(path, separator))
    if bad and not skip:
        raise _bad_lines(path, bad)
    if bad:
        numbers = {number for number, _ in bad}
        with tempfile.TemporaryDirectory() as folder, open(path, encoding="utf-8-sig", newline="") as source:
            copy = Path(folder) / path.name
            with open(copy, "w", encoding="utf-8", newline="") as target:
                rows = csv.reader(source, delimiter=separator)
                csv.writer(target, delimiter=separator).writerows(r for r in rows if rows.line_num not in numbers)
            found = _in_memory(_with_reader("csv", copy, **options))
    else:
        found = _with_reader("csv", path, **options)
    return _whole_numbers(found), len(bad)


def _bad_csv_lines(path: Path, separator: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of rows with another number of fields than the header."""
    _refuse_other_encodings(path)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        header = next(rows, [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path}: two columns are called '{twice[0]}'", "name each column once")
        for row in rows:
            if row and len(row) != len(header):
                yield rows.line_num, f"{len(row)} fields, the header has {len(header)} ({', '.join(header)})"


def _refuse_other_encodings(path: Path) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                cause = f"{path} line {number}: not UTF-8 (byte {error.start + 1} of the line)"
                raise DataError(cause, "save the file as UTF-8") from error


def _whole_numbers(rows: datasets.Dataset) -> datasets.Dataset:
    """A column of whole numbers with gaps is read as floating point; make it whole again."""
    features = rows.features.copy()
    for name, feature in rows.features.items():
        if getattr(feature, "dtype", None) == "float64":
            column = rows.data.column(name).drop_null()
            if len(column) and len(column) < len(rows) and pc.all(pc.equal(pc.floor(column), column)).as_py():
                features[name] = datasets.Value("int64")
    return rows if features == rows.features else rows.cast(features)


def _read_json(path: Path, skip: bool) -> tuple[datasets.Dataset, int]:
    _refuse_other_encodings(path)
    try:
        return _with_reader("json", path), 0
    except DataError:
        bad = list(_bad_json_lines(path))
        if not bad:
            raise
        if not skip:
            raise _bad_lines(path, bad) from None
    numbers = {number for number, _ in bad}
    with tempfile.TemporaryDirectory() as folder, open(path, "rb") as source:
        copy = Path(folder) / path.name
        copy.write_bytes(b"".join(line for number, line in enumerate(source, 1) if number not in numbers))
        return _in_memory(_with_reader("json", copy)), len(bad)


def _bad_json_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip().startswith("["):
                return  # one list, not lines
            try:
                value = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError) as error:
                yield number, f"no JSON ({error})"
                continue
            if not isinstance(value, dict):
                yield number, f"a {type(value).__name__}, expected an object"


def _bad_lines(path: Path, bad: list[tuple[int, str]]) -> DataError:
    shown = "; ".join(f"line {number}: {what}" for number, what in bad[:3])
    more = f"; {len(bad) - 3} more" if len(bad) > 3 else ""
    return DataError(f"{path} {shown}{more}", "mend these rows, or leave them out: data.drop=[unreadable]")


def _in_memory(rows: datasets.Dataset) -> datasets.Dataset:
    """A copy that needs no file."""
    return datasets.Dataset.from_dict(rows.to_dict(), features=rows.features)


def mixed_row(rows: datasets.Dataset, column: str) -> tuple[int, str] | None:
    """(row, kinds) where a column that was read as JSON first holds another kind of value than before."""
    kinds: list[str] = []
    for i, value in enumerate(rows[column]):
        kind = type(value).__name__
        if value is not None and kind not in kinds:
            kinds.append(kind)
        if len(kinds) > 1:
            return i + 1, " and ".join(kinds)
    return None


# --- streams --------------------------------------------------------------------------------------------------------


def _open(data: Data) -> Any:
    """split -> rows that are read when they are used; of local files, the training one alone."""
    path = Path(data.path)
    files = {"train": path} if path.is_file() else _split_files(path, data.splits or {}) if path.is_dir() else {}
    if files:
        train = (data.splits or {}).get("train", "train")
        return {split: _open_file(p) if split == train else _read_file(p, False)[0] for split, p in files.items()}
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            cause = f"data '{data.path}' was saved for memory-mapped reading, which takes no more memory than a stream"
            raise RecipeError(cause, "leave data.streaming out")
        if not any(path.iterdir()):
            raise DataError(f"data '{data.path}': the folder is empty", _LAYOUT)
    else:
        _refuse_missing(data)
    return datasets.load_dataset(data.path, data.name, revision=data.revision, streaming=True)


def _open_file(path: Path) -> datasets.IterableDataset:
    """A file's rows; CSV and JSON lines are looked through first, so that nothing stops at a bad line later."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"cannot read {path.name}: unknown kind of file", f"use one of {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", "remove the file or fill it")
    if reader == "csv":
        return _open_csv(path)
    if reader == "json":
        _refuse_other_encodings(path)
        bad = list(_bad_json_lines(path))
        if bad:
            raise _bad_lines(path, bad)
    opened = datasets.load_dataset(reader, data_files=str(path), split="train", streaming=True)
    return opened.reshard() if reader == "parquet" else opened  # its row groups, which are found without reading on


def _open_csv(path: Path) -> datasets.IterableDataset:
    """Columns have the types of the first rows: the library would find others in every piece of the file."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    bad = list(_bad_csv_lines(path, separator))
    if bad:
        raise _bad_lines(path, bad)
    with tempfile.TemporaryDirectory() as folder, open(path, encoding="utf-8-sig", newline="") as source:
        copy = Path(folder) / path.name
        with open(copy, "w", encoding="utf-8", newline="") as target:
            rows = csv.reader(source, delimiter=separator)
            csv.writer(target, delimiter=separator).writerows(itertools.islice(rows, HEAD + 1))
        features = _read_csv(copy, False)[0].features
    texts = datasets.Features({name: datasets.Value("string") for name in features})
    opened = datasets.load_dataset(
        "csv", data_files=str(path), split="train", streaming=True, features=texts, sep=separator, **_CSV
    )
    return opened.map(_Typed(features, path.name), features=features)


@dataclass
class _Typed:
    """The fields of a CSV row as what the columns hold."""

    features: datasets.Features
    name: str

    def __call__(self, row: dict[str, str | None]) -> dict[str, Any]:
        return {column: self.read(column, text) for column, text in row.items()}

    def read(self, column: str, text: str | None) -> Any:
        kind = self.features[column].dtype
        if text is None or kind not in ("int64", "float64", "bool"):
            return text
        try:
            return {"true": True, "false": False}[text.lower()] if kind == "bool" else _NUMBERS[kind](text)
        except (KeyError, ValueError):
            raise DataError(
                f"{self.name}: column '{column}' holds {kind} in the first {HEAD} rows, later '{text[:50]}'",
                "write one kind of value in a column, or leave data.streaming out",
            ) from None


_NUMBERS: dict[str, Callable[[str], Any]] = {"int64": int, "float64": float}


def _head(opened: datasets.IterableDataset, count: int) -> tuple[datasets.Dataset, datasets.IterableDataset]:
    """(the first rows, all rows as they are in the files)."""
    opened = opened._resolve_features()
    return _whole(opened, count), opened.decode(False)


def _whole(rows: Any, limit: int | None) -> datasets.Dataset:
    """Rows, or the first of them, at hand."""
    if isinstance(rows, datasets.Dataset):
        return rows
    rows = rows._resolve_features()
    found = list(rows.decode(False).take(limit) if limit else rows.decode(False))
    return in_memory(found, rows.features)


def in_memory(rows: list[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Rows that are not decoded, as a data set in memory."""
    found = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(found), datasets.DatasetInfo(features=features))


def ends(data: Data, opened: datasets.IterableDataset) -> str:
    """What tells the files of a stream from others without reading them: their names, sizes and ends; commits of those
    on the Hub."""
    path = Path(data.path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            with open(file, "rb") as content:
                content.seek(max(0, size - _END))
                digest.update(f"{file.name} {size} ".encode() + content.read())
    if not path.exists():
        source = getattr(opened._ex_iterable, "ex_iterable", opened._ex_iterable)
        digest.update(repr((data.revision, getattr(source, "kwargs", None))).encode())
    return digest.hexdigest()[:16]


def _split_of(found: Any, data: Data, split: str) -> Any:
    """A split by our name, theirs, or a usual one; None where there is none."""
    if not isinstance(found, dict):
        return found if split == "train" else None
    wanted = (data.splits or {}).get(split)
    if wanted and wanted not in found:
        raise RecipeError(f"data.splits.{split}: there is no split '{wanted}'", nearest(wanted, found))
    return next((found[name] for name in ([wanted] if wanted else [split, *_ALIASES[split]]) if name in found), None)


# --- errors ---------------------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> str:
    """The innermost cause, in one line: the outer errors only say that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _unreadable(data: Data, error: Exception) -> KtError:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    far = (
        (isinstance(error, OSError) and "ffline" in text)
        or "doesn't exist on the Hub" in text
        or "Couldn't reach" in text
    )
    if far or type(error).__name__ in ("DatasetNotFoundError", "HFValidationError", "OfflineModeIsEnabled"):
        cause = (
            f"data '{data.path}' is no folder or file, and not on the Hub as far as it can be reached ({text[:120]})"
        )
        return HubError(cause, "check data.path, or the network")
    if isinstance(error, ValueError) and "BuilderConfig" in text:
        return RecipeError(f"data.name: {text}", "name one of the data set's configurations")
    return DataError(f"data '{data.path}' cannot be read: {_chain(error)}", _LAYOUT)


def arrow(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """A column of rows that no selection was made from, as Arrow has it."""
    assert rows._indices is None
    return rows.data.column(column)
