"""Writes amounts, times, numbers in a row and config values the way that people read them, for every message and page.

Two places that say the same thing to a user call the same function here, so that they cannot come to differ.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable
from typing import Any


def amount(size: float) -> str:
    """A number of bytes: ``512 B``, ``1.5 kB``, ``3.2 GB``, in powers of a thousand as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def gib(size: float) -> str:
    """A GPU's memory in bytes as ``79.6 GiB``, in powers of 1024 as its maker and ``nvidia-smi`` count."""
    return f"{size / 2**30:.1f} GiB"


def span(seconds: float) -> str:
    """An estimated time, in one unit: ``0.31 s``, ``40 s``, ``12 min``, ``5.5 h``, ``3.1 days``."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def duration(seconds: float) -> str:
    """A measured time, in two units: ``8.2 s``, ``3 min 20 s``, ``5 h 03 min``, ``2 d 4 h``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole, minutes = round(seconds), round(seconds / 60)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes // 60 % 24} h"


def moment(seconds: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Seconds since 1970 as date and time in UTC."""
    return time.strftime(form, time.gmtime(seconds))


def ranges(numbers: Iterable[int], dash: str = "-", most: int | None = None) -> str:
    """Increasing numbers with those in a row drawn together, ``0-3, 7``; after ``most`` ranges comes an ellipsis."""
    rows: list[list[int]] = []
    for number in numbers:
        if rows and number == rows[-1][1] + 1:
            rows[-1][1] = number
        else:
            rows.append([number, number])
    parts = [str(first) if first == last else f"{first}{dash}{last}" for first, last in rows]
    return ", ".join(parts[:most]) + (", …" if most is not None and len(parts) > most else "")


def literal(value: Any) -> str:
    """A value as YAML and JSON have it: ``null``, ``true`` and ``false`` instead of Python's words, all else as it is."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that a misspelled word was probably meant to be; None if nothing resembles it."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)), None)
