"""Chooses which episodes of a data set are used, and which of them are held out for validation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from agent.data.recorded.metadata import Metadata, spelled


def choose_episodes(metadata: Metadata, numbers: Sequence[int] | None, split: str | None) -> np.ndarray:
    """Returns the episodes that ``episodes`` or ``split`` select, ascending.

    Raises:
        ValueError: if both are given, nothing is selected, or an episode does not exist or is named twice.
    """
    count, name = metadata.total_episodes, f"data set {metadata.repo_id}"
    if numbers is not None and split is not None:
        raise ValueError(f"{name}: give `episodes` or `split`, not both")
    if split is not None:
        return _slice_of(split, metadata, name)
    if numbers is None:
        return np.arange(count)
    episodes = np.sort(np.asarray(numbers, dtype=np.int64))
    outside = episodes[(episodes < 0) | (episodes >= count)]
    if len(outside) or len(episodes) == 0:
        asked = f"asks for {spelled(outside)}" if len(outside) else "is empty"
        raise ValueError(f"{name}: `episodes` {asked}, the data set has the episodes 0 to {count - 1}")
    if (np.diff(episodes) == 0).any():
        raise ValueError(f"{name}: `episodes` names {spelled(episodes[1:][np.diff(episodes) == 0])} twice")
    return episodes


def _slice_of(split: str, metadata: Metadata, name: str) -> np.ndarray:
    match = re.fullmatch(r"(\w+)(?:\[(-?[\d.]+%?)?:(-?[\d.]+%?)?\])?", split.replace(" ", ""))
    splits = metadata.splits()
    if match is None or match[1] not in splits:
        raise ValueError(
            f"{name}: split {split!r} is not understood; write one of {', '.join(sorted(splits))}, whole or as a "
            "slice of its episodes: train[:95%], train[5%:], train[10:200]"
        )
    first, last = metadata.split(match[1])
    episodes = np.arange(first, last)
    try:
        chosen = episodes[slice(*(_bound(text, len(episodes)) for text in match.groups()[1:]))]
    except ValueError as error:
        raise ValueError(f"{name}: split {split!r}: {error}") from error
    if len(chosen) == 0:
        raise ValueError(f"{name}: split {split!r} selects none of the {len(episodes)} episodes")
    return chosen


def _bound(text: str | None, count: int) -> int | None:
    if text is None:
        return None
    if not text.endswith("%"):
        return int(text)
    percent = Fraction(text[:-1])
    if abs(percent) > 100:
        raise ValueError(f"{text} is more than all of it")
    return int(percent * count / 100 + Fraction(1, 2) * (1 if percent >= 0 else -1))


def hold_out(episodes: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits episodes into those for training and those for validation.

    The validation episodes are evenly spaced, the same for every seed, at least one when ``fraction`` > 0 and
    never all.

    Raises:
        ValueError: if the fraction is outside [0, 1), or there is only one episode to split.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"data.val.fraction is {fraction}, it must be at least 0 and below 1")
    if fraction == 0:
        return episodes, episodes[:0]
    if len(episodes) < 2:
        raise ValueError(
            "one episode cannot be split into training and validation: set data.val.fraction to 0, or name "
            "validation data in data.val.datasets"
        )
    count = min(max(1, round(len(episodes) * fraction)), len(episodes) - 1)
    held = (2 * np.arange(count) + 1) * len(episodes) // (2 * count)
    return np.delete(episodes, held), episodes[held]
