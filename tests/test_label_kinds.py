"""Labels that are no single class: lists of classes, numbers; and which column can be what."""

from __future__ import annotations

import datasets
import pytest
from test_data import write

from kt_hf import Data, Role, Task
from kt_hf.data import DataInfo, prepare
from kt_hf.errors import RecipeError
from kt_hf.roles import kinds


class Anything(Task):
    """Reads texts with labels of any kind."""

    roles = (
        Role("text", ("string",), aliases=("sentence1",)),
        Role("label", ("class", "classes", "number"), aliases=("score", "tags")),
    )


class Numbers(Anything):
    """Reads whole numbers as numbers."""

    label_kind = "number"


def prepared(path, task=Anything, **settings) -> DataInfo:
    return prepare("mine", Data(str(path), **settings), task())


def test_lists_of_classes_are_numbered_by_one_list_of_names(tmp_path):
    train = {"text": ["a", "b", "c"], "tags": [["x", "z"], [], ["y"]]}
    test = {"text": ["d"], "tags": [["z", "x", "z"]]}
    info = prepared(write(tmp_path, train=train, validation=test, test=test), columns={"label": "tags"})
    assert info.labels == ["x", "y", "z"]
    assert info.splits["train"]["label"][:] == [[0, 2], [], [1]]
    assert info.splits["test"]["label"][:] == [[2, 0, 2]]
    with pytest.raises(RecipeError, match="lists of classes"):
        prepared(tmp_path, columns={"label": "tags"}, labels=["x"])


def test_named_classes_in_lists_keep_their_order(tmp_path):
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-x", "I-x"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": tags})
    rows = {"text": ["a", "b"], "label": [[0, 1, 2], [0]]}
    info = prepared(write(tmp_path, features=features, train=rows, validation=rows))
    assert info.labels == ["O", "B-x", "I-x"] and info.splits["train"]["label"][:] == [[0, 1, 2], [0]]


def test_numbers_stay_numbers(tmp_path):
    rows = {"sentence1": ["a", "b"], "score": [2.5, None]}
    info = prepared(write(tmp_path, train=rows, validation={"sentence1": ["c"], "score": [5.0]}))
    assert info.labels is None
    assert info.splits["train"]["label"][0] == 2.5 and info.splits["train"]["label"][1] is None
    whole = prepared(write(tmp_path / "whole", train={"text": ["a", "b"], "label": [3, 1]}), Numbers)
    assert whole.labels is None and {whole.splits[s]["label"][0] for s in ("train", "validation")} == {3.0, 1.0}


def test_other_labels_are_other_data(tmp_path):
    first = prepared(write(tmp_path, train={"text": ["a", "b"], "label": [0.5, 1.0]})).fingerprint
    again = prepared(write(tmp_path, train={"text": ["a", "b"], "label": [0.5, 2.0]})).fingerprint
    assert first != again


def test_streamed_lists_have_the_numbers_of_those_that_are_read_whole(tmp_path):
    tags = [["x"], ["y", "x"], ["z"], []] * 10
    rows = {"text": [f"t{i}" for i in range(40)], "label": tags}
    write(tmp_path, train=rows, validation={"text": ["v"], "label": [["x"]]})
    plain, stream = prepared(tmp_path), prepared(tmp_path, streaming=True).stream
    assert stream is not None
    found = {row["text"]: row["label"] for row in next(b for _, b in stream.blocks(0, _start()))}
    assert found == dict(zip(plain.splits["train"]["text"][:], plain.splits["train"]["label"][:], strict=True))


def _start():
    from kt_hf.streaming import Place

    return Place()


@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        (datasets.Audio(), ("audio",)),
        (datasets.Value("float32"), ("number",)),
        (datasets.Value("int64"), ("class?", "number?")),
        (datasets.List(datasets.ClassLabel(names=["a"])), ("classes",)),
        (datasets.List(datasets.Value("string")), ("strings", "classes?")),
        (datasets.List(datasets.Value("float32")), ("numbers",)),
        (datasets.List(datasets.Image()), ("images",)),
        ({"text": datasets.List(datasets.Value("string"))}, ("struct",)),
        (datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}), ("messages",)),
    ],
)
def test_what_a_column_can_serve_as(feature, expected):
    assert kinds(feature) == expected
