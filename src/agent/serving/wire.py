"""Packs and unpacks openpi's messages: msgpack in which numpy arrays are maps of bytes, type and shape."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import msgpack
import numpy as np

_KINDS = "biuf"  # truth values, whole and real numbers

# What a message may have, far above what a robot sends. Pictures are arrays, whose bytes the largest message bounds; all
# else is unpacked item by item, while every other client waits.
_MOST_ENTRIES = 256  # of a map
_MOST_ITEMS = 4096  # of a list
_MOST_IN_ALL = 100_000  # entries and items of a message
_LONGEST_TEXT = 65_536  # bytes, of a key too
_LONGEST_TYPE = 16  # characters of an array's type


def pack(message: dict[str, Any]) -> bytes:
    """Packs a message with numpy arrays and numbers in it, as openpi's client unpacks it."""
    return msgpack.packb(message, default=_described)


def unpack(frame: bytes) -> dict[str, Any]:
    """Unpacks a client's message. Its arrays are views of the frame: nothing is copied, and nothing can be written to.

    Raises:
        ValueError: if the frame is not a msgpack map, or an array in it is not what it says.
    """
    count = _Count()
    try:
        message = msgpack.unpackb(
            frame,
            object_pairs_hook=count.entries,
            list_hook=count.items,
            max_map_len=_MOST_ENTRIES,
            max_array_len=_MOST_ITEMS,
            max_str_len=_LONGEST_TEXT,
        )
    except _Refused as error:
        raise ValueError(str(error)) from None
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        if too_long := re.fullmatch(r"(\d+) exceeds max_(\w+)_len\((\d+)\)", str(error)):
            number, kind, most = too_long.groups()
            what = {"map": "a map of {} entries", "array": "a list of {} items", "str": "a text of {} bytes"}[kind]
            raise ValueError(f"the message has {what.format(number)}, at most {most} are taken{_INSTEAD}") from None
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ValueError(f"the message of {len(frame)} bytes is no whole msgpack ({reason})") from None
    if not isinstance(message, dict):
        raise ValueError(f"the message is a msgpack {type(message).__name__}, expected a map of key → value")
    if unnamed := [key for key in message if not isinstance(key, str)]:
        raise ValueError(f"the message has a key {unnamed[0]!r:.60}, expected texts")
    return message


_INSTEAD = "; pictures and long vectors are sent as numpy arrays"


class _Refused(ValueError):
    """A message of valid msgpack that is refused."""


class _Count:
    """Counts what a message holds while it is unpacked, and makes arrays of the maps that are some."""

    def __init__(self) -> None:
        self._number = 0

    def _add(self, number: int) -> None:
        self._number += number + 1
        if self._number > _MOST_IN_ALL:
            raise _Refused(f"the message has more than {_MOST_IN_ALL} entries and items{_INSTEAD}")

    def items(self, items: list[Any]) -> list[Any]:
        self._add(len(items))
        return items

    def entries(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._add(len(pairs))
        entry = dict(pairs)
        if len(entry) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise _Refused(f"the message has the key {key!r:.60} twice in a map")
        return _array(entry)


def _described(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.kind in _KINDS:
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _array(entry: dict[Any, Any]) -> Any:
    """Gives the array or number that a map stands for, or the map itself."""
    if b"__ndarray__" not in entry and b"__npgeneric__" not in entry:
        return entry
    try:
        if len(entry[b"dtype"]) > _LONGEST_TYPE:  # one with fields, which takes long to read
            raise ValueError(f"its type is {entry[b'dtype']!r:.60}, expected numbers")
        dtype = np.dtype(entry[b"dtype"])
        if dtype.kind not in _KINDS:  # above all, never objects
            raise ValueError(f"its type is {dtype}, expected numbers")
        if b"__npgeneric__" in entry:
            return dtype.type(entry[b"data"])
        shape, data = tuple(entry[b"shape"]), entry[b"data"]
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize  # whole numbers of Python: no overflow
        if not all(isinstance(side, int) and side >= 0 for side in shape) or size != len(data):
            raise ValueError(f"shape {shape} of {dtype} takes {size} bytes, it has {len(data)}")
        return np.frombuffer(data, dtype).reshape(shape)
    except (KeyError, TypeError, ValueError, OverflowError, SyntaxError) as error:  # the last: a type like "(2,f4"
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise _Refused(f"an array of the message cannot be read: {reason}") from None
