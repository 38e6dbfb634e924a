"""Opens the data sets of a run, holds episodes out for validation, and checks that all fit the model and each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agent.batch import SampleSpec
from agent.data.agreement import check_agreement
from agent.data.configuration import DataConfig, DatasetConfig, TrainDataConfig
from agent.data.features import check_features
from agent.data.frames.manifest import PREPARE
from agent.data.frames.store import WantedStore, stores_there
from agent.data.normalization.robot_names import assign_robots
from agent.data.recorded.episodes import hold_out
from agent.data.recorded.metadata import spelled
from agent.data.source import Source, open_source


@dataclass(frozen=True)
class Opened:
    """The data sets of a run: their files are there, what they hold is not compared yet."""

    training: list[Source]
    validation: list[Source]
    wanted: WantedStore
    """Where the config wants pictures to come from."""

    @property
    def sources(self) -> list[Source]:
        """All of them, those of validation last."""
        return [*self.training, *self.validation]

    def described(self) -> list[str]:
        """Lines for the log: what each gives, and episodes that are trained on and validated on."""
        roles = [("training", source) for source in self.training]
        roles += [("validation", source) for source in self.validation]
        described = [
            f"{role}: {source}, {len(source.episodes)} episodes ({spelled(source.episodes)}), {len(source)} frames"
            for role, source in roles
        ]
        return described + _overlaps(self.training, self.validation)


@dataclass(frozen=True)
class Agreement:
    """What holds for all data sets of a run together."""

    spec: SampleSpec
    """What the model wants of a sample, completed where it left its features to the data."""
    robots: list[str]
    """The robot of each of ``Opened.sources``."""
    deployed: str
    """The robot that a checkpoint's own processors are made for."""
    report: list[str]
    """Lines for the log."""


def open_sources(config: DataConfig, spec: SampleSpec, began_with: Mapping[str, str | None] | None) -> Opened:
    """Finds the data sets, verifies their files and holds episodes out for validation.

    Args:
        config: the data sets.
        spec: what the model wants of a sample.
        began_with: of a run that goes on, see ``WantedStore``.

    Raises:
        ValueError: if there is none, or a data set is not as it must be.
    """
    train = config.train
    if not train.datasets:
        raise ValueError("data.train.datasets is empty: name at least one data set")
    wanted = WantedStore(train.frame_store, train.frame_quality, spec.image_resolution, began_with or {})

    def opened(dataset: DatasetConfig) -> Source:
        return open_source(dataset, spec.chunk_size, train.video_backend, train.tolerance_s, wanted=wanted)

    training, validation = [opened(dataset) for dataset in train.datasets], []
    if config.val.datasets:
        whole = [opened(dataset) for dataset in config.val.datasets]
        validation = [source.view(source.episodes, with_previous_action=True) for source in whole]
    elif config.val.fraction:
        parts = [_held_out(source, config.val.fraction) for source in training]
        training, validation = [train for train, _ in parts], [held for _, held in parts]
    return Opened(training, validation, wanted)


def agree(opened: Opened, config: TrainDataConfig, spec: SampleSpec) -> Agreement:
    """Compares the data sets with the model, with each other and with their frame stores.

    Raises:
        ValueError: on the first of these that does not hold, naming the data sets and what to write.
    """
    sources = opened.sources
    robots, deployed = assign_robots(opened.training, opened.validation, config)
    spec, report = check_features(sources, spec, robots, deployed)
    report += check_agreement(sources, robots)
    return Agreement(spec, robots, deployed, report + _stores(sources, opened.wanted))


def _held_out(source: Source, fraction: float) -> tuple[Source, Source]:
    try:
        train, held = hold_out(source.episodes, fraction)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return source.view(train), source.view(held, with_previous_action=True)


def _stores(sources: Sequence[Source], wanted: WantedStore) -> list[str]:
    """Checks that the frame stores have every camera; returns lines for the log: where pictures are read from."""
    lines, without = [], []
    for source in sources:
        if source.store is not None:
            source.store.require(list(source.cameras.values()), wanted)
        if wanted.setting == "auto" and source.config.repo_id in wanted.began_with:
            lines.append(_kept_to(source, wanted.began_with[source.config.repo_id]))
        elif source.store is not None:
            lines.append(f"{source}: pictures from {source.store} ({source.store.manifest.encoding})")
        elif wanted.setting != "none" and source.cameras:
            without.append(str(source))
    if without:
        names = ", ".join(dict.fromkeys(without))
        lines.append(
            f"{names}: pictures are decoded from the data set as they are needed. A frame store would be read 4 times as "
            f"fast for videos of 224 × 224, 18 times for 640 × 480 (measured; docs/data.md); make one with {PREPARE}. "
            "A JPEG store is for runs that begin with it; this one would read a raw or lossless one when it is resumed"
        )
    return list(dict.fromkeys(lines))


def _kept_to(source: Source, began_with: str | None) -> str:
    """Says where the pictures of a run come from that goes on under `auto`; what it began with says which may serve."""
    now = f"{source}: pictures are " + (
        f"from {source.store}" if source.store is not None else "decoded from the data set"
    )
    if source.store_name != began_with:
        before = f"from the frame store {began_with}" if began_with is not None else "decoded from the data set"
        return f"{now}; they were {before} before, and are the same bit for bit"
    others = [name for name in stores_there(source.metadata, source.config.frames) if name != began_with]
    unread = f", not from {' or '.join(others)}, which a new run may read" if others else ""
    return f"{now}, as when this run began{unread}"


def _overlaps(training: Sequence[Source], validation: Sequence[Source]) -> list[str]:
    lines = []
    for train in training:
        for held in validation:
            both = np.intersect1d(train.episodes, held.episodes)
            if train.metadata.root.resolve() == held.metadata.root.resolve() and len(both):
                lines.append(
                    f"WARNING: {train}: episodes {spelled(both)} are trained on and validated on; "
                    "validation will look better than it is"
                )
    return lines
