"""Converts one file of an RLDS tree to one video per camera and one table of columns, in a process of its own."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from agent.data.conversion.rlds import Values, parse_example, read_records
from agent.data.recorded.pictures import NoColours, colours
from agent.safe_files import write_text

_SAMPLED = 10  # every tenth picture counts in the statistics of pixels, which no training here uses


@dataclass(frozen=True)
class Layout:
    """Which features of a step become what; names are like ``observation/image_0``."""

    fps: int
    images: dict[str, str]
    """Camera → feature."""
    state: tuple[str, ...]
    """Features that are put together, in this order."""
    action: tuple[str, ...]
    instruction: str
    """The text of the first step is the episode's."""
    size: int = 224
    """Height and width of the pictures."""
    crf: int = 18
    """Quality of H.264; smaller is better."""


@dataclass(frozen=True)
class Place:
    """Where the parts of one file go; the report is written last, so a file with one is done."""

    folder: Path
    number: int

    @property
    def chunk_and_file(self) -> tuple[int, int]:
        return divmod(self.number, 1000)

    def numbered(self, kind: str, ending: str) -> Path:
        """Names the file of a LeRobot data set; its folders are not made."""
        chunk, file = self.chunk_and_file
        return self.folder / kind / f"chunk-{chunk:03d}" / f"file-{file:03d}.{ending}"

    def video(self, camera: str) -> Path:
        return self.numbered(f"videos/observation.images.{camera}", "mp4")

    @property
    def columns(self) -> Path:
        return self.folder / "shards" / f"{self.number:05d}.npz"

    @property
    def report(self) -> Path:
        return self.folder / "shards" / f"{self.number:05d}.json"


def convert_shard(shard: Path, expected: int, layout: Layout, place: Place) -> None:
    """Converts the episodes of one file.

    Episodes without an instruction are left out and named in the report.

    Args:
        shard: the TFRecord file.
        expected: its episodes.

    Raises:
        ValueError: if the file is damaged, or an episode does not have what the layout names.
    """
    import torch

    torch.set_num_threads(1)  # there are as many processes as cores
    videos = {camera: _Video(place.video(camera), layout) for camera in layout.images}
    episodes: list[dict[str, Any]] = []
    states, actions, left_out, number = [], [], [], -1
    for number, record in enumerate(read_records(shard)):
        values = parse_example(record)
        try:
            task = _instruction(values, layout.instruction)
            if not task:
                left_out.append(number)
                continue
            pictures = {camera: _bytes(values, feature) for camera, feature in layout.images.items()}
            steps = len(next(iter(pictures.values())))
            if steps == 0 or any(len(encoded) != steps for encoded in pictures.values()):
                counts = {feature: len(pictures[camera]) for camera, feature in layout.images.items()}
                raise ValueError(f"every camera needs the same number of pictures, at least one; there are {counts}")
            action, state = _vectors(values, layout.action, steps), _vectors(values, layout.state, steps)
            for camera, encoded in pictures.items():
                try:
                    videos[camera].add(encoded)
                except NoColours as error:
                    raise ValueError(
                        f"a picture of {layout.images[camera]} {error}; a camera has colours of 8 bits"
                    ) from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{shard}, episode {number}: {error}") from error
        states.append(state)
        actions.append(action)
        episodes.append({"length": len(action), "task": task, "source": number})
    if number + 1 != expected:
        raise ValueError(
            f"{shard} holds {number + 1} episodes where dataset_info.json counts {expected}; copy it again"
        )
    histograms = {camera: video.close().tolist() for camera, video in videos.items()}
    if episodes:
        np.savez(place.columns, state=np.concatenate(states), action=np.concatenate(actions))
    report = {"episodes": episodes, "left_out": left_out, "histograms": histograms}
    write_text(place.report, json.dumps(report))


def _found(values: dict[str, Values], feature: str) -> Values:
    name = f"steps/{feature}"
    if name not in values:
        known = ", ".join(sorted(key.removeprefix("steps/") for key in values if key.startswith("steps/")))
        raise ValueError(f"there is no {feature}; a step has {known}")
    return values[name]


def _bytes(values: dict[str, Values], feature: str) -> list[bytes]:
    found = _found(values, feature)
    if not isinstance(found, list):
        raise ValueError(f"{feature} is no image or text")
    return found


def _instruction(values: dict[str, Values], feature: str) -> str:
    texts = _bytes(values, feature)
    return texts[0].decode().strip() if texts else ""


def _vectors(values: dict[str, Values], features: tuple[str, ...], steps: int) -> np.ndarray:
    """(steps, dims) float32."""
    parts = []
    for feature in features:
        found = _found(values, feature)
        if isinstance(found, list) or len(found) == 0 or len(found) % steps:
            kind = "is no number" if isinstance(found, list) else f"has {len(found)} values for {steps} steps"
            raise ValueError(f"{feature} {kind}")
        parts.append(found.reshape(steps, -1).astype(np.float32))
    return np.concatenate(parts, axis=1)


class _Video:
    """Writes one H.264 file, frame after frame at its exact time."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        self._container: Any = None
        self._stream: Any = None
        self._frames = 0
        self._histogram = np.zeros((3, 256), dtype=np.int64)

    def add(self, pictures: list[bytes]) -> None:
        """Encodes the pictures of an episode, resized as the model does."""
        import av

        if self._container is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(str(self.path), "w", options={"movflags": "faststart"})
            self._stream = self._container.add_stream("libx264", rate=self.layout.fps)
            self._stream.width = self._stream.height = self.layout.size
            self._stream.pix_fmt = "yuv420p"
            self._stream.time_base = Fraction(1, self.layout.fps)
            # a key frame every second one, as LeRobot's: training reads single frames; no frame waits for a later one
            self._stream.options = {"crf": str(self.layout.crf), "g": "2", "bf": "0", "threads": "1", "preset": "fast"}
        for picture in _decoded(pictures, self.layout.size):
            if self._frames % _SAMPLED == 0:
                self._histogram += np.stack([np.bincount(channel.ravel(), minlength=256) for channel in picture])
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.transpose(1, 2, 0)), format="rgb24")
            frame.pts = self._frames
            self._container.mux(self._stream.encode(frame))
            self._frames += 1

    def close(self) -> np.ndarray:
        """Ends the file, and returns (3, 256) how often each value of each colour occurred."""
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        return self._histogram


def _decoded(pictures: list[bytes], size: int) -> Iterator[np.ndarray]:
    """Decodes and resizes each JPEG or PNG to (3, size, size) uint8."""
    import torch
    from PIL import Image

    from agent.data.resizing import resize_with_pad

    for encoded in pictures:
        with Image.open(io.BytesIO(encoded)) as picture:
            values = colours(picture)
        yield resize_with_pad(torch.from_numpy(values.transpose(2, 0, 1).copy()), size, size).numpy()
