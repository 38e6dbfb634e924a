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

from agent.optim.stochastic_rounding import constant

BLOCK = 256
_DECADES = 7
PREFIX = 20  # sign, exponent and 11 bits of the mantissa, of which a code keeps seven at most
NO_SCALE = 1e-30  # of a block of zeros


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
def tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers of the codes (256,) float32, and the nearest code (2^20,) uint8 of every float32's first 20 bits.

    A search among the 256 would be nearest to the last bit, and took ten times as long on a CPU.
    """
    numbers = dynamic_map(signed)
    boundaries = [(a + b) / 2 for a, b in zip(numbers, numbers[1:], strict=False)]
    if not signed:
        boundaries[0] = 0.0  # only zero itself is zero
    words = torch.arange(1 << PREFIX, dtype=torch.int32) << (32 - PREFIX)
    middles = (words + (1 << (31 - PREFIX))).view(torch.float32)
    middles[words == 0] = 0.0
    codes = torch.bucketize(middles, torch.tensor(boundaries)).to(torch.uint8)
    return torch.tensor(numbers, device=device), codes.to(device)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the scales of a tensor of this shape: its rows, and the blocks of a row."""
    return shape[0], math.ceil(math.prod(shape[1:]) / BLOCK)


def dequantise(codes: Tensor, scale: Tensor, signed: bool, out: Tensor, words: Tensor) -> Tensor:
    """Reads a moment.

    Args:
        codes: uint8 (rows, numbers), contiguous.
        scale: float32 (rows, blocks).
        signed: whether it is the first moment.
        out: float32 (rows, numbers), contiguous, overwritten.
        words: int32 (rows * numbers,), overwritten.

    Returns:
        ``out``.
    """
    numbers, _ = tables(signed, codes.device)
    torch.index_select(numbers, 0, words.copy_(codes.view(-1)), out=out.view(-1))
    for part, factor in _blocks(out, scale):
        part.mul_(factor)
    return out


def quantise(values: Tensor, codes: Tensor, scale: Tensor, signed: bool) -> None:
    """The reverse, into ``codes`` and ``scale``; ``values`` float32 (rows, numbers), contiguous, are overwritten."""
    for part, factor in _blocks(values, scale):
        largest = part.amax(dim=-1, keepdim=True)
        if signed:
            torch.maximum(largest, part.amin(dim=-1, keepdim=True).neg_(), out=largest).abs_()
        factor.copy_(largest)
        part.div_(largest.clamp_min_(NO_SCALE))
    _, nearest = tables(signed, values.device)
    prefixes = values.view(torch.int32).bitwise_right_shift_(constant(32 - PREFIX))
    if signed:
        prefixes.bitwise_and_(constant((1 << PREFIX) - 1))
    torch.index_select(nearest, 0, prefixes.view(-1), out=codes.view(-1))


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
