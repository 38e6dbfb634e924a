"""Turns stored pictures into colours of 8 bits, and refuses by name what would have to be squeezed into them.

Sixteen bits of depth in millimetres, cut off at 255, are one white square. What holds the same colours in another form (grey,
a palette, transparency, an orientation in the file's notes) is converted, for the reader and for frame stores alike.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import av
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

    from agent.data.source import Source

_ORIENTATION = 0x0112  # of Exif
_EIGHT_BITS = ("RGB", "RGBA", "L", "LA", "P", "PA", "1")


class NoColours(ValueError):
    """A picture that has no colours of 8 bits."""


def stored_picture(entry: Mapping[str, Any]) -> np.ndarray:
    """Reads a picture in a data file, as ``datasets.Image`` stores it, without its transparency: (H, W, 3) uint8.

    Raises:
        NoColours: if it is of another kind.
        OSError, SyntaxError, TypeError: if it cannot be read, or is none.
    """
    with _opened(entry) as image:
        return colours(image)


def raw_picture(entry: Mapping[str, Any]) -> np.ndarray:
    """Reads the picture as it is stored, whatever it is."""
    with _opened(entry) as image:
        return np.array(image)


def _opened(entry: Mapping[str, Any]) -> ImageFile:
    from PIL import Image

    return Image.open(io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"])


def colours(file: ImageFile) -> np.ndarray:
    """Converts an opened picture that was not loaded yet to (H, W, 3) uint8.

    Raises:
        NoColours: if it has more than 8 bits a channel, or channels that are no colours.
    """
    from PIL import ImageOps

    # Pillow itself drops the lower half of the colours of 16 bits; how they are stored is known until they are loaded.
    image: Image = file
    if image.mode.startswith("I") or any(";16" in str(tile.args) for tile in file.tile):
        raise NoColours(f"has {32 if file.mode == 'I' else 16} bits a channel ({file.format}, mode {file.mode})")
    if image.mode not in _EIGHT_BITS:
        kind = "floating-point values" if file.mode == "F" else "other channels than red, green and blue"
        raise NoColours(f"has {kind} ({file.format}, mode {file.mode})")
    if image.mode in ("P", "PA", "LA", "1"):
        image = image.convert({"LA": "L", "1": "L"}.get(image.mode, "RGBA"))
    if image.getexif().get(_ORIENTATION) is not None:  # as `datasets` does
        image = ImageOps.exif_transpose(image)
    pixels = np.array(image)
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels[:, :, :3]


def check_format(pixel_format: str) -> None:
    """Checks that FFmpeg turns pictures of this format into colours of 8 bits.

    Raises:
        NoColours: if they are grey of more than 8 bits, which are depths, or of floating-point numbers.
    """
    import av

    try:
        known = av.VideoFormat(pixel_format, 16, 16)
    except ValueError:  # of a newer FFmpeg
        return
    bits = max(component.bits for component in known.components)
    if (len(known.components) < 3 and bits > 8) or bits > 16:
        raise NoColours(f"has {bits} bits a channel (pixel format {pixel_format})")


def check_frame(frame: av.VideoFrame) -> None:
    """Checks the format of a decoded frame, likewise."""
    if frame.format.name not in ("yuv420p", "yuvj420p"):  # nearly all are
        check_format(frame.format.name)


def check_pictures(source: Source) -> None:
    """Looks at what the pictures of each mapped camera are, in the first and the last file; its cameras are known.

    A file that is not there is passed over: a frame store may hold its pictures.

    Raises:
        ValueError: if those of a camera are no colours of 8 bits, naming the camera, its key and the file.
    """
    for slot, key in source.cameras.items():
        for episode in dict.fromkeys(source.episodes[[0, -1]].tolist()):
            video = key in source.metadata.video_keys
            path = source.metadata.file(f"videos/{key}" if video else "data", episode)
            if not path.is_file():
                continue
            try:
                _check_video(path) if video else _check_data_file(path, key)
            except NoColours as error:
                raise ValueError(
                    f"{source}: {'a frame' if video else 'a picture'} of {key}, for the camera {slot}, {error} in {path}; a "
                    "camera has colours of 8 bits. If it holds depths, leave it out: "
                    f"`cameras: {{{slot}: null}}` in the data set's entry (and write is_depth_map: true into the info of {key} "
                    "in meta/info.json, as LeRobot does); else convert its pictures to 8 bits, by a scale that suits them"
                ) from None


def _check_video(path: Path) -> None:
    import av

    try:
        with av.open(str(path)) as container:
            pixel_format = container.streams.video[0].codec_context.pix_fmt
    except (av.FFmpegError, IndexError):  # another's to say
        return
    if pixel_format is not None:
        check_format(pixel_format)


def _check_data_file(path: Path, key: str) -> None:
    for entry in _first_entries(path, key):
        try:
            stored_picture(entry)
        except NoColours:
            raise
        except (OSError, SyntaxError, TypeError, ValueError):  # damaged; said with its episode when it is read
            return


def _first_entries(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    """Yields the first picture of a data file, if it can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            if key in file.schema_arrow.names:
                for batch in file.iter_batches(batch_size=1, columns=[key], use_threads=False):
                    yield batch[key][0].as_py()
                    return
    except (pa.ArrowInvalid, OSError):  # damaged; the files are verified elsewhere
        return
