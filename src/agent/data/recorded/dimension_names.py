"""Reads the names of the dimensions of states and actions, and tells by them whether two mean the same at each place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_POSITION = ("pos", "position")  # what LeRobot's robots write behind a joint's name, in states, actions or both


def names_of(feature: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Reads the names of a feature's dimensions, or None where the data set has none, or not one for each.

    Args:
        feature: its entry in ``meta/info.json``; ``names`` is a list, or in older recordings ``{"motors": [name, …]}`` or
            ``{name: place, …}``.
    """
    names = feature.get("names")
    if isinstance(names, dict):
        places = all(isinstance(place, int) for place in names.values())
        groups = [group for group in names.values() if isinstance(group, list)]
        names = sorted(names, key=names.__getitem__) if places else [name for group in groups for name in group]
    return fitting(names, math.prod(feature["shape"]))


def fitting(names: Any, dims: int) -> tuple[str, ...] | None:
    """Returns the names as a tuple, or None unless there is one for each dimension."""
    if not isinstance(names, list | tuple) or len(names) != dims:
        return None
    return tuple(str(name) for name in names)


def labels_of(feature: Mapping[str, Any], unnamed: str) -> list[str]:
    """Gives each dimension a label, no two alike: its name if they are so, else ``unnamed`` and a number."""
    names, dims = names_of(feature), math.prod(feature["shape"])
    return list(names) if names and len(set(names)) == dims else [f"{unnamed} {number}" for number in range(dims)]


def alike(one: Sequence[str], other: Sequence[str]) -> list[bool]:
    """Tells for each place whether both names there are the same, in any case, and with or without what all of a list have at
    their beginning or end (``left_``) and ``.pos``."""
    plain = zip(_plain(one), _plain(other), strict=False)
    exact = zip(_lower(one), _lower(other), strict=False)
    return [a == b or c == d for (a, b), (c, d) in zip(plain, exact, strict=True)]


def misplaced(one: Sequence[str], other: Sequence[str], dims: Iterable[int]) -> tuple[int, str] | None:
    """Finds the first of these places at which the names differ and one of them stands elsewhere in the other list.

    Names that are nowhere in the other list tell nothing: those two are paired by their place.

    Returns:
        The place, and in words where the name is found; or None.
    """
    same = alike(one, other)
    for dim in dims:
        if same[dim]:
            continue
        for spell in (_lower, _plain):
            mine, theirs = list(spell(one)), list(spell(other))
            if mine[dim] in theirs:
                return dim, f"{one[dim]!r} is dimension {theirs.index(mine[dim])} there"
            if theirs[dim] in mine:
                return dim, f"{other[dim]!r} is dimension {mine.index(theirs[dim])} here"
    return None


def _lower(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [(name.lower(),) for name in names]


def _plain(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Splits each name into its parts, without what all have in common at either end; never down to a number, which says little:
    ``state_0`` and ``joint_0`` are not the same."""
    split = [tuple(part for part in re.split(r"[^a-z0-9]+", name) if part) for (name,) in _lower(names)]
    split = [parts[:-1] if parts and parts[-1] in _POSITION and _tells(parts[:-1]) else parts for parts in split]
    for cut, end in ((slice(None, -1), -1), (slice(1, None), 0)):
        while split and all(_tells(parts[cut]) for parts in split) and len({parts[end] for parts in split}) == 1:
            split = [parts[cut] for parts in split]
    return split


def _tells(parts: tuple[str, ...]) -> bool:
    return any(not part.isdigit() for part in parts)
