"""The data set `digits`: scikit-learn's 1,797 handwritten digits (8x8 pixels), split into two domains.

`source`: 1,000 upright digits (800 training, 100 validation, 100 test). `target`: the other 797, rotated by about 25
degrees and noisy (5 training images per class, 150 validation, 597 test). `captions`: the source's training images
with a caption each, validated and tested on the target. `animals`: all digits from 0 to 5, which play the animals of
CIFAR-10. Everything is drawn with fixed seeds.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # recipes read the configurations below, and start without these libraries
    import datasets
    import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {}", "the digit {}", "a small drawing of the number {}", "somebody wrote a {}")
ANIMALS = ("deer", "frog", "horse", "cat", "bird", "dog")
NAMES = ("source", "target", "captions", "animals")
_SHOTS, _VALIDATION = 5, 150

VIT: dict[str, Any] = {
    "hidden_size": 80,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.1,
}
"""A small vision transformer for 8x8 pixels; the wide initialisation lets it learn in a hundred steps."""
BERT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}
"""Configuration of a small text encoder for captions."""


@functools.cache
def load(name: str | None) -> datasets.DatasetDict:
    """Columns `image` (RGB-able 8x8 PNG) and `label` (class names zero to nine); `captions` also has `text`."""
    import numpy as np

    pixels_NHW, labels_N = _arrays()
    order = np.random.default_rng(20240601).permutation(len(labels_N))
    if name == "animals":
        order = order[labels_N[order] < len(ANIMALS)]
        return _splits(pixels_NHW, labels_N, (order[:700], order[700:800], order[800:]), False, ANIMALS)
    source, target = order[:1000], order[1000:]
    if name in (None, "source"):
        return _splits(pixels_NHW, labels_N, (source[:800], source[800:900], source[900:]), False)
    shifted = _shift(pixels_NHW)
    few = np.concatenate([target[labels_N[target] == c][:_SHOTS] for c in range(10)])
    rest = target[~np.isin(target, few)]
    parts = (few, rest[:_VALIDATION], rest[_VALIDATION:])
    if name == "target":
        return _splits(shifted, labels_N, parts, False)
    mixed = shifted.copy()
    mixed[source] = pixels_NHW[source]
    return _splits(mixed, labels_N, (source[:800], *parts[1:]), True)


@functools.cache
def _arrays() -> tuple[np.ndarray, np.ndarray]:
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


def _shift(pixels_NHW: np.ndarray) -> np.ndarray:
    """Rotate by 25 degrees (standard deviation 5) and add Gaussian noise (standard deviation 30 of 255)."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(7)
    angles = random.normal(25, 5, len(pixels_NHW))
    turned = [
        np.asarray(Image.fromarray(p).rotate(a, Image.Resampling.BILINEAR))
        for p, a in zip(pixels_NHW, angles, strict=True)
    ]
    noisy = np.stack(turned).astype(np.float64) + random.normal(0, 30, pixels_NHW.shape)
    return noisy.clip(0, 255).round().astype(np.uint8)


def _splits(
    pixels: np.ndarray,
    labels: np.ndarray,
    parts: tuple[np.ndarray, ...],
    captions: bool,
    names: tuple[str, ...] = WORDS,
) -> datasets.DatasetDict:
    import datasets
    from PIL import Image

    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    if captions:
        features["text"] = datasets.Value("string")
    found = {}
    for split, rows in zip(("train", "validation", "test"), parts, strict=True):
        columns = {"image": [Image.fromarray(p) for p in pixels[rows]], "label": labels[rows]}
        if captions:
            columns["text"] = [CAPTIONS[i % len(CAPTIONS)].format(WORDS[labels[i]]) for i in rows]
        found[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.DatasetDict(found)
