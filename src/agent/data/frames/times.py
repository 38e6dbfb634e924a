"""Finds which frames of a video belong to which episode, by what its index says and without decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.data.frames.manifest import SourceFile
from agent.data.recorded.stretches import Stretches, by_counting, lacking, match


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
            times = [
                packet.pts for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard
            ]
    except (av.FFmpegError, IndexError) as error:
        if not times:
            return FileIndex(path, source, np.zeros(0, np.int64), 1.0, f"cannot be opened as a video ({error})")
    return FileIndex(path, source, np.sort(np.asarray(times, dtype=np.int64)), unit)


def times_of_episodes(
    index: FileIndex, stretches: Stretches, offsets: np.ndarray, bad: Mapping[int, str]
) -> list[np.ndarray | str]:
    """Which frames of a video belong to its episodes.

    A video with as many frames as its episodes have rows, at an even rate of its own, has them one after the other, whatever
    its clock says, if the metadata do not contradict that. In any other one they are those of the episode's stretch: the
    nearest to each time, at most half a frame away, or all, if there are as many as rows.

    Args:
        index: of the file.
        stretches: of all episodes in it, in order of their start.
        offsets: seconds from its episode's first row to each row.
        bad: episode → why the metadata alone make it unusable.

    Returns:
        For each episode the presentation times of its frames, or what is wrong with it.
    """
    times = index.times
    assert times is not None
    if index.trouble is not None or not len(times):
        return [f"{index.path} {index.trouble or 'holds no frame'}"] * len(stretches.lengths)
    seconds, lengths = times * index.unit, stretches.lengths
    counted = by_counting(seconds, stretches)
    if counted is not None:
        return np.split(times, counted[1:])  # type: ignore[return-value]
    matched = match(seconds, stretches, offsets)
    found: list[np.ndarray | str] = []
    ends = np.cumsum(lengths)
    for place, (episode, end, length) in enumerate(zip(stretches.episodes.tolist(), ends, lengths, strict=True)):
        near = matched.near[end - length : end]
        if episode in bad:
            found.append(bad[episode])
        elif near.all():
            found.append(times[matched.places[end - length : end]])
        elif matched.stop[place] - matched.first[place] == length:
            found.append(times[matched.first[place] : matched.stop[place]])
        else:
            found.append(lacking(index.path, len(times), stretches, place, near))
    return found
