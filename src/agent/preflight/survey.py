"""Looks through a data set as a whole: all metadata, every file, all numbers, and a sample of its frames.

Training refuses a data set at the first mistake. Here all mistakes are collected, by episode.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from agent import hub
from agent.data.features import check_features
from agent.data.frames.store import WantedStore, find_store
from agent.data.normalization.robot_names import robot_alone
from agent.data.recorded import files
from agent.data.recorded.columns import ColumnTable
from agent.data.recorded.episodes import choose_episodes
from agent.data.recorded.metadata import Metadata, read_metadata
from agent.data.recorded.stretches import mapped_videos, picture_problems
from agent.data.source import Source, open_source
from agent.preflight.refusal import Refusal

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.data.configuration import DatasetConfig

log = logging.getLogger(__name__)

_FRAMES = 48  # of a data set, read as training reads them
_EACH = 3  # of these from an episode, at least: its first, its last and its middle
_SECONDS = 30.0  # for these, and as much for the files, of all data sets together
_EVEN = 1e-4  # seconds that a frame's time may be off


@dataclass
class Survey:
    """What was found in a data set."""

    key: str
    """The config key of its entry."""
    config: DatasetConfig
    problem: Exception | None = None
    """Why it cannot be used at all."""
    mismatch: ValueError | None = None
    """Why it does not fit the model."""
    metadata: Metadata | None = None
    chosen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The episodes that the config selects."""
    bad: dict[int, str] = field(default_factory=dict)
    """Number of an episode that cannot be used → why."""
    uneven: dict[int, str] = field(default_factory=dict)
    """Number of an episode with uneven time stamps → how they are uneven."""
    dark: list[str] = field(default_factory=list)
    """Frames with a picture of a single colour."""
    sizes: dict[str, str] = field(default_factory=dict)
    """Camera whose pictures do not have the size that the metadata say → which sizes."""
    source: Source | None = None
    """The data set with its good episodes; its cameras are known unless there is a mismatch."""
    files: tuple[int, int] = (0, 0)
    """How many files were looked at, and how many were left out for lack of time."""
    frames_read: int = 0

    @property
    def good(self) -> np.ndarray:
        """The selected episodes that can be used."""
        return np.setdiff1d(self.chosen, list(self.bad))

    def name(self) -> str:
        """Names the data set in a message."""
        return f"{self.key} ({self.config.repo_id})"


def survey(
    key: str, dataset: DatasetConfig, config: TrainPipelineConfig, began_with: Mapping[str, str | None] | None = None
) -> Survey:
    """Looks through one data set and downloads nothing. ``began_with`` is of the run so far, see ``WantedStore``."""
    patience = _SECONDS / (len(config.data.train.datasets) + len(config.data.val.datasets))
    found = Survey(key, dataset)
    try:
        with hub.offline():
            root = files.locate(dataset.repo_id, dataset.root, dataset.revision)
        found.metadata = read_metadata(dataset.repo_id, root)
        found.chosen = choose_episodes(found.metadata, dataset.episodes, dataset.split)
        train, size = config.data.train, config.family.sample_spec(config.trainable).image_resolution
        wanted = WantedStore(train.frame_store, train.frame_quality, size, began_with or {})
        stored = find_store(found.metadata, dataset.frames, wanted, found.chosen) is not None
        _look_at_files(found, found.metadata, not stored, patience)
        _look_at_numbers(found, found.metadata, None if stored else config.data.train.tolerance_s)
        _open(found, config, wanted)
        if found.source is not None and found.mismatch is None:
            _look_at_frames(found, found.source, patience)
            _require_some(found)
    except ValueError as error:
        found.problem, found.source = error, None
    except Exception as error:  # nobody has thought of this damage; the other data sets are still worth a look
        log.exception("%s could not be looked through", found.name())
        told = f"{type(error).__name__}: {error}"
        found.source = None
        found.problem = Refusal(f"{found.name()} could not be looked through ({told})", "is it whole? Copy it again")
    return found


def _look_at_files(found: Survey, metadata: Metadata, videos: bool, patience: float) -> None:
    empty = found.chosen[metadata.episodes["length"][found.chosen] <= 0]
    found.bad.update({int(episode): "it has no frames" for episode in empty})
    looked, skipped, end = 0, 0, time.monotonic() + patience
    for members, problem in files.look_through(metadata, found.chosen, videos):
        looked += 1
        if problem is not None:
            found.bad.update({int(episode): str(problem) for episode in members if int(episode) not in found.bad})
        if time.monotonic() > end:
            kinds = ["data", *(f"videos/{key}" for key in (metadata.video_keys if videos else []))]
            skipped = sum(len(np.unique(metadata.places(kind)[found.chosen])) for kind in kinds) - looked
            break
    found.files = (looked, skipped)


def _look_at_numbers(found: Survey, metadata: Metadata, tolerance_s: float | None) -> None:
    """Looks at state, action, time stamp and instruction of every frame, and at its place in videos that are read."""
    good = found.good
    if not len(good):
        return
    keys = [key for key in (found.config.state, found.config.action) if key in metadata.features]
    table = _columns(found, metadata, tuple(dict.fromkeys([*keys, "task_index", "timestamp"])))
    good = found.good
    for key in keys:
        has, said_to = table[key].shape[1], int(np.prod(metadata.features[key]["shape"]))
        if has != said_to:
            raise Refusal(
                f"{found.key}: {key} has {has} dimensions in the data and {said_to} in {metadata.root}/meta/info.json",
                "copy the data set again, or correct the shape there",
            )
    if tolerance_s is not None:  # first, because a start says it in these words
        cameras = mapped_videos(metadata, found.config.cameras)
        found.bad |= picture_problems(metadata, table, good, cameras, tolerance_s)
    lengths, begins = metadata.episodes["length"][good], table.begins(good)
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(good)), lengths)
    frame = np.arange(ends[-1]) - (ends - lengths)[owner]
    rows = begins[owner] + frame
    stamps = table["timestamp"][rows, 0].astype(np.float64)
    tasks = np.nan_to_num(table["task_index"][rows, 0], nan=-1).astype(np.int64)  # where it is null
    said = [index for index, task in metadata.tasks.items() if task.strip()]
    after = np.append(True, (np.diff(stamps) > 0) | (frame[1:] == 0))
    tests = {f"{key} is not finite": np.isfinite(table[key][rows]).all(axis=1) for key in keys}
    tests["its time stamp is not finite"] = np.isfinite(stamps)
    tests["its instruction is empty or missing"] = np.isin(tasks, said)
    tests["its time stamp is not after the one before it"] = after
    for why, fine in tests.items():
        for place, row in zip(*np.unique(owner[~fine], return_index=True), strict=True):
            found.bad.setdefault(int(good[place]), f"frame {frame[~fine][row]}: {why}")
    off = np.abs(stamps - frame / float(metadata.info["fps"]))
    for place, row in zip(*np.unique(owner[off > _EVEN], return_index=True), strict=True):
        number, late = int(frame[off > _EVEN][row]), off[off > _EVEN][row]
        found.uneven[int(good[place])] = f"frame {number} is {late:.4f} s away from frame/fps"


def _columns(found: Survey, metadata: Metadata, names: tuple[str, ...]) -> ColumnTable:
    """Reads columns of the good episodes; a damaged file makes the episodes in it bad ones."""
    table = ColumnTable(metadata, found.good, names)
    try:
        table.load()
    except ValueError:
        bad = {int(episode): str(error) for members, error in table.unreadable() for episode in members}
        if len(bad) == len(found.good):  # not a file is wrong, but the data set
            raise
        found.bad.update(bad)
        table = ColumnTable(metadata, found.good, names)
    return table


def _open(found: Survey, config: TrainPipelineConfig, wanted: WantedStore) -> None:
    _require_some(found)
    train, model = config.data.train, config.family.sample_spec(config.trainable)
    usable = replace(found.config, episodes=found.good.tolist(), split=None)
    with hub.offline():
        source = open_source(
            usable, model.chunk_size, train.video_backend, train.tolerance_s, wanted=wanted, verify_videos=False
        )
    source.config = found.config
    found.source = source
    try:
        check_features([source], model, *robot_alone(found.config, train))
    except ValueError as error:
        found.mismatch = error


def _require_some(found: Survey) -> None:
    if not len(found.good):
        problem = f"{found.key}: none of the {len(found.chosen)} episodes can be used"
        raise Refusal(problem, f"The first: {found.bad[min(found.bad)]}", joint=". ")


def _look_at_frames(found: Survey, source: Source, patience: float) -> None:
    """Reads frames that are spread over the data set and its episodes."""
    end = time.monotonic() + patience
    lengths = source.metadata.episodes["length"][source.episodes]
    begins = np.cumsum(lengths) - lengths
    some = np.unique(np.linspace(0, len(lengths) - 1, _FRAMES // _EACH).astype(int))
    spread = np.linspace(0, 1, _FRAMES // len(some))
    spread = spread[np.argsort(-abs(spread - 0.5), kind="stable")]  # the ends first: a file cut short lacks the last
    recorded = source.recorded_sizes() if source.store is None else {}  # a store's are those of the model
    for place in np.random.default_rng(0).permutation(some).tolist():
        for frame in dict.fromkeys((spread * (lengths[place] - 1)).round().astype(int).tolist()):
            if time.monotonic() > end:
                return
            try:
                images: dict[str, Any] = source.read(int(begins[place]) + frame).images
            except RuntimeError as error:
                found.bad.setdefault(int(source.episodes[place]), str(error))
                break
            found.frames_read += 1
            for slot, image in images.items():
                if int(image.amax()) == int(image.amin()):
                    found.dark.append(f"{slot} of episode {source.episodes[place]}, frame {frame}")
                if (has := tuple(image.shape[1:])) != (said := recorded.get(slot, has)):
                    found.sizes[source.cameras[slot]] = (
                        f"{has[0]} × {has[1]} pixels, meta/info.json says {said[0]} × {said[1]}"
                    )
