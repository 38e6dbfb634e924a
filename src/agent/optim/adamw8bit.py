"""Stores AdamW's two moments in eight bits a number, in blocks with a scale each (https://arxiv.org/abs/2110.02861).

A block is up to 256 consecutive numbers of a row, so a matrix that is split by rows over processes is quantised as if it
were whole. A code stands for one of 256 numbers between -1 and 1, or 0 and 1, dense around zero over seven decades, as in
the paper. Of the second moment its square root is kept: that is what an update divides by, and it has half as many
decades. A root that is not zero never becomes zero, which would make the next update of that weight enormous.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

BLOCK = 256
_DECADES = 7
_PREFIX = 20  # sign, exponent and 11 bits of the mantissa, of which a code keeps seven at most
_NO_SCALE = 1e-30  # of a block of zeros


def dynamic_map(signed: bool) -> list[float]:
    """The 256 numbers of the paper's dynamic data type, ascending: each decade has twice as many as the one below."""
    numbers = [0.0, 1.0]
    for decade in range(_DECADES):
        count = 2 ** (decade + (0 if signed else 1))
        width = 0.9 / count
        means = [(0.1 + width * (i + 0.5)) * 10.0 ** (decade - _DECADES + 1) for i in range(count)]
        numbers += means + ([-mean for mean in means] if signed else [])
    return sorted(numbers)


@cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers of the codes, and the nearest code of every float32, found by its first 20 bits.

    A search among the 256 would be nearest to the last bit, and took ten times as long on a CPU.
    """
    numbers = dynamic_map(signed)
    boundaries = [(a + b) / 2 for a, b in zip(numbers, numbers[1:], strict=False)]
    if not signed:
        boundaries[0] = 0.0  # only zero itself is zero
    words = torch.arange(1 << _PREFIX, dtype=torch.int32) << (32 - _PREFIX)
    middles = (words + (1 << (31 - _PREFIX))).view(torch.float32)
    middles[words == 0] = 0.0
    codes = torch.bucketize(middles, torch.tensor(boundaries)).to(torch.uint8)
    return torch.tensor(numbers, device=device), codes.to(device)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the scales of a tensor of this shape: its rows, and the blocks of a row."""
    return shape[0], math.ceil(math.prod(shape[1:]) / BLOCK)


def dequantise(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Codes (rows, numbers) uint8 with scales (rows, blocks) → new float32 (rows, numbers)."""
    numbers, _ = _tables(signed, codes.device)
    values = numbers.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    for part, factor in _blocks(values, scale):
        part.mul_(factor)
    return values


def quantise(values: Tensor, codes: Tensor, scale: Tensor, signed: bool) -> None:
    """The reverse, into ``codes`` and ``scale``; ``values`` (rows, numbers) are overwritten."""
    for part, factor in _blocks(values, scale):
        factor.copy_(torch.linalg.vector_norm(part, ord=math.inf, dim=-1, keepdim=True))
        part.div_(factor.clamp_min(_NO_SCALE))
    _, nearest = _tables(signed, values.device)
    prefixes = values.view(torch.int32).bitwise_right_shift_(32 - _PREFIX).bitwise_and_((1 << _PREFIX) - 1)
    codes.copy_(nearest.index_select(0, prefixes.view(-1)).view(codes.shape))


def _blocks(values: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the numbers, one block in the last dimension, and of the blocks' scales: the whole ones, and the rest."""
    width = values.shape[1]
    whole = width // BLOCK
    pairs = []
    if whole:
        pairs.append((values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), scale[:, :whole, None]))
    if width % BLOCK:
        pairs.append((values[:, whole * BLOCK :], scale[:, whole:]))
    return pairs
