"""Cheap strategies: a valid file or document, and a few edits that make something else of it."""

from __future__ import annotations

import copy
import struct
from typing import Any

from hypothesis import strategies as st

ODD_NUMBERS = (0, 1, -1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1)
ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 1023, 2**31, 2**63, 10**18, 10**39, 10**400, -(10**18)),
    *(0.0, -0.0, 0.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "auto", "1", "float32", "\0", "\ud800", "é" * 40, [], [1], [[]], {}, {"a": 1}, [None] * 3),
)

_edit = st.tuples(st.integers(0, 8), st.integers(0, 2**20), st.integers(0, 255))
edits = st.lists(_edit, max_size=5)


def edited(data: bytes, changes: list[tuple[int, int, int]]) -> bytes:
    """``data`` with bytes set, flipped, inserted, removed, repeated or overwritten with numbers that sizes may have."""
    out = bytearray(data)
    for kind, place, value in changes:
        at = place % (len(out) + 1)
        if kind <= 1 and at < len(out):
            out[at] = value
        elif kind == 2 and at < len(out):
            out[at] ^= 1 << value % 8
        elif kind == 3:
            out[at:at] = bytes([value]) * (1 + place % 5)
        elif kind == 4:
            del out[at : at + 1 + value % 64]
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            out[at:at] = out[at : at + 1 + value]
        else:
            number = ODD_NUMBERS[value % len(ODD_NUMBERS)]
            code, size = ("Q", 8) if kind == 7 else ("I", 4)
            out[at : at + size] = struct.pack(("<" if place % 2 else ">") + code, number % 2 ** (8 * size))
    return bytes(out)


changes = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 2**16), st.integers(0, len(ODD_VALUES) - 1)), min_size=0, max_size=4
)


def changed(document: Any, edits: list[tuple[int, int, int]]) -> Any:
    """A JSON document with values replaced by odd ones, keys removed, added, or moved elsewhere."""
    document = {"": copy.deepcopy(document)}
    for kind, place, value in edits:
        places = list(_places(document))
        parent, key = places[place % len(places)]
        if kind == 0 or parent is document:
            parent[key] = copy.deepcopy(ODD_VALUES[value])
        elif kind == 1:
            del parent[key]
        elif kind == 2 and isinstance(parent, dict):
            parent[str(ODD_VALUES[value])] = copy.deepcopy(parent[key])
        else:
            other, name = places[value % len(places)]
            parent[key] = copy.deepcopy(other[name])
    return document[""]


def _places(node: Any) -> Any:
    """(container, key) of everything in a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        yield from _places(value)
