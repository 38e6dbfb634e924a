"""The statistics that a robot's states and actions are normalised with, from the data or given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from agent.data.normalization import FeatureStatistics, Normalizer, first_non_finite, given_statistics
from agent.data.relative import Chunks, relative_mask
from agent.data.robot import Robot
from agent.data.source import Source
from agent.data.statistics_cache import cached_chunk_statistics, cached_statistics


class GivenStatistics(NamedTuple):
    """Statistics that are not of the training data."""

    source: str
    """Where they are from, for people."""
    values: Mapping[str, Mapping[str, np.ndarray]]
    """``state`` and ``action`` → statistic → values."""


@dataclass(frozen=True)
class RelativeActions:
    """That actions are learnt relative to the state."""

    exclude: Sequence[str]
    """Words; a dimension whose name contains one stays absolute."""
    action_names: Sequence[str] | None
    """For data sets that have no names of their own."""


def make_robots(
    training: Sequence[Source],
    names: Sequence[str],
    shares: Sequence[float],
    normalization_mapping: Mapping[str, str],
    given: GivenStatistics | None,
    relative: RelativeActions | None,
    digest: xxhash.xxh3_128,
) -> tuple[dict[str, Robot], list[str]]:
    """Robots by name, and lines for the log. What is trained on goes into the digest.

    Args:
        training: the data sets.
        names: the robot of each.
        shares: each data set's fraction of the samples.
        normalization_mapping: ``STATE`` and ``ACTION`` → mode.
        given: statistics to normalise with, instead of those of the data; for a single robot.
        relative: that actions are learnt relative to the state, or None.
        digest: gets every state and action, and the statistics that are given.

    Raises:
        ValueError: if a value is not finite, given statistics do not fit, or actions cannot be made relative.
    """
    assert given is None or len(set(names)) == 1, "checked with the configuration"
    columns = {}
    for feature in ("state", "action"):
        columns[feature] = [finite_columns(source, feature) for source in training]
        for blocks in columns[feature]:
            for block in blocks:
                digest.update(np.ascontiguousarray(block))
        if given is not None:
            taken = _taken(given, feature, normalization_mapping, columns[feature][0][0].shape[1])
            for values in taken.to_dict().values():
                digest.update(np.ascontiguousarray(values))
    robots, report = {}, []
    for name in dict.fromkeys(names):
        mine = [number for number, other in enumerate(names) if other == name]
        members = [training[number] for number in mine]
        of_robot = {feature: [columns[feature][number] for number in mine] for feature in columns}
        share = [shares[number] for number in mine]
        if len(mine) < len(names):
            share = [part / sum(share) for part in share]
        robots[name], lines = _robot(name, members, of_robot, share, normalization_mapping, given, relative)
        report += lines if len(set(names)) == 1 else [f"robot {name}: {line}" for line in lines]
    return robots, report


def _robot(
    name: str,
    members: Sequence[Source],
    columns: Mapping[str, list[list[np.ndarray]]],
    shares: list[float],
    mapping: Mapping[str, str],
    given: GivenStatistics | None,
    relative: RelativeActions | None,
) -> tuple[Robot, list[str]]:
    """A robot, and lines for the log; ``columns`` are ``state`` and ``action`` of each of its data sets, in pieces."""
    root, actions, mask, report = members[0].metadata.root, columns["action"], None, []
    action_names = names_of_action(members[0])
    statistics = {"state": cached_statistics(columns["state"], shares, root)}
    if relative is None:
        statistics["action"] = cached_statistics(actions, shares, root)
        mean_action = statistics["action"].mean
    else:
        action_names = action_names or _given_names(relative, actions[0][0].shape[1])
        chunks, mask = _chunks(members, columns, relative, action_names)
        means = [np.concatenate(blocks).mean(axis=0, dtype=np.float64) for blocks in actions]
        mean_action = np.average(means, axis=0, weights=shares).astype(np.float32)
        if given is None:
            statistics["action"] = cached_chunk_statistics(chunks, shares, root)
        report.append(f"actions relative to the state: {_listed(mask, action_names)}")
    for feature in ("state", "action"):
        if given is not None:
            statistics[feature] = _taken(given, feature, mapping, columns[feature][0][0].shape[1])
            report.append(f"{feature} statistics are those of {given.source}")
        elif statistics[feature].clamped:
            report.append(f"{feature} dimensions {list(statistics[feature].clamped)} hardly vary: statistics clamped")
    state, action = (Normalizer(mapping.get(f.upper(), "IDENTITY"), statistics[f]) for f in ("state", "action"))
    return Robot(name, state, action, mean_action, mask, action_names), report


def _chunks(
    members: Sequence[Source],
    columns: Mapping[str, list[list[np.ndarray]]],
    relative: RelativeActions,
    names: tuple[str, ...] | None,
) -> tuple[list[Chunks], np.ndarray]:
    """The chunks of each data set, and which dimensions are relative."""
    dims, parts = columns["action"][0][0].shape[1], []
    try:
        mask = relative_mask(names, relative.exclude, dims)
    except ValueError as error:
        raise ValueError(f"{members[0]}: {error}") from None
    for source, state, action in zip(members, columns["state"], columns["action"], strict=True):
        if not np.array_equal(relative_mask(names_of_action(source) or names, relative.exclude, dims), mask):
            raise ValueError(
                f"{source} has other action dimensions that stay absolute (relative_exclude_joints "
                f"{list(relative.exclude)}) than {members[0]}, and is normalised together with it: write "
                "data.train.normalization: per_dataset, and another `robot` if it has the same one"
            )
        if state[0].shape[1] < dims:
            raise ValueError(
                f"{source}: use_relative_actions subtracts {source.config.state} ({state[0].shape[1]} dimensions) from "
                f"{source.config.action} ({dims}): each action dimension needs its state; name another column with "
                "`state:`, or write use_relative_actions: false in model_cfg"
            )
        lengths = source.metadata.episodes["length"][source.episodes]
        part = Chunks(state, action, lengths, source.chunk_size, mask)
        if not len(part):
            raise ValueError(
                f"{source}: no episode has the {source.chunk_size} frames of a whole chunk (the longest has "
                f"{lengths.max()}), and statistics of relative actions are of whole chunks: lower model_cfg.chunk_size"
            )
        parts.append(part)
    return parts, mask


def names_of_action(source: Source) -> tuple[str, ...] | None:
    """Names of the action's dimensions, or None where the data set has none, or not one for each."""
    feature = source.metadata.features[source.config.action]
    names = feature.get("names")
    if isinstance(names, dict):  # older recordings: {"motors": [name, …]}, or {name: place, …}
        places = all(isinstance(place, int) for place in names.values())
        groups = [group for group in names.values() if isinstance(group, list)]
        names = sorted(names, key=names.__getitem__) if places else [name for group in groups for name in group]
    return _fitting(names, int(np.prod(feature["shape"])))


def _given_names(relative: RelativeActions, dims: int) -> tuple[str, ...] | None:
    if relative.action_names is not None and len(relative.action_names) != dims:
        raise ValueError(
            f"model_cfg.action_feature_names has {len(relative.action_names)} names for {dims} action dimensions: write one "
            "for each"
        )
    return _fitting(relative.action_names, dims)


def _fitting(names: Sequence[str] | None, dims: int) -> tuple[str, ...] | None:
    if not isinstance(names, list | tuple) or len(names) != dims:
        return None
    return tuple(str(name) for name in names)


def _listed(mask: np.ndarray, names: tuple[str, ...] | None) -> str:
    labels = names or [str(dim) for dim in range(len(mask))]
    absolute = [label for label, on in zip(labels, mask, strict=True) if not on]
    relative = [label for label, on in zip(labels, mask, strict=True) if on]
    return f"{', '.join(relative)}; absolute: {', '.join(absolute) or 'none'}"


def _taken(given: GivenStatistics, name: str, mapping: Mapping[str, str], dims: int) -> FeatureStatistics:
    try:
        return given_statistics(given.values[name], mapping.get(name.upper(), "IDENTITY"), dims)
    except ValueError as error:
        raise ValueError(
            f"data.statistics: the {name} statistics of {given.source} cannot be used: {error}; write dataset, or another "
            "load_from_checkpoint"
        ) from None


def finite_columns(source: Source, name: str) -> list[np.ndarray]:
    """The state or action column of a source in pieces.

    Raises:
        ValueError: if a value is not finite, naming its episode, frame and dimension.
    """
    key = source.config.state if name == "state" else source.config.action
    blocks, before = source.blocks(key), 0
    for block in blocks:
        if (bad := first_non_finite(block)) is not None:
            row, dim = bad
            episode, frame = source.frame(before + row)
            raise ValueError(
                f"{source}: {key} is {block[row, dim]} in dimension {dim} at episode {episode}, frame {frame}: repair "
                "the data set, or leave this episode out with `episodes`"
            )
        before += len(block)
    return blocks
