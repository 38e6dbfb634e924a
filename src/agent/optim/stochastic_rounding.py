"""Rounds to bfloat16, up or down with the probability that keeps the mean.

bfloat16 has eight significant bits: an update of less than 1/512 of a weight, which is what a small learning rate gives,
is lost when the sum is rounded to nearest. Rounded up with the probability of its distance to the lower neighbour it is
kept in the mean (https://arxiv.org/abs/2010.06192). The bits that decide are a function of a key, so a run that is
continued rounds as the one that was not interrupted, and all processes round alike.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_DROPPED = 16  # bits of a float32 that a bfloat16 lacks


class RandomBits:
    """Random numbers as a function of a key; torch's own generators do not move.

    The numbers are drawn on the device. A CPU and a GPU give different ones for the same key.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def draw(self, key: tuple[int | str, ...], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """int32 numbers from 0 to 65535, in this shape."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        text = "/".join(str(part) for part in (self._seed, *key))
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        generator = self._generators[device].manual_seed(number)
        bits = torch.empty(shape, dtype=torch.int32, device=device)
        return bits.random_(0, 1 << _DROPPED, generator=generator)


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
    values.view(torch.int32).add_(bits).bitwise_and_(-1 << _DROPPED)
    return values
