"""Checks the statistics: finds dimensions that hardly vary, and values that are far out after normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from agent.data.normalization.normalizer import compute_statistics
from agent.data.recorded.dimension_names import labels_of
from agent.preflight.context import Context
from agent.preflight.report import Row

if TYPE_CHECKING:
    from agent.data.normalization.normalizer import Normalizer
    from agent.data.normalization.robot import Robot
    from agent.data.source import Source

FAR = 5.0
_OFTEN = 0.01  # of a dimension's values; a normal distribution has 6e-7 beyond 5
_VERY_FAR = 20.0
_MOST_FRAMES = 500_000  # of a data set, evenly spaced


def check(context: Context) -> list[Row]:
    """Normalises state and action of every training data set as training does, and looks at the result."""
    reader, given = context.data.reader, context.config.data.statistics == "checkpoint"
    rows = []
    for source, robot in zip(reader.sources, reader.robots, strict=True):
        for what, key, normalizer, raw in _recorded(source, robot):
            name = f"statistics: {source.config.repo_id}"
            names, values = labels_of(source.metadata.features[key], "dimension"), normalizer.normalize(raw)
            far = np.abs(values) > FAR
            share = far.mean(axis=0)
            details = {"beyond_5": dict(zip(names, share.round(6).tolist(), strict=True)), "key": key}
            advice = _advice(what, key, normalizer.mode, given)
            found = [*_constant(what, key, names, normalizer, raw if given else None)]
            found += [(text, advice) for text in _outliers(what, names, values, share, source)]
            rows += [Row(name, "warn", text, change, details) for text, change in found]
            if not found:
                most = int(share.argmax())
                beyond = (
                    f"{100 * share[most]:.2g}% of {names[most]} and less of the others is"
                    if share[most]
                    else "no value is"
                )
                rows.append(Row(name, "pass", f"{what}: every dimension varies; {beyond} beyond ±5", details=details))
    return rows


def _recorded(source: Source, robot: Robot) -> Iterator[tuple[str, str, Normalizer, np.ndarray]]:
    """Yields ``state`` and ``action``: the word, the key, the normaliser, and the recorded values (frames, dims)."""
    states, actions = (source.columns(key).astype(np.float32) for key in (source.config.state, source.config.action))
    every = -(-len(states) // _MOST_FRAMES)
    states, actions = states[::every], actions[::every]
    yield "state", source.config.state, robot.state, states
    if robot.relative is not None:
        offset = np.where(robot.relative, states[:, : actions.shape[1]], np.float32(0.0))
        actions = actions - offset  # the first step of a chunk
    yield "action", source.config.action, robot.action, actions


def _constant(
    what: str, key: str, names: list[str], normalizer: Normalizer, raw: np.ndarray | None
) -> Iterator[tuple[str, str]]:
    """Yields the dimensions that hardly vary: by the statistics, or by ``raw`` where the statistics are of other data."""
    constant = normalizer.statistics.constant if raw is None else compute_statistics(raw).constant
    if constant:
        left = " and stays unnormalised" if raw is None and normalizer.mode != "IDENTITY" else ""
        text = f"{what}: {', '.join(names[dim] for dim in constant)} hardly varies{left}"
        change = (
            f"is {key} recorded rightly? A gripper that never moves, or a joint that was not connected, teaches nothing"
        )
        yield text, change


def _advice(what: str, key: str, mode: str, given: bool) -> str:
    """Says what to do about values that are far out."""
    if given:
        return "are these statistics of this robot, in its units? Else write data.statistics: dataset"
    if mode.startswith("QUANTILE"):
        return f"look at that episode; a few values far out of a long-tailed {key} are what {mode} leaves"
    kind = "STATE" if what == "state" else "ACTION"
    return (
        f"look at that episode; or write normalization_mapping.{kind}: QUANTILES in model_cfg, for a long-tailed {key}"
    )


def _outliers(what: str, names: list[str], values: np.ndarray, share: np.ndarray, source: Source) -> Iterator[str]:
    furthest = np.abs(values).max(axis=0)
    for dim in np.flatnonzero((share > _OFTEN) | (furthest > _VERY_FAR)).tolist():
        column = np.abs(values[:, dim])
        every = -(-len(source) // len(values))
        episode, frame = source.frame(int(column.argmax()) * every)
        yield (
            f"{what}: {share[dim]:.2%} of {names[dim]} is beyond ±5 after normalisation; the furthest is "
            f"{column.max():.1f}, at episode {episode}, frame {frame}"
        )
