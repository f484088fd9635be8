"""Where a tensor stands in a model's depth, from the names alone: in which block of which stack, before or after them.

Blocks are what a list of modules holds, which the names tell by a number: `model.layers.3.mlp.up_proj.weight`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

BEFORE = re.compile(
    r"emb|wte|wpe|stem|patch|shared\.|feature_|(cls|mask|dist|reg)_token|pre_?la?y|ln_pre|norm_pre|(^|\.)conv\d?\.",
    re.IGNORECASE,
)
"""In names of what comes before the blocks."""
AFTER = re.compile(r"embed_out|unembed|output_embed|head\.", re.IGNORECASE)
"""In names of what comes after them although `BEFORE` says otherwise."""
SMALL = 0.1
"""A list with a smaller share of the tensors of the largest one is no stack, such as a feature extractor."""

_ITEM = re.compile(r"(?:^|(?<=\.))(\d+)\.")
_STAGE = re.compile(r"(?:\w*[a-zA-Z_]\w*\.)?(\d+)\.")


@dataclass(frozen=True)
class Block:
    """A place in a stack: the name of the list, which of its blocks, and of how many."""

    stack: str
    index: int
    count: int


def blocks(names: Collection[str]) -> dict[str, Block]:
    """name -> its block, for the names that are in one. Encoder and decoder are stacks apart; lists of stages that
    hold blocks each are one stack."""
    lists: dict[str, dict[str, tuple[int, str]]] = defaultdict(dict)
    for name in names:
        if found := _ITEM.search(name):
            lists[name[: found.start()].rstrip(".")][name] = (int(found[1]), name[found.end() :])
    stacks = {key: items for key, items in lists.items() if _alike(items.values())}
    if not stacks:  # a model of one block
        single = {k: items for k, items in lists.items() if any("." in rest for _, rest in items.values())}
        stacks = dict(sorted(single.items(), key=lambda item: -len(item[1]))[:1])
    least = SMALL * max(map(len, stacks.values()), default=0)
    return {n: b for key, items in stacks.items() if len(items) >= least for n, b in _stack(key, items).items()}


def _alike(items: Collection[tuple[int, str]]) -> bool:
    """Whether the items of a list are like each other, which blocks are and the layers within a block are not. What
    holds weights itself is no block."""
    inside: dict[int, set[str]] = defaultdict(set)
    for index, rest in items:
        inside[index].add(rest)
    order = [inside[index] for index in sorted(inside)]
    pairs = list(pairwise(order))
    like = [len(a & b) >= 0.3 * len(a | b) and any("." in rest for rest in a) for a, b in pairs]
    return bool(pairs) and sum(like) * 2 >= len(pairs)


def _stack(key: str, items: dict[str, tuple[int, str]]) -> dict[str, Block]:
    places: dict[str, tuple[int, int]] = {name: (index, 0) for name, (index, _) in items.items()}
    staged: dict[int, dict[str, tuple[int, str]]] = defaultdict(dict)
    for name, (index, rest) in items.items():
        if found := _STAGE.match(rest):
            staged[index][name] = (int(found[1]), rest[found.end() :])
    if any(_alike(inner.values()) for inner in staged.values()):
        places |= {n: (index, inner[n][0]) for index, inner in staged.items() for n in inner}
    order = {place: i for i, place in enumerate(sorted(set(places.values())))}
    return {name: Block(key, order[place], len(order)) for name, place in places.items()}


def depths(names: Collection[str]) -> dict[str, float]:
    """name -> depth: that of a block from 0, the first of its stack, to 1, the last; 0 before the blocks, 1 after them,
    and for a block that is alone."""
    placed = blocks(names)
    return {name: _depth(name, placed.get(name)) for name in names}


def _depth(name: str, block: Block | None) -> float:
    if block is not None:
        return block.index / (block.count - 1) if block.count > 1 else 1.0
    return 0.0 if BEFORE.search(name) and not AFTER.search(name) else 1.0
