"""Resizes pictures without distortion, for samples, frame stores, conversions and the policy at work alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def fitted_size(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
    """Computes height and width of the largest picture with the proportions of ``old`` that fits into ``new``."""
    ratio = max(old[1] / new[1], old[0] / new[0])
    # openpi's truncation can round a side of a very long image to nothing
    return max(1, int(old[0] / ratio)), max(1, int(old[1] / ratio))


def resize_with_pad(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes without distortion and centres on black, as openpi does.

    Args:
        image: (3, H, W) uint8.

    Returns:
        (3, height, width) uint8; differs from openpi's float result by rounding only.
    """
    import torch
    from torch.nn.functional import interpolate, pad

    old_height, old_width = image.shape[-2:]
    if (old_height, old_width) == (height, width):
        return image
    new_height, new_width = fitted_size((old_height, old_width), (height, width))
    resized = interpolate(image[None].float(), (new_height, new_width), mode="bilinear", align_corners=False)[0]
    resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return pad(resized, (left, width - new_width - left, top, height - new_height - top))
