"""Decodes, resizes and writes the parts of a frame store, in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.data.frames.encoding import Encoding
from agent.data.frames.manifest import picture_checksum
from agent.data.orphans import end_with_parent
from agent.data.recorded.arrow import to_numpy
from agent.data.recorded.pictures import NoColours, stored_picture
from agent.data.recorded.video_frame import rgb
from agent.data.resizing import fitted_size
from agent.safe_files import replacing

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

    import av
    import torch

_BATCH = 64  # pictures of one Arrow record batch

_done: Synchronized[int] | None = None  # frames written by all processes, for the progress bar


@dataclass
class Part:
    """Consecutive episodes of one source file, to be written as one file."""

    camera: str
    source: Path
    target: Path
    episodes: dict[int, np.ndarray]
    """Episode → presentation times of its frames in a video, or row numbers in a data file."""
    encoding: Encoding
    resolution: tuple[int, int]
    video: bool


@dataclass
class Written:
    """What has become of a part."""

    frames: int
    bad: dict[int, str] = field(default_factory=dict)
    """Episode → why it could not be read."""
    checksums: list[int] = field(default_factory=list)
    """Of the pictures, in the order of the file."""


def start_worker(done: Synchronized[int]) -> None:
    """Runs first in a new process."""
    import cv2
    import torch

    global _done
    _done = done
    torch.set_num_threads(1)  # there is a process for every core
    cv2.setNumThreads(1)
    end_with_parent()


class FrameMissing(Exception):
    """A frame that the file's index lists does not come."""


def write_part(part: Part) -> Written:
    """Writes a part; the file is there whole or not at all.

    Raises:
        OSError: if it cannot be written, for instance because the disk is full.
    """
    import pyarrow as pa

    bad: dict[int, str] = {}
    with (
        replacing(part.target) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        _Writer(file, part) as writer,
    ):
        pictures = _from_video if part.video else _from_data_file
        pictures(part, writer, bad)
    return Written(writer.frames, bad, writer.checksums)


class _Writer:
    """Collects pictures into record batches."""

    def __init__(self, file: Any, part: Part) -> None:
        import pyarrow as pa

        self.frames = 0
        self.checksums: list[int] = []
        self._part = part
        self._rows: tuple[list[int], list[int], list[bytes | memoryview]] = ([], [], [])
        height, width = part.resolution
        picture = pa.binary(3 * height * width) if part.encoding.kind == "raw" else pa.binary()
        fields = {"episode_index": pa.int32(), "frame_index": pa.int32(), "image": picture}
        notes = {"encoding": str(part.encoding), "height": str(height), "width": str(width)}
        self._schema = pa.schema(list(fields.items()), metadata=notes)
        self._writer = pa.ipc.new_file(file, self._schema)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._flush()
            self._writer.close()

    def add(self, episode: int, frame: int, data: bytes | memoryview) -> None:
        """Takes an encoded picture."""
        episodes, frames, pictures = self._rows
        episodes.append(episode)
        frames.append(frame)
        pictures.append(data)
        self.checksums.append(picture_checksum(data, episode, frame))
        self.frames += 1
        if len(self._rows[0]) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        episodes, frames, pictures = self._rows
        if not episodes:
            return
        data, picture = pa.py_buffer(b"".join(pictures)), self._schema.field("image").type
        if picture == pa.binary():
            ends = np.cumsum([0, *map(len, pictures)], dtype=np.int32)
            column = pa.Array.from_buffers(picture, len(pictures), [None, pa.py_buffer(ends), data])
        else:
            column = pa.Array.from_buffers(picture, len(pictures), [None, data])
        columns = [pa.array(episodes, pa.int32()), pa.array(frames, pa.int32()), column]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        if _done is not None:
            with _done.get_lock():
                _done.value += len(episodes)
        self._rows = ([], [], [])


def encoded(part: Part, frame: av.VideoFrame) -> bytes | memoryview:
    """Encodes a decoded frame as the part keeps it.

    Raises:
        NoColours: if it has no colours of 8 bits.
    """
    return _resized(part, rgb(frame), halved_colours=frame.format.name in ("yuv420p", "yuvj420p", "nv12"))


def _resized(part: Part, image: np.ndarray, halved_colours: bool) -> bytes | memoryview:
    """Encodes a picture (h, w, 3) uint8 of any size as the part keeps it."""
    if image.shape[:2] != part.resolution:
        image, halved_colours = resize(image, part.resolution), False
    return part.encoding.encode(image, halved_colours)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What ``resize_with_pad`` gives, in half the time: colours last, for which torch has a faster kernel with the same
    result, and with the large intermediate picture in memory that is used again.

    Args:
        image: (h, w, 3) uint8.
        size: height and width wanted.

    Returns:
        (height, width, 3) uint8.
    """
    import torch
    from torch.nn.functional import interpolate

    height, width = fitted_size(image.shape[:2], size)
    large = _workspace(image.shape[:2])
    large.copy_(torch.from_numpy(image)[None].permute(0, 3, 1, 2))
    small = interpolate(large, (height, width), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    padded = torch.zeros(*size, 3, dtype=torch.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padded[top : top + height, left : left + width] = small.round_().clamp_(0, 255)
    return padded.numpy()


@lru_cache(maxsize=4)
def _workspace(size: tuple[int, int]) -> torch.Tensor:
    import torch

    return torch.empty(1, 3, *size).contiguous(memory_format=torch.channels_last)


def _from_video(part: Part, writer: _Writer, bad: dict[int, str]) -> None:
    for episodes in _passes(part.episodes):
        _in_one_pass(part, episodes, writer, bad)


def _passes(episodes: dict[int, np.ndarray]) -> list[list[int]]:
    """Groups episodes whose frames come one after the other: two may be of the same stretch of a video."""
    groups: list[list[int]] = []
    for episode, times in episodes.items():
        if groups and episodes[groups[-1][-1]][-1] < times[0]:
            groups[-1].append(episode)
        else:
            groups.append([episode])
    return groups


def _in_one_pass(part: Part, episodes: list[int], writer: _Writer, bad: dict[int, str]) -> None:
    import av

    while episodes:
        times = np.concatenate([part.episodes[episode] for episode in episodes])
        owners = [(episode, frame) for episode in episodes for frame in range(len(part.episodes[episode]))]
        done = 0
        try:
            for picture in decode(part.source, times):
                writer.add(*owners[done], encoded(part, picture))
                done += 1
            return
        except (av.FFmpegError, FrameMissing, NoColours) as error:
            episode, frame = owners[done]
            bad[episode] = f"{part.source} cannot be decoded at frame {frame} of the episode ({error})"
            episodes = episodes[episodes.index(episode) + 1 :]  # what is behind the damage may be whole


def decode(path: Path, times: np.ndarray) -> Iterator[av.VideoFrame]:
    """Decodes the frames of a video at presentation times that do not descend, in one pass.

    Raises:
        av.FFmpegError: if the stream is damaged.
        FrameMissing: if one of them does not come.
    """
    import av

    wanted = iter(times.tolist())
    next_one = next(wanted)
    for from_start in (False, True):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            # Without this, FFmpeg paints over what it cannot read and says nothing.
            stream.codec_context.options = {"err_detect": "explode"}
            if not from_start:
                container.seek(next_one, stream=stream, backward=True)
            first = True
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts < next_one:
                    first = False
                    continue
                if frame.pts > next_one:
                    if first and not from_start:
                        break  # seeking went too far, as it can where frames are reordered
                    raise FrameMissing(f"no frame at time {next_one}, the next is at {frame.pts}")
                if frame.is_corrupt:
                    raise FrameMissing("the decoder calls it corrupt")
                first = False
                while next_one == frame.pts:  # more than once, where the tolerance lets rows share a frame
                    yield frame
                    following = next(wanted, None)
                    if following is None:
                        return
                    next_one = following
            else:
                raise FrameMissing("the file ends before it")


def _from_data_file(part: Part, writer: _Writer, bad: dict[int, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        column = pq.read_table(part.source, columns=[part.camera])[part.camera]
    except (pa.ArrowInvalid, OSError) as error:
        bad.update(dict.fromkeys(part.episodes, f"{part.source} cannot be read ({error})"))
        return
    for episode, rows in part.episodes.items():
        for frame, row in enumerate(rows.tolist()):
            try:
                pixels = stored_picture(column[row].as_py())
            except (NoColours, OSError, SyntaxError, TypeError) as error:  # the last where there is none
                bad[episode] = f"the picture of frame {frame} in {part.source} cannot be read ({error})"
                break
            writer.add(episode, frame, _resized(part, pixels, halved_colours=False))


def checksums_of(path: Path, encoding: Encoding) -> list[int]:
    """Computes the checksums of the pictures in a part as they are now, in order.

    Raises:
        ValueError: if the part is damaged so that they cannot be found.
    """
    import pyarrow as pa

    try:
        found = places(path, encoding)
    except (pa.ArrowInvalid, OSError, IndexError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    sums = []
    with path.open("rb", buffering=0) as file:
        for episode, frame, offset, size in zip(*(found[n].tolist() for n in found), strict=True):
            data = np.empty(max(size, 0), dtype=np.uint8)
            if size < 0 or os.preadv(file.fileno(), [data], offset) != size or min(episode, frame) < 0:
                raise ValueError("a picture reaches beyond its end")
            sums.append(picture_checksum(data, episode, frame))
    return sums


def places(path: Path, encoding: Encoding) -> dict[str, np.ndarray]:
    """Finds of every picture in a part: episode, frame, byte where it begins in the file, length."""
    import pyarrow as pa

    columns: dict[str, list[np.ndarray]] = {"episode": [], "frame": [], "offset": [], "size": []}
    with pa.memory_map(str(path)) as file:
        begin = file.read_buffer(file.size()).address
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            images = batch["image"]
            _, *buffers = images.buffers()
            if encoding.kind == "raw":
                ends = np.arange(len(batch) + 1, dtype=np.int64) * images.type.byte_width
            else:
                ends = np.frombuffer(buffers[0], dtype=np.int32)[: len(batch) + 1].astype(np.int64)
            columns["episode"].append(to_numpy(batch["episode_index"]))
            columns["frame"].append(to_numpy(batch["frame_index"]))
            columns["offset"].append(ends[:-1] + (buffers[-1].address - begin))
            columns["size"].append(np.diff(ends))
    empty = np.zeros(0, dtype=np.int64)
    return {name: np.concatenate([empty, *parts]) for name, parts in columns.items()}
