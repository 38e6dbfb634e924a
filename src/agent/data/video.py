"""One frame of a video by its time stamp, with LeRobot's two decoders and without importing LeRobot.

Importing LeRobot's data sets takes several seconds and hundreds of megabytes. The frames are the same: the calls of the
decoders are those of ``lerobot.datasets.video_utils``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.data.pictures import check_format
from agent.data.video_frame import rgb

if TYPE_CHECKING:
    import torch

_OPEN_VIDEOS = 32  # per process; a decoder holds some megabytes


def decode_frame(path: Path, seconds: float, tolerance_s: float, backend: str) -> torch.Tensor:
    """The frame at a time stamp, (3, H, W) uint8.

    Args:
        path: of the video.
        seconds: from its beginning.
        tolerance_s: how far the nearest frame may be.
        backend: ``torchcodec`` or ``pyav``.

    Raises:
        ValueError: if no frame is that near.
    """
    frame, found = (_with_torchcodec if backend == "torchcodec" else _with_pyav)(path, seconds)
    # In single precision, as LeRobot compares them: what it reads is read here.
    if frame is None or not abs(np.float32(found) - np.float32(seconds)) < tolerance_s:
        nearest = "none" if frame is None else f"the nearest one is at {found:.4f} s"
        raise ValueError(
            f"{path} has no frame within {tolerance_s:g} s of {seconds:.4f} s, {nearest}: its time stamps have drifted from "
            "the metadata; raise data.train.tolerance_s if that is known to be harmless"
        )
    return frame


def _with_torchcodec(path: Path, seconds: float) -> tuple[torch.Tensor | None, float]:
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


def _with_pyav(path: Path, seconds: float) -> tuple[torch.Tensor | None, float]:
    import av
    import torch

    best: tuple[Any, float] = (None, float("inf"))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        container.seek(round(seconds / stream.time_base) - 1, backward=True, any_frame=False, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            stamp = float(frame.pts * stream.time_base)
            if abs(stamp - seconds) < abs(best[1] - seconds):
                best = frame, stamp
            if stamp >= seconds:
                break
    if best[0] is None:
        return None, best[1]
    return torch.from_numpy(rgb(best[0])).permute(2, 0, 1).contiguous(), best[1]
