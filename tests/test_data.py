"""Data sets: reading, roles, labels, subsets, splits, cleaning. All sets are made here, with the columns of real
ones.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from kt_hf import Data, registry
from kt_hf.augmenting import transforms
from kt_hf.data import DataInfo, find_roles, prepare, read
from kt_hf.errors import DataError, HubError, KtError, RecipeError
from kt_hf.roles import fitting_tasks

TEXT, IMAGE = "text-classification", "image-classification"
Split = dict[str, list[Any]]


def task(name: str = TEXT) -> Any:
    return registry.load("task", name)()


def prepared(path: Path | str, kind: str = TEXT, **settings: Any) -> DataInfo:
    return prepare("mine", Data(str(path), **settings), task(kind))


def texts(n: int, prefix: str = "text", classes: int = 3) -> Split:
    return {"text": [f"{prefix} {i}" for i in range(n)], "label": [f"c{i % classes}" for i in range(n)]}


def write(folder: Path, suffix: str = ".parquet", features: Any = None, **splits: Split) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for split, columns in splits.items():
        rows = datasets.Dataset.from_dict(columns, features=features)
        path = folder / f"{split}{suffix}"
        if suffix == ".parquet":
            rows.to_parquet(path)
        elif suffix in (".csv", ".tsv"):
            rows.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
        else:
            rows.to_json(path)
    return folder


def image(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4), value, dtype=np.uint8))


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> Any:
    logger = logging.getLogger("kt_hf")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield
    logger.removeHandler(caplog.handler)


# --- reading ---


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".json", ".jsonl"])
def test_a_folder_of_any_kind_of_file(tmp_path: Path, suffix: str) -> None:
    folder = write(tmp_path, suffix, train=texts(9), valid=texts(6, "v"), test=texts(3, "t"))
    info = prepared(folder)
    assert {s: len(r) for s, r in info.splits.items()} == {"train": 9, "validation": 6, "test": 3}
    assert info.labels == ["c0", "c1", "c2"] and info.splits["train"]["text"][4] == "text 4"
    assert info.splits["test"].column_names == ["text", "index", "label"]


def test_one_file_is_training_data_and_part_of_it_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, ".csv", everything=texts(60))
    info = prepared(tmp_path / "everything.csv", validation_size=12)
    assert (len(info.splits["train"]), len(info.splits["validation"])) == (48, 12)
    assert info.evaluation_split == "validation"
    assert not set(info.splits["train"]["index"]) & set(info.splits["validation"]["index"])


def test_a_folder_written_by_save_to_disk_and_one_of_shards(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(texts(20))
    datasets.DatasetDict(train=rows, test=rows.select(range(3))).save_to_disk(tmp_path / "saved")
    info = prepared(tmp_path / "saved", validation_size=4)
    assert info.counts["train"] + info.counts["validation"] == 20 and info.counts["test"] == 3
    (tmp_path / "shards").mkdir()
    for i in range(2):
        rows.shard(2, i).to_parquet(tmp_path / "shards" / f"train-0000{i}-of-00002.parquet")
    assert len(read(Data(str(tmp_path / "shards")))["train"]) == 20


def test_named_splits(tmp_path: Path) -> None:
    folder = write(tmp_path, train=texts(9), big=texts(12, "b"), validation=texts(3, "v"))
    assert len(read(Data(str(folder), splits={"train": "big"}))["train"]) == 12
    with pytest.raises(RecipeError, match="there is no split 'huge'"):
        read(Data(str(folder), splits={"train": "huge"}))


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    assert prepared(write(tmp_path, train=texts(30))).counts["train"] == 27
    assert prepared(write(tmp_path, train=texts(60))).counts["train"] == 54


def test_splits_may_lack_labels_but_nothing_else(tmp_path: Path) -> None:
    unlabelled = {"text": ["a", "b"]}
    info = prepared(write(tmp_path / "a", train=texts(9), validation=texts(3, "v"), test=unlabelled))
    assert list(info.splits["test"]["label"]) == [-1, -1] and info.evaluation_split == "validation"
    folder = write(tmp_path / "b", train=texts(9), validation={"sentence": ["x"], "label": ["c0"]})
    with pytest.raises(DataError, match="the split validation has no column 'text'"):
        prepared(folder)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", b"text,label\na,x\nb,y,z\nc,x\nd\n", ["line 3: 3 fields", "the header has 2", "line 5: 1 fields"]),
        ("b.jsonl", b'{"text":"a","label":1}\n{"text": oops}\n[1]\n', ["line 2: no JSON", "line 3: a list"]),
        ("c.csv", "text,label\na,x\ncaf\u00e9,y\n".encode("latin-1"), ["line 3: not UTF-8"]),
        ("d.csv", b"", ["is empty"]),
        ("d.jsonl", b"", ["is empty"]),
        ("e.csv", b"text,label\n", ["e.csv holds no rows"]),
        ("f.csv", b"text,text,label\na,b,c\n", ["two columns are called 'text'"]),
        ("g.parquet", b"PAR1 truncated", ["g.parquet cannot be read"]),
        (
            "h.jsonl",
            b'{"text":"a","label":1}\n{"text":"b","label":"x"}\n',
            ["column 'label' mixes int and str", "row 2"],
        ),
        ("i.pkl", b"x", ["unknown kind of file"]),
        ("j.csv", b"text,label\nonly,x\n", ["validation_size asks for 1 of 1"]),
    ],
)
def test_faulty_files_are_named_by_row(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        prepared(tmp_path / name)
    assert all(part in str(error.value) for part in parts), error.value
    assert error.value.remedy and error.value.exit_code == 3


def test_unreadable_rows_are_dropped_on_request_and_counted(tmp_path: Path) -> None:
    good = "".join(f"t{i},c{i % 2}\n" for i in range(20))
    (tmp_path / "a.csv").write_text(f"text,label\nb,y,z\n{good}oops\n")
    info = prepared(tmp_path / "a.csv", drop=["unreadable"])
    assert info.counts["unreadable"] == 2 and info.counts["train"] + info.counts["validation"] == 20
    lines = "".join(json.dumps({"text": f"t{i}", "label": i % 2}) + "\n" for i in range(20))
    (tmp_path / "b.jsonl").write_text(f"{lines}oops\n")
    info = prepared(tmp_path / "b.jsonl", drop=["unreadable"])
    assert info.counts["unreadable"] == 1 and info.counts["train"] + info.counts["validation"] == 20


def test_csv_with_a_mark_quotes_newlines_and_words_for_nothing(tmp_path: Path) -> None:
    rows = 'text,label\n"a\nb",1\nNA,2\nnull,1\n"c, d",\n\u00e9\u65e5,2\n'
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    info = prepared(tmp_path, validation_size=1, drop=[])
    found = {**dict(zip(info.splits["train"]["text"], info.splits["train"]["label"], strict=True))}
    found.update(zip(info.splits["validation"]["text"], info.splits["validation"]["label"], strict=True))
    assert found == {"a\nb": 0, "NA": 1, "null": 0, "c, d": -1, "\u00e9\u65e5": 1}
    assert info.labels == ["1", "2"] and info.counts["unlabelled"] == 1


def test_data_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "trec", train=texts(9))
    with pytest.raises(DataError, match="did you mean"):
        prepared(tmp_path / "trecc")
    with pytest.raises(DataError, match="the folder is empty"):
        (tmp_path / "empty").mkdir()
        prepared(tmp_path / "empty")
    with pytest.raises(HubError, match="is no folder or file, and not on the Hub"):
        prepared("nobody/has-this")
    with pytest.raises(RecipeError, match="digits has no 'sauce'"):
        prepared("digits", IMAGE, name="sauce")


# --- roles ---

V, C = datasets.Value, datasets.ClassLabel
STRINGS, PICTURE = datasets.List(V("string")), datasets.Image()
LAYOUTS: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
    (
        "sst2, cola",
        TEXT,
        {"sentence": V("string"), "label": C(names=["a", "b"])},
        {"text": "sentence", "label": "label"},
    ),
    ("trec, ag_news", TEXT, {"text": V("string"), "label": C(names=["a", "b"])}, {"text": "text", "label": "label"}),
    (
        "mrpc, rte",
        TEXT,
        {"sentence1": V("string"), "sentence2": V("string"), "label": C(names=["a", "b"])},
        {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
    ),
    (
        "nli",
        TEXT,
        {"premise": V("string"), "hypothesis": V("string"), "label": V("int64")},
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
    ),
    (
        "sentiment_domains",
        TEXT,
        {"text": V("string"), "label": C(names=["a", "b"]), "domain": V("string")},
        {"text": "text", "label": "label"},
    ),
    ("csv", TEXT, {"label": V("large_string"), "text": V("large_string")}, {"text": "text", "label": "label"}),
    (
        "one fitting column each",
        TEXT,
        {"utterance": V("string"), "intent": C(names=["a"])},
        {"text": "utterance", "label": "intent"},
    ),
    ("cifar10, mnist", IMAGE, {"image": PICTURE, "label": C(names=["a"])}, {"image": "image", "label": "label"}),
    ("hub", IMAGE, {"img": PICTURE, "fine": C(names=["a"])}, {"image": "img", "label": "fine"}),
    (
        "pacs",
        IMAGE,
        {"image": PICTURE, "label": C(names=["a"]), "domain": V("string")},
        {"image": "image", "label": "label"},
    ),
]


@pytest.mark.parametrize(
    ("kind", "features", "roles"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS]
)
def test_roles_of_real_layouts(kind: str, features: dict[str, Any], roles: dict[str, str]) -> None:
    assert find_roles(features, task(kind).roles) == roles
    assert task(kind).fits(roles)


@pytest.mark.parametrize(
    ("media", "tasks"),
    [
        (datasets.Audio(), ["audio-classification"]),
        (datasets.Video(), ["video-classification"]),
        (datasets.List(PICTURE), ["video-classification"]),
    ],
    ids=["sound", "video", "frames"],
)
def test_what_is_said_about_a_sound_is_not_taken_for_the_task(media: Any, tasks: list[str]) -> None:
    beside = {"label": C(names=["a", "b"]), "speaker": V("string")}
    assert [name for name, _ in fitting_tasks(datasets.Features(beside))] == [TEXT]
    assert [name for name, _ in fitting_tasks(datasets.Features({"media": media, **beside}))] == tasks


@pytest.mark.parametrize(
    ("features", "columns", "part"),
    [
        (
            {"sentence": V("string"), "question": V("string"), "label": C(names=["a"])},
            {},
            "several columns could be the text",
        ),
        ({"x": V("string"), "y": V("string"), "label": C(names=["a"])}, {}, "several columns could be the text: x, y"),
        ({"text": V("string"), "mood": V("string")}, {}, "no column can be the label"),
        ({"text": V("string"), "at": V("timestamp[s]")}, {"label": "at"}, "'at' is timestamp[s], not class or classes"),
        ({"text": V("string"), "label": C(names=["a"])}, {"text": "label"}, "'label' is class of 1, not string"),
        ({"text": V("string"), "label": C(names=["a"])}, {"txt": "text"}, "did you mean 'text'"),
        ({"text": V("string"), "label": C(names=["a"])}, {"text": "txet"}, "there is no column 'txet'"),
        ({"text": V("string"), "label": C(names=["a"])}, {"text": "text", "text_pair": "text"}, "name a column once"),
    ],
)
def test_columns_that_are_not_clear(features: dict[str, Any], columns: dict[str, str], part: str) -> None:
    with pytest.raises(RecipeError) as error:
        find_roles(features, task().roles, columns)
    assert part in str(error.value) and error.value.remedy


def test_columns_of_which_a_task_with_optional_roles_knows_none(tmp_path: Path) -> None:
    folder = write(tmp_path, train={"en": ["a", "b"], "de": ["c", "d"]})
    with pytest.raises(RecipeError, match=r"the columns are en \(string\), de \(string\)") as error:
        prepared(folder, "text-generation")
    assert "data.columns.ROLE=COLUMN" in error.value.remedy and "completion" in error.value.remedy


def test_named_columns_and_roles_that_swap_names(tmp_path: Path) -> None:
    rows = {"label": ["one", "two", "three", "four"], "text": [0, 1, 0, 1], "index": [7, 7, 7, 7]}
    info = prepared(write(tmp_path, train=rows), columns={"text": "label", "label": "text"}, validation_size=1)
    assert set(info.splits["train"]["text"]) < {"one", "two", "three", "four"} and info.labels == ["0", "1"]
    numbers = [*info.splits["train"]["index"], *info.splits["validation"]["index"]]
    assert sorted(numbers) == [0, 1, 2, 3]  # the row's number, whatever the data's own `index` says


# --- labels ---


def test_labels_are_matched_by_name_across_splits(tmp_path: Path) -> None:
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = datasets.Features(text=V("string"), label=C(names=names))
        rows = {"text": [f"{split} {i}" for i in range(8)], "label": [names.index(n) for n in ["cat", "dog"] * 4]}
        write(tmp_path, features=features, **{split: rows})
    info = prepared(tmp_path, validation_size=2)
    assert info.labels == ["cat", "dog"] and list(info.splits["test"]["label"]) == [0, 1] * 4


@pytest.mark.parametrize(
    ("values", "labels", "numbers"),
    [
        (["b", "a", "b", "a"], ["a", "b"], [1, 0, 1, 0]),
        ([10, 9, 10, 9], ["9", "10"], [1, 0, 1, 0]),
        ([True, False, True, False], ["False", "True"], [1, 0, 1, 0]),
        ([-1, 1, -1, 1], ["-1", "1"], [0, 1, 0, 1]),
        (["a", None, "b", "a"], ["a", "b"], [0, -1, 1, 0]),
    ],
)
def test_labels_of_any_kind(tmp_path: Path, values: list[Any], labels: list[str], numbers: list[int]) -> None:
    rows = {"text": ["w", "x", "y", "z"], "label": values}
    info = prepared(write(tmp_path, train=rows, validation=rows))
    assert info.labels == labels and list(info.splits["train"]["label"]) == numbers


def test_minus_one_is_no_class_where_training_rows_do_not_have_it(tmp_path: Path) -> None:
    info = prepared(
        write(
            tmp_path,
            train={"text": ["a", "b"], "label": [0, 1]},
            validation={"text": ["c"], "label": [0]},
            test={"text": ["d"], "label": [-1]},
        )
    )
    assert info.labels == ["0", "1"] and info.evaluation_split == "validation"


def test_a_subset_of_classes_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    folder = write(tmp_path, train=texts(30, classes=5), test=texts(10, "t", classes=5))
    info = prepared(folder, labels=["c3", "c1"], validation_size=2)
    assert info.labels == ["c3", "c1"] and info.counts["test"] == 4
    assert list(info.splits["test"]["label"]) == [1, 0, 1, 0] and list(info.splits["test"]["index"]) == [1, 3, 6, 8]
    assert prepared(folder, labels=[3, 1], validation_size=2).labels == ["c3", "c1"]
    with pytest.raises(RecipeError, match="there is no class 'c9'"):
        prepared(folder, labels=["c9"])


def test_columns_that_are_no_class_and_training_rows_without_any(tmp_path: Path) -> None:
    rows = {"text": [f"t{i}" for i in range(300)], "label": [f"l{i}" for i in range(300)]}
    with pytest.raises(DataError, match="looks like no class"):
        prepared(write(tmp_path / "a", train=rows))
    none = {"text": ["a", "b"], "label": [-1, -1]}
    features = datasets.Features(text=V("string"), label=C(names=["x", "y"]))
    with pytest.raises(DataError, match="no training row has a label"):
        prepared(write(tmp_path / "b", features=features, train=none, validation=none))


def test_single_class_splits_and_untrained_classes_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared(write(tmp_path, train=texts(9, classes=1), validation=texts(6, "v", classes=2)))
    assert "all 9 rows of train have a single class, 'c0'" in logged(caplog)
    prepared(write(tmp_path / "b", train=texts(9, classes=2), validation=texts(6, "v", classes=3)))
    assert "1 classes have no training rows: c2" in logged(caplog)


# --- subsets ---


def test_where_by_value_and_by_name_of_a_class(tmp_path: Path) -> None:
    features = datasets.Features(text=V("string"), label=C(names=["x", "y"]), domain=V("string"), year=V("int32"))
    rows = {"text": list("abcdefgh"), "label": [0, 1] * 4, "domain": ["u", "u", "v", "w"] * 2, "year": [1, 2, 3, 4] * 2}
    folder = write(tmp_path, features=features, train=rows, validation=rows)
    assert list(prepared(folder, where={"domain": "u"}).splits["train"]["index"]) == [0, 1, 4, 5]
    assert list(prepared(folder, where={"domain": ["v", "w"], "year": 3}).splits["train"]["text"]) == ["c", "g"]
    assert list(prepared(folder, where={"label": "y"}).splits["train"]["text"]) == list("bdfh")
    with pytest.raises(DataError, match="no row of train has 'z'"):
        prepared(folder, where={"domain": "z"})
    with pytest.raises(RecipeError, match="did you mean 'domain'"):
        prepared(folder, where={"domian": "u"})


def test_k_shot_is_k_of_every_class_and_a_function_of_the_seed(tmp_path: Path) -> None:
    folder = write(tmp_path, train=texts(90), validation=texts(6, "v"), test=texts(30, "t"))
    first, again, other = (prepared(folder, k_shot=4, seed=s) for s in (1, 1, 2))
    assert np.bincount(first.splits["train"]["label"]).tolist() == [4, 4, 4] and first.counts["test"] == 30
    assert list(first.splits["train"]["index"]) == list(again.splits["train"]["index"])
    assert list(first.splits["train"]["index"]) != list(other.splits["train"]["index"])
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_max_examples(tmp_path: Path) -> None:
    folder = write(tmp_path, train=texts(30), validation=texts(9, "v"), test=texts(6, "t"))
    assert [prepared(folder, max_examples=8).counts[s] for s in ("train", "validation", "test")] == [8, 8, 6]
    assert [prepared(folder, max_examples={"test": 2}).counts[s] for s in ("train", "test")] == [30, 2]
    assert list(prepared(folder, max_examples=8).splits["train"]["index"]) == sorted(
        prepared(folder, max_examples=8).splits["train"]["index"]
    )


def test_the_hold_out_is_stratified_and_keeps_copies_together(tmp_path: Path) -> None:
    rows = texts(200, classes=2)
    rows["label"] = ["rare" if i < 20 else "frequent" for i in range(200)]
    info = prepared(write(tmp_path, train=rows), validation_size=0.2)
    assert np.bincount(info.splits["validation"]["label"]).tolist() == [36, 4]
    again = prepared(tmp_path, validation_size=0.2)
    assert list(again.splits["validation"]["index"]) == list(info.splits["validation"]["index"])
    doubled = {key: values * 2 for key, values in texts(50).items()}
    info = prepared(write(tmp_path / "b", train=doubled), validation_size=0.2)
    assert not set(info.splits["train"]["text"]) & set(info.splits["validation"]["text"])
    assert info.counts["duplicates"] == 50


def test_the_fingerprint_follows_the_rows(tmp_path: Path) -> None:
    first = prepared(write(tmp_path / "a", train=texts(9), validation=texts(3, "v"))).fingerprint
    assert prepared(write(tmp_path / "b", train=texts(9), validation=texts(3, "v"))).fingerprint == first
    for i, change in enumerate(({"text": ["other", *texts(9)["text"][1:]]}, {"label": ["c1", *texts(9)["label"][1:]]})):
        rows = {**texts(9), **change}
        assert prepared(write(tmp_path / f"c{i}", train=rows, validation=texts(3, "v"))).fingerprint != first


# --- cleaning ---


def dirty(tmp_path: Path) -> Path:
    train = {"text": ["a", "a", "  ", None, "b", "c", "shared", "d"], "label": [0, 1, 0, 1, 0, 1, 0, -1]}
    features = datasets.Features(text=V("string"), label=C(names=["x", "y"]))
    return write(tmp_path, features=features, train=train, validation={"text": ["shared", ""], "label": [0, 1]})


def test_what_is_unclean_is_counted_and_kept_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = prepared(dirty(tmp_path))
    found = {k: info.counts[k] for k in ("empty", "duplicates", "overlap", "unlabelled")}
    assert found == {"empty": 3, "duplicates": 1, "overlap": 1, "unlabelled": 1}
    assert info.counts["train"] == 8 and info.splits["train"]["text"][3] == ""
    assert "1 training rows that are also in validation or test; data.drop=[overlap] drops them" in logged(caplog)


def test_chats_without_a_word_are_empty(tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": "yes"}
    train = {"messages": [[turn], [], [{"role": "user", "content": " "}], [{"role": "user", "content": None}, turn]]}
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps({'messages': m})}\n" for m in train["messages"]))
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": [turn]}) + "\n")
    info = prepared(tmp_path, "text-generation", drop=["empty"], validation_size=0.5)
    assert info.counts["empty"] == 2 and sum(len(info.splits[s]) for s in ("train", "validation")) == 2
    assert list(info.texts()) == ["yes"]


def test_lists_of_captions_are_empty_only_without_a_word(tmp_path: Path) -> None:
    captions = [["a dog", ""], [], ["", " "], ["a cat"]]
    features = datasets.Features(image=datasets.Image(), captions=datasets.List(V("string")))
    images = [image(i) for i in range(len(captions))]
    folder = write(tmp_path, features=features, train={"image": images, "captions": captions})
    info = prepared(folder, "zero-shot-image-classification", drop=["empty"], validation_size=0.5)
    assert info.counts["empty"] == 2 and sum(len(info.splits[s]) for s in ("train", "validation")) == 2


@pytest.mark.parametrize(
    ("drop", "train", "validation"),
    [
        (["empty"], [0, 1, 4, 5, 6, 7], [0]),
        (["duplicates"], [0, 2, 3, 4, 5, 6, 7], [0, 1]),
        (["overlap"], [0, 1, 2, 3, 4, 5, 7], [0, 1]),
        (["unlabelled"], [0, 1, 2, 3, 4, 5, 6], [0, 1]),
        (["empty", "duplicates", "overlap", "unlabelled"], [0, 4, 5], [0]),
    ],
)
def test_what_is_dropped(tmp_path: Path, drop: list[str], train: list[int], validation: list[int]) -> None:
    info = prepared(dirty(tmp_path), drop=drop)
    assert list(info.splits["train"]["index"]) == train and list(info.splits["validation"]["index"]) == validation
    assert info.counts["duplicates"] == 1


def test_dropping_everything_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, train=texts(3), validation=texts(3))
    with pytest.raises(DataError, match="no rows are left in train"):
        prepared(folder, drop=["overlap"])


# --- images ---


def test_images(tmp_path: Path) -> None:
    features = datasets.Features(image=PICTURE, label=C(names=["dark", "light"]))
    train = {"image": [image(v) for v in (0, 10, 10, 200, 250)], "label": [0, 0, 0, 1, 1]}
    info = prepared(
        write(tmp_path, features=features, train=train, test={"image": [image(250)], "label": [1]}),
        IMAGE,
        validation_size=1,
    )
    assert info.counts["duplicates"] == 1 and info.counts["overlap"] == 1 and info.labels == ["dark", "light"]
    assert info.splits["train"]["image"][0].size == (4, 4)


def test_a_folder_of_images_by_class(tmp_path: Path) -> None:
    for split, values in (("train", range(0, 40, 5)), ("test", [35, 36])):
        for i, value in enumerate(values):
            path = tmp_path / split / ("even" if i % 2 == 0 else "odd")
            path.mkdir(parents=True, exist_ok=True)
            image(value).save(path / f"{i}.png")
    info = prepared(tmp_path, IMAGE, validation_size=2)
    assert info.labels == ["even", "odd"] and info.counts["test"] == 2 and info.counts["overlap"] == 1


def test_missing_images_must_be_dropped(tmp_path: Path) -> None:
    features = datasets.Features(image=PICTURE, label=C(names=["a", "b"]))
    rows = {"image": [image(1), None, image(3), image(4)], "label": [0, 1, 0, 1]}
    folder = write(tmp_path, features=features, train=rows, validation={"image": [image(9)], "label": [0]})
    with pytest.raises(DataError, match="1 rows of train have no image"):
        prepared(folder, IMAGE)
    assert prepared(folder, IMAGE, drop=["empty"]).counts["train"] == 3


def test_digits_are_two_domains_and_captions() -> None:
    sizes = {n: {s: len(r) for s, r in read(Data("digits", n)).items()} for n in ("source", "target", "captions")}
    assert sizes["source"] == {"train": 800, "validation": 100, "test": 100}
    assert sizes["target"] == {"train": 50, "validation": 150, "test": 597}
    assert sizes["captions"] == {"train": 800, "validation": 150, "test": 597}
    target = prepared("digits", IMAGE, name="target")
    assert np.bincount(target.splits["train"]["label"]).tolist() == [5] * 10
    assert target.fingerprint == prepared("digits", IMAGE, name="target").fingerprint


def test_augmentation_by_name() -> None:
    steps = transforms([{"RandomRotation": {"degrees": 10}}, "RandomHorizontalFlip"])
    assert steps(image(3)).size == (4, 4)
    for wrong, part in (
        ("RandomRotatoin", "did you mean 'RandomRotation'"),
        ({"RandomRotation": {"degrese": 1}}, "degrese"),
    ):
        with pytest.raises(KtError, match=part):
            transforms([wrong])
