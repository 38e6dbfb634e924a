"""openpi's messages: msgpack in which numpy arrays are maps of bytes, type and shape."""

from __future__ import annotations

import functools
from typing import Any

import msgpack
import numpy as np

_KINDS = "biuf"  # truth values, whole and real numbers


def pack(message: dict[str, Any]) -> bytes:
    """A message with numpy arrays and numbers in it, as openpi's client unpacks it."""
    return _packer()(message)


def unpack(frame: bytes) -> dict[str, Any]:
    """A client's message. Its arrays are views of the frame: nothing is copied, and nothing can be written to.

    Raises:
        ValueError: if the frame is not a msgpack map, or an array in it is not what it says.
    """
    try:
        message = msgpack.unpackb(frame, object_hook=_array)
    except _NotAnArray as error:
        raise ValueError(str(error)) from None
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ValueError(f"the message of {len(frame)} bytes is no whole msgpack ({reason})") from None
    if not isinstance(message, dict):
        raise ValueError(f"the message is a msgpack {type(message).__name__}, expected a map of key → value")
    if unnamed := [key for key in message if not isinstance(key, str)]:
        raise ValueError(f"the message has a key {unnamed[0]!r:.60}, expected texts")
    return message


class _NotAnArray(ValueError):
    """A map that calls itself an array is none."""


@functools.lru_cache(maxsize=1)
def _packer() -> Any:
    return functools.partial(msgpack.packb, default=_described)


def _described(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.kind in _KINDS:
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _array(entry: dict[Any, Any]) -> Any:
    """The array or number that a map stands for, or the map itself."""
    if b"__ndarray__" not in entry and b"__npgeneric__" not in entry:
        return entry
    try:
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
        raise _NotAnArray(f"an array of the message cannot be read: {reason}") from None
