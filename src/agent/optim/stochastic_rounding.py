"""Rounds to bfloat16, up or down with the probability that keeps the mean.

bfloat16 has eight significant bits: an update of less than 1/512 of a weight, which is what a small learning rate gives,
is lost when the sum is rounded to nearest. Rounded up with the probability of its distance to the lower neighbour it is
kept in the mean (https://arxiv.org/abs/2010.06192).

The bits that decide are a hash of the seed, the update, the parameter's name and the number's position in the whole
tensor. Nothing is drawn one after the other, so they are the same on every processor, however a tensor is cut or split,
and a run that is continued rounds as the one that was not interrupted. The hash is triple32
(https://github.com/skeeto/hash-prospector) of a counter, with one half of a key before its first round and the other
before its last; a hash of 32 bits serves two neighbours.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

# triple32: shift and multiplier of each of its rounds, and the shift at its end.
ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
LAST_SHIFT = 14
# What a step of the counter's high word adds to the two halves of the key.
HIGH = (0x9E3779B9, 0x85EBCA6B)

_DROPPED = 16  # bits of a float32 that a bfloat16 lacks
_WORD = 1 << 32


def rounding_key(seed: int, update: int, name: str) -> tuple[int, int]:
    """The key of a parameter's bits in an update: two numbers of 32 bits."""
    digest = hashlib.blake2b(f"{seed}/{update}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


def random_bits(key: tuple[int, int], first: int, out: Tensor) -> Tensor:
    """The bits of successive positions.

    Args:
        key: from :func:`rounding_key`.
        first: position of the first number in its whole tensor, flattened.
        out: int32 (numbers,), overwritten with numbers from 0 to 65535.

    Returns:
        ``out``.
    """
    begin, end = first // 2, (first + len(out) + 1) // 2
    words = torch.empty(end - begin, dtype=torch.int32, device=out.device)
    for high in range(begin // _WORD, (end - 1) // _WORD + 1):
        low, stop = max(begin, high * _WORD), min(end, (high + 1) * _WORD)
        _hash(key, high, low % _WORD, words[low - begin : stop - begin])
    # Little-endian: the lower half of a word is the first of its two neighbours'.
    halves = words.view(torch.int16)[first % 2 :][: len(out)]
    return out.copy_(halves).bitwise_and_(constant((1 << _DROPPED) - 1))


def round_to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds in place.

    Args:
        values: float32, finite; overwritten with numbers that bfloat16 holds exactly.
        bits: int32 of the same shape, uniform from 0 to 65535.

    Returns:
        ``values``.
    """
    # The words of a float grow with its magnitude. What is added carries into the kept bits in as many of 65536 cases as
    # the dropped bits say, for either sign.
    values.view(torch.int32).add_(bits).bitwise_and_(constant(-1 << _DROPPED))
    return values


def _hash(key: tuple[int, int], high: int, low: int, out: Tensor) -> None:
    """Overwrites int32 (pairs,) with the hashes of the counters from ``low`` on, whose upper word is ``high``."""
    before, within = (half + high * step for half, step in zip(key, HIGH, strict=True))
    torch.arange(len(out), out=out).add_(_signed(low)).bitwise_xor_(_signed(before))
    shifted = torch.empty_like(out)
    for number, (shift, factor) in enumerate(ROUNDS):
        if number == len(ROUNDS) - 1:
            out.add_(_signed(within))
        _xor_shifted(out, shift, shifted)
        out.mul_(constant(_signed(factor)))
    _xor_shifted(out, LAST_SHIFT, shifted)


def _xor_shifted(words: Tensor, shift: int, shifted: Tensor) -> None:
    # A shift of signed words repeats the sign.
    torch.bitwise_right_shift(words, constant(shift), out=shifted).bitwise_and_(constant((1 << (32 - shift)) - 1))
    words.bitwise_xor_(shifted)


@cache
def constant(number: int) -> Tensor:
    """An int32 () on the CPU: as an operand it takes a third of the time that torch needs for Python's number."""
    return torch.tensor(number, dtype=torch.int32)


def _signed(word: int) -> int:
    """The number that int32 holds for the lowest 32 bits of this one."""
    return (word + _WORD // 2) % _WORD - _WORD // 2
