"""Shortens long curves without hiding a spike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Column:
    """What is drawn at one place: one point, or the points of a stretch."""

    x: float
    mean: float
    low: float
    high: float
    count: int
    """How many points have a number."""
    first: float
    """The x of the first of them."""
    last: float


def columns_of(points: Sequence[tuple[float, float]], most: int) -> list[Column | None]:
    """Draws points together into at most ``most`` columns of equal width; where there are no more points, each has its own.

    Args:
        points: (x, y) with increasing x; y is NaN where there is no number.
        most: how many columns.

    Returns:
        The columns in order. None stands for a gap: a point without a number, or a stretch with no other points.
    """
    if len(points) <= most:
        return [None if math.isnan(y) else Column(x, y, y, y, 1, x, x) for x, y in points]
    start, span = points[0][0], points[-1][0] - points[0][0]
    stretches: list[list[tuple[float, float]]] = [[] for _ in range(most)]
    for x, y in points:
        stretches[min(most - 1, int((x - start) / span * most))].append((x, y))
    return [_column(stretch) for stretch in stretches if stretch]


def _column(stretch: list[tuple[float, float]]) -> Column | None:
    numbers = [(x, y) for x, y in stretch if not math.isnan(y)]
    if not numbers:
        return None
    values = [y for _, y in numbers]
    first, last = numbers[0][0], numbers[-1][0]
    return Column((first + last) / 2, fmean(values), min(values), max(values), len(values), first, last)
