"""Computes, or takes from a checkpoint, the statistics that each robot's states and actions are normalised with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import xxhash

from agent.data.normalization.kept import cached_chunk_statistics, cached_statistics
from agent.data.normalization.normalizer import (
    NARROW_RULE,
    FeatureStatistics,
    Normalizer,
    first_non_finite,
    given_statistics,
)
from agent.data.normalization.relative import Chunks, relative_mask
from agent.data.normalization.robot import Robot
from agent.data.recorded.dimension_names import fitting, misplaced
from agent.data.source import Source


class GivenStatistics(NamedTuple):
    """Statistics that are not of the training data."""

    source: str
    """Where they are from, for people."""
    values: Mapping[str, Mapping[str, np.ndarray]]
    """``state`` and ``action`` → statistic → values."""
    names: Mapping[str, Sequence[str]] = {}  # noqa: RUF012  (never changed)
    """``state`` and ``action`` → names of the dimensions, where they are known."""


@dataclass(frozen=True)
class RelativeActions:
    """How actions are learnt relative to the state."""

    exclude: Sequence[str]
    """Words; a dimension whose name contains one stays absolute."""
    action_names: Sequence[str] | None
    """For data sets that have no names of their own."""


@dataclass(frozen=True)
class Normalization:
    """How states and actions become the model's numbers."""

    mapping: Mapping[str, str]
    """``VISUAL``, ``STATE`` and ``ACTION`` → mode, as in the model JSON."""
    given: GivenStatistics | None = None
    """Statistics to normalise with, instead of those of the training frames; for a single robot."""
    relative: RelativeActions | None = None
    """That actions are learnt relative to the state; None for absolute ones."""
    narrow_rule: int = NARROW_RULE
    """What the statistics take for narrow, see ``made_safe``; of a run that is continued, the one that it began with."""

    def __post_init__(self) -> None:
        if self.mapping.get("VISUAL", "IDENTITY") != "IDENTITY":
            raise ValueError("normalization_mapping.VISUAL must be IDENTITY: the model scales its images itself")

    def mode(self, feature: str) -> str:
        """Returns the mode of ``state`` or ``action``."""
        return self.mapping.get(feature.upper(), "IDENTITY")

    def taken(self, feature: str, columns: Sequence[Sequence[np.ndarray]]) -> FeatureStatistics:
        """Fits the given statistics of ``state`` or ``action`` to columns of these data sets.

        Raises:
            ValueError: if they are not of this data.
        """
        assert self.given is not None
        try:
            return given_statistics(self.given.values[feature], self.mode(feature), columns[0][0].shape[1])
        except ValueError as error:
            raise ValueError(
                f"data.statistics: the {feature} statistics of {self.given.source} cannot be used: {error}; write dataset, "
                "or another load_from_checkpoint"
            ) from None


@dataclass(frozen=True)
class Robots:
    """The robots of a run."""

    of_sources: list[Robot]
    """The robot of each source, those of validation last."""
    deployed_first: list[Robot]
    """Each once; the first is the one that a checkpoint's own processors are made for."""
    report: list[str]
    """Lines for the log."""


def make_robots(
    sources: tuple[Sequence[Source], Sequence[Source]],
    names: Sequence[str],
    deployed: str,
    shares: Sequence[float],
    normalization: Normalization,
    digest: xxhash.xxh3_128,
) -> Robots:
    """Computes, or takes, the statistics of every robot. What is trained on goes into the digest.

    Args:
        sources: for training and for validation.
        names: the robot of each source, those of validation last.
        deployed: the one that a checkpoint's own processors are made for.
        shares: each training source's fraction of the samples.
        normalization: how their numbers are normalised.
        digest: gets every state and action, and the statistics that are given.

    Raises:
        ValueError: if a value is not finite, given statistics do not fit, or actions cannot be made relative.
    """
    training, validation = sources
    columns = _trained_on(training, normalization, digest)
    trained, robots, report = names[: len(training)], {}, []
    for name in dict.fromkeys(trained):
        mine = [number for number, other in enumerate(trained) if other == name]
        members = [training[number] for number in mine]
        of_robot = {feature: [columns[feature][number] for number in mine] for feature in columns}
        share = [shares[number] for number in mine]
        if len(mine) < len(trained):
            share = [part / sum(share) for part in share]
        robots[name], lines = _robot(name, members, of_robot, share, normalization)
        report += lines if len(set(trained)) == 1 else [f"robot {name}: {line}" for line in lines]
    if len(robots) > 1:
        report.append(f"each robot is normalised by its own statistics: {', '.join(robots)}; processors for {deployed}")
    for source in validation:
        finite_columns(source, "state")
        finite_columns(source, "action")
    return Robots([robots[name] for name in names], [robots.pop(deployed), *robots.values()], report)


def _trained_on(
    training: Sequence[Source], normalization: Normalization, digest: xxhash.xxh3_128
) -> dict[str, list[list[np.ndarray]]]:
    """Reads ``state`` and ``action`` of each data set, in pieces, and hashes them with the statistics that are given."""
    columns = {}
    for feature in ("state", "action"):
        columns[feature] = [finite_columns(source, feature) for source in training]
        for blocks in columns[feature]:
            for block in blocks:
                digest.update(np.ascontiguousarray(block))
        if normalization.given is not None:
            for values in normalization.taken(feature, columns[feature]).to_dict().values():
                digest.update(np.ascontiguousarray(values))
    return columns


def _robot(
    name: str,
    members: Sequence[Source],
    columns: Mapping[str, list[list[np.ndarray]]],
    shares: list[float],
    how: Normalization,
) -> tuple[Robot, list[str]]:
    """Makes a robot, and lines for the log; ``columns`` are ``state`` and ``action`` of each of its data sets, in pieces."""
    root, actions, mask, report = members[0].metadata.root, columns["action"], None, []
    action_names = members[0].names("action")
    compute: dict[str, Callable[[int], FeatureStatistics]] = {
        feature: partial(cached_statistics, columns[feature], shares, root) for feature in ("state", "action")
    }
    if how.relative is None:
        mean_action = compute["action"](how.narrow_rule).mean
    else:
        action_names = _relative_names(members[0], how.relative, actions[0][0].shape[1])
        chunks, mask = _chunks(members, columns, how.relative, action_names)
        means = [np.concatenate(blocks).mean(axis=0, dtype=np.float64) for blocks in actions]
        mean_action = np.average(means, axis=0, weights=shares).astype(np.float32)
        compute["action"] = partial(cached_chunk_statistics, chunks, shares, root)
        report.append(f"actions relative to the state: {_listed(mask, action_names)}")
    normalizers = {}
    for feature in ("state", "action"):
        if how.given is not None:
            statistics = how.taken(feature, columns[feature])
            for source in members:
                _check_given(how.given, feature, source)
            report.append(f"{feature} statistics are those of {how.given.source}")
        else:
            statistics = compute[feature](how.narrow_rule)
            report += _unnormalised(feature, members[0], statistics)
            if how.narrow_rule != NARROW_RULE and statistics.clamped:
                report += _kept_as_begun(feature, statistics, compute[feature](NARROW_RULE))
        normalizers[feature] = Normalizer(how.mode(feature), statistics)
    state, action = normalizers["state"], normalizers["action"]
    return Robot(name, state, action, mean_action, mask, action_names, members[0].names("state")), report


def _unnormalised(feature: str, source: Source, statistics: FeatureStatistics) -> list[str]:
    if not statistics.constant:
        return []
    names = source.names(feature)
    listed = ", ".join(names[dim] if names else str(dim) for dim in statistics.constant)
    return [f"{feature} dimensions {list(statistics.constant)} ({listed}) hardly vary and stay unnormalised"]


def _kept_as_begun(feature: str, kept: FeatureStatistics, now: FeatureStatistics) -> list[str]:
    changed = [
        dim
        for dim in kept.clamped
        if any(not np.array_equal(kept.to_dict()[name][dim], now.to_dict()[name][dim]) for name in kept.known)
    ]
    if not changed:
        return []
    return [
        f"WARNING: {feature} dimensions {changed} vary by less than 1e-4 in their unit, which this run was begun to take for "
        "constant; it goes on with the statistics of its checkpoints. A new run, under another name, normalises them"
    ]


def _chunks(
    members: Sequence[Source],
    columns: Mapping[str, list[list[np.ndarray]]],
    relative: RelativeActions,
    names: tuple[str, ...] | None,
) -> tuple[list[Chunks], np.ndarray]:
    """Finds the chunks of each data set, and which dimensions are relative."""
    dims, parts = columns["action"][0][0].shape[1], []
    try:
        mask = relative_mask(names, relative.exclude, dims)
    except ValueError as error:
        raise ValueError(f"{members[0]}: {error}") from None
    for source, state, action in zip(members, columns["state"], columns["action"], strict=True):
        if not np.array_equal(relative_mask(source.names("action") or names, relative.exclude, dims), mask):
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
        _check_pairs(source, source.names("action") or names, mask)
        lengths = source.metadata.episodes["length"][source.episodes]
        part = Chunks(state, action, lengths, source.chunk_size, mask)
        if not len(part):
            raise ValueError(
                f"{source}: no episode has the {source.chunk_size} frames of a whole chunk (the longest has "
                f"{lengths.max()}), and statistics of relative actions are of whole chunks: lower model_cfg.chunk_size"
            )
        parts.append(part)
    return parts, mask


def _check_pairs(source: Source, names: tuple[str, ...] | None, mask: np.ndarray) -> None:
    """Checks that each relative action and the state of its place are of one joint, as LeRobot and openpi take for granted."""
    states = source.names("state")
    if names is None or states is None:
        return
    found = misplaced(names, states, np.flatnonzero(mask).tolist())
    if found is not None:
        dim, where = found
        raise ValueError(
            f"{source}: use_relative_actions subtracts from each action the state of the same place, and dimension {dim} is "
            f"{names[dim]!r} in {source.config.action}, {states[dim]!r} in {source.config.state} ({where}). Bring the columns of "
            f"the data set into one order, name another one with `state:`, write {names[dim]!r} into "
            "relative_exclude_joints, or use_relative_actions: false in model_cfg; where only the names are wrong, correct them "
            "in meta/info.json"
        )


def _relative_names(source: Source, relative: RelativeActions, dims: int) -> tuple[str, ...] | None:
    """Takes the data set's own names, else those of the config."""
    own, written = source.names("action"), fitting(relative.action_names, dims)
    if own is None:
        if relative.action_names is not None and written is None:
            raise ValueError(
                f"model_cfg.action_feature_names has {len(relative.action_names)} names for {dims} action dimensions: write "
                "one for each"
            )
        return written
    if written is not None and (found := misplaced(own, written, range(dims))) is not None:
        raise ValueError(
            f"{source}: dimension {found[0]} of {source.config.action} is {own[found[0]]!r}, and in "
            f"model_cfg.action_feature_names {written[found[0]]!r} ({found[1]}): leave that out, for the data set "
            "has names of its own"
        )
    return own


def _listed(mask: np.ndarray, names: tuple[str, ...] | None) -> str:
    labels = names or [str(dim) for dim in range(len(mask))]
    absolute = [label for label, on in zip(labels, mask, strict=True) if not on]
    relative = [label for label, on in zip(labels, mask, strict=True) if on]
    return f"{', '.join(relative)}; absolute: {', '.join(absolute) or 'none'}"


def _check_given(given: GivenStatistics, feature: str, source: Source) -> None:
    theirs, ours, key = given.names.get(feature), source.names(feature), getattr(source.config, feature)
    if theirs is None or ours is None or len(theirs) != len(ours):
        return
    if (found := misplaced(ours, theirs, range(len(ours)))) is not None:
        raise ValueError(
            f"data.statistics: dimension {found[0]} of {key} is {ours[found[0]]!r} in {source}, and in {given.source} it is "
            f"{theirs[found[0]]!r} ({found[1]}): bring the data set into that order, or write data.statistics: dataset"
        )


def finite_columns(source: Source, name: str) -> list[np.ndarray]:
    """Reads the state or action column of a source, in pieces.

    Raises:
        ValueError: if a value is not finite, naming its episode, frame and dimension.
    """
    key = getattr(source.config, name)
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
