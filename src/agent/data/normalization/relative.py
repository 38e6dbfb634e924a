"""Tells which action dimensions are relative to the state, and computes their exact statistics over all chunks.

A chunk's actions are all relative to the state at its first step (openpi's DeltaActions, LeRobot's
``use_relative_actions``). What is normalised is then spread wider the further a step is ahead, so statistics are of every
action of every whole chunk: T times as many numbers as frames. They are never held in memory together: quantiles are
found by counting, in one pass by the upper half of the bits of each number, in a second by the lower half.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from agent.data.normalization.normalizer import NARROW_RULE, RESOLUTION, FeatureStatistics, made_safe, resolution

_QUANTILES = {"q01": Fraction(1, 100), "q10": Fraction(1, 10), "q90": Fraction(9, 10), "q99": Fraction(99, 100)}
_AT_ONCE = 1 << 18  # numbers, so that they stay in a core's cache
_HALF = 1 << 16


def relative_mask(names: Sequence[str] | None, exclude: Sequence[str], dims: int) -> np.ndarray:
    """Calls ``relative_dims`` for a training, and refuses a ``relative_exclude_joints`` that cannot be meant.

    Args:
        names: of the action's dimensions.
        exclude: words; a dimension whose name contains one, in any case, stays absolute.
        dims: of the action.

    Raises:
        ValueError: if dimensions are to be excluded by name and have none, or all of them are excluded.
    """
    mask = relative_dims(names or (), exclude, dims)
    if names is None and any(exclude):
        raise ValueError(
            f"model_cfg.relative_exclude_joints is {list(exclude)}, but the data set has no names of its {dims} action "
            "dimensions: write them as action_feature_names in model_cfg, or relative_exclude_joints: [] to make all of "
            "them relative"
        )
    if not mask.any():
        raise ValueError(
            f"model_cfg.relative_exclude_joints {list(exclude)} excludes every action dimension ({', '.join(names or ())}): "
            "write fewer, or use_relative_actions: false"
        )
    return mask


def relative_dims(names: Sequence[Any], exclude: Sequence[Any], dims: int) -> np.ndarray:
    """Tells which dimensions are relative, (dims,) bool, as LeRobot does: all whose name contains no excluded word, in any case.

    A dimension without a name is relative; those beyond ``dims`` are not looked at.
    """
    words = [str(word).lower() for word in exclude if word]
    mask = np.ones(dims, dtype=bool)
    mask[: len(names)] = [not any(word in str(name).lower() for word in words) for name in names[:dims]]
    return mask


@dataclass
class Chunks:
    """All whole chunks of a data set."""

    states: Sequence[np.ndarray]
    """Pieces, each (frames, s)."""
    actions: Sequence[np.ndarray]
    """Pieces, each (frames, a), cut like the states or otherwise."""
    lengths: np.ndarray
    """Frames of the episodes, in the order of the pieces."""
    chunk_size: int
    relative: np.ndarray
    """(a,) bool."""
    starts: np.ndarray = field(init=False)
    """The frames at which a chunk begins that ends within its episode."""

    def __post_init__(self) -> None:
        ends = np.repeat(np.cumsum(self.lengths), self.lengths)
        self.starts = np.flatnonzero(np.arange(len(ends)) + self.chunk_size <= ends)

    def __len__(self) -> int:
        """Numbers in each dimension."""
        return len(self.starts) * self.chunk_size

    def values(self, dim: int) -> Iterator[np.ndarray]:
        """Yields every number of a dimension, in float32 as LeRobot subtracts, in pieces (n,)."""
        actions = np.concatenate([piece[:, dim] for piece in self.actions]).astype(np.float32)
        states = None
        if self.relative[dim]:
            states = np.concatenate([piece[:, dim] for piece in self.states]).astype(np.float32)
        for begin in range(0, len(self.starts), _AT_ONCE):
            starts = self.starts[begin : begin + _AT_ONCE]
            at = states[starts] if states is not None else np.float32(0.0)
            for ahead in range(self.chunk_size):
                yield actions[starts + ahead] - at

    def resolution(self, dim: int) -> float:
        """Tells how far apart two numbers of a dimension are: a difference is as coarse as what it is a difference of."""
        columns = [*self.actions, *(self.states if self.relative[dim] else ())]
        return max(resolution(piece.dtype, float(np.abs(piece[:, dim]).max(initial=0.0))) for piece in columns)


def chunk_statistics(parts: Sequence[Chunks], shares: Sequence[float], rule: int = NARROW_RULE) -> FeatureStatistics:
    """Computes exact statistics of the actions of all chunks, each data set's together weighing its share.

    Args:
        parts: one per data set, each with at least one chunk.
        shares: each data set's fraction of the samples.
        rule: what is narrow, see ``made_safe``.
    """
    counts = np.asarray([len(part) for part in parts], dtype=np.float64)
    weights: list[float] = [1.0] * len(parts)  # whole numbers where they can be, so that counting stays exact
    if len(parts) > 1 and not np.allclose(counts / counts.sum(), np.asarray(shares) / sum(shares), rtol=1e-12):
        weights = (np.asarray(shares) / counts).tolist()
    dims = parts[0].actions[0].shape[1]
    with ThreadPoolExecutor(min(dims, 4, os.cpu_count() or 1)) as pool:  # numpy computes without Python's lock
        each = list(pool.map(lambda dim: _of_dimension(parts, weights, dim), range(dims)))
    return made_safe(each, rule)


def _of_dimension(parts: Sequence[Chunks], weights: Sequence[float], dim: int) -> dict[str, float]:
    total = sum(weight * len(part) for part, weight in zip(parts, weights, strict=True))
    upper, mean, low, high = np.zeros(_HALF), 0.0, np.inf, -np.inf
    for part, weight in zip(parts, weights, strict=True):
        for values in part.values(dim):
            upper += weight * np.bincount(_ordered(values) >> np.uint32(16), minlength=_HALF)
            mean += weight * float(values.sum(dtype=np.float64))
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    mean /= total
    targets = {name: _rank(total, share, weights) for name, share in _QUANTILES.items()}
    cumulated = np.cumsum(upper)
    halves = {name: int(np.searchsorted(cumulated, target)) for name, target in targets.items()}
    lower, variance = {half: np.zeros(_HALF) for half in halves.values()}, 0.0
    for part, weight in zip(parts, weights, strict=True):
        for values in part.values(dim):
            keys = _ordered(values)
            for half, counted in lower.items():
                inside = keys[keys >> np.uint32(16) == half] & np.uint32(_HALF - 1)
                counted += weight * np.bincount(inside, minlength=_HALF)
            deviations = values.astype(np.float64) - mean
            variance += weight * float(deviations @ deviations)
    found = {"mean": mean, "std": float(np.sqrt(variance / total)), "min": low, "max": high}
    found[RESOLUTION] = max(part.resolution(dim) for part in parts)
    for name, half in halves.items():
        before = float(cumulated[half - 1]) if half else 0.0
        rest = int(np.searchsorted(np.cumsum(lower[half]) + before, targets[name]))
        rest = min(rest, int(np.flatnonzero(lower[half])[-1]))  # sums of weights round
        found[name] = _number(half << 16 | rest)
    return found


def _rank(total: float, share: Fraction, weights: Sequence[float]) -> float:
    """Tells how much weight lies at or below the quantile; a whole number where the weights are."""
    if all(weight == 1.0 for weight in weights):
        return float(-(-int(total) * share.numerator // share.denominator))
    return total * float(share) * (1 - 1e-12)


def _ordered(values: np.ndarray) -> np.ndarray:
    """Maps (n,) float32 to (n,) uint32 in the same order, both zeros as one."""
    bits = (values + np.float32(0.0)).view(np.uint32)
    return bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31))


def _number(key: int) -> float:
    bits = key ^ (1 << 31) if key >> 31 else key ^ 0xFFFFFFFF
    return float(np.asarray(bits, dtype=np.uint32).view(np.float32))
