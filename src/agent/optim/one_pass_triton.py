"""The update of ``one_pass.py`` as one Triton kernel a tensor, for CUDA; imported only where there is a GPU.

A program takes a few blocks of the eight-bit moments, reads every number of them once and writes it once. Nothing is
contracted to fused multiply-adds, no small number is flushed to zero, and division and root are rounded as IEEE 754
says, so that the bits are those of a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agent.optim import adamw8bit, stochastic_rounding
from agent.optim.one_pass import OneUpdate

OPTIONS = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
"""What the compiler must not do: contract operations, and have the root flush small numbers to zero."""
_BLOCKS = 4  # of a program
_BLOCK = tl.constexpr(adamw8bit.BLOCK)
_DROPPED = tl.constexpr(32 - adamw8bit.PREFIX)
_PREFIXES = tl.constexpr((1 << adamw8bit.PREFIX) - 1)
_NO_SCALE = tl.constexpr(adamw8bit.NO_SCALE)
_HIGH_BEFORE, _HIGH_WITHIN = (tl.constexpr(step) for step in stochastic_rounding.HIGH)
(_SHIFT_0, _FACTOR_0), (_SHIFT_1, _FACTOR_1), (_SHIFT_2, _FACTOR_2) = (
    (tl.constexpr(shift), tl.constexpr(factor)) for shift, factor in stochastic_rounding.ROUNDS
)
_LAST_SHIFT = tl.constexpr(stochastic_rounding.LAST_SHIFT)


@triton.jit
def _bits(position, before, within):
    """16 random bits for each position."""
    counter = position >> 1
    high = (counter >> 32).to(tl.uint32)
    word = counter.to(tl.uint32) ^ (before.to(tl.uint32) + high * _HIGH_BEFORE)
    word = (word ^ (word >> _SHIFT_0)) * _FACTOR_0
    word = (word ^ (word >> _SHIFT_1)) * _FACTOR_1
    word = word + (within.to(tl.uint32) + high * _HIGH_WITHIN)
    word = (word ^ (word >> _SHIFT_2)) * _FACTOR_2
    word = word ^ (word >> _LAST_SHIFT)
    return tl.where((position & 1) == 1, word >> 16, word & 0xFFFF).to(tl.int32)


@triton.jit
def _widened(pointer, mask):
    """Loads float32 or bfloat16 as float32."""
    value = tl.load(pointer, mask=mask, other=0.0)
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value


@triton.jit
def _quantised(value, nearest, codes, scales, at, mask, block, valid):
    """Stores a moment's blocks as codes and scales."""
    largest = tl.max(tl.where(mask, tl.abs(value), 0.0), axis=1)
    tl.store(scales + block, largest, mask=valid)
    value = tl.div_rn(value, tl.broadcast_to(tl.maximum(largest, _NO_SCALE)[:, None], value.shape))
    prefix = (value.to(tl.int32, bitcast=True) >> _DROPPED) & _PREFIXES
    tl.store(codes + at, tl.load(nearest + prefix), mask=mask)


# What changes from one update to the next must not have the kernel compiled anew.
@triton.jit(do_not_specialize=["rows", "first", "before", "within"])
def _update(
    weight, gradient, average, average_scale, root, root_scale,
    signed_numbers, signed_nearest, unsigned_numbers, unsigned_nearest, gradient_scale,
    rows: tl.int64, width, first: tl.int64, before: tl.uint32, within: tl.uint32,
    keep_first, add_first, keep_second, add_second, decay, rate, correction, eps,
    EIGHT_BIT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Updates ``BLOCKS`` blocks of (rows, width) numbers, of which the first has the position ``first``."""
    blocks_of_row = tl.cdiv(width, _BLOCK)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    valid = block < rows * blocks_of_row
    column = (block % blocks_of_row)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    mask = valid[:, None] & (column < width)
    at = (block // blocks_of_row)[:, None] * width + column

    g = _widened(gradient + at, mask)
    if gradient_scale is not None:
        g = g * tl.load(gradient_scale)
    if EIGHT_BIT:
        m = tl.load(signed_numbers + tl.load(average + at, mask=mask, other=0).to(tl.int32))
        m = m * tl.load(average_scale + block, mask=valid, other=0.0)[:, None]
        v = tl.load(unsigned_numbers + tl.load(root + at, mask=mask, other=0).to(tl.int32))
        v = v * tl.load(root_scale + block, mask=valid, other=0.0)[:, None]
        v = v * v
    else:
        m = tl.load(average + at, mask=mask, other=0.0)
        v = tl.load(root + at, mask=mask, other=0.0)
    m = m * keep_first + g * add_first
    v = v * keep_second + (g * g) * add_second
    r = tl.sqrt_rn(v)
    change = tl.div_rn(m, r * correction + eps) * rate
    value = _widened(weight + at, mask) * decay - change
    if weight.dtype.element_ty == tl.bfloat16:
        word = value.to(tl.int32, bitcast=True) + _bits(first + at, before, within)
        tl.store(weight + at, (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(weight + at, value, mask=mask)
    if EIGHT_BIT:
        _quantised(m, signed_nearest, average, average_scale, at, mask, block, valid)
        _quantised(r, unsigned_nearest, root, root_scale, at, mask, block, valid)
    else:
        tl.store(average + at, m, mask=mask)
        tl.store(root + at, v, mask=mask)


def update_in_triton(update: OneUpdate) -> None:
    """Computes an update with one launch of the kernel."""
    average, *scales = update.moments
    average_scale, root, root_scale = scales if update.eight_bit else (None, scales[0], None)
    (rows, width), device = update.shape, update.weight.device
    programs = triton.cdiv(rows * triton.cdiv(width, adamw8bit.BLOCK), _BLOCKS)
    _update[(programs,)](
        update.weight, update.gradient, average, average_scale, root, root_scale,
        *adamw8bit.tables(True, device), *adamw8bit.tables(False, device), update.gradient_scale,
        rows, width, update.first, *update.key, *update.factors,
        EIGHT_BIT=update.eight_bit, BLOCKS=_BLOCKS, **OPTIONS,
    )  # fmt: skip
