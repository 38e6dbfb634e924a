"""Colours and rotation of videos, as their files state them. Run: uv run pytest tests/data/recorded/test_video_frames.py"""

from __future__ import annotations

import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.samples import FRONT

from agent.configuration_pipeline import load_config
from agent.data.frames.making import prepare
from agent.data.frames.store import WantedStore
from agent.data.recorded.video import choose_video_backend
from agent.data.source import open_source

BT709, BT601, BT2020, SMPTE240M = 1, 6, 9, 7
LIMITED, FULL = 1, 2
EXAMPLES = {
    "nothing stated": {},
    "BT.601": {"matrix": BT601},
    "BT.709": {"matrix": BT709},
    "SMPTE 240M": {"matrix": SMPTE240M},
    "full range": {"full": True},
    "BT.709 of full range": {"matrix": BT709, "full": True},
    "BT.709 of 10 bits": {"matrix": BT709, "pixels": "yuv420p10le"},
    "upside down": {"turned": 180},
    "on its side": {"turned": 90},
}


def pictures(number: int) -> np.ndarray:
    """(48, 64, 3) uint8: four fields of strong colours, of which the first changes."""
    picture = np.empty((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:] = (200, 40, 40 + 2 * number), (40, 200, 40)
    picture[24:, :32], picture[24:, 32:] = (40, 40, 200), (128, 128, 128)
    return picture


def encode(path: Path, frames: int, *, matrix: int | None = None, full=False, pixels="yuv420p", turned=0) -> None:
    """A video of ``pictures`` that states how its colours and its position are meant."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", 10, options={"crf": "1", "g": "4", "bf": "0", "x264-params": "log-level=error"}
        )
        turned_by = turned // 90
        height, width = (48, 64) if turned_by % 2 == 0 else (64, 48)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = width, height, pixels, Fraction(1, 10)
        if matrix:
            stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = FULL if full else LIMITED if matrix else 0
        for number in range(frames):
            # Turned against the way in which a player turns it.
            stored = np.ascontiguousarray(np.rot90(pictures(number), -turned_by))
            frame = av.VideoFrame.from_ndarray(stored, format="rgb24").reformat(
                format=pixels,
                src_colorspace=BT601 if matrix == BT709 else BT709,  # of no meaning for RGB, but has to differ
                dst_colorspace=matrix or BT601,
                src_color_range=FULL,
                dst_color_range=FULL if full else LIMITED,
            )
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if turned:
        _turn(path, turned)


def _turn(path: Path, degrees: int) -> None:
    """Writes a rotation into the file's track header (ISO 14496-12, ``tkhd``), as phones do."""
    matrix = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1)}[degrees]
    data = bytearray(path.read_bytes())
    begin = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[begin : begin + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def opened(place, root, backend, wanted=None):
    config = load_config(place.folder / "tiny.yaml", ["--data.train.datasets.0.root", str(root)], 1)[0]
    source = open_source(config.data.train.datasets[0], 4, backend, 1e-4, wanted=wanted)
    source.cameras = {FRONT: FRONT}
    return source


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_video_is_seen_as_it_says(place, tmp_path, example):
    """By both decoders to the bit, in frame stores, and as it was before it was encoded."""
    root = shutil.copytree(place.folder / "data", tmp_path / "data")  # a decoder is kept open by its file's path
    (path,) = (root / "videos").rglob("*.mp4")
    encode(path, 72, **EXAMPLES[example])
    seen = [opened(place, root, "pyav").read(number).images[FRONT].numpy().transpose(1, 2, 0) for number in range(3)]
    for number, picture in enumerate(seen):
        inside = np.zeros((48, 64), bool)  # away from where colours meet, which are halved in size
        inside[4:20, 4:28] = inside[4:20, 36:60] = inside[28:44, 4:28] = inside[28:44, 36:60] = True
        off = np.abs(picture.astype(int) - pictures(number))[inside]
        assert off.max() <= 4, f"frame {number} is off by {off.max()}"
    if choose_video_backend(None) == "torchcodec":
        for number in range(3):
            other = opened(place, root, "torchcodec").read(number).images[FRONT].numpy().transpose(1, 2, 0)
            assert (other == seen[number]).all(), np.abs(other.astype(int) - seen[number]).max()
    wanted = WantedStore("lossless", 95, (48, 64))
    prepare(opened(place, root, "pyav"), wanted, skip_bad_episodes=False, workers=1)
    stored = opened(place, root, "pyav", wanted)
    for number in range(3):
        assert (stored.read(number).images[FRONT].numpy().transpose(1, 2, 0) == seen[number]).all()
