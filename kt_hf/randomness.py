"""Randomness without state: generators are seeded from where one is, so nothing needs to be saved or restored."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def number(*where: Any) -> int:
    """A 63-bit seed, a pure function of its arguments."""
    return int.from_bytes(hashlib.blake2b(repr(where).encode(), digest_size=8).digest(), "little") >> 1


def seed_torch(*where: Any) -> None:
    """Seed torch's generators alone; cheap enough for every micro-batch and sample."""
    seed = number(*where)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def seed_all(*where: Any) -> None:
    """Seed Python, numpy and torch."""
    seed = number(*where)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    seed_torch(*where)
