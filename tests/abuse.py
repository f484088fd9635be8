"""Safetensors files that lie about themselves."""

from __future__ import annotations

import json
import struct

HEADER = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
BODY = b"\0" * 8


def file(header: str | bytes, body: bytes = BODY, length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def tensors(**given: tuple[str, list[int], list[int]]) -> str:
    return json.dumps({k: {"dtype": d, "shape": s, "data_offsets": o} for k, (d, s, o) in given.items()})


SOUND = file(HEADER)
CASES = {
    "empty": b"",
    "shorter than a length": b"\x08\0\0",
    "header longer than the file": file(HEADER, length=10**6),
    "header of 4 GB": file(HEADER, length=2**32),
    "header of 2^63": file(HEADER, length=2**63 + 5),
    "header is no JSON": file("{" * 64),
    "header is no UTF-8": file(b'{"\xff\xfe":1}'),
    "header is a list": file("[1, 2]"),
    "deeply nested": file('{"__metadata__":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "overlapping": file(tensors(a=("F32", [2], [0, 8]), b=("F32", [2], [4, 12])), BODY + b"\0" * 4),
    "negative offset": file(tensors(w=("F32", [2], [-8, 0]))),
    "backwards": file(tensors(w=("F32", [2], [8, 0]))),
    "gap": file(tensors(a=("F32", [1], [0, 4]), b=("F32", [1], [8, 12])), b"\0" * 12),
    "first byte unused": file(tensors(w=("F32", [2], [4, 12])), b"\0" * 12),
    "beyond the end": file(tensors(w=("F32", [200], [0, 800]))),
    "shape too small": file(tensors(w=("F32", [1], [0, 8]))),
    "shape too large": file(tensors(w=("F32", [3], [0, 8]))),
    "wrong type": file(tensors(w=("F64", [2], [0, 8]))),
    "unknown type": file(tensors(w=("F31", [2], [0, 8]))),
    "negative shape": file(tensors(w=("F32", [-2], [0, 8]))),
    "overflow": file(tensors(w=("F32", [2**62, 4], [0, 0])), b""),
    "overflow to nothing": file(tensors(w=("F32", [2**32, 2**32], [0, 0])), b""),
    "trailing bytes": file(HEADER, BODY + b"more"),
    "cut": file(HEADER, BODY[:5]),
    "metadata is a number": file('{"__metadata__":7,' + HEADER[1:]),
    "metadata holds a number": file('{"__metadata__":{"a":7},' + HEADER[1:]),
    "one name twice": file(
        '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ),
    "no shape": file('{"w":{"dtype":"F32","data_offsets":[0,8]}}'),
}
