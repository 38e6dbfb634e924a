"""The bits that round are a function of seed, update, name and position, as random as coins, and keep the mean.

Run with ``uv run pytest tests/optim/test_stochastic_rounding.py``; seconds. All numbers follow from fixed keys.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agent.optim.stochastic_rounding import random_bits, round_to_bfloat16, rounding_key

KEY = rounding_key(1, 2, "some.weight")


def random(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def drawn(first: int, count: int, key: tuple[int, int] = KEY) -> Tensor:
    return random_bits(key, first, torch.empty(count, dtype=torch.int32))


def expected_bits(key: tuple[int, int], position: int) -> int:
    """The hash in Python's integers."""
    mask = 0xFFFFFFFF
    low, high = position // 2 & mask, position // 2 >> 32
    x = low ^ ((key[0] + high * 0x9E3779B9) & mask)
    x = (x ^ x >> 17) * 0xED5AD4BB & mask
    x = (x ^ x >> 11) * 0xAC4C1B51 & mask
    x = (x + key[1] + high * 0x85EBCA6B) & mask
    x = (x ^ x >> 15) * 0x31848BAB & mask
    x ^= x >> 14
    return x >> 16 if position % 2 else x & 0xFFFF


@pytest.mark.parametrize("first", [0, 1, 2**31 - 3, 2**32 - 5, 2**33 - 4, 2**33 + 1, 5 * 2**33 - 7, 2**40 + 3])
def test_the_bits_are_a_function_of_key_and_position(first: int) -> None:
    assert drawn(first, 11).tolist() == [expected_bits(KEY, first + i) for i in range(11)]


def test_a_part_has_the_bits_of_the_whole() -> None:
    whole = drawn(2**33 - 500, 1000)
    for begin, count in ((0, 1), (1, 1), (3, 500), (499, 2), (998, 2), (501, 499)):
        assert torch.equal(drawn(2**33 - 500 + begin, count), whole[begin : begin + count])


def test_the_bits_are_uniform() -> None:
    numbers = drawn(0, 1 << 22).numpy()
    for values, kinds in ((numbers, 65536), (numbers & 0xFF, 256), (numbers >> 8, 256)):
        expected = len(values) / kinds
        chi_square = float(((np.bincount(values, minlength=kinds) - expected) ** 2 / expected).sum())
        assert abs(chi_square - (kinds - 1)) < 4 * (2 * (kinds - 1)) ** 0.5


def signs(numbers: Tensor) -> Tensor:
    """(numbers,) of 16 bits → (numbers, 16), a bit as -1 or 1."""
    return ((numbers[:, None] >> torch.arange(16)) & 1).float() * 2 - 1


def largest_correlation(one: Tensor, other: Tensor) -> float:
    """Of any bit of one with any of the other, in standard deviations of fair coins."""
    return float((signs(one).T @ signs(other) / len(one) ** 0.5).abs().max())


@pytest.mark.parametrize("apart", [1, 2, 3, 16, 256, 1152, 2048, 65536])
def test_neighbours_have_nothing_to_do_with_each_other(apart: int) -> None:
    bits = drawn(0, (1 << 17) + apart)
    assert largest_correlation(bits[:-apart], bits[apart:]) < 5


def test_halves_updates_names_and_seeds_have_nothing_to_do_with_each_other() -> None:
    bits = drawn(0, 1 << 17)
    assert largest_correlation(bits[::2], bits[1::2]) < 5
    keys = [rounding_key(1, 3, "some.weight"), rounding_key(1, 2, "some.weighu"), rounding_key(2, 2, "some.weight")]
    for others in [drawn(0, 1 << 17, key) for key in keys] + [drawn(2**33, 1 << 17), drawn(2**34, 1 << 17)]:
        assert largest_correlation(bits, others) < 5
        assert float((bits == others).float().mean()) < 1e-4


def test_a_bit_of_the_position_turns_half_of_the_bits() -> None:
    count = 1 << 12
    keys = [rounding_key(0, update, "w") for update in range(16)]
    at = torch.arange(count)
    here = torch.cat([drawn(0, count, key) for key in keys])
    for bit in range(40):
        if 1 << bit < count:
            there = torch.cat([drawn(0, count, key)[at ^ (1 << bit)] for key in keys])
        else:
            there = torch.cat([drawn(1 << bit, count, key) for key in keys])
        turned = (signs(here) != signs(there)).float().mean(dim=0)
        # Each pair below `count` is met twice.
        assert ((turned - 0.5).abs() < 5 * 0.5 / (len(here) / 2) ** 0.5).all(), bit


def test_rounding_gives_a_neighbour_and_the_mean_is_kept() -> None:
    values = torch.cat([random(50), random(50) * 1e-8, torch.tensor([0.0, 1.0, -1.0, 1 / 3, 3e38])])
    keys = 2000
    bits = torch.empty(105, dtype=torch.int32)
    rounded = torch.stack(
        [round_to_bfloat16(values.clone(), random_bits(rounding_key(1, k, "a.weight"), 0, bits)) for k in range(keys)]
    )
    assert torch.equal(rounded, rounded.bfloat16().float())
    below = (values.view(torch.int32) & -65536).view(torch.float32)
    above = (below.view(torch.int32) + 65536).view(torch.float32)
    assert ((rounded == below) | (rounded == above)).all()
    exact = values == values.bfloat16()
    assert (rounded[:, exact] == values[exact]).all()
    # Five standard deviations of a mean over so many coins.
    gap = (above - below).double().abs()
    assert ((rounded.double().mean(dim=0) - values).abs() <= gap * 5 * 0.5 / keys**0.5).all()
