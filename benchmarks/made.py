"""Data that are made for task_rows.py: rectangles to find, digits both spoken and written, digits as words."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from kt_hf.reading import in_memory

SPLITS = ("train", "validation", "test")
COLOURS = ((210, 60, 60), (70, 60, 150), (120, 50, 130))
SIDES = ((22, 30), (28, 40), (6, 11))


def rectangles(work: Path) -> Path:
    """Pictures of 160 x 120 pixels with 3 to 13 rectangles of three kinds, as detection data."""
    folder = work / "rectangles"
    box = datasets.List(datasets.List(datasets.Value("float64")))
    kinds = datasets.List(datasets.ClassLabel(names=["brick", "slab", "chip"]))
    features = datasets.Features({"image": datasets.Image(), "objects": {"bbox": box, "category": kinds}})
    for seed, (split, count) in enumerate(zip(SPLITS, (600, 100, 100), strict=True)):
        if not (folder / f"{split}.parquet").exists():
            folder.mkdir(parents=True, exist_ok=True)
            random = np.random.default_rng(seed)
            _write([_picture(random) for _ in range(count)], features, folder, split)
    return folder


def _picture(random: np.random.Generator) -> dict[str, Any]:
    image = Image.fromarray(random.normal(200, 12, (120, 160, 3)).clip(0, 255).astype(np.uint8))
    draw, found = ImageDraw.Draw(image), {"bbox": [], "category": []}
    for _ in range(random.integers(3, 14)):
        kind = int(random.integers(3))
        width, height = random.integers(*SIDES[kind], 2).tolist()
        x, y = int(random.integers(0, 160 - width)), int(random.integers(0, 120 - height))
        colour = tuple(int(v) for v in random.normal(COLOURS[kind], 12).clip(0, 255))
        draw.rectangle([x, y, x + width - 1, y + height - 1], fill=colour)
        found["bbox"].append([x, y, width, height])
        found["category"].append(kind)
    return {"image": {"bytes": _png(image), "path": None}, "objects": found}


def spoken_and_written(source: Path, work: Path, name: str) -> Path:
    """Of fsdd and mnist: `both`, rows with a sound and a noisy picture of one digit; `sounds`, `pictures`: other rows
    with one of them."""
    folder = work / name
    features = {
        "image": datasets.Image(),
        "audio": datasets.Audio(decode=False),
        "label": datasets.ClassLabel(names=[str(i) for i in range(10)]),
    }
    for split in SPLITS:
        if (folder / f"{split}.parquet").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(_pairs(source, split))
        if split == "train":  # 300 rows are both; the others teach one medium alone
            rows = rows[:300] if name == "both" else rows[300:]
        kept = [column for column in features if {"pictures": "audio", "sounds": "image"}.get(name) != column]
        rows = [{column: row[column] for column in kept} for row in rows]
        _write(rows, datasets.Features({column: features[column] for column in kept}), folder, split)
    return folder


def words(source: Path, work: Path) -> Path:
    """fsdd with its digits as words."""
    folder, names = work / "words", ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    features = {"audio": datasets.Audio(decode=False), "text": datasets.Value("string")}
    for split in SPLITS:
        if not (folder / f"{split}.parquet").exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows = datasets.Dataset.from_parquet(str(source / "fsdd" / f"{split}.parquet"))
            rows = rows.cast_column("audio", datasets.Audio(decode=False))
            found = [{"audio": r["audio"], "text": names[r["label"]], "speaker": r["speaker"]} for r in rows]
            _write(found, datasets.Features({**features, "speaker": datasets.Value("string")}), folder, split)
    return folder


def _pairs(source: Path, split: str) -> Iterator[dict[str, Any]]:
    """Every sound with a picture of its digit, in random order; each picture once, as far as they go."""
    random = np.random.default_rng(SPLITS.index(split))
    sounds, pictures = (
        datasets.Dataset.from_parquet(str(source / name / f"{split}.parquet")) for name in ("fsdd", "mnist")
    )
    sounds = sounds.cast_column("audio", datasets.Audio(decode=False))
    labels = np.asarray(pictures["label"][:])
    piles = {digit: random.permutation(np.flatnonzero(labels == digit)).tolist() for digit in range(10)}
    for place in random.permutation(len(sounds)).tolist():
        row = sounds[place]
        pile = piles[row["label"]]
        chosen = pile.pop(0)
        pile.append(chosen)
        pixels = np.asarray(pictures[chosen]["image"].convert("L"), dtype=np.float64)
        noisy = (0.35 * pixels + random.normal(90, 60, pixels.shape)).clip(0, 255).astype(np.uint8)
        image = {"bytes": _png(Image.fromarray(noisy)), "path": None}
        yield {"image": image, "audio": row["audio"], "label": row["label"]}


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _write(rows: list[dict[str, Any]], features: datasets.Features, folder: Path, split: str) -> None:
    """Under its name only when it is complete."""
    staged = folder / f".{split}.parquet"
    in_memory(rows, features).to_parquet(str(staged))
    staged.rename(folder / f"{split}.parquet")
