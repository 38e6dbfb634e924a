"""Checks that the picture of every row is in its episode's own stretch of video.

The metadata give each episode a stretch of a file (``from_timestamp``, ``to_timestamp``) and a number of rows, the rows have
time stamps, and the file has its frames. The start of a training, ``--check true`` and ``agent.data.prepare`` hold them against
each other here, in the same words: outside its stretch, an episode would be shown the pictures of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agent.data.recorded.files import files_of
from agent.data.recorded.metadata import Metadata, spelled
from agent.data.recorded.mp4 import frame_times
from agent.data.recorded.video import Moment

if TYPE_CHECKING:
    from agent.data.recorded.columns import ColumnTable

_EVEN = 1e-4  # seconds by which a time stamp may miss its frame's number and still mean it


@dataclass(frozen=True)
class Stretches:
    """Where the episodes are in the videos of one camera, by the metadata."""

    episodes: np.ndarray
    """Their numbers; the other arrays are (episodes,) as well."""
    files: np.ndarray
    """A number for the file of each."""
    starts: np.ndarray
    """Seconds in the file."""
    ends: np.ndarray
    lengths: np.ndarray
    """Rows."""
    fps: float
    tolerance_s: float = 0.0
    """How far a frame may be from its time, if that is more than half of what a frame lasts."""

    @classmethod
    def of(cls, metadata: Metadata, camera: str, tolerance_s: float = 0.0) -> Stretches:
        """Reads those of all episodes; ``camera`` is the key of a video."""
        table, place = metadata.episodes, f"videos/{camera}"
        starts, ends = (table[f"{place}/{name}_timestamp"].astype(np.float64) for name in ("from", "to"))
        numbers = np.arange(metadata.total_episodes)
        fps = float(metadata.info["fps"])
        return cls(numbers, metadata.places(place), starts, ends, table["length"], fps, tolerance_s)

    def __getitem__(self, places: np.ndarray) -> Stretches:
        """Takes some of the episodes."""
        names = ("episodes", "files", "starts", "ends", "lengths")
        return replace(self, **{name: getattr(self, name)[places] for name in names})

    @property
    def half(self) -> float:
        """Half of what a frame lasts, in seconds."""
        return 0.5 / self.fps

    @property
    def reach(self) -> float:
        """How far a frame may be from its time, in seconds."""
        return max(self.half, self.tolerance_s)

    def offsets(self) -> np.ndarray:
        """Seconds from its episode's first row to each row at an even rate, (all rows,)."""
        return self.frames() / self.fps

    def frames(self) -> np.ndarray:
        """The number of each row in its episode, (all rows,)."""
        return np.arange(self.lengths.sum()) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)

    def counted(self) -> np.ndarray:
        """(episodes,) bool: those in files of which all stretches say what counting rows says, one episode after the other."""
        order = np.lexsort((self.episodes, self.starts, self.files))
        lengths, files = self.lengths[order], self.files[order]
        ends = np.cumsum(lengths)
        firsts = np.append(True, files[1:] != files[:-1])
        ends = ends - (ends - lengths)[firsts][np.cumsum(firsts) - 1]  # rows in the file so far
        fits = abs(self.starts[order] * self.fps - (ends - lengths)) < 0.5
        fits &= abs(self.ends[order] * self.fps - ends) < 0.5
        return ~np.isin(self.files, files[~fits])


def offset_of(stamp: float, frame: int, fps: float) -> float:
    """Returns the seconds from its episode's first row to a row, in double precision.

    A time stamp that says what the number of the frame says is a rounded form of it: single precision, LeRobot's, is no finer
    than a tenth of a millisecond beyond 1024 s.
    """
    even = frame / fps
    return even if abs(stamp - even) <= _EVEN + _resolution(stamp) else stamp


def moment_of(metadata: Metadata, camera: str, episode: int, frame: int, stamp: float, tolerance_s: float) -> Moment:
    """Tells when the picture of a row is shown in its video, by the metadata and the row's time stamp."""
    fps = float(metadata.info["fps"])
    begin, end = (metadata.episodes[f"videos/{camera}/{name}_timestamp"][episode] for name in ("from", "to"))
    # No finer than the numbers that it is made of: single precision in data files, and in some tables of episodes.
    coarse = float(_resolution(stamp)) + (float(_resolution(begin)) if begin.dtype == np.float32 else 0.0)
    seconds = float(begin) + offset_of(stamp, frame, fps)
    return Moment(seconds, tolerance_s + coarse, 1 / fps, float(begin), float(end))


def offsets_of(table: ColumnTable, stretches: Stretches) -> np.ndarray:
    """Computes ``offset_of`` for each row of some episodes, (all rows,); ``table`` has the column ``timestamp``."""
    rows = np.repeat(table.begins(stretches.episodes), stretches.lengths) + stretches.frames()
    stamps, even = table["timestamp"][rows, 0].astype(np.float64), stretches.offsets()
    return np.where(abs(stamps - even) <= _EVEN + _resolution(stamps), even, stamps)


def astray(offsets: np.ndarray, stretches: Stretches) -> np.ndarray:
    """Finds the rows whose time is outside their episode's stretch, or no number: (all rows,) bool."""
    s = stretches
    room = np.repeat(s.ends - s.starts + s.reach - s.half, s.lengths)
    return ~((offsets >= -s.reach) & (offsets < room))


def _resolution(seconds: np.ndarray | float) -> np.ndarray | float:
    """Returns the step of a number in single precision."""
    return np.spacing(np.abs(np.asarray(seconds, dtype=np.float32))).astype(np.float64)


def wrong_by_the_table(stretches: Stretches, path_of: Callable[[int], Path]) -> dict[int, str]:
    """Tells how an episode's stretch contradicts its rows or the next one's stretch; no file is opened.

    Args:
        stretches: of all episodes of a camera, because each is held against its neighbour.
        path_of: the file of an episode.
    """
    s = stretches
    short = s.lengths / s.fps - (s.ends - s.starts) > s.reach + 1e-6
    order = np.lexsort((s.starts, s.files))
    order = order[s.lengths[order] > 0]
    # The files one after the other on one line of time, so that what begins next is found for all at once.
    number = np.unique(s.files, return_inverse=True)[1][order]
    length = float(max(s.ends.max(), (s.starts + s.lengths / s.fps).max(), 0.0)) + 10.0
    begins = number * length + s.starts[order]
    following = np.searchsorted(begins, begins + s.half, side="right").clip(max=len(begins) - 1)
    reaches = begins + (s.lengths[order] - 0.5) / s.fps
    inside = (begins[following] > begins + s.half) & (begins[following] < reaches - 1e-6)
    # Two that begin together and are as long are shown the same on purpose; of others nobody knows whose it is.
    together = np.append((np.diff(begins) <= s.half) & (np.diff(s.lengths[order]) != 0), False)
    together |= np.append(False, together[:-1])
    found: dict[int, str] = {}
    for place in np.flatnonzero(short).tolist():
        start, end, rows = s.starts[place], s.ends[place], int(s.lengths[place])
        episode = int(s.episodes[place])
        found[episode] = (
            f"its stretch of {path_of(episode)}, {start:.4f} to {end:.4f} s, has room for {max(0, round((end - start) * s.fps))} "
            f"frames at {s.fps:g} a second, and it has {rows} rows"
        )
    for place in np.flatnonzero(inside | together).tolist():
        this = order[place]
        other = (
            order[following[place]]
            if inside[place]
            else order[place + 1 if _begins_with(s, order, place) else place - 1]
        )
        episode, rows = int(s.episodes[this]), int(s.lengths[this])
        found.setdefault(
            episode,
            f"its {rows} rows take {path_of(episode)} from {s.starts[this]:.4f} to {s.starts[this] + rows / s.fps:.4f} s, and "
            f"episode {s.episodes[other]} begins there at {s.starts[other]:.4f} s",
        )
    return found


def _begins_with(s: Stretches, order: np.ndarray, place: int) -> bool:
    """Tells whether the next one in order begins at the same time in the same file."""
    if place + 1 == len(order):
        return False
    this, following = order[place], order[place + 1]
    return bool(s.files[this] == s.files[following] and s.starts[following] - s.starts[this] <= s.half)


@dataclass(frozen=True)
class Matched:
    """The frames of a file nearest to the times of its episodes' rows, each episode's from its own stretch."""

    places: np.ndarray
    """(all rows,) number of the frame in the file."""
    near: np.ndarray
    """(all rows,) bool: it is as near as it has to be."""
    first: np.ndarray
    """(episodes,) number of the first frame of each stretch."""
    stop: np.ndarray
    """(episodes,) and of the first one behind it."""


def match(times: np.ndarray, stretches: Stretches, offsets: np.ndarray) -> Matched:
    """Finds which frame of a file is each row's.

    Args:
        times: seconds, ascending, of all frames in the file; at least one.
        stretches: of episodes in it.
        offsets: seconds from its episode's first row to each row.
    """
    s = stretches
    first = np.searchsorted(times, s.starts - s.half)
    stop = np.searchsorted(times, s.ends - s.half)
    owner = np.repeat(np.arange(len(s.lengths)), s.lengths)
    asked = s.starts[owner] + offsets
    last = np.maximum(stop - 1, first).clip(max=len(times) - 1)[owner]
    after = np.searchsorted(times, asked).clip(np.minimum(first, len(times) - 1)[owner], last)
    before = np.maximum(after - 1, np.minimum(first[owner], after))
    places = np.where(asked - times[before] <= abs(times[after] - asked), before, after)
    near = (abs(times[places] - asked) < s.reach) & (stop > first)[owner]
    return Matched(places, near, first, stop)


def by_counting(times: np.ndarray, stretches: Stretches) -> np.ndarray | None:
    """Counts frames from the beginning of the file, whatever its clock says: (episodes,) the number of each one's first.

    None unless nothing contradicts that: the file has as many frames as its episodes have rows, at an even rate, and the
    stretches say the same.

    Args:
        times: of all frames in the file.
        stretches: of all episodes in it, in order of their start.
    """
    count = len(times)
    if count != stretches.lengths.sum() or not stretches.counted().all():
        return None
    even = np.linspace(times[0], times[-1], count)
    if count > 1 and (abs(times - even) > 0.5 * (times[-1] - times[0]) / (count - 1)).any():
        return None
    return np.cumsum(stretches.lengths) - stretches.lengths


def lacking(path: Path, frames: int, stretches: Stretches, place: int, near: np.ndarray) -> str:
    """Says that a file does not hold all frames of an episode.

    Args:
        path: of the file.
        frames: in the file.
        stretches: of all its episodes.
        place: which of them.
        near: (rows,) bool, whether each of the episode's is there.
    """
    gone = int(np.flatnonzero(~near)[0])
    start, end = stretches.starts[place], stretches.ends[place]
    return (
        f"{path} holds {int(near.sum())} of its {len(near)} frames from {start:.4f} to {end:.4f} s, not frame {gone} "
        f"({frames} frames in all where the metadata count {stretches.lengths.sum()})"
    )


def picture_problems(
    metadata: Metadata, table: ColumnTable, episodes: np.ndarray, cameras: Sequence[str], tolerance_s: float
) -> dict[int, str]:
    """Tells, by indices and metadata alone, why some pictures of an episode cannot be read from the videos.

    Args:
        metadata: of the data set.
        table: with the column ``timestamp``.
        episodes: those to look at.
        cameras: keys of the data set's videos that are read.
        tolerance_s: how far a video's time stamp may be from the asked one.

    Raises:
        ValueError: if the column cannot be read.
    """
    found: dict[int, str] = {}
    for camera in cameras:
        every = Stretches.of(metadata, camera, tolerance_s)
        wrong = wrong_by_the_table(every, partial(metadata.file, f"videos/{camera}"))
        told = {int(episode): wrong[episode] for episode in np.intersect1d(episodes, list(wrong))}
        for path, members in files_of(metadata, np.setdiff1d(episodes, list(told)), f"videos/{camera}"):
            told |= _wrong_in_a_file(path, every, members, table)
        for episode, why in told.items():
            found.setdefault(episode, f"{camera}: {why}")
    return found


def _wrong_in_a_file(path: Path, every: Stretches, members: np.ndarray, table: ColumnTable) -> dict[int, str]:
    """Tells the same of the episodes ``members``, which are in one file."""
    s = every[members]
    offsets, owner = offsets_of(table, s), np.repeat(np.arange(len(members)), s.lengths)
    outside = np.flatnonzero(astray(offsets, s))
    found: dict[int, str] = {}
    for place, row in zip(*np.unique(owner[outside], return_index=True), strict=True):
        number = outside[row]
        found[int(members[place])] = (
            f"frame {s.frames()[number]} has the time stamp {offsets[number]:.10g} s, and its stretch of {path} takes "
            f"{s.ends[place] - s.starts[place]:.4f} s: `timestamp` counts seconds from the episode's first frame, write "
            "frame_index / fps there"
        )
    times = frame_times(path)
    if times is None or not len(times):
        return found
    whole = every[np.flatnonzero(every.files == s.files[0])]
    whole = whole[np.argsort(whole.starts, kind="stable")]
    place_in_file = {int(episode): place for place, episode in enumerate(whole.episodes)}
    matched = match(times, s, offsets)
    for place in np.unique(owner[~matched.near]).tolist():
        near = matched.near[owner == place]
        found.setdefault(
            int(members[place]), lacking(path, len(times), whole, place_in_file[int(members[place])], near)
        )
    counted = by_counting(times, whole)
    if counted is not None:
        firsts = counted[[place_in_file[int(episode)] for episode in members]]
        shown = matched.places - firsts[owner]
        others = np.flatnonzero(shown != s.frames())
        rate = (len(times) - 1) / (times[-1] - times[0])
        for place, row in zip(*np.unique(owner[others], return_index=True), strict=True):
            number = others[row]
            if f"{rate:.6g}" == f"{s.fps:.6g}":
                told = (
                    f"frame {s.frames()[number]} has the time stamp {offsets[number]:.10g} s, at which {path} shows frame "
                    f"{shown[number]} of the episode: `timestamp` counts seconds from the episode's first frame, write "
                    "frame_index / fps there"
                )
            else:
                told = (
                    f"{path} shows {rate:.6g} frames a second where meta/info.json says {s.fps:g}, so that a time is another "
                    "frame's; a frame store, made by `python -m agent.data.prepare`, counts them instead"
                )
            found.setdefault(int(members[place]), told)
    return found


def mapped_videos(metadata: Metadata, cameras: Mapping[str, str | None] | None) -> list[str]:
    """Lists the keys of the videos that a data set's entry has read; ``cameras`` is its own."""
    keys = metadata.camera_keys if cameras is None else cameras.values()
    return [key for key in metadata.video_keys if key in keys]


def refusal(repo_id: str, problems: Mapping[int, str]) -> ValueError:
    """Words the error of a training that finds such episodes when it starts."""
    first = min(problems)
    return ValueError(
        f"data set {repo_id}: videos and rows of episodes {spelled(list(problems))} do not fit together. Episode {first}: "
        f"{problems[first]}. Leave these episodes out with `episodes`, or of a frame store with "
        "`python -m agent.data.prepare --skip_bad_episodes`; or convert the data set again."
    )
