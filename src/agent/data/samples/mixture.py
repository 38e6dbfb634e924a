"""Tells which frame is the k-th sample of the run: a pure function of the lengths, the weights and the seed.

Nothing is shuffled and nothing is stored: a keyed bijection answers "which frame comes at place k" in constant
time and memory, so that a resume at k = 10**9 costs what a start at 0 costs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from agent.reproducibility import key_of

_MASK_64 = (1 << 64) - 1
_ROUNDS = 8
_RATIO_BITS = 32
_BLOCK = 4096


def _hash(value: Any) -> Any:
    """64 bits to 64 bits, every input bit moving every output bit (splitmix64's finaliser); an int, or an array."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)


@lru_cache(maxsize=256)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_hash((key + number * 0x9E3779B97F4A7C15) & _MASK_64) for number in range(1, _ROUNDS + 1))


def permute(index: int, length: int, key: int) -> int:
    """Where a random permutation of ``range(length)``, chosen by ``key``, sends ``index``.

    A Feistel network is a bijection of its power-of-four domain whatever its round function is; walking on from
    a value outside ``range(length)`` until one falls inside makes it a bijection of the range (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). The domain is less than four times the
    range, so fewer than four steps are needed on average.

    Raises:
        IndexError: if ``index`` is not in ``range(length)``.
    """
    if not 0 <= index < length:
        raise IndexError(f"{index} is not in range({length})")
    value = index
    while True:
        value = _scramble(value, length, key)
        if value < length:
            return value


def _permute_all(indices: np.ndarray, length: int, key: int) -> np.ndarray:
    """``permute`` of each of (n,) uint64."""
    values = _scramble(indices, length, key)
    outside = np.flatnonzero(values >= length)
    while len(outside) > 32:
        values[outside] = again = _scramble(values[outside], length, key)
        outside = outside[again >= length]
    for place in outside:  # one by one is faster for the last few
        value = int(values[place])
        while value >= length:
            value = _scramble(value, length, key)
        values[place] = value
    return values


def _scramble(value: Any, length: int, key: int) -> Any:
    """The bijection of the power-of-four domain; an int, or a uint64 array."""
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & half_mask
    for round_key in _round_keys(key & _MASK_64):
        left, right = right, left ^ (_hash(right ^ round_key) & half_mask)
    return left << half_bits | right


class Mixture:
    """The order in which a run visits the frames of its data sets; ``mixture[k]`` is (data set, position).

    Without weights all frames form one pool, and pass e = k // frames visits each of them exactly once. With
    weights every data set gets its exact share of each stretch of the stream, and goes through its own passes at
    its own pace.

    Args:
        lengths: the number of frames of each data set.
        weights: relative shares, or None (also a list of nothing but None) for one pool.
        seed: the run's seed.

    Raises:
        ValueError: if there is no frame, or the weights are partial, not positive, or too far apart.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float | None] | None, seed: int) -> None:
        if not lengths or min(lengths) <= 0:
            raise ValueError(f"every data set needs at least one frame, the frames are {list(lengths)}")
        self.lengths = list(lengths)
        self.frames = sum(self.lengths)
        self.seed = seed
        self.weights = _complete(weights, len(self.lengths))
        self._ends = list(accumulate(self.lengths))
        shares = self.weights or [float(length) for length in self.lengths]
        self.shares = [share / sum(shares) for share in shares]
        """The fraction of the samples that each data set gives."""
        self._tree = _split(self.weights, 0, len(self.lengths)) if self.weights else None

    def __getitem__(self, k: int) -> tuple[int, int]:
        """The data set of sample ``k`` and the position of its frame there."""
        if k < 0:
            raise IndexError(f"sample numbers start at 0, asked for {k}")
        if self._tree is None:
            number, index = divmod(k, self.frames)
            pooled = permute(index, self.frames, key_of(self.seed, f"pass/{number}"))
            dataset = bisect_right(self._ends, pooled)
            return dataset, pooled - (self._ends[dataset] - self.lengths[dataset])
        # A quota scheme alone repeats one rhythm (A B A B …); permuting within blocks breaks it and moves no
        # sample by more than a block.
        block, place = divmod(k, _BLOCK)
        place = permute(place, _BLOCK, key_of(self.seed, f"block/{block}"))
        dataset, index = _descend(self._tree, block * _BLOCK + place)
        number, index = divmod(index, self.lengths[dataset])
        key = key_of(self.seed, f"dataset/{dataset}/pass/{number}")
        return dataset, permute(index, self.lengths[dataset], key)

    def counts(self, start: int, stop: int) -> list[int]:
        """How many of the samples ``start`` to ``stop - 1`` each data set gives; looks at these alone."""
        found, ends = np.zeros(len(self.lengths), dtype=np.int64), np.asarray(self._ends, dtype=np.uint64)
        size = self.frames if self._tree is None else _BLOCK
        for number in range(start // size, -(-stop // size)):
            begin = number * size
            places = np.arange(max(start - begin, 0), min(stop - begin, size), dtype=np.uint64)
            if self._tree is None:
                pooled = _permute_all(places, size, key_of(self.seed, f"pass/{number}"))
                found += np.bincount(np.searchsorted(ends, pooled, side="right"), minlength=len(found))
            else:
                places = _permute_all(places, size, key_of(self.seed, f"block/{number}"))
                _count(self._tree, places + np.uint64(begin), found)
        return found.tolist()


def _complete(weights: Sequence[float | None] | None, count: int) -> list[float] | None:
    """The weights as numbers, or None where there are none at all."""
    if weights is None or all(weight is None for weight in weights):
        return None
    given = [weight for weight in weights if weight is not None]
    if len(given) != count or len(weights) != count:
        raise ValueError(
            f"weights are {list(weights)} for {count} data sets: give every data set a `weight`, or none of them"
        )
    if min(given) <= 0 or not all(weight < float("inf") for weight in given):
        raise ValueError(f"weights must be positive and finite, they are {given}; leave out a data set of weight 0")
    return given


# A leaf is the number of a data set; a node is (left share over 2**32, left, right).
_Tree = int | tuple[int, "_Tree", "_Tree"]


def _split(weights: list[float], start: int, stop: int) -> _Tree:
    if stop - start == 1:
        return start
    middle = (start + stop) // 2
    share = sum(weights[start:middle]) / sum(weights[start:stop])
    ratio = round(share * (1 << _RATIO_BITS))
    if not 0 < ratio < 1 << _RATIO_BITS:
        raise ValueError(f"weights {weights} are too far apart: the smallest would never be drawn")
    return ratio, _split(weights, start, middle), _split(weights, middle, stop)


def _descend(tree: _Tree, index: int) -> tuple[int, int]:
    """The data set that sample ``index`` of the whole stream falls to, and its number in that data set's stream."""
    while not isinstance(tree, int):
        ratio, left, right = tree
        before = index * ratio >> _RATIO_BITS  # samples among the first `index` that went left
        if (index + 1) * ratio >> _RATIO_BITS > before:
            tree, index = left, before
        else:
            tree, index = right, index - before
    return tree, index


def _count(tree: _Tree, indices: np.ndarray, found: np.ndarray) -> None:
    """Adds to ``found`` how many samples fall to each data set; ``indices`` is (n,) uint64. See ``_descend``."""
    if isinstance(tree, int):
        found[tree] += len(indices)
        return
    ratio, left, right = tree
    before, after = (_quota(numbers, ratio) for numbers in (indices, indices + np.uint64(1)))
    goes_left = after > before
    _count(left, before[goes_left], found)
    _count(right, (indices - before)[~goes_left], found)


def _quota(indices: np.ndarray, ratio: int) -> np.ndarray:
    """``indices * ratio >> 32`` where the product has more than 64 bits."""
    bits = np.uint64(_RATIO_BITS)
    high, low = indices >> bits, indices & np.uint64((1 << _RATIO_BITS) - 1)
    return high * np.uint64(ratio) + (low * np.uint64(ratio) >> bits)
