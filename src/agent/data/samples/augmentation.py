"""Crops and recolours training pictures at random, as pure functions of picture, seed, sample number and camera.

The definitions are those of ``torchvision.transforms.v2.functional`` (``resized_crop``, ``adjust_brightness``,
``adjust_contrast``, ``adjust_saturation``, ``adjust_hue``), in this order, for a quarter of the time: colours are shifted in
integers of 16 bits, and no hue is ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from agent.data.configuration import AugmentationConfig
from agent.data.frames.encoding import in_planes
from agent.data.resizing import fitted_size
from agent.reproducibility import stream

if TYPE_CHECKING:
    import torch

_GREY = np.asarray([0.2989, 0.587, 0.114])  # of red, green and blue, as torchvision weighs them
_ATTEMPTS = 10


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Change(NamedTuple):
    """What was drawn for one picture."""

    crop: Box
    """Within the picture, its padding not counted."""
    brightness: float
    contrast: float
    saturation: float
    hue: float
    """Turns of the colour circle, -0.5 to 0.5."""


class Augmentation(NamedTuple):
    """Changes the pictures of one camera of one data set."""

    config: AugmentationConfig
    """Its own values."""
    picture: Box
    """Where the picture lies in what the model sees."""

    def __call__(self, image: torch.Tensor, seed: int, k: int, camera: str) -> torch.Tensor:
        """Changes the picture of sample ``k``, (3, H, W) uint8."""
        return augmented(image, self.picture, draw_change(self.config, self.picture, seed, k, camera))


def augmentations(
    config: AugmentationConfig | None,
    recorded: Mapping[str, tuple[int, int]],
    slots: Sequence[str],
    resolution: tuple[int, int],
    dataset: str,
) -> dict[str, Augmentation]:
    """Finds the cameras of a data set whose pictures are changed.

    Args:
        config: of the data set; None for none of them.
        recorded: model camera → height and width of its pictures in the data set.
        slots: all cameras of the model.
        resolution: height and width of what the model sees.
        dataset: for messages.

    Raises:
        ValueError: if the config names a camera that the model does not have.
    """
    if config is None:
        return {}
    unknown = [camera for camera in config.cameras or {} if camera not in slots]
    if unknown:
        raise ValueError(
            f"{dataset}: `augmentation.cameras` names {', '.join(unknown)}, which the model does not have; write one of "
            f"{', '.join(slots)}"
        )
    return {
        camera: Augmentation(own, picture_box(size, resolution))
        for camera, size in recorded.items()
        if (own := config.of_camera(camera)) is not None
    }


def picture_box(recorded: tuple[int, int], resolution: tuple[int, int]) -> Box:
    """Where a picture that was recorded with this height and width lies in what the model sees; around it is padding."""
    if recorded == resolution:
        return Box(0, 0, *resolution)
    height, width = fitted_size(recorded, resolution)
    return Box((resolution[0] - height) // 2, (resolution[1] - width) // 2, height, width)


def draw_change(config: AugmentationConfig, picture: Box, seed: int, k: int, camera: str) -> Change:
    """What happens to the picture of a camera in sample ``k``.

    Args:
        config: the camera's own values.
        picture: of which only the size counts.
        seed: the run's.
        k: the sample's number.
        camera: the model's.
    """
    numbers = stream(seed, f"augmentation/{camera}", k).random(6 + 2 * _ATTEMPTS).tolist()
    brightness, contrast, saturation, hue, *numbers = numbers

    def between(number: float, low: float, high: float) -> float:
        return low + number * (high - low)

    return Change(
        _draw_crop(config, picture, numbers),
        between(brightness, 1 - config.brightness, 1 + config.brightness),
        between(contrast, *config.contrast),
        between(saturation, *config.saturation),
        between(hue, -config.hue, config.hue),
    )


def _draw_crop(config: AugmentationConfig, picture: Box, numbers: list[float]) -> Box:
    """As torchvision's ``RandomResizedCrop``: a crop that does not fit is drawn again, and in the end all is kept."""
    down, right, *numbers = numbers
    ratios = [math.log(ratio) for ratio in config.crop_ratio]
    for scale, ratio in zip(numbers[::2], numbers[1::2], strict=True):
        area = config.crop_scale[0] + scale * (config.crop_scale[1] - config.crop_scale[0])
        stretch = math.exp((ratios[0] + ratio * (ratios[1] - ratios[0])) / 2)
        height = round(picture.height * math.sqrt(area) / stretch)
        width = round(picture.width * math.sqrt(area) * stretch)
        if 0 < height <= picture.height and 0 < width <= picture.width:
            top, left = int(down * (picture.height - height + 1)), int(right * (picture.width - width + 1))
            return Box(top, left, height, width)
    return Box(0, 0, picture.height, picture.width)


def augmented(image: torch.Tensor, picture: Box, change: Change) -> torch.Tensor:
    """A changed copy of what the model sees; the padding around the picture stays as it is.

    Args:
        image: (3, H, W) uint8.
        picture: where in it the picture lies.
        change: see ``draw_change``.

    Returns:
        (3, H, W) uint8.
    """
    import torch

    top, left, height, width = picture
    inside = image[:, top : top + height, left : left + width]
    changed = torch.from_numpy(recoloured(crop(inside, change.crop).numpy(), change))
    if changed.shape == image.shape:
        return changed
    whole = image.clone()
    whole[:, top : top + height, left : left + width] = changed
    return whole


def crop(image: torch.Tensor, box: Box) -> torch.Tensor:
    """A part of a picture (3, h, w) uint8, enlarged to the size of the whole, bilinear."""
    import cv2
    import torch
    from torch.nn.functional import interpolate

    height, width = image.shape[1:]
    if box == (0, 0, height, width):
        return image
    part = image[:, box.top : box.top + box.height, box.left : box.left + box.width].numpy()
    # Colours last and back: half the time of the same in planes, with the same result.
    pixels = torch.from_numpy(cv2.merge(list(part)))[None].permute(0, 3, 1, 2)
    large = interpolate(pixels, (height, width), mode="bilinear", align_corners=False)[0]
    return torch.from_numpy(in_planes(large.permute(1, 2, 0).numpy()))


# ── colours ─────────────────────────────────────────────────────────────────────────────────────────────────────
# In planes of int16: numpy's operations on them take 2 µs for 224 × 224, a tenth of what its comparisons with a number,
# selections and tables take. All is integer arithmetic, so nothing depends on threads.


def recoloured(image: np.ndarray, change: Change) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each clipped to what a picture can show, of (3, h, w) uint8."""
    if change.brightness != 1 or change.contrast != 1:
        image = _toned(image, change.brightness, change.contrast)
    planes = image.astype(np.int16)
    if change.saturation != 1:
        planes = _saturated(planes, change.saturation)
    parts = math.ceil(abs(change.hue) * 6)  # turns of a sixth at most
    for _ in range(parts):
        planes = _turned(planes, change.hue / parts)
    return planes.astype(np.uint8)


def _toned(image: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Brightness and contrast by one table."""
    levels = np.minimum(np.arange(256) * brightness, 255)
    if contrast != 1:
        most = min(255, round(255 / brightness)) if brightness else 255  # what is brighter is clipped
        shown = np.minimum(image, np.full_like(image, most)) if most < 255 else image
        sums = shown.reshape(3, -1).astype(np.int16).sum(axis=1, dtype=np.int32)  # exact, whatever the threads
        mean = brightness * float(sums @ _GREY) / image[0].size
        levels = (contrast * levels + (1 - contrast) * mean).clip(0, 255)
    table = np.rint(levels).astype(np.uint8)
    return np.frombuffer(image.tobytes().translate(table.tobytes()), np.uint8).reshape(image.shape)


def _fixed_point(factor: float) -> tuple[np.int16, int, np.int16]:
    """A factor of differences up to 255 in 16 bits: the number, the shift after multiplying, half of the last place."""
    shift = min(14, int(math.log2(32000 / (255 * max(abs(factor), 1e-3)))))
    return np.int16(round(factor * (1 << shift))), shift, np.int16(1 << (shift - 1))


def _saturated(planes: np.ndarray, factor: float) -> np.ndarray:
    """Differences from grey times a factor; (3, h, w) int16."""
    number, shift, half = _fixed_point(factor - 1)
    red, green, blue = planes
    grey = red * np.int16(38)  # 0.2989, 0.587 and 0.114 in 128ths
    grey += green * np.int16(75)
    grey += blue * np.int16(15)
    grey += np.int16(64)
    grey >>= 7
    result = planes - grey
    result *= number
    result += half
    result >>= shift
    result += planes
    return result if factor <= 1 else result.clip(0, 255, out=result)


def _turned(planes: np.ndarray, turn: float) -> np.ndarray:
    """Hues turned by at most a sixth of the colour circle; (3, h, w) int16.

    Along the circle a channel climbs from the least of the three to the largest in one sixth, stays there for two, falls
    in one and stays down for two. So after a turn by e sixths it is, with chroma C the largest less the least, e·C further
    on this path: up if it comes to its summit, down if it leaves it, which the other two tell. No division is needed.
    """
    if turn < 0:
        return _turned(planes[::-1], -turn)[::-1]
    number, shift, half = _fixed_point(6 * turn)
    red, green, blue = planes
    low = np.minimum(np.minimum(red, green), blue)
    chroma = np.maximum(np.maximum(red, green), blue)
    chroma -= low
    step = chroma * number
    step += half
    step >>= shift
    result, zero = np.empty_like(planes), np.zeros_like(low)
    for channel in range(3):
        # A hue climbs to the summit of a channel from that of the one before it: red, green, blue, red.
        before, value, after = planes[channel - 1], planes[channel], planes[(channel + 1) % 3]
        rising = value - after
        falling = np.maximum(rising, zero)
        falling += value
        falling -= before
        falling -= step
        rising += step
        falls = before - after
        falls >>= 15  # all bits set where `before` is less than `after`, none elsewhere
        # A selection in three operations: np.where takes ten times as long as one.
        falling ^= rising
        falling &= falls
        rising ^= falling
        np.minimum(np.maximum(rising, zero, out=rising), chroma, out=rising)
        np.add(rising, low, out=result[channel])
    return result
