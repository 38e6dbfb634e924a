"""Converts a robot's states and actions between its own units and the model's numbers.

The data sets of a robot are normalised alike. Another robot has other dimensions and other statistics; the model sees
both padded to one size, each normalised by its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.data.normalization.normalizer import FeatureStatistics, Normalizer, to_lerobot_stats


@dataclass(frozen=True)
class Robot:
    """Normalises states and actions of one robot, and brings actions back."""

    name: str
    """What the config calls it, or the data set it is from."""
    state: Normalizer
    action: Normalizer
    mean_action: np.ndarray
    """(a,) float32 of the training frames in the robot's own units, absolute even where ``relative`` is set."""
    relative: np.ndarray | None = None
    """(a,) bool, the action dimensions that are learnt relative to the state; None if all are absolute."""
    action_names: tuple[str, ...] | None = None
    """Names of the action's dimensions, where the data set has them."""
    state_names: tuple[str, ...] | None = None
    """Names of the state's."""

    @property
    def state_statistics(self) -> FeatureStatistics:
        """What states are normalised with."""
        return self.state.statistics

    @property
    def action_statistics(self) -> FeatureStatistics:
        """What actions are normalised with: of the relative ones where ``relative`` is set."""
        return self.action.statistics

    def encode(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Turns recorded actions (T, a) at a state (s,), both float32 in own units, into what the model learns, (T, a)."""
        if self.relative is not None:
            actions = actions - self._offset(state)
        return self.action.normalize(actions)

    def decode(self, values: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Turns what the model says, (T, A) with a ≤ A, at a state (s,), into absolute actions (T, a) in own units."""
        actions = self.action.unnormalize(values[..., : len(self.mean_action)])
        return actions if self.relative is None else actions + self._offset(state)

    def _offset(self, state: np.ndarray) -> np.ndarray:
        assert self.relative is not None
        return np.where(self.relative, state[: len(self.relative)], np.float32(0.0))


def robots_document(robots: Sequence[Robot]) -> dict[str, Any] | None:
    """Words ``robots.json`` of a checkpoint, by which it can be exported for each robot; None if there is but one."""
    if len(robots) == 1:
        return None
    entries = {}
    for robot in robots:
        statistics = to_lerobot_stats(robot.state_statistics, robot.action_statistics)
        entries[robot.name] = {
            "action_names": robot.action_names and list(robot.action_names),
            "state_names": robot.state_names and list(robot.state_names),
            "statistics": {
                feature: {name: values.tolist() for name, values in entry.items()}
                for feature, entry in statistics.items()
            },
        }
    return {"processors_are_of": robots[0].name, "robots": entries}


def names_document(robot: Robot) -> dict[str, list[str]] | None:
    """Words ``dimension_names.json`` of a checkpoint, feature → names of its dimensions; None if there are none."""
    names = {"observation.state": robot.state_names, "action": robot.action_names}
    return {feature: list(some) for feature, some in names.items() if some is not None} or None
