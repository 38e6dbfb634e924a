"""Writes the film of an episode as mp4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agent.safe_files import replacing

_SMALLEST_SIDE = 384  # what policies see is too small to look at


def write_video(path: Path, images: Sequence[np.ndarray], fps: int) -> None:
    """Writes pictures (H, W, 3) uint8 and enlarges small ones pixel by pixel; the file is there whole or not at all."""
    from fractions import Fraction

    import av

    factor = max(1, -(-_SMALLEST_SIDE // min(images[0].shape[:2])))
    height, width = (side * factor // 2 * 2 for side in images[0].shape[:2])  # h264 wants even sides
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "20", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for image in images:
            large = image.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(large), format="rgb24")))
        container.mux(stream.encode())
