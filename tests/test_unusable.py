"""Rows that a task cannot use: named by number, and left out on request, before anything is computed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from kt_hf_plugins.audio_classification import AudioClassification
from kt_hf_plugins.image_segmentation import ImageSegmentation
from kt_hf_plugins.image_text_matching import ImageTextMatching
from kt_hf_plugins.object_detection import ObjectDetection
from kt_hf_plugins.question_answering import QuestionAnswering
from kt_hf_plugins.token_classification import TokenClassification
from PIL import Image

from kt_hf import Data
from kt_hf.data import prepare
from kt_hf.reading import in_memory


def wav(samples: int) -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, np.linspace(-0.5, 0.5, samples), 8000, format="WAV")
    return {"bytes": file.getvalue(), "path": None}


def sounds() -> datasets.Dataset:
    given = [wav(80 + i) for i in range(6)]
    given[2], given[4] = {"bytes": b"no sound", "path": None}, wav(0)
    kinds = datasets.Features({"audio": datasets.Audio(), "label": datasets.Value("int64")})
    return in_memory([{"audio": sound, "label": i % 2} for i, sound in enumerate(given)], kinds)


def masks() -> datasets.Dataset:
    pictures = [Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)) for i in range(6)]
    found = [Image.fromarray(np.zeros((8, 8), np.uint8)) for _ in range(6)]
    found[1] = Image.fromarray(np.zeros((8, 6), np.uint8))
    found[3] = Image.fromarray(np.full((8, 8), 9, np.uint8))
    kinds = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return datasets.Dataset.from_dict({"image": pictures, "mask": found}, kinds)


def words() -> datasets.Dataset:
    rows = [{"tokens": ["a", "b", str(i)], "label": [0, 1, 0]} for i in range(6)]
    rows[5]["label"] = [0, 1]
    return datasets.Dataset.from_list(rows)


def questions() -> datasets.Dataset:
    rows = [
        {"question": f"which {i}", "context": f"number {i} it is", "answers": {"text": [str(i)], "answer_start": [7]}}
        for i in range(6)
    ]
    rows[0]["answers"] = {"text": ["0"], "answer_start": [6]}
    return datasets.Dataset.from_list(rows)


def boxes() -> datasets.Dataset:
    objects = [{"bbox": [[1.0, 1.0, 4.0, 4.0]], "category": [0]} for _ in range(6)]
    objects[2] = {"bbox": [[1.0, 1.0, 0.0, 4.0]], "category": [0]}
    objects[3] = {"bbox": [[1.0, 1.0, 4.0, 4.0]], "category": [0, 0]}
    pictures = [Image.fromarray(np.full((8, 8, 3), 30 * i, np.uint8)) for i in range(6)]
    kind = datasets.List(datasets.ClassLabel(names=["thing"]))
    fields = {"bbox": datasets.List(datasets.List(datasets.Value("float64"))), "category": kind}
    kinds = datasets.Features({"image": datasets.Image(), "objects": fields})
    return datasets.Dataset.from_dict({"image": pictures, "objects": objects}, kinds)


def pairs() -> datasets.Dataset:
    pictures = [Image.fromarray(np.full((8, 8, 3), 30 * i, np.uint8)) for i in range(6)]
    kinds = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("float64")}
    )
    columns = {"image": pictures, "text": [f"text {i}" for i in range(6)], "label": [0.0, 1.0, 0.5, 1.0, 0.0, 1.0]}
    return datasets.Dataset.from_dict(columns, kinds)


CASES: dict[str, tuple[Any, datasets.Dataset, dict[int, str]]] = {
    "audio": (AudioClassification(), sounds(), {2: "cannot be decoded as sound", 4: "holds no sound at all"}),
    "masks": (
        ImageSegmentation(classes=["a", "b"]),
        masks(),
        {1: "its mask 6 x 8", 3: "the value 9, the classes go from 0 to 1"},
    ),
    "words": (TokenClassification(), words(), {5: "3 words with 2 tags"}),
    "boxes": (ObjectDetection(), boxes(), {2: "has no width", 3: "1 boxes and 2 classes"}),
    "pairs": (ImageTextMatching(), pairs(), {2: "the label is 0.5"}),
    "questions": (QuestionAnswering(), questions(), {0: "is not at character 6"}),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_named_and_left_out(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task, rows, faults = CASES[case]
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    info = prepare("d", Data(str(tmp_path), drop=["unreadable"]), task)
    assert (
        info.counts["unreadable"] == 2 * len(faults)
        and f"{2 * len(faults)} rows that cannot be used, dropped" in caplog.text
    )
    for split in ("train", "validation"):
        assert info.splits[split]["index"][:] == [i for i in range(6) if i not in faults]
        for number, why in faults.items():
            line = next(line for line in caplog.text.splitlines() if f"row {number} of {split} of 'd'" in line)
            assert why in line
