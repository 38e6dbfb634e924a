"""The data of a run from its config: sources, statistics, instructions and readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import xxhash

from agent.data.agreement import check_agreement
from agent.data.configuration import DataConfig, DatasetConfig
from agent.data.features import check_features
from agent.data.frames.manifest import PREPARE
from agent.data.frames.store import WantedStore, jpeg_of, stores_there
from agent.data.loading.loader import start_fork_server
from agent.data.normalization.normalizer import NARROW_RULE
from agent.data.normalization.robot import Robot
from agent.data.normalization.robot_names import assign_robots
from agent.data.normalization.robot_statistics import (
    GivenStatistics,
    RelativeActions,
    finite_columns,
    make_robots,
)
from agent.data.recorded.episodes import hold_out
from agent.data.recorded.metadata import spelled
from agent.data.samples.augmentation import augmentations
from agent.data.samples.mixture import Mixture
from agent.data.samples.reader import Draw, SampleReader
from agent.data.samples.task_tokens import cached_task_tokens
from agent.data.samples.transforms import SampleSpec, load_paraphrases
from agent.data.source import Source, open_source


@dataclass
class Data:
    """Everything the trainer needs of the data."""

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
        """Of what is trained on: episodes, states, actions, pictures, instructions as tokens. A copy has the same."""
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
        """The metrics ``mix/<data set>``: the fraction of the samples so far."""
        return {f"mix/{label}": number / sum(drawn.values()) for label, number in drawn.items()}


def build_data(
    config: DataConfig,
    spec: SampleSpec,
    *,
    seed: int,
    draw: Draw,
    validation_draw: Draw,
    normalization_mapping: Mapping[str, str],
    tokenizer_path: str,
    task_paraphrase: str | None = None,
    given: GivenStatistics | None = None,
    relative: RelativeActions | None = None,
    narrow_rule: int = NARROW_RULE,
    began_with: Mapping[str, str | None] | None = None,
) -> Data:
    """Opens and verifies all data of a run.

    Args:
        config: the data sets.
        spec: what the model wants of a sample.
        seed: the run's.
        draw: k → noise (T, A) float32 and time of training sample k.
        validation_draw: the same for the validation set.
        normalization_mapping: ``VISUAL``, ``STATE`` and ``ACTION`` → mode, as in the model JSON.
        tokenizer_path: folder or hub id.
        task_paraphrase: a JSON of instruction → paraphrases, for training samples.
        given: statistics to normalise with, instead of those of the training frames.
        relative: that actions are learnt relative to the state; None for absolute ones.
        narrow_rule: what the statistics take for narrow; of a run that is continued, the one that it began with.
        began_with: of a run that goes on, see ``WantedStore``.

    Raises:
        ValueError: on anything wrong with the data or its config, before a sample is read.
    """
    if not config.train.datasets:
        raise ValueError("data.train.datasets is empty: name at least one data set")
    if normalization_mapping.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise ValueError("normalization_mapping.VISUAL must be IDENTITY: the model scales its images itself")
    wanted = WantedStore(config.train.frame_store, config.train.frame_quality, spec.image_resolution, began_with or {})
    training, validation, report = _open_sources(config, spec, wanted)
    if config.train.num_workers:
        start_fork_server(training)
    names, deployed = assign_robots(training, validation, config.train)
    spec, notes = check_features([*training, *validation], spec, names, deployed)
    notes += check_agreement([*training, *validation], names)
    report += notes + _stores([*training, *validation], wanted)
    mixture = Mixture([len(s) for s in training], config.train.weights(), seed)
    report += [f"{s}: {share:.1%} of the samples" for s, share in zip(training, mixture.shares, strict=True)]
    digest = xxhash.xxh3_128()
    robots, notes = make_robots(
        training, names[: len(training)], mixture.shares, normalization_mapping, given, relative, digest, narrow_rule
    )
    report += notes
    if len(robots) > 1:
        report.append(f"each robot is normalised by its own statistics: {', '.join(robots)}; processors for {deployed}")
    each = [robots[name] for name in names]
    for source in validation:
        for name in ("state", "action"):
            finite_columns(source, name)
    tasks = sorted({task for source in [*training, *validation] for task in source.tasks()})
    paraphrases: dict[str, list[str]] = {}
    if task_paraphrase is not None:
        trained = sorted({task for source in training for task in source.tasks()})
        paraphrases, missing = load_paraphrases(task_paraphrase, trained)
        if missing:
            report.append(f"{len(missing)} of {len(trained)} instructions have no paraphrase: {missing[:5]}")
    order = {task: number for number, task in enumerate(tasks)}
    for source in training:
        # which frame has which instruction, whatever its number is in meta/tasks.parquet
        known = np.asarray(sorted(source.metadata.tasks))
        number = np.asarray([order.get(source.metadata.tasks[index], -1) for index in known.tolist()])
        for block in source.blocks("task_index"):
            digest.update(number[np.searchsorted(known, block[:, 0].astype(np.int64))])
    for source in [*training, *validation]:
        source.table.release()  # every page was touched
    texts = [*tasks, *(text for task in tasks for text in paraphrases.get(task, []))]
    changes = [
        augmentations(s.config.augmentation, s.recorded_sizes(), spec.camera_slots, spec.image_resolution, str(s))
        for s in training
    ]
    report += [f"{s}: pictures of {', '.join(c)} are augmented" for s, c in zip(training, changes, strict=True) if c]
    tokens = cached_task_tokens(tokenizer_path, spec.tokenizer_max_length, texts, training[0].metadata.root)
    report += tokens.warnings()
    return Data(
        spec=spec,
        reader=SampleReader(training, each[: len(training)], tokens, spec, draw, seed, paraphrases, changes),
        mixture=mixture,
        validation=SampleReader(validation, each[len(training) :], tokens, spec, validation_draw, seed)
        if validation
        else None,
        robots=[robots.pop(deployed), *robots.values()],
        fingerprint_if=partial(
            _fingerprint, digest, [s.episodes for s in training], [tokens(t) for t in sorted(set(texts))]
        ),
        narrow_rule=narrow_rule,
        report=report,
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


def _open_sources(
    config: DataConfig, spec: SampleSpec, wanted: WantedStore
) -> tuple[list[Source], list[Source], list[str]]:
    """Training and validation sources, and a line of the log for each."""

    def opened(dataset: DatasetConfig) -> Source:
        return open_source(
            dataset, spec.chunk_size, config.train.video_backend, config.train.tolerance_s, wanted=wanted
        )

    training = [opened(dataset) for dataset in config.train.datasets]
    if config.val.datasets:
        whole = [opened(dataset) for dataset in config.val.datasets]
        validation = [source.view(source.episodes, with_previous_action=True) for source in whole]
    elif config.val.fraction:
        parts = [_held_out(source, config.val.fraction) for source in training]
        training = [train for train, _ in parts]
        validation = [held for _, held in parts]
    else:
        validation = []
    report = _described("training", training) + _described("validation", validation) + _overlaps(training, validation)
    return training, validation, report


def _held_out(source: Source, fraction: float) -> tuple[Source, Source]:
    try:
        train, held = hold_out(source.episodes, fraction)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return source.view(train), source.view(held, with_previous_action=True)


def _stores(sources: Sequence[Source], wanted: WantedStore) -> list[str]:
    """Lines for the log: where pictures are read from."""
    lines, without = [], []
    for source in sources:
        if source.store is not None:
            source.store.require(list(source.cameras.values()), wanted)
        if wanted.setting == "auto" and source.config.repo_id in wanted.began_with:
            lines.append(_kept_to(source, wanted.began_with[source.config.repo_id]))
        elif source.store is not None:
            lines.append(f"{source}: pictures from {source.store} ({source.store.manifest.encoding})")
        elif wanted.setting != "none":
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
    """Where the pictures of a run come from that goes on under `auto`; what it began with says which may serve."""
    now = f"{source}: pictures are " + (
        f"from {source.store}" if source.store is not None else "decoded from the data set"
    )
    if source.store_name != began_with:
        before = f"from the frame store {began_with}" if began_with is not None else "decoded from the data set"
        return f"{now}; they were {before} before, and are the same bit for bit"
    others = [name for name in stores_there(source.metadata, source.config.frames) if name != began_with]
    unread = f", not from {' or '.join(others)}, which a new run may read" if others else ""
    return f"{now}, as when this run began{unread}"


def _described(role: str, sources: Sequence[Source]) -> list[str]:
    return [
        f"{role}: {source}, {len(source.episodes)} episodes ({spelled(source.episodes)}), {len(source)} frames"
        for source in sources
    ]


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
