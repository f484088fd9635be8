"""What an object leads to: through attributes, items, closures and bound methods, at any depth.

Strategies hide things in lists, dictionaries, plain objects and closures; `nn.Module` only knows what is registered.
"""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

LIMIT = 50_000
"""Objects after which the search stops: a processor with a large vocabulary is not worth more."""
_INTERNAL = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
_LEAVES = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    type(None),
    type,
    types.ModuleType,
    np.ndarray,
    torch.dtype,
    torch.device,
    torch.Size,
)


def reach(root: Any, opaque: tuple[type, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(path, object) for everything that `root` leads to, each once, nearest first. `opaque` types are not entered."""
    queue: deque[tuple[str, Any]] = deque([("", root)])
    seen = {id(root)}
    while queue and len(seen) < LIMIT:
        path, item = queue.popleft()
        for step, child in _children(item):
            if id(child) in seen and not isinstance(child, (int, float, str, type(None))):
                continue
            seen.add(id(child))
            where = f"{path}{step}".removeprefix(".")
            yield where, child
            if not isinstance(child, (*_LEAVES, torch.Tensor, *opaque)):
                queue.append((where, child))


def _children(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, dict):
        yield from ((f"[{key!r}]", value) for key, value in list(item.items()))
    elif isinstance(item, (list, tuple, deque)):
        yield from ((f"[{i}]", value) for i, value in enumerate(list(item)))
    elif isinstance(item, (set, frozenset)):
        yield from (("{}", value) for value in item)
    elif isinstance(item, types.MethodType):
        yield ".__self__", item.__self__
        yield from _children(item.__func__)
    elif isinstance(item, types.FunctionType):
        cells = item.__closure__ or ()
        yield from (
            (f".{name}", c.cell_contents)
            for name, c in zip(item.__code__.co_freevars, cells, strict=False)
            if _filled(c)
        )
        yield from ((".default", value) for value in item.__defaults__ or ())
    elif isinstance(item, functools.partial):
        yield from ((".partial", value) for value in (item.func, *item.args, *item.keywords.values()))
    else:
        yield from _attributes(item)


def _attributes(item: Any) -> Iterator[tuple[str, Any]]:
    for name, value in list(getattr(item, "__dict__", {}).items()):
        if isinstance(item, nn.Module) and name in _INTERNAL:
            continue
        if isinstance(item, nn.Module) and name in ("_parameters", "_buffers", "_modules"):
            yield from ((f".{key}", inner) for key, inner in value.items() if inner is not None)
        else:
            yield f".{name}", value
    for cls in type(item).__mro__:
        for name in (cls.__dict__.get("__slots__") or ()) if not isinstance(cls.__dict__.get("__slots__"), str) else ():
            if hasattr(item, name):
                yield f".{name}", getattr(item, name)


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def leaves(root: Any, skip: set[int], opaque: tuple[type, ...] = ()) -> dict[str, Any]:
    """path -> comparable value of all numbers, texts, arrays, tensors and random generators that `root` leads to.

    `skip` holds ids of objects that are saved in another way.
    """
    found: dict[str, Any] = {}
    for path, item in reach(root, opaque):
        if id(item) in skip:
            continue
        if isinstance(item, (bool, int, float, complex, str, bytes)):
            found[path] = repr(item)
        elif isinstance(item, torch.Tensor):
            found[path] = _bytes(item)
        elif isinstance(item, np.ndarray):
            found[path] = item.tobytes() if item.dtype != object else repr(item)
        elif isinstance(item, torch.Generator):
            found[path] = _bytes(item.get_state())
        elif isinstance(item, np.random.Generator):
            found[path] = repr(item.bit_generator.state)
        elif isinstance(item, random.Random):
            found[path] = repr(item.getstate())
        elif isinstance(item, (list, dict, set, deque)):
            found[path] = f"{len(item)} items"
    return found


def _bytes(tensor: torch.Tensor) -> Any:
    if tensor.is_meta or tensor.layout != torch.strided:
        return tuple(tensor.shape)
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
