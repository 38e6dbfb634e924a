"""Computes statistics of low-dimensional columns, and normalises by them as LeRobot does again at inference.

The statistics are made safe once, here, before they are used or stored: LeRobot reads the same numbers with the
same formulas and therefore normalises identically.

With one data set its own statistics are used. With several, all are normalised by one merged set, computed over
the pooled frames weighted by their share of the sample stream, because a checkpoint holds one set and the policy
must meet at inference the numbers it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    Values = TypeVar("Values", np.ndarray, torch.Tensor)

_EPSILON = 1e-8  # LeRobot's, in NormalizerProcessorStep
_NARROW = 1e-4
_STEPS = 4  # of a number's type; what varies less is its rounding
NARROW_RULE = 2
"""Which rule tells what is narrow, see ``made_safe``. A run keeps the one that it began with; rule 1 is that of runs whose
checkpoints name none."""
RESOLUTION = "resolution"
STATISTIC_NAMES = ("mean", "std", "min", "max", "q01", "q10", "q90", "q99")
MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")
_BOUNDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of one feature, each (dims,) float32."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q10: np.ndarray
    q90: np.ndarray
    q99: np.ndarray
    clamped: tuple[int, ...] = ()
    """The dimensions of which at least one statistic was replaced by a safe one."""
    constant: tuple[int, ...] = ()
    """Those among them that stay unnormalised: the standard deviation, or minimum and maximum, is not the data's."""
    known: tuple[str, ...] = STATISTIC_NAMES
    """The other ones are NaN: a policy of another program brings only those that it needs."""
    kept_in: Path | None = None
    """The file that an earlier start left them in, or this one did."""

    def to_dict(self) -> dict[str, np.ndarray]:
        """Returns name → (dims,), as LeRobot's ``stats.json`` and processors have it."""
        return {name: getattr(self, name) for name in self.known}


def given_statistics(values: Mapping[str, np.ndarray], mode: str, dims: int) -> FeatureStatistics:
    """Takes statistics of another program, or of an earlier run, as they are.

    Args:
        values: statistic → (dims,).
        mode: the normalisation that they are for.
        dims: of the feature.

    Raises:
        ValueError: if the mode needs others, they are of another size, not finite, or leave no room between bounds.
    """
    needed = {"IDENTITY": (), "MEAN_STD": ("mean", "std"), **_BOUNDS}[mode]
    if absent := [name for name in needed if name not in values]:
        raise ValueError(f"{mode} needs {' and '.join(absent)}, they hold {', '.join(sorted(values))}")
    for name in needed:
        if values[name].shape != (dims,):
            raise ValueError(f"{name} is of {values[name].size} dimensions, the data has {dims}")
        if not np.isfinite(values[name]).all():
            raise ValueError(f"{name} is {values[name][~np.isfinite(values[name])][0]}: they were never filled in")
    narrow = (
        (values["std"] <= 0)
        if mode == "MEAN_STD"
        else (values[needed[1]] <= values[needed[0]])
        if needed
        else np.False_
    )
    if narrow.any():
        raise ValueError(f"dimension {int(np.flatnonzero(narrow)[0])} has no width ({' and '.join(needed)})")
    known = tuple(name for name in STATISTIC_NAMES if name in values and values[name].shape == (dims,))
    unknown = np.full(dims, np.nan, np.float32)
    filled: dict[str, Any] = {name: np.asarray(values[name], np.float32) for name in known}
    filled |= {name: unknown for name in STATISTIC_NAMES if name not in known}
    return FeatureStatistics(**filled, known=known)


def first_non_finite(columns: np.ndarray) -> tuple[int, int] | None:
    """Finds row and dimension of the first NaN or infinity of (frames, dims), or None."""
    bad = ~np.isfinite(columns)
    if not bad.any():
        return None
    row = int(bad.any(axis=1).argmax())
    return row, int(bad[row].argmax())


def compute_statistics(columns: np.ndarray, rule: int = NARROW_RULE) -> FeatureStatistics:
    """Computes exact statistics of (frames, dims), in float64; see ``merge_statistics``.

    Raises:
        ValueError: if there is no frame, or a value is not finite (named by dimension and row).
    """
    if columns.ndim != 2 or len(columns) == 0:
        raise ValueError(f"statistics need values of shape (frames, dims), got {columns.shape}")
    if (bad := first_non_finite(columns)) is not None:
        row, dim = bad
        raise ValueError(f"dimension {dim} is {columns[row, dim]} at row {row}: every value must be finite")
    return merge_statistics([[columns]], [1.0], rule)


def merge_statistics(
    columns: Sequence[Sequence[np.ndarray]], shares: Sequence[float], rule: int = NARROW_RULE
) -> FeatureStatistics:
    """Computes exact statistics of several data sets pooled, each one's frames together weighing its share of the stream.

    Every frame counts. Quantiles are values that occur: the smallest one at which the (weighted) share of the frames
    reaches q. So a merge over data sets equals the statistics of the pooled frames. One dimension after the other is
    held in memory.

    Args:
        columns: for each data set the pieces, each (frames, dims) of any finite numbers, all of the same dims. How they
            are cut makes no difference.
        shares: each data set's fraction of the samples (``Mixture.shares``).
        rule: what is narrow, see ``made_safe``.
    """
    counts = np.asarray([sum(len(block) for block in blocks) for blocks in columns])
    weights = None
    if not np.allclose(counts / counts.sum(), shares, rtol=1e-12):
        weights = np.repeat(np.asarray(shares) / counts, counts)
    pieces = [block for blocks in columns for block in blocks]
    dims = pieces[0].shape[1]
    each = [_of_dimension(np.concatenate([piece[:, dim] for piece in pieces]), weights) for dim in range(dims)]
    return made_safe(each, rule)


def resolution(kind: np.dtype, largest: float) -> float:
    """Tells how far apart two numbers of a type are, of this size and as float32, in which they are trained on."""
    step = np.finfo(kind).eps if kind.kind == "f" else 0.0
    return largest * float(max(step, np.finfo(np.float32).eps))


def _of_dimension(column: np.ndarray, weights: np.ndarray | None) -> dict[str, float]:
    """Computes statistics of (frames,); weights are (frames,) or None for equal ones."""
    values = column.astype(np.float64)
    mean = np.average(values, weights=weights)
    quantiles = np.quantile(values, [0.01, 0.1, 0.9, 0.99], weights=weights, method="inverted_cdf")
    low, high = values.min(), values.max()
    values -= mean
    values *= values
    deviation = np.sqrt(np.average(values, weights=weights))
    found = dict(zip(STATISTIC_NAMES, (mean, deviation, low, high, *quantiles), strict=True))
    return {**found, RESOLUTION: resolution(column.dtype, max(abs(low), abs(high)))}


def made_safe(each: Sequence[Mapping[str, float]], rule: int = NARROW_RULE) -> FeatureStatistics:
    """Replaces what would blow up a near-constant dimension.

    A narrow std becomes 1. A narrow min..max becomes mean ± 1. A narrow pair of quantiles becomes min..max, which is the
    right scale for a gripper that hardly ever moves. Narrow is below 1e-4 of the mean's size, whatever the unit; below four
    steps of the numbers' type; or so small that LeRobot's own epsilon flattens it. Quantiles are narrow below 1e-4 of
    min..max, too.

    Args:
        each: for each dimension every statistic, and ``RESOLUTION``.
        rule: 2 for the above; 1 for narrow below 1e-4 × max(1, |mean|), which depends on the unit.
    """
    raw = {name: np.asarray([values[name] for values in each]) for name in (*STATISTIC_NAMES, RESOLUTION)}
    steps, safe = raw.pop(RESOLUTION), {name: value.copy() for name, value in raw.items()}
    if rule == 1:
        narrow = narrow_quantiles = _NARROW * np.maximum(1.0, np.abs(raw["mean"]))
    else:
        least = np.maximum(_STEPS * steps, 10 * _EPSILON)
        narrow = np.maximum(_NARROW * np.abs(raw["mean"]), least)
        narrow_quantiles = np.maximum(_NARROW * (raw["max"] - raw["min"]), narrow)
    constant = raw["std"] < narrow
    safe["std"][constant] = 1.0
    flat = (raw["max"] - raw["min"]) < narrow
    safe["min"][flat], safe["max"][flat] = raw["mean"][flat] - 1.0, raw["mean"][flat] + 1.0
    constant = constant | flat
    clamped = constant.copy()
    for low, high in (("q01", "q99"), ("q10", "q90")):
        tight = (raw[high] - raw[low]) < narrow_quantiles
        safe[low][tight], safe[high][tight] = safe["min"][tight], safe["max"][tight]
        clamped |= tight
    stored: dict[str, Any] = {name: value.astype(np.float32) for name, value in safe.items()}
    return FeatureStatistics(**stored, clamped=_dims(clamped), constant=_dims(constant))


def _dims(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(dim) for dim in np.flatnonzero(mask))


class Normalizer:
    """Normalises the last dimension of numpy arrays or torch tensors with LeRobot's formulas, and back.

    Args:
        mode: one of ``MODES``.
        statistics: of the feature; its dims are the last dimension of what is normalised.

    Raises:
        ValueError: on an unknown mode.
    """

    def __init__(self, mode: str, statistics: FeatureStatistics) -> None:
        if mode not in MODES:
            raise ValueError(f"normalisation mode {mode!r} is unknown, choose one of {', '.join(MODES)}")
        self.mode = mode
        self.statistics = statistics

    def normalize(self, values: Values) -> Values:
        """Converts physical units (…, dims) to normalised ones, in the type of the input."""
        if self.mode == "IDENTITY":
            return values
        if self.mode == "MEAN_STD":
            mean, std = self._like(values, "mean"), self._like(values, "std")
            return (values - mean) / (std + _EPSILON)
        low, width = self._bounds(values)
        return 2.0 * (values - low) / width - 1.0

    def unnormalize(self, values: Values) -> Values:
        """Converts normalised (…, dims) to physical units."""
        if self.mode == "IDENTITY":
            return values
        if self.mode == "MEAN_STD":
            return values * self._like(values, "std") + self._like(values, "mean")
        low, width = self._bounds(values)
        return (values + 1.0) * width / 2.0 + low

    def _bounds(self, values: Values) -> tuple[Values, Values]:
        low, high = (self._like(values, name) for name in _BOUNDS[self.mode])
        return low, high - low  # never zero: made_safe widened it

    def _like(self, values: Values, name: str) -> Values:
        statistic = getattr(self.statistics, name)
        if isinstance(values, np.ndarray):
            return statistic.astype(values.dtype)
        import torch

        return torch.as_tensor(statistic, dtype=values.dtype, device=values.device)


def to_lerobot_stats(state: FeatureStatistics, action: FeatureStatistics) -> dict[str, dict[str, np.ndarray]]:
    """Returns the statistics under the names that a LeRobot checkpoint stores them by."""
    return {"observation.state": state.to_dict(), "action": action.to_dict()}
