"""Builds the data of a run from its config: opens it, normalises it, and makes the readers of its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import xxhash

from agent.batch import SampleSpec
from agent.data.configuration import DataConfig
from agent.data.frames.store import jpeg_of
from agent.data.loading.loader import start_fork_server
from agent.data.normalization.robot import Robot
from agent.data.normalization.robot_statistics import Normalization, make_robots
from agent.data.opening import agree, open_sources
from agent.data.samples.mixture import Mixture
from agent.data.samples.reader import Draw, SampleReader
from agent.data.samples.readers import make_readers
from agent.data.samples.wording import Wording


@dataclass
class Data:
    """Holds everything that the trainer needs of the data."""

    spec: SampleSpec
    """As given, completed where the model left its features to the data."""
    reader: SampleReader
    """Of the training samples."""
    mixture: Mixture
    """Which training frame each sample is; ``mixture.frames`` make an epoch."""
    validation: SampleReader | None
    """Of the validation samples, or None when nothing is held out."""
    robots: list[Robot]
    """How states and actions are normalised. The first is the one that a checkpoint's processors are made for."""
    fingerprint_if: Callable[[Sequence[str | None]], str]
    """What the fingerprint would be if each training data set's pictures were those of this frame store, by its name, or
    of the videos: None."""
    narrow_rule: int
    """What the statistics take for narrow, see ``agent.data.normalization.normalizer.made_safe``."""
    report: list[str]
    """Lines for the log: frames, statistics that were clamped, cameras left out, instructions cut."""

    @property
    def fingerprint(self) -> str:
        """A hash of what is trained on: episodes, states, actions, pictures, instructions as tokens. A copy has the same."""
        return self.fingerprint_if([source.store_name for source in self.reader.sources])

    @property
    def frame_stores(self) -> dict[str, str | None]:
        """Data set → the frame store that its pictures come from, by name; None where they are decoded."""
        found: dict[str, set[str | None]] = {}
        for source in [*self.reader.sources, *(self.validation.sources if self.validation is not None else [])]:
            found.setdefault(source.config.repo_id, set()).add(source.store_name)
        # Of two folders under one name with a store each nothing can be said.
        return {repo_id: next(iter(names)) for repo_id, names in found.items() if len(names) == 1}

    @property
    def labels(self) -> list[str]:
        """A short name for each training data set, no two alike."""
        names = [source.config.repo_id for source in self.reader.sources]
        short = [name.rpartition("/")[2] for name in names]
        names = short if len(set(short)) == len(set(names)) else names
        return [f"{name}#{n}" if names.count(name) > 1 else name for n, name in enumerate(names)]

    def count(self, drawn: dict[str, int], first: int, stop: int) -> None:
        """Adds to ``drawn`` how many of the samples ``first`` to ``stop - 1`` each of several data sets gives."""
        if len(self.mixture.lengths) > 1:
            for label, number in zip(self.labels, self.mixture.counts(first, stop), strict=True):
                drawn[label] = drawn.get(label, 0) + number

    def mix(self, drawn: Mapping[str, int]) -> dict[str, float]:
        """Returns the metrics ``mix/<data set>``: the fraction of the samples so far."""
        return {f"mix/{label}": number / sum(drawn.values()) for label, number in drawn.items()}


def build_data(
    config: DataConfig,
    spec: SampleSpec,
    *,
    seed: int,
    draw: Draw,
    validation_draw: Draw,
    normalization: Normalization,
    wording: Wording,
    began_with: Mapping[str, str | None] | None = None,
) -> Data:
    """Opens and verifies all data of a run.

    Args:
        config: the data sets.
        spec: what the model wants of a sample.
        seed: the run's.
        draw: k → random numbers of training sample k.
        validation_draw: the same for the validation set.
        normalization: how states and actions become the model's numbers.
        wording: how instructions become tokens.
        began_with: of a run that goes on, see ``WantedStore``.

    Raises:
        ValueError: on anything wrong with the data or its config, before a sample is read.
    """
    opened = open_sources(config, spec, began_with)
    training = opened.training
    if config.train.num_workers:
        start_fork_server(training)
    agreed = agree(opened, config.train, spec)
    mixture = Mixture([len(source) for source in training], config.train.weights(), seed)
    shares = [f"{s}: {share:.1%} of the samples" for s, share in zip(training, mixture.shares, strict=True)]
    numbers = xxhash.xxh3_128()
    robots = make_robots(
        (training, opened.validation), agreed.robots, agreed.deployed, mixture.shares, normalization, numbers
    )
    readers = make_readers(
        (training, opened.validation),
        robots.of_sources,
        agreed.spec,
        wording,
        numbers,
        seed=seed,
        draw=draw,
        validation_draw=validation_draw,
    )
    return Data(
        spec=agreed.spec,
        reader=readers.training,
        mixture=mixture,
        validation=readers.validation,
        robots=robots.deployed_first,
        fingerprint_if=partial(_fingerprint, numbers, [source.episodes for source in training], readers.tokens),
        narrow_rule=normalization.narrow_rule,
        report=[*opened.described(), *agreed.report, *shares, *robots.report, *readers.report],
    )


def _fingerprint(
    numbers: xxhash.xxh3_128, episodes: Sequence[np.ndarray], tokens: Sequence[np.ndarray], stores: Sequence[str | None]
) -> str:
    digest = numbers.copy()
    for chosen, store in zip(episodes, stores, strict=True):
        digest.update(np.ascontiguousarray(chosen))
        if (jpeg := jpeg_of(store)) is not None:  # other stores hold the very same pictures
            digest.update(jpeg.encode())
    for ids in tokens:
        digest.update(ids)
    return digest.hexdigest()
