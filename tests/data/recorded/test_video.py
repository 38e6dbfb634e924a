"""Frames of videos that are hard to find: long files, and streams in which decoders lose their way.

Run: uv run pytest tests/data/recorded/test_video.py      (half a minute)
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from support import large_dataset
from support.large_dataset import write_large_dataset
from support.videos import Read, moment

from agent.data.configuration import DatasetConfig
from agent.data.loading.worker_pool import WorkerPool
from agent.data.recorded import mp4, video
from agent.data.recorded.video import Moment, decode_frame
from agent.data.source import Source, open_source

BACKENDS = ["pyav", "torchcodec"]


def encoded(path: Path, frames: int, codec: str, options: dict[str, str], fps: int = 10) -> Path:
    """A video of pictures with black and white stripes, the digits of each one's number."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, fps, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(frames):
            stripes = np.repeat([255 * (number >> digit & 1) for digit in range(8)], 8).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ones((64, 1, 3), np.uint8) * stripes[None, :, None], format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def number_of(picture) -> int:
    stripes = picture.double().mean(dim=(0, 1)).reshape(8, 8)[:, 2:6].mean(dim=1)
    return sum(1 << digit for digit, stripe in enumerate(stripes.tolist()) if stripe > 127)


# ── streams in which decoders lose their way ────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def hevc(tmp_path_factory) -> Path:
    """As LeRobot records it, with open groups of pictures: torchcodec gives another frame for every third one asked for."""
    return encoded(tmp_path_factory.mktemp("hevc") / "v.mp4", 81, "libx265", {"g": "2", "crf": "10"})


def test_what_torchcodec_does_not_find_pyav_does(hevc, caplog, monkeypatch):
    monkeypatch.setattr(video, "_astray", set())
    with caplog.at_level(logging.INFO):
        for number in np.random.default_rng(0).permutation(81).tolist():
            assert number_of(decode_frame(hevc, moment(number), "torchcodec")) == number
    (line,) = [record.getMessage() for record in caplog.records if str(hevc) in record.getMessage()]
    assert "is decoded with pyav, which finds its frames" in line


def test_a_frame_that_is_not_there_is_not_for_the_tolerance(hevc, monkeypatch):
    monkeypatch.setattr(video, "_astray", set())
    for backend in BACKENDS:
        late = Moment(3.04, 1e-4, 0.1, 0.0, 8.1)
        with pytest.raises(ValueError, match=r"no frame within 0.0001 s of 3.0400 s, .* at 3.0000 s: .* above 0.04 if"):
            decode_frame(hevc, late, backend)
        for beyond, stretch, what in (
            (8.1, (0.0, 9.0), "no frame of the episode at 8.1000 s, the nearest one is 1.0 frames away, at 8.0000 s"),
            (1.7e9, (0.0, 8.1), "no frame of the episode at 1700000000 s, its stretch is 0.0000 to 8.1000 s"),
            (1.1, (0.0, 1.1), "no frame of the episode at 1.1 s, its stretch is 0.0000 to 1.1000 s"),
        ):
            with pytest.raises(ValueError, match=what) as raised:
                decode_frame(hevc, Moment(beyond, 1e-4, 0.1, *stretch), backend)
            assert "tolerance" not in str(raised.value)
        # However large the tolerance, the picture is one of the episode.
        assert number_of(decode_frame(hevc, Moment(1.1, 0.2, 0.1, 0.0, 1.1), backend)) == 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx265", {"g": "3", "crf": "10"}),
        ("libx265", {"g": "250", "crf": "10", "x265-params": "keyint=250:min-keyint=20:open-gop=1:bframes=4"}),
        ("libx264", {"g": "12", "crf": "10", "bf": "3", "flags": "-cgop", "x264-params": "open-gop=1"}),
    ],
)
def test_every_frame_of_open_groups_of_pictures(tmp_path, backend, codec, options):
    path = encoded(tmp_path / "v.mp4", 81, codec, options)
    for number in np.random.default_rng(1).permutation(81).tolist():
        assert number_of(decode_frame(path, moment(number), backend)) == number


def test_workers_say_it_once(hevc, caplog):
    pool = WorkerPool(Read(hevc), workers=2, ahead=2, pin=False, advice="")
    try:
        with caplog.at_level(logging.INFO):
            pictures = [pool.next() for _ in range(40)]
    finally:
        pool.close()
    assert [number_of(picture.image) for picture in pictures] == Read(hevc).order[:40].tolist()
    assert len([record for record in caplog.records if "is decoded with pyav" in record.getMessage()]) == 1


# ── long files ──────────────────────────────────────────────────────────────────────────────────────────────────


RATE, SECONDS = 15, 2_150


def write_long(root: Path, episodes: int, videos: Path | None = None) -> Path:
    """Episodes in one video; every picture is one step lighter than the one before. ``videos`` are those to take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_dataset, "FPS", RATE)
        if videos is not None:
            patch.setattr(large_dataset, "_write_videos", lambda root, _: os.symlink(videos, root / "videos"))
        return write_large_dataset(root, episodes, RATE * SECONDS)


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> dict[int, Path]:
    """The same video of 2,150 seconds as two episodes, of which the second begins at 1,282 s, and as a single one."""
    folder = tmp_path_factory.mktemp("long")
    two = write_long(folder / "two", 2)
    return {2: two, 1: write_long(folder / "one", 1, two / "videos")}


def opened(root: Path, backend: str) -> Source:
    source = open_source(DatasetConfig("test/long", str(root)), 4, backend, 1e-4)
    source.cameras = {large_dataset.CAMERA: large_dataset.CAMERA}
    return source


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("episodes", [2, 1])
def test_time_stamps_late_in_a_file(long, episodes, backend):
    """Single precision, in which the rows have them, has steps of 0.0001 s from 1,024 s on and 0.0002 s from 2,048 s."""
    source = opened(long[episodes], backend)
    for position in (0, *range(21_150, 21_700, 11), *range(30_800, 31_400, 11), len(source) - 1):
        picture = source.read(position).images[large_dataset.CAMERA].double().mean()
        assert abs(float(picture) - position % 200) < 3, position


# ── the index of an mp4 ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_index_of_an_mp4_tells_what_the_decoder_does(tmp_path):
    """Reordered, cut without encoding anew, begun late, with gaps, and with another clock."""
    import av

    plain = encoded(tmp_path / "plain.mp4", 90, "libx264", {"g": "12", "bf": "3"})
    encoded(tmp_path / "hevc.mp4", 40, "libx265", {"g": "3"})
    for name, before, after in (
        ("cut", ["-ss", "1.03"], []),
        ("both", ["-ss", "1.03"], ["-t", "2"]),
        ("late", ["-itsoffset", "0.5"], []),
        ("clock", [], ["-video_track_timescale", "1000"]),
        ("no_edit", [], ["-use_editlist", "0"]),
    ):
        command = ["ffmpeg", "-loglevel", "error", *before, "-i", plain, *after, "-c", "copy", tmp_path / f"{name}.mp4"]
        subprocess.run(command, check=True)
    paths = sorted(tmp_path.glob("*.mp4"))
    assert len(paths) == 7
    for path in paths:
        with av.open(str(path)) as container:
            shown = sorted(float(frame.pts * frame.time_base) for frame in container.decode(video=0))
        np.testing.assert_allclose(mp4.frame_times(path), shown, atol=1e-6, err_msg=path.name)
    (tmp_path / "none.mp4").write_bytes(plain.read_bytes()[:100])
    assert mp4.frame_times(tmp_path / "none.mp4") is None
    assert mp4.frame_times(Path(sys.executable)) is None
