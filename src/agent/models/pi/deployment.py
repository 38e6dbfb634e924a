"""A checkpoint of several robots, for one of them: the same weights, its own statistics and dimensions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from agent.checkpoints.manifest import Folder
from agent.models.lerobot_config import ACTION, STATE, FeatureSpec
from agent.models.pi.configuration import PI0Config
from agent.models.pi.pretrained import NAMES, ROBOTS, Statistics
from agent.models.pi.statistics import read_statistics

PREPROCESSOR = "policy_preprocessor.json"


@dataclass(frozen=True)
class Deployment:
    """A policy's processors and config for one of the robots that it was trained on."""

    config: PI0Config
    written: dict[str, Any]
    """config.json."""
    statistics: Statistics
    processors: dict[str, bytes]
    """File → contents."""


def robots_of(pretrained: Path) -> list[str]:
    """The robots that a checkpoint has statistics of, the one of its own processors first; empty for a single robot."""
    if (path := Folder(pretrained).file(ROBOTS)) is None:
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    first = content["processors_are_of"]
    return [first, *(name for name in content["robots"] if name != first)]


def saved_statistics(pretrained: Path, config: PI0Config) -> dict[str | None, Statistics]:
    """What a checkpoint of this project normalises with.

    Returns:
        Robot, None where there is but one → ``state`` and ``action`` → statistic → (dims,).

    Raises:
        ValueError: if that cannot be read.
    """
    there = Folder(pretrained)
    if there.file(ROBOTS) is None:
        return {None: dict(read_statistics([pretrained / "model.safetensors"], config))}
    return {
        robot: {
            feature: {name: np.asarray(values, np.float32) for name, values in entry["statistics"][key].items()}
            for feature, key in (("state", STATE), ("action", ACTION))
        }
        for robot, entry in json.loads(there.text(ROBOTS))["robots"].items()
    }


def deployment(pretrained: Path, config: PI0Config, written: dict[str, Any], robot: str) -> Deployment:
    """A checkpoint for another of its robots: the same weights, other statistics and dimensions.

    Raises:
        ValueError: if the checkpoint does not know the robot.
    """
    known = robots_of(pretrained)
    if robot not in known:
        if not known:
            raise ValueError(
                f"--statistics: {pretrained} has no {ROBOTS}, it was trained with one set of statistics; leave the option out"
            )
        near = get_close_matches(robot, known, n=1) or known
        raise ValueError(f"--statistics: {robot!r} is no robot of {pretrained}; write {' or '.join(near)}")
    entry = json.loads(Folder(pretrained).text(ROBOTS))["robots"][robot]
    statistics = {
        feature: {name: np.asarray(values, np.float32) for name, values in some.items()}
        for feature, some in entry["statistics"].items()
    }
    shapes = {feature: list(statistics[feature]["mean"].shape) for feature in (STATE, ACTION)}
    changes: dict[str, Any] = {
        "input_features": dict(config.input_features or {}) | {STATE: FeatureSpec("STATE", shapes[STATE])},
        "output_features": {ACTION: FeatureSpec("ACTION", shapes[ACTION])},
    }
    written = json.loads(json.dumps(written))
    written["input_features"][STATE]["shape"], written["output_features"][ACTION]["shape"] = (
        shapes[STATE],
        shapes[ACTION],
    )
    if config.use_relative_actions:
        changes["action_feature_names"] = written["action_feature_names"] = entry["action_names"]
    files: dict[str, bytes] = {}
    for path in Folder(pretrained).matching("policy_*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        for step in content["steps"]:
            for feature in shapes.keys() & step["config"].get("features", {}).keys():
                step["config"]["features"][feature]["shape"] = shapes[feature]
            if step["registry_name"] == "relative_actions_processor" and config.use_relative_actions:
                step["config"]["action_names"] = entry["action_names"]
            if "state_file" in step:
                files[step["state_file"]] = _statistics_file(statistics)
        files[path.name] = (json.dumps(content, indent=2) + "\n").encode()
    names = {STATE: entry.get("state_names"), ACTION: entry.get("action_names")}
    files[NAMES] = (json.dumps({feature: some for feature, some in names.items() if some}, indent=2) + "\n").encode()
    return Deployment(replace(config, **changes), written, statistics, files)


def dimension_names(pretrained: Path, instead: Mapping[str, bytes] | None = None) -> dict[str, list[str]]:
    """Feature → names of its dimensions, as far as a checkpoint knows them.

    Args:
        pretrained: its folder.
        instead: file → contents, in place of what the folder holds under that name.

    Raises:
        ValueError: if its file of names is damaged.
    """

    def content(name: str) -> bytes | None:
        path = there.file(name)
        return (instead or {}).get(name) or (path.read_bytes() if path is not None else None)

    there, path = Folder(pretrained), pretrained / NAMES
    text = content(NAMES)
    if text is not None:
        try:
            return {feature: [str(name) for name in names] for feature, names in json.loads(text).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy the checkpoint again, or remove that file") from None
    described = json.loads(content(PREPROCESSOR) or b"{}")  # LeRobot has those of relative actions, in there
    for step in described.get("steps", []):
        if step["registry_name"] == "relative_actions_processor" and step["config"].get("action_names"):
            return {ACTION: list(map(str, step["config"]["action_names"]))}
    return {}


def _statistics_file(statistics: Statistics) -> bytes:
    from safetensors.numpy import save

    return save({f"{feature}.{name}": values for feature, some in statistics.items() for name, values in some.items()})
