"""Turns a decoded frame into the picture that its video means.

PyAV 15.1 converts every video as if its colours were BT.601's and leaves a rotation to the caller; torchcodec 0.11 follows what
the file says of both. A run that reads videos with one of them, or frames that the other stored, has to see the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from agent.data.recorded.pictures import check_frame

if TYPE_CHECKING:
    import av

_BT709, _BT601, _FULL_RANGE = 1, 5, 2


def rgb(frame: av.VideoFrame) -> np.ndarray:
    """The picture, (height, width, 3) uint8, in the colours and the position that the file states.

    It is torchcodec's to the bit: 4:2:0, 4:2:2 and 4:4:4; BT.601, BT.709, BT.2020, SMPTE 240M and FCC; 8 bits of both ranges
    and 10 of the limited one.

    Raises:
        NoColours: if it has no colours of 8 bits.
    """
    check_frame(frame)
    converter = _converter(frame.colorspace, frame.color_range)
    deep = any(component.bits > 8 for component in frame.format.components)
    converted = converter.reformat(
        frame,
        format="rgb24",
        src_colorspace=frame.colorspace,
        # The source's is followed only where the target's differs, which has none, being RGB.
        dst_colorspace=_BT709 if frame.colorspace == _BT601 else _BT601,
        src_color_range=frame.color_range,
        dst_color_range=_FULL_RANGE,
        interpolation="BICUBIC" if deep else "BILINEAR",
    )
    plane = converted.planes[0]
    # ``to_ndarray`` would copy it.
    rows = np.frombuffer(plane, dtype=np.uint8).reshape(frame.height, plane.line_size)
    pixels = rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


@lru_cache(maxsize=16)
def _converter(colorspace: int, color_range: int) -> av.video.reformatter.VideoReformatter:
    """One for all frames of a kind: a frame's own would compute the same tables anew, one of another kind keeps its colours."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()
