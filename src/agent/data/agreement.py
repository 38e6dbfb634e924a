"""Checks that data sets that are trained on as one mean the same by their numbers: frame rates and names of dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from agent.data.recorded.dimension_names import alike, misplaced
from agent.data.source import Source


def check_agreement(sources: Sequence[Source], robots: Sequence[str]) -> list[str]:
    """Compares frame rates and names of the dimensions of state and action of the data sets that are normalised together.

    Args:
        sources: all data sets, of training and validation.
        robots: the robot of each; data sets of different robots need not agree.

    Returns:
        Lines for the log, on what differs between robots.

    Raises:
        ValueError: naming two data sets of one robot that differ, and what to write.
    """
    first: dict[str, Source] = {}
    notes: list[str] = []
    for source, robot in zip(sources, robots, strict=True):
        other = first.setdefault(robot, source)
        _check_rates(other, source)
        if (note := _check_names(other, source)) is not None and note not in notes:
            notes.append(note)
    rates = {robot: _rate(source) for robot, source in first.items()}
    if len(set(rates.values())) < 2:
        return notes
    listed = ", ".join(f"{robot} {rate:g}" for robot, rate in rates.items())
    return [
        *notes,
        f"WARNING: the robots' frames a second differ ({listed}): a chunk of actions lasts longer for some of them",
    ]


_APART = "or, if each is to keep its own, let them be robots apart: data.train.normalization: per_dataset"


def _rate(source: Source) -> float:
    return float(source.metadata.info["fps"])


def _check_rates(one: Source, other: Source) -> None:
    if _rate(one) == _rate(other):
        return
    lasts = [f"{one.chunk_size / _rate(source):.3g} s" for source in (one, other)]
    raise ValueError(
        f"{one} has {_rate(one):g} frames a second, {other} has {_rate(other):g}: a chunk of {one.chunk_size} actions lasts "
        f"{lasts[0]} in one and {lasts[1]} in the other, and the policy cannot tell which is meant. Train on one of them, "
        f"resample one; {_APART}"
    )


def _check_names(one: Source, other: Source) -> str | None:
    """Compares names: the action's must be the same, and of state names with nothing in common a warning is returned."""
    for what in ("action", "state"):
        mine, theirs = one.names(what), other.names(what)
        if mine is None or theirs is None or all(same := alike(mine, theirs)):
            continue
        assert len(mine) == len(theirs), "checked with the features"
        dim, where = misplaced(mine, theirs, range(len(mine))) or (same.index(False), "")
        keys = [getattr(source.config, what) for source in (one, other)]
        if not where and what == "state":  # poses and joints, say, or x and state_0, which may be the same
            return (
                f"WARNING: dimension {dim} of {keys[0]} of {one} is {mine[dim]!r}, that of {other} {theirs[dim]!r}: they are "
                "taken for the same"
            )
        order = " (the same names in another order)" if sorted(mine) == sorted(theirs) else ""
        raise ValueError(
            f"the {what}s of {one} and {other} are not of the same things: dimension {dim} of {keys[0]} is "
            f"{mine[dim]!r} in one and {theirs[dim]!r} in the other{order}. Correct the names in meta/info.json if they mean the "
            f"same, or name another column with `{what}:`; {_APART}"
        )
    return None
