"""Decodes one frame of a video by its time stamp, with LeRobot's two decoders and without importing LeRobot.

Importing LeRobot's data sets takes several seconds and hundreds of megabytes. The frames are the same: the calls of the
decoders are those of ``lerobot.datasets.video_utils``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.data.recorded.pictures import check_format
from agent.data.recorded.video_frame import rgb

if TYPE_CHECKING:
    from collections.abc import Iterator

    import av
    import torch

logger = logging.getLogger(__name__)

_OPEN_VIDEOS = 32  # per process; a decoder holds some megabytes
_astray: set[str] = set()
"""Videos of which torchcodec gave another frame than the one asked for, and PyAV that one; per process."""


@dataclass(frozen=True)
class Moment:
    """When a frame is shown in a video; all in seconds from its beginning."""

    seconds: float
    tolerance_s: float
    """How far the frame may be."""
    period: float
    """How long a frame is shown."""
    begin: float
    """Of the episode's stretch of the video."""
    end: float

    def has(self, shown: float) -> bool:
        """Whether a frame is of the stretch and as near as it has to be."""
        return self.inside(shown) and abs(shown - self.seconds) < self.tolerance_s

    def inside(self, shown: float) -> bool:
        """Whether a frame is of the stretch."""
        return self.begin - self.period / 2 <= shown < self.end - self.period / 2


class WrongTime(ValueError):
    """A frame is not shown when the metadata say so, although the file may be as it was recorded."""


@cache
def choose_video_backend(asked: str | None, needed: bool = True) -> str:
    """Chooses the decoder: ``torchcodec`` when it really loads, else ``pyav``; logged once.

    Where no video is to be decoded it is not tried out, since importing it takes a second.

    Raises:
        ValueError: if the one that is asked for is unknown or does not load.
    """
    if asked not in (None, "torchcodec", "pyav"):
        raise ValueError(f"data.train.video_backend is {asked!r}: write torchcodec, pyav, or leave it out")
    if asked == "pyav" or not needed:
        return asked or "pyav"
    try:
        # Installed is not enough: it binds FFmpeg's shared libraries when it is imported.
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        if asked == "torchcodec":
            raise ValueError(
                f"data.train.video_backend is torchcodec, which does not load here ({str(error).splitlines()[0]}). "
                "Install FFmpeg's shared libraries, or leave the setting out to decode with pyav."
            ) from error
        logger.info("videos are decoded with pyav; torchcodec is faster but does not load here")
        return "pyav"
    logger.info("videos are decoded with torchcodec")
    return "torchcodec"


def decode_frame(path: Path, moment: Moment, backend: str) -> torch.Tensor:
    """Decodes the frame at a time, (3, H, W) uint8.

    A frame that torchcodec does not find is asked for of PyAV, which from then on decodes that video in this process:
    torchcodec 0.11 may give another frame of HEVC than was asked for when it goes from place to place.

    Args:
        path: of the video.
        moment: of the frame.
        backend: ``torchcodec`` or ``pyav``.

    Raises:
        ValueError: if the video has no such frame.
    """
    margin = moment.period / 2 + moment.tolerance_s
    if not moment.begin - margin <= moment.seconds < moment.end - moment.period + margin:
        raise WrongTime(
            f"{path} has no frame of the episode at {moment.seconds:.10g} s, its stretch is {moment.begin:.4f} to "
            f"{moment.end:.4f} s: correct the time stamp of the row, or the stretch in meta/episodes"
        )
    if backend != "torchcodec" or str(path) in _astray:
        return _with_pyav(path, moment, strict=backend == "torchcodec")
    try:
        frame, shown = _with_torchcodec(path, moment.seconds)
        if moment.has(shown):
            return frame
        how = "gave another one than was asked for"
    except (RuntimeError, IndexError, ValueError) as error:
        how = f"did not give one of them ({type(error).__name__})"
    frame = _with_pyav(path, moment, strict=True)
    _astray.add(str(path))
    logger.info("%s is decoded with pyav, which finds its frames: torchcodec %s", path, how)
    return frame


def _with_torchcodec(path: Path, seconds: float) -> tuple[torch.Tensor, float]:
    decoder = _decoder(str(path))
    frames = decoder.get_frames_at(indices=[round(seconds * decoder.metadata.average_fps)])
    return frames.data[0], float(frames.pts_seconds[0])


@lru_cache(maxsize=_OPEN_VIDEOS)
def _decoder(path: str) -> Any:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, seek_mode="approximate")
    if (pixel_format := decoder.metadata.pixel_format) is not None:
        check_format(pixel_format)
    return decoder


def _with_pyav(path: Path, moment: Moment, strict: bool) -> torch.Tensor:
    """Looks from the key frame before the moment; if that does not lead there, from ever earlier ones, the first at last.

    Args:
        strict: whether what FFmpeg would paint over without a word is an error.
    """
    import av
    import torch

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        if strict:
            stream.codec_context.options = {"err_detect": "explode"}
        unit, start, back = float(stream.time_base), stream.start_time or 0, 0.0
        while True:
            target = round((moment.seconds - back) / unit) - 1
            container.seek(max(target, start - 1), backward=True, any_frame=False, stream=stream)
            last_try = target < start
            try:
                frame, shown, led_there = _nearest(container.decode(stream), moment, unit)
            except av.FFmpegError:
                if last_try:
                    raise
                led_there = False
            if led_there or last_try:
                break
            back = max(1.0, 2 * back)
    if frame is None or not moment.has(shown):
        raise _no_frame(path, moment, shown)
    return torch.from_numpy(rgb(frame)).permute(2, 0, 1).contiguous()


def _nearest(frames: Iterator[av.VideoFrame], moment: Moment, unit: float) -> tuple[Any, float, bool]:
    """Finds the stretch's frame nearest to a moment, when it is shown, and whether decoding began before it.

    Where frames are reordered, seeking may lead to a key frame behind the one that was asked for.
    """
    best, at, first = None, float("inf"), True
    for frame in frames:
        if frame.pts is None:
            continue
        shown = frame.pts * unit
        if first and shown - moment.seconds >= min(moment.tolerance_s, moment.period / 2):
            return None, shown, False
        first = False
        if moment.inside(shown) and abs(shown - moment.seconds) < abs(at - moment.seconds):
            best, at = frame, shown
        if shown >= moment.seconds:
            break
    return best, at, not first


def _no_frame(path: Path, moment: Moment, shown: float) -> ValueError:
    asked, away = moment.seconds, abs(shown - moment.seconds)
    if away < moment.period / 2 and moment.inside(shown):
        return WrongTime(
            f"{path} has no frame within {moment.tolerance_s:.3g} s of {asked:.4f} s, the nearest one is at {shown:.4f} s: its "
            f"time stamps have drifted from the metadata; raise data.train.tolerance_s above {away:.2g} if that is known to be "
            "harmless"
        )
    nearest = (
        f"the nearest one is {away / moment.period:.1f} frames away, at {shown:.4f} s"
        if away < 1e9
        else "nor any near it"
    )
    return ValueError(f"{path} has no frame of the episode at {asked:.4f} s, {nearest}")
