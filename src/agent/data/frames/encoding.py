"""Encodes and decodes one picture of a frame store: as JPEG, lossless or raw."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["jpeg", "lossless", "raw"]


@dataclass(frozen=True)
class Encoding:
    """How all pictures of a store are kept; ``benchmarks/loader.py`` measures what each way costs."""

    kind: Kind
    quality: int | None = None
    """Of JPEG, 1 to 100; None for the others."""

    def __post_init__(self) -> None:
        assert (self.quality is not None) == (self.kind == "jpeg")

    def __str__(self) -> str:
        return f"jpeg{self.quality}" if self.kind == "jpeg" else self.kind

    @classmethod
    def parse(cls, name: str) -> Encoding:
        """Reads what ``str`` gives."""
        match = re.fullmatch(r"(jpeg)(\d+)|(lossless)|(raw)", name)
        assert match is not None, f"{name} is no encoding"
        return cls("jpeg", int(match[2])) if match[1] else cls(name)  # type: ignore[arg-type]

    def encode(self, image: np.ndarray, halved_colours: bool) -> bytes | memoryview:
        """Turns a picture into bytes.

        Args:
            image: (H, W, 3) uint8.
            halved_colours: whether the picture comes pixel by pixel from a video with colours at half resolution, so
                that a JPEG loses nothing by keeping no more of them than the video did.
        """
        if self.kind == "jpeg":
            import simplejpeg

            picture = np.ascontiguousarray(image)
            return simplejpeg.encode_jpeg(
                picture, quality=self.quality, colorsubsampling="420" if halved_colours else "444"
            )
        planes = in_planes(np.ascontiguousarray(image))
        if self.kind == "raw":
            return memoryview(planes).cast("B")
        # Each row as its difference from the one above: half the bytes of zstd alone.
        rows = planes.copy()
        rows[:, 1:] -= planes[:, :-1]
        return _zstd().compress(rows, asbytes=True)

    def decode(self, data: np.ndarray, height: int, width: int) -> np.ndarray:
        """Turns bytes, (size,) uint8, into a picture (3, H, W) uint8; a raw one is ``data`` itself, not a copy."""
        if self.kind == "jpeg":
            import simplejpeg

            # Colours at half resolution are repeated, not smoothed: so did the video's decoder.
            planes = in_planes(simplejpeg.decode_jpeg(data, fastupsample=True))
        elif self.kind == "raw":
            planes = data.reshape(3, height, width)
        else:
            size = 3 * height * width
            rows = np.frombuffer(_zstd().decompress(data, size, asbytes=True), dtype=np.uint8)
            planes = np.add.accumulate(rows.reshape(3, height, width), axis=1, dtype=np.uint8)
        if planes.shape != (3, height, width):
            raise ValueError(f"a picture of {planes.shape[1:]} in a store of {(height, width)}")
        return planes


def in_planes(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) → (3, H, W)."""
    import cv2

    planes = np.empty((3, *image.shape[:2]), dtype=np.uint8)
    cv2.split(image, list(planes))  # several times as fast as numpy's transposing copy
    return planes


def _zstd():  # noqa: ANN202
    import pyarrow as pa

    return pa.Codec("zstd", compression_level=1)
