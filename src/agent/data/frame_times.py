"""Which frames of a video belong to which episode, by what its index says and without decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.data.frame_manifest import SourceFile


@dataclass
class FileIndex:
    """A source file, and where its frames are."""

    path: Path
    source: SourceFile
    times: np.ndarray | None
    """Presentation times of a video's frames in units of ``unit``, ascending; None for a data file."""
    unit: float = 0.0
    """Seconds."""
    trouble: str | None = None
    """Why it cannot be read as a video."""


def index_file(path: Path, video: bool) -> FileIndex:
    """Reads a source file once, without decoding."""
    import av

    source = SourceFile.of(path)
    if not video:
        return FileIndex(path, source, None)
    times: list[int] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            unit = float(stream.time_base or 0)
            times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    except (av.FFmpegError, IndexError) as error:
        if not times:
            return FileIndex(path, source, np.zeros(0, np.int64), 1.0, f"cannot be opened as a video ({error})")
    return FileIndex(path, source, np.sort(np.asarray(times, dtype=np.int64)), unit)


def times_of_episodes(
    index: FileIndex, starts: Sequence[float], lengths: Sequence[int], fps: float
) -> list[np.ndarray | str]:
    """Which frames of a video belong to its episodes, in order of their start.

    A video with as many frames as its episodes has them one after the other, whatever its clock says. In any other
    one the frame nearest to each time is taken, at most half a frame away.

    Returns:
        For each episode the presentation times of its frames, or what is wrong with it.
    """
    times = index.times
    assert times is not None
    if index.trouble is not None or not len(times):
        return [f"{index.path} {index.trouble or 'holds no frame'}"] * len(starts)
    if len(times) == sum(lengths):
        return np.split(times, np.cumsum(lengths)[:-1])  # type: ignore[return-value]
    found: list[np.ndarray | str] = []
    seconds = times * index.unit
    for start, length in zip(starts, lengths, strict=True):
        asked = start + np.arange(length) / fps
        after = np.searchsorted(seconds, asked).clip(max=len(seconds) - 1)
        before = np.maximum(after - 1, 0)
        places = np.where(asked - seconds[before] <= np.abs(seconds[after] - asked), before, after)
        there = np.abs(seconds[places] - asked) < 0.5 / fps
        if there.all():
            found.append(times[places])
        else:
            found.append(
                f"{index.path} holds {int(there.sum())} of its {length} frames "
                f"({len(times)} frames in all where the metadata count {sum(lengths)})"
            )
    return found
