"""Computes the axes of charts: values to pixels, round ticks, short numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

_WIDTHS = dict.fromkeys(".,ijl'|: ", 0.33) | dict.fromkeys("-_frt", 0.45) | dict.fromkeys("mwMW…", 1.0)
"""Width of a character as a fraction of the font's size."""


@dataclass(frozen=True)
class Axis:
    """Values → pixels, and the ticks between."""

    low: float
    high: float
    start: float
    """The pixel of ``low``."""
    end: float
    """The pixel of ``high``; less than ``start`` on an axis that points up."""
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values inside, ``most`` of them or fewer."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high]; at most ``most`` ≥ 2."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 5, 10, 20, 50)):
        # A tick that rounding puts a hair outside still belongs to the axis.
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
    raise AssertionError(f"no step from {low} to {high}")


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 times them where there is room, or every second, third … of them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
        inside = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


def tick_text(value: float) -> str:
    """A short number: ``20k``, ``0.25``, ``5e-5``."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1e6:
        return f"{value / 1e6:.6g}M"
    return f"{value / 1e3:.6g}k" if size >= 1e4 else f"{value:.5g}"


def text_width(text: str, size: float = 12.0) -> float:
    """Pixels that a text takes, in the widest of the fonts that a page may be shown in (DejaVu Sans)."""
    return size * sum(_WIDTHS.get(character, 0.64) for character in text)


def widened(low: float, high: float, part: float) -> tuple[float, float]:
    """The range with room at both ends; a single value gets a range around it."""
    if high - low <= abs(high) * 1e-9:
        room = abs(high) * 0.1 or 1.0
        return low - room, high + room
    return low - part * (high - low), high + part * (high - low)


def value_range(low: float, high: float, from_zero: bool, log: bool) -> tuple[float, float]:
    """The range of an axis that holds values from ``low`` to ``high``; a logarithmic one needs ``low`` > 0."""
    if log:
        assert low > 0
        return low / 1.15, high * 1.15
    if from_zero and low >= 0:
        return 0.0, (high or 1.0) * 1.06
    return widened(low, high, 0.06)
