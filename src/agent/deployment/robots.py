"""Prepares a checkpoint of several robots for one of them: the same weights with its statistics and dimensions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from agent.checkpoints.manifest import Folder
from agent.models import registry
from agent.models.lerobot_config import ACTION, STATE, FeatureSpec, TrainableConfig
from agent.models.lerobot_folder import NAMES, ROBOTS, Statistics

PREPROCESSOR = "policy_preprocessor.json"


@dataclass(frozen=True)
class Deployment:
    """Holds a policy's config and processors for one of the robots that it was trained on."""

    config: TrainableConfig
    written: dict[str, Any]
    """The content of ``config.json``."""
    statistics: Statistics
    processors: dict[str, bytes]
    """Maps file → contents."""


def robots_of(pretrained: Path) -> list[str]:
    """Lists the robots of a checkpoint, the one that its processors are for first; empty for a single robot."""
    if (path := Folder(pretrained).file(ROBOTS)) is None:
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    first = content["processors_are_of"]
    return [first, *(name for name in content["robots"] if name != first)]


def saved_statistics(pretrained: Path, config: TrainableConfig) -> dict[str | None, Statistics]:
    """Reads the statistics that a checkpoint of this project normalises with.

    Returns:
        Robot (None for a single robot) → ``state`` and ``action`` → statistic → values (dims,) float32.

    Raises:
        ValueError: if they cannot be read.
    """
    there = Folder(pretrained)
    if there.file(ROBOTS) is None:
        return {None: registry.family(config).saved.read_statistics([pretrained / "model.safetensors"], config)}
    return {
        robot: {
            feature: {name: np.asarray(values, np.float32) for name, values in entry["statistics"][key].items()}
            for feature, key in (("state", STATE), ("action", ACTION))
        }
        for robot, entry in json.loads(there.text(ROBOTS))["robots"].items()
    }


def deployment(pretrained: Path, config: TrainableConfig, written: dict[str, Any], robot: str) -> Deployment:
    """Returns a checkpoint's config and processors for another of its robots.

    Args:
        pretrained: the checkpoint's folder.
        config: the checkpoint's config.
        written: its ``config.json``, which is not changed.
        robot: the robot's name.

    Raises:
        ValueError: if the checkpoint was not trained on the robot.
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
    """Maps feature → names of its dimensions, where a checkpoint has them.

    Args:
        pretrained: the checkpoint's folder.
        instead: file → contents that replace the folder's file of that name.

    Raises:
        ValueError: if the file with the names is damaged.
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
    # LeRobot stores names in its preprocessor, and only for relative actions.
    described = json.loads(content(PREPROCESSOR) or b"{}")
    for step in described.get("steps", []):
        if step["registry_name"] == "relative_actions_processor" and step["config"].get("action_names"):
            return {ACTION: list(map(str, step["config"]["action_names"]))}
    return {}


def _statistics_file(statistics: Statistics) -> bytes:
    from safetensors.numpy import save

    return save({f"{feature}.{name}": values for feature, some in statistics.items() for name, values in some.items()})
