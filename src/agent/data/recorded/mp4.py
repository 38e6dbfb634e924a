"""Reads from the index of an mp4 when its pictures are shown: nothing is decoded, no picture is read.

FFmpeg tells it only by reading every packet, which for a large data set is every video. The index of a file with a hundred
thousand pictures is read here in milliseconds. Boxes and fields are those of ISO/IEC 14496-12.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

_INSIDE = (b"trak", b"mdia", b"minf", b"stbl", b"edts")


def frame_times(path: Path) -> np.ndarray | None:
    """Reads the seconds at which the pictures of the first video track are shown, ascending, (frames,) float64.

    None where this index does not tell: a fragmented file, several edits, or no mp4 at all.

    Raises:
        OSError: if the file cannot be read.
    """
    index = _movie(path)
    if index is None:
        return None
    try:
        return _times(index)
    except (struct.error, KeyError, ValueError):  # cut short, or of another form: it does not tell
        return None


def _movie(path: Path) -> bytes | None:
    """Reads the contents of the box ``moov``."""
    with path.open("rb") as file:
        for kind, offset, begin, length in outermost_boxes(file, path.stat().st_size):
            if length < begin:
                return None
            if kind == b"moov":
                file.seek(offset + begin)
                return file.read(length - begin)
    return None


def outermost_boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Yields kind, place, bytes of the header and of the whole, of each box of a file of this size.

    The lengths are as they are written, which may be anything; whoever reads them stops at one that cannot be.
    """
    offset = 0
    while offset < size:
        file.seek(offset)
        header = file.read(16)
        begin, length = _lengths(header, size - offset)
        yield header[4:8], offset, begin, length
        offset += length


def _lengths(header: bytes | memoryview, rest: int) -> tuple[int, int]:
    """Reads how many bytes the header of a box has, and the whole of it."""
    length = int.from_bytes(header[:4], "big")
    if length == 1:  # a 64-bit length follows
        return 16, int.from_bytes(header[8:16], "big")
    return 8, length or rest  # 0 stands for all that is left


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    offset = 0
    while offset + 8 <= len(data):
        begin, length = _lengths(data[offset : offset + 16], len(data) - offset)
        if length < begin:
            raise ValueError("a box shorter than its header")
        yield bytes(data[offset + 4 : offset + 8]), data[offset + begin : offset + length]
        offset += length


def _track(data: memoryview) -> dict[bytes, memoryview]:
    """Collects the boxes of a track, those within others among them."""
    found: dict[bytes, memoryview] = {}
    for kind, content in _boxes(data):
        found |= (
            {name: inner for name, inner in _track(content).items() if name not in found} if kind in _INSIDE else {}
        )
        found.setdefault(kind, content)
    return found


def _times(movie: bytes) -> np.ndarray | None:
    parts = list(_boxes(memoryview(movie)))
    if any(kind == b"mvex" for kind, _ in parts):  # fragments follow, each with times of its own
        return None
    tracks = [_track(content) for kind, content in parts if kind == b"trak"]
    track = next(track for track in tracks if bytes(track[b"hdlr"][8:12]) == b"vide")
    unit, movie_unit = (_timescale(boxes[kind]) for boxes, kind in ((track, b"mdhd"), (dict(parts), b"mvhd")))
    durations = _runs(track[b"stts"], ">u4")
    times = np.cumsum(durations) - durations
    if b"ctts" in track:
        times = times + _runs(track[b"ctts"], ">i4")
    if b"elst" not in track:
        return np.sort(times) / unit
    edits = _edits(track[b"elst"])
    delay = 0.0
    if edits and edits[0][1] == -1:  # nothing is shown at first
        delay, edits = edits[0][0] / movie_unit, edits[1:]
    if len(edits) != 1:
        return None
    duration, begin = edits[0]
    # What is outside the edit is decoded and not shown; FFmpeg moves the first picture of the rest to the edit's begin.
    shown = times >= begin
    if duration:
        shown &= times < begin + duration * unit / movie_unit
    times = np.sort(times[shown])
    return (times - times[:1]) / unit + delay


def _timescale(header: memoryview) -> int:
    """Reads the units in a second from ``mdhd`` or ``mvhd``, which begin alike."""
    (units,) = struct.unpack_from(">I", header, 20 if header[0] == 1 else 12)
    if not units:
        raise ValueError("no time scale")
    return units


def _runs(box: memoryview, kind: str) -> np.ndarray:
    """Writes out a table of (count, value); ``kind`` is the type of the values."""
    (count,) = struct.unpack_from(">I", box, 4)
    table = np.frombuffer(box, dtype=[("count", ">u4"), ("value", kind)], count=count, offset=8)
    return np.repeat(table["value"].astype(np.int64), table["count"])


def _edits(box: memoryview) -> list[tuple[int, int]]:
    """Reads (duration, first time shown) of each edit; -1 as time for an empty one."""
    (count,) = struct.unpack_from(">I", box, 4)
    form, size = (">Qq", 20) if box[0] == 1 else (">Ii", 12)
    return [struct.unpack_from(form, box, 8 + size * number) for number in range(count)]
