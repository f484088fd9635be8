"""Real data sets, where a checkout has them beside it: found roles, inferred tasks, counts, labels, time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from kt_hf import Data, registry
from kt_hf.data import prepare, read
from kt_hf.roles import fitting_tasks

FOLDER = Path(__file__).parent.parent.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the real data sets are not beside this checkout (../shared/data)"
)

TEXT, IMAGE, PAIRS, LANGUAGE = (
    "text-classification",
    "image-classification",
    "zero-shot-image-classification",
    "text-generation",
)
# name: task, rows of train, validation and test, number of classes
SETS: dict[str, tuple[str, tuple[int, int, int], int | None]] = {
    "sst2": (TEXT, (67349, 872, 1821), 2),
    "trec": (TEXT, (4952, 500, 500), 6),
    "ag_news": (TEXT, (8980, 1000, 4000), 4),
    "cola": (TEXT, (7250, 1301, 1043), 2),
    "mrpc": (TEXT, (3676, 400, 1725), 2),
    "rte": (TEXT, (2127, 363, 277), 2),
    "sentiment_domains": (TEXT, (2100, 297, 595), 2),
    "cifar10": (IMAGE, (20000, 2000, 5000), 10),
    "mnist": (IMAGE, (5000, 1000, 2000), 10),
    "usps": (IMAGE, (850, 150, 2007), 10),
    "fashion_mnist": (IMAGE, (20000, 2000, 5000), 10),
    "pacs_mini": (IMAGE, (3920, 420, 1120), 7),
    "tinyshakespeare": (LANGUAGE, (6499, 361, 362), None),
    "flickr8k_mini": (PAIRS, (762, 113, 125), None),
}


def task(name: str) -> Any:
    return registry.load("task", name)()


def data(name: str, **settings: Any) -> Data:
    if not (FOLDER / name).is_dir():
        pytest.skip(f"there is no {FOLDER / name}")
    return Data(str(FOLDER / name), **settings)


def fitting(name: str) -> list[str]:
    """The tasks that a recipe without `task` could mean."""
    features = next(iter(read(data(name)).values())).features
    return [kind for kind, _ in fitting_tasks(features)]


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_prepared_as_it_is(name: str) -> None:
    kind, sizes, num_classes = SETS[name]
    started = time.perf_counter()
    info = prepare(name, data(name), task(kind))
    print(f"{name}: {time.perf_counter() - started:.2f} s")
    assert tuple(info.counts[s] for s in ("train", "validation", "test")) == sizes
    assert info.counts["unlabelled"] == 0 and (info.labels is None) == (num_classes is None)
    if num_classes is not None:
        assert len(info.labels or []) == num_classes
        assert set(info.splits["train"]["label"]) == set(range(num_classes))
    row = info.splits["train"][0]
    assert set(row) == {*info.roles, "index"} and all(value is not None for value in row.values())


@pytest.mark.parametrize("name", [n for n, (kind, _, _) in SETS.items() if kind in (TEXT, IMAGE)])
def test_the_task_is_found_where_the_features_decide_it(name: str) -> None:
    assert fitting(name) == [SETS[name][0]]


@pytest.mark.parametrize("name", [n for n, (kind, _, _) in SETS.items() if kind in (TEXT, IMAGE)])
def test_labels_keep_the_names_and_the_order_of_the_set(name: str) -> None:
    raw = read(data(name))["train"]
    info = prepare(name, data(name), task(SETS[name][0]))
    assert isinstance(raw.features["label"], datasets.ClassLabel)
    assert info.labels == raw.features["label"].names
    assert list(info.splits["train"]["label"])[:200] == list(raw["label"])[:200]


@pytest.mark.parametrize("name", ["sst2", "cola", "rte"])
def test_reports_are_made_on_labelled_rows(name: str) -> None:
    info = prepare(name, data(name), task(TEXT))
    labels = list(info.splits[info.evaluation_split]["label"])
    assert max(labels) >= 0
    if info.evaluation_split == "validation":
        assert max(info.splits["test"]["label"]) < 0


def test_subsets_of_real_sets() -> None:
    info = prepare("books", data("sentiment_domains", where={"domain": _domain()}, k_shot=5), task(TEXT))
    assert info.counts["train"] == 10
    animals = prepare("animals", data("cifar10", labels=["cat", "dog"], max_examples=100), task(IMAGE))
    assert animals.labels == ["cat", "dog"] and animals.counts["train"] == 100
    clean = prepare("trec", data("trec", drop=["duplicates", "overlap"]), task(TEXT))
    assert clean.counts["train"] < 4952 and clean.counts["test"] == 500
    again = prepare("trec", data("trec", drop=["duplicates", "overlap"]), task(TEXT))
    assert again.fingerprint == clean.fingerprint


def test_translations_and_scored_pairs() -> None:
    pairs = prepare(
        "multi30k", data("multi30k", columns={"source": "en", "target": "de"}), task("text2text-generation")
    )
    assert [pairs.counts[split] for split in ("train", "validation", "test")] == [29000, 1014, 1000]
    assert pairs.splits["train"][0]["target"].startswith("Zwei junge") and pairs.counts["empty"] == 0
    scored = prepare("stsb", data("stsb"), task("feature-extraction"))
    assert scored.roles == {"text": "sentence1", "text_pair": "sentence2", "label": "score"}
    assert scored.counts["test"] == 1379 and min(scored.splits["test"]["label"]) >= 0 and scored.labels is None


def _domain() -> str:
    return str(read(data("sentiment_domains"))["train"]["domain"][0])


@pytest.mark.parametrize(
    ("name", "sizes", "tags"), [("wnut17", (3394, 1009, 1287), 13), ("crossner", (500, 1391, 1610), 51)]
)
def test_tags_of_words(name: str, sizes: tuple[int, int, int], tags: int) -> None:
    assert fitting(name) == ["token-classification"]
    info = prepare(name, data(name), task("token-classification"))
    assert tuple(info.counts[s] for s in ("train", "validation", "test")) == sizes
    assert info.roles == {"tokens": "tokens", "label": "ner_tags"}
    assert info.labels == read(data(name))["train"].features["ner_tags"].feature.names and len(info.labels) == tags
    assert all(len(row["tokens"]) == len(row["label"]) for row in info.splits["test"])
    if name == "crossner":
        assert (
            prepare(name, data(name, where={"domain": "politics"}), task("token-classification")).counts["train"] == 200
        )


@pytest.mark.parametrize(("name", "sizes"), [("xquad", (3525, 460, 1965)), ("subjqa", (1980, 313, 737))])
def test_questions_with_their_answers(name: str, sizes: tuple[int, int, int]) -> None:
    assert fitting(name) == ["question-answering"]
    info = prepare(name, data(name), task("question-answering"))
    assert tuple(info.counts[s] for s in ("train", "validation", "test")) == sizes
    for row in info.splits["test"]:
        found = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        assert all(row["context"][start:].startswith(text) for text, start in found)
