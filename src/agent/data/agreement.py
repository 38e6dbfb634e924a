"""Do data sets that are trained on as one mean the same by their numbers?"""

from __future__ import annotations

from collections.abc import Sequence

from agent.data.robot_statistics import names_of_action
from agent.data.source import Source


def check_agreement(sources: Sequence[Source], robots: Sequence[str]) -> list[str]:
    """Compares frame rates and names of the action dimensions of the data sets that are normalised together.

    Args:
        sources: all data sets, of training and validation.
        robots: the robot of each; data sets of different robots need not agree.

    Returns:
        Lines for the log, on what differs between robots.

    Raises:
        ValueError: naming two data sets of one robot that differ, and what to write.
    """
    first: dict[str, Source] = {}
    for source, robot in zip(sources, robots, strict=True):
        other = first.setdefault(robot, source)
        _check_rates(other, source)
        _check_names(other, source)
    rates = {robot: _rate(source) for robot, source in first.items()}
    if len(set(rates.values())) < 2:
        return []
    listed = ", ".join(f"{robot} {rate:g}" for robot, rate in rates.items())
    return [f"WARNING: the robots' frames a second differ ({listed}): a chunk of actions lasts longer for some of them"]


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


def _check_names(one: Source, other: Source) -> None:
    mine, theirs = names_of_action(one), names_of_action(other)
    if mine is None or theirs is None or mine == theirs:
        return
    assert len(mine) == len(theirs), "checked with the features"
    dim = next(dim for dim, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
    order = " (the same names in another order)" if sorted(mine) == sorted(theirs) else ""
    raise ValueError(
        f"the actions of {one} and {other} are not of the same things: dimension {dim} of {one.config.action} is "
        f"{mine[dim]!r} in one and {theirs[dim]!r} in the other{order}. Correct the names in meta/info.json if they mean the "
        f"same, or name another column with `action:`; {_APART}"
    )
