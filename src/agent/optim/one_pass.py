"""One update of one tensor: what goes into it, and its arithmetic in torch.

There are three ways: this one for every device, ``one_pass_triton.py`` for CUDA, and ``one_pass.c`` for CPUs that have a
compiler. They give the same bits. Therefore each step below is a single addition, subtraction, multiplication, division
or root, rounded to float32 by itself and in this order; ``lerp`` and ``addcdiv`` may or may not keep a product unrounded,
and a division by a Python number becomes a product on a GPU.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.optim.adamw8bit import BLOCK, dequantise, quantise
from agent.optim.stochastic_rounding import random_bits, round_to_bfloat16

_PIECE = 1 << 17  # numbers at a time and thread, so that the buffers stay in a CPU's cache
_PIECE_ELSEWHERE = 1 << 22  # and on a GPU, where an operator costs a launch


class Factors(NamedTuple):
    """The numbers of an update, each of which float32 holds exactly: every processor reads the same."""

    keep_first: float
    add_first: float
    keep_second: float
    add_second: float
    decay: float
    rate: float
    correction: float
    """The inverse of what the root of the second moment is divided by for its bias."""
    eps: float

    @classmethod
    def of(cls, group: dict[str, Any], step: int) -> Factors:
        """Those of update ``step``, counted from 1, with a parameter group's ``lr``, ``betas``, ``eps``, ``weight_decay``."""
        lr, (first, second) = group["lr"], group["betas"]
        decay, rate = 1 - lr * group["weight_decay"], lr / (1 - first**step)
        correction = 1 / math.sqrt(1 - second**step)
        numbers = (first, 1 - first, second, 1 - second, decay, rate, correction, group["eps"])
        return cls(*(ctypes.c_float(number).value for number in numbers))


class OneUpdate(NamedTuple):
    """One tensor's update. All tensors are contiguous and on one device; weight and moments are changed."""

    weight: Tensor
    """float32 or bfloat16: successive rows of a tensor, or all of it."""
    gradient: Tensor
    """float32 or bfloat16, of the weight's shape."""
    moments: tuple[Tensor, ...]
    """``exp_avg``, ``exp_avg_sq`` as float32; or ``exp_avg``, its scales, ``exp_avg_sq_root``, its scales."""
    factors: Factors
    key: tuple[int, int]
    """From :func:`agent.optim.stochastic_rounding.rounding_key`; only weights of bfloat16 need it."""
    first: int = 0
    """Position of the first number in the whole tensor, flattened."""
    gradient_scale: Tensor | None = None
    """One float32, by which the gradient is multiplied."""

    @property
    def eight_bit(self) -> bool:
        """Whether the moments are codes."""
        return len(self.moments) == 4

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and numbers of a row; one row of all numbers if there are no blocks that end with a row."""
        rows = len(self.weight) if self.eight_bit else 1
        return rows, self.weight.numel() // rows


def update_in_torch(update: OneUpdate) -> None:
    """Computes an update with torch's operators, in pieces; the buffers take 20 bytes a number of a piece."""
    numbers = update.weight.numel()
    on_cpu = update.weight.device.type == "cpu"
    size = min(numbers, _PIECE * torch.get_num_threads() if on_cpu else _PIECE_ELSEWHERE)
    # A piece is at most that, but for rows that are cut at whole blocks.
    buffers = torch.empty(4, max(size, BLOCK), device=update.weight.device)
    words = torch.empty(max(size, BLOCK), dtype=torch.int32, device=update.weight.device)
    # Tensors as operands: Python's numbers take thrice the time.
    factors = torch.tensor(update.factors, dtype=torch.float32).unbind()
    for rows, columns in _pieces(*update.shape, size):
        _update_piece(update, factors, rows, columns, buffers, words)


def _pieces(rows: int, width: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cuts (rows, width) into whole rows, or rows into whole blocks, of about this many numbers."""
    if width <= size:
        step = size // width
        yield from ((slice(row, min(row + step, rows)), slice(0, width)) for row in range(0, rows, step))
        return
    step = max(size // BLOCK, 1) * BLOCK
    for row in range(rows):
        yield from ((slice(row, row + 1), slice(at, min(at + step, width))) for at in range(0, width, step))


def _update_piece(
    update: OneUpdate, factors: tuple[Tensor, ...], rows: slice, columns: slice, buffers: Tensor, words: Tensor
) -> None:
    keep_first, add_first, keep_second, add_second, decay, rate, correction, eps = factors
    width = update.shape[1]
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    begin, count = rows.start * width + columns.start, shape[0] * shape[1]
    here, blocks = slice(begin, begin + count), (rows, slice(columns.start // BLOCK, -(-columns.stop // BLOCK)))
    average, square, gradient, value = buffers[:, :count]
    words = words[:count]
    if update.eight_bit:
        first, first_scale, second, second_scale = update.moments
        first, second = first.view(-1)[here].view(shape), second.view(-1)[here].view(shape)
        first_scale, second_scale = first_scale[blocks], second_scale[blocks]
        dequantise(first, first_scale, True, average.view(shape), words)
        dequantise(second, second_scale, False, square.view(shape), words)
        square.mul_(square)
    else:
        average, square = (moment.view(-1)[here] for moment in update.moments)
    gradient.copy_(update.gradient.view(-1)[here])
    if update.gradient_scale is not None:
        gradient.mul_(update.gradient_scale)
    average.mul_(keep_first).add_(torch.mul(gradient, add_first, out=value))
    square.mul_(keep_second).add_(gradient.mul_(gradient).mul_(add_second))
    root = _root(square, out=square if update.eight_bit else value)
    torch.mul(root, correction, out=gradient).add_(eps)
    torch.div(average, gradient, out=gradient).mul_(rate)
    weight = update.weight.view(-1)[here]
    value.copy_(weight).mul_(decay).sub_(gradient)
    if weight.dtype == torch.bfloat16:
        round_to_bfloat16(value, random_bits(update.key, update.first + begin, words))
    weight.copy_(value)
    if update.eight_bit:
        quantise(average.view(shape), first, first_scale, signed=True)
        quantise(root.view(shape), second, second_scale, signed=False)


def _root(values: Tensor, out: Tensor) -> Tensor:
    """The nearest float32 to each root; torch's operator asks MKL on a CPU, which is off by the last bit in 1 of 160."""
    if values.device.type == "cpu":
        np.sqrt(values.numpy(), out=out.numpy())
        return out
    return torch.sqrt(values, out=out)
