"""Images that are broken, odd or hostile: named by row, left out on request, never silently wrong."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import VIT
from PIL import Image

from kt_hf import Data, Model, Recipe, Train, images, run
from kt_hf.data import prepare
from kt_hf.errors import DataError
from kt_hf.loader import Rows
from kt_hf.registry import load


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(value: int = 128) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), value, np.uint8))


def bomb() -> bytes:
    """A PNG of a few hundred kilobytes at most that says that it has 400 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(2501 * 20000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BROKEN = {
    "no bytes": b"",
    "no image": b"this is text",
    "cut short": encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))[:900],
    "bomb": bomb(),
    "floating point": encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
}


def folder_with(tmp_path: Path, bad: bytes, split: str = "train") -> Path:
    """Twelve images, of which the eighth row of a split is bad."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["dark", "light"]))
    for name in ("train", "validation", "test"):
        values = [encoded(plain(10 * i + (100 if i % 2 else 0))) for i in range(12)]
        if name == split:
            values[7] = bad
        rows = {"image": [{"bytes": v, "path": None} for v in values], "label": [i % 2 for i in range(12)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def recipe(folder: Path, workers: int = 0, **data) -> Recipe:
    training = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": workers,
        "report_to": "none",
    }
    if workers:
        data["augment"] = ["RandomHorizontalFlip"]  # else rows are made ready beforehand, by no worker
    stage = Train("a", model=Model(config="vit", config_overrides=VIT), training=training)
    return Recipe(task="image-classification", data=Data(str(folder), **data), stages=[stage])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_image_is_named_by_its_row(case, workers, tmp_path):
    with pytest.raises(DataError) as error:
        run(recipe(folder_with(tmp_path, BROKEN[case]), workers), tmp_path / "out")
    assert "row 7 of train" in error.value.cause and "\n" not in error.value.cause, error.value
    assert "drop=[unreadable]" in error.value.remedy and error.value.exit_code == 3


def test_broken_images_of_other_splits_are_named_too(tmp_path):
    with pytest.raises(DataError, match="row 7 of test"):
        run(recipe(folder_with(tmp_path, b"x", "test")), tmp_path / "out")


@pytest.mark.parametrize("case", BROKEN)
def test_broken_images_are_left_out_on_request_and_counted(case, tmp_path, caplog):
    task = load("task", "image-classification")()
    info = prepare("d", Data(str(folder_with(tmp_path, BROKEN[case])), drop=["unreadable"]), task)
    assert len(info.splits["train"]) == 11 and 7 not in info.splits["train"]["index"]
    assert info.counts["unreadable"] == 1 and "1 rows that cannot be used, dropped" in caplog.text


def turned() -> bytes:
    """Bright above, dark below, and a note to turn it upside down."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(Image.fromarray(pixels), "PNG", exif=exif)


def frames() -> bytes:
    return encoded(plain(200), "GIF", save_all=True, append_images=[plain(0), plain(50)])


ODD = {
    "cmyk": (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 55)), "JPEG", quality=100), 200),
    "16 bits": (encoded(Image.fromarray(np.full((8, 8), 200 * 257, np.uint16))), 200),
    "palette": (encoded(plain(200).convert("P", palette=Image.Palette.ADAPTIVE)), 200),
    "one bit": (encoded(Image.new("1", (8, 8), 1)), 255),
    "grey": (encoded(Image.new("L", (8, 8), 200)), 200),
    "transparent": (encoded(Image.new("RGBA", (8, 8), (200, 200, 200, 255))), 200),
    "animated": (frames(), 200),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_images_have_the_pixels_one_sees(case, tmp_path):
    data, value = ODD[case]
    task = load("task", "image-classification")()
    info = prepare("d", Data(str(folder_with(tmp_path, data))), task)
    pixels = np.asarray(images.rgb(info.splits["train"][7]["image"]))
    assert pixels.shape == (8, 8, 3) and np.abs(pixels.astype(int) - value).max() <= 3, pixels[0, 0]


def test_an_image_is_turned_as_its_exif_says(tmp_path):
    task = load("task", "image-classification")()
    info = prepare("d", Data(str(folder_with(tmp_path, turned()))), task)
    model = Model(config="vit", config_overrides=VIT)
    pixels = Rows(info, "train", task, task.load(model, info), train=True)[0, 7]["pixel_values"]
    assert pixels[:, :3].max() < 0 < pixels[:, 5:].min(), "dark above, bright below"
