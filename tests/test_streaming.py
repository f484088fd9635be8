"""Training rows that are read as they are used: their order, what is left out, where a run goes on, what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import BERT, VIT
from PIL import Image
from test_data import logged, prepared, task

from kt_hf import Data, Recipe, Train, main, run
from kt_hf.data import DataInfo, prepare
from kt_hf.errors import DataError, KtError
from kt_hf.loader import Windows
from kt_hf.reading import HEAD
from kt_hf.streaming import Place, StreamPlan

TINY_VIT = {"config": "vit", "config_overrides": VIT}
QUICK = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": "none", "num_threads": 1, "eval_steps": 3}


def texts(count: int, prefix: str = "row") -> dict[str, list[Any]]:
    return {"text": [f"{prefix} {i}" for i in range(count)], "label": [("a", "b", "c")[i % 3] for i in range(count)]}


def folder(path: Path, train: dict[str, list[Any]], row_group: int = 60, **splits: dict[str, list[Any]]) -> Path:
    path.mkdir(exist_ok=True)
    for split, columns in {"train": train, **splits}.items():
        pq.write_table(pa.table(columns), path / f"{split}.parquet", row_group_size=row_group)
    return path


def streamed(path: Path | str, **settings: Any) -> DataInfo:
    return prepared(path, streaming=True, **{"shuffle_buffer": 50, **settings})


def epoch(info: DataInfo, number: int = 0, size: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of an epoch, in their order."""
    assert info.stream is not None
    found: list[dict[str, Any]] = []
    for at, rows, _ in StreamPlan(info.stream, size, seed).steps(0, 10**6):
        if at > number:
            return found
        found += rows if at == number else []
    raise AssertionError("epochs do not end")


# --- order ------------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    path = folder(tmp_path, texts(400), validation=texts(9, "other"))
    info = streamed(path)
    first, second, other = epoch(info), epoch(info, 1), epoch(info, seed=1)
    wanted = sorted(texts(400)["text"])
    for rows in (first, second, other):
        assert sorted(row["text"] for row in rows) == wanted
        assert len({row["index"] for row in rows}) == 400
    assert first == epoch(info)
    assert first != second and first != other
    blocks = [[int(row["text"].split()[1]) // 50 for row in first[start : start + 50]] for start in (0, 50, 100)]
    assert [row["text"] for row in first] != [row["text"] for row in sorted(first, key=lambda row: row["index"])]
    assert all(len(set(block)) <= 3 for block in blocks), "a block is no more than what was read at a time"
    assert info.num_training_rows is None and "train" not in info.counts


def test_rows_are_what_they_are_without_streaming(tmp_path):
    path = folder(tmp_path, texts(130), validation=texts(9, "other"))
    plain = prepared(path)
    info = streamed(path)
    assert info.labels == plain.labels and info.roles == plain.roles
    whole = {row["text"]: row["label"] for row in plain.splits["train"]}
    assert {row["text"]: row["label"] for row in epoch(info)} == whole


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_reading_goes_on_at_any_step(tmp_path, suffix):
    rows = datasets.Dataset.from_dict(texts(230))
    tmp_path.joinpath("data").mkdir()
    write = {
        "parquet": lambda p: rows.to_parquet(p, batch_size=40),
        "csv": lambda p: rows.to_csv(p, index=False),
        "jsonl": rows.to_json,
    }
    write[suffix](tmp_path / "data" / f"train.{suffix}")
    info = streamed(tmp_path / "data", shuffle_buffer=30, validation_size=20)
    assert info.stream is not None
    steps = list(StreamPlan(info.stream, 8, 3).steps(0, 80))
    assert steps[-1][0] >= 2, "three epochs"
    reads = 0
    for start in range(0, 71, 7):
        plan = StreamPlan(info.stream, 8, 3)
        place = json.loads(json.dumps(asdict(steps[start - 1][2]))) if start else asdict(Place())
        plan.reached(start, Place(**place))
        assert list(plan.steps(start, start + 9)) == steps[start : start + 9]
        reads += plan.places[start].block > 0
    assert reads > 5, "most of these places lie within an epoch"


def test_going_on_takes_up_no_block_but_the_one_that_was_left(tmp_path):
    path = folder(tmp_path, texts(600), row_group=50, validation=texts(9, "other"))
    info = streamed(path)
    assert info.stream is not None
    steps = list(StreamPlan(info.stream, 50, 0).steps(0, 12))
    seen: list[int] = []
    refine = info.stream.refine
    info.stream.refine = lambda rows, numbers: (seen.extend(numbers), refine(rows, numbers))[1]
    plan = StreamPlan(info.stream, 50, 0)
    plan.reached(11, steps[10][2])
    assert list(plan.steps(11, 12)) == steps[11:]
    assert len(seen) <= 100, "the block in which it stopped, and the next"


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_processes_share_the_global_batches_of_one(tmp_path, micro_batches):
    info = streamed(folder(tmp_path, texts(103), validation=texts(9, "other")))
    assert info.stream is not None

    def read(world: int, rank: int, micro: int) -> list[list[tuple[int, str]]]:
        plan = StreamPlan(info.stream, 8, 0)  # type: ignore[arg-type]
        found = Windows(plan, 0, 30, world, rank, micro)
        counted = []
        for number, items in enumerate(found):
            sizes = found.passed[number // micro][0][number % micro]
            counted.append([(at, row["text"]) for at, row in items][: sizes[rank]])
        return [[row for part in counted[i : i + micro] for row in part] for i in range(0, len(counted), micro)]

    alone = read(1, 0, 1)
    shares = [read(2, rank, micro_batches) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == alone
    assert {len(batch) for batch in alone} == {8, 103 % 8}, "the last batch of an epoch has what is left"


# --- what is left out -------------------------------------------------------------------------------------------------


def test_subsets_and_drops_hold_for_every_row_of_the_stream(tmp_path):
    count = HEAD + 300
    rows = {**texts(count), "kind": ["new" if i % 2 else "old" for i in range(count)]}
    rows["text"][HEAD + 5] = "  "
    rows["text"][HEAD + 7] = "held out"
    rows["label"][HEAD + 9] = None
    held_out = {"text": ["held out", "x"], "label": ["a", "b"], "kind": ["new", "new"]}
    path = folder(tmp_path, rows, 500, validation=held_out)
    info = streamed(path, where={"kind": "new"}, drop=["empty", "overlap", "unlabelled"], labels=["c", "a"])
    names = [r["text"] for r in epoch(info)]
    wanted = [
        rows["text"][i]
        for i in range(count)
        if i % 2 and rows["label"][i] in ("a", "c") and i not in (HEAD + 5, HEAD + 7, HEAD + 9)
    ]
    assert sorted(names) == sorted(wanted)
    assert info.labels == ["c", "a"]
    assert {r["label"] for r in epoch(info)} == {0, 1}


def test_what_is_held_out_is_never_trained_on(tmp_path):
    rows = texts(300)
    rows["text"][290] = rows["text"][3]  # a copy
    info = streamed(folder(tmp_path, rows), validation_size=40)
    held_out = set(info.splits["validation"]["text"])
    assert len(held_out) >= 39
    assert not held_out & {row["text"] for row in epoch(info)}
    assert held_out | {row["text"] for row in epoch(info)} == set(rows["text"])


def test_a_class_that_the_first_rows_have_not_is_named(tmp_path):
    rows = texts(HEAD + 20)
    rows["label"][-1] = "rare"
    path = folder(tmp_path, rows, validation=texts(9, "other"))
    with pytest.raises(DataError, match=r"a class 'rare'.*\n.*data.labels"):
        epoch(streamed(path))
    info = streamed(path, labels=["a", "b", "c", "rare"])
    assert info.labels == ["a", "b", "c", "rare"] and 3 in {row["label"] for row in epoch(info)}


def test_columns_of_csv_have_the_types_of_the_first_rows(tmp_path):
    lines = ["text,label,score,flag", '"a, b",1,0.5,true', '"two\nlines",,2,false', "NA,0,,true"]
    path = tmp_path / "train.csv"
    path.write_text("\n".join(lines) + "\n")
    info = streamed(path, validation_size=1, drop=["unlabelled"])
    plain = prepared(path, validation_size=1, drop=["unlabelled"])
    assert info.splits["train"].features == plain.splits["train"].features
    found = epoch(info) + list(info.splits["validation"])
    assert {"NA", "a, b"} == {row["text"] for row in found} and {0, 1} == {row["label"] for row in found}
    path.write_text("\n".join(["text,label", *(f"t{i},{i % 2}" for i in range(HEAD + 1)), "late,many"]) + "\n")
    with pytest.raises(DataError, match="column 'label' holds int64 in the first 1000 rows, later 'many'"):
        epoch(streamed(path))


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "text,label\na,1\nb,2,3\n", "line 3: 3 fields"),
        ("train.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2: no JSON"),
        ("train.csv", "", "is empty"),
        ("train.csv", "text,label\n", "holds no rows"),
    ],
)
def test_bad_files_are_named_before_training(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        streamed(tmp_path)


def test_a_file_that_breaks_in_the_middle_is_an_error_of_the_data(tmp_path):
    path = folder(tmp_path, texts(4000), 500, validation=texts(9, "other")) / "train.parquet"
    group = pq.ParquetFile(path).metadata.row_group(6).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset : group.data_page_offset + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read on after row"):
        epoch(streamed(tmp_path))


def test_rows_that_never_fill_a_batch_do_not_go_round_for_ever(tmp_path):
    info = streamed(folder(tmp_path, texts(20), validation=texts(9, "other")))
    assert info.stream is not None
    with pytest.raises(DataError, match="do not fill a batch of 32"):
        list(StreamPlan(info.stream, 32, 0, drop_last=True).steps(0, 3))


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        ({}, {}, "nobody knows how many rows"),
        ({"k_shot": 2}, {"max_steps": 2}, "k_shot exclude each other"),
        ({"max_examples": 20}, {"max_steps": 2}, "max_examples does not limit a stream"),
        ({"drop": ["duplicates"]}, {"max_steps": 2}, r"drop=\[duplicates\] exclude each other"),
        ({}, {"max_steps": 2, "train_sampling_strategy": "group_by_length"}, "group_by_length exclude each other"),
        ({}, {"max_steps": 2, "cache_frozen": True}, "cache_frozen exclude each other"),
        ({"path": "digits"}, {"max_steps": 2}, "digits are in memory"),
        ({"task": "text-generation"}, {"max_steps": 2, "packing": True}, "training.packing exclude each other"),
    ],
)
def test_what_needs_all_rows_at_hand_is_refused(tmp_path, data, training, message):
    path = folder(tmp_path / "data", texts(60), validation=texts(9, "other"))
    data = dict(data)
    recipe = Recipe(
        task=data.pop("task", "text-classification"),
        data=Data(**{"path": str(path), "streaming": True, **data}),
        model={"config": "bert"},
        training=training,
        stages=[Train("one")],
    )
    with pytest.raises(KtError, match=message) as found:
        run(recipe, tmp_path / "out")
    assert found.value.exit_code == 2
    assert not (tmp_path / "out" / "one" / "model").exists()


# --- trainings --------------------------------------------------------------------------------------------------------


def images(path: Path, count: int = 60) -> Path:
    random = np.random.default_rng(0)

    def png() -> dict[str, Any]:
        content = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (8, 8), dtype=np.uint8)).save(content, "PNG")
        return {"bytes": content.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    path.mkdir(exist_ok=True)
    for split, size in (("train", count), ("validation", 9), ("test", 9)):
        columns = {"image": [png() for _ in range(size)], "label": [i % 2 for i in range(size)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path / f"{split}.parquet", batch_size=20)
    return path


def trained(tmp_path: Path, name: str, path: Path, **training: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    recipe = Recipe(
        data=Data(str(path), streaming=True, shuffle_buffer=16, augment=[{"RandomRotation": {"degrees": 40}}]),
        model=TINY_VIT,
        training={**QUICK, **training},
        stages=[Train("one", compare=["majority"])],
    )
    report = run(recipe, tmp_path / name)
    assert report["stages"][0]["cost"]["optimizer_steps"] == 6
    return load_file(tmp_path / name / "one" / "model" / "model.safetensors")


def test_streamed_images_do_not_depend_on_the_number_of_workers(tmp_path):
    path = images(tmp_path / "images")
    here, there = trained(tmp_path, "a", path), trained(tmp_path, "b", path, dataloader_num_workers=2)
    other = trained(tmp_path, "c", path, seed=1)
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert any(not torch.equal(here[name], other[name]) for name in here)


def test_other_files_are_other_data(tmp_path):
    path = folder(tmp_path, texts(HEAD + 400), validation=texts(9, "other"))
    first = streamed(path).fingerprint
    assert streamed(path).fingerprint == first
    changed = texts(HEAD + 400)
    changed["text"][-1] = "changed"
    folder(tmp_path, changed, validation=texts(9, "other"))
    assert streamed(path).fingerprint != first


def test_the_log_says_what_the_first_rows_stand_for(tmp_path, caplog):
    with caplog.at_level("INFO", logger="kt_hf"):
        prepare("mine", Data(str(folder(tmp_path, texts(80))), streaming=True), task())
    assert "training rows are streamed; what is said of them beforehand is about the first 80" in logged(caplog)


def test_the_plan_counts_no_epochs_of_rows_that_nobody_has_counted(tmp_path, capsys):
    recipe = Recipe(
        data=Data(str(folder(tmp_path / "data", texts(HEAD + 50), validation=texts(9, "other"))), streaming=True),
        task="text-classification",
        model={"config": "bert", "config_overrides": BERT},
        training=QUICK,
        stages=[Train("one")],
    )
    main(recipe, ["--print", "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "train streamed, 9 validation" in said and "6 steps of 4 (at most 24 examples)" in said
    assert "epochs)" not in said
