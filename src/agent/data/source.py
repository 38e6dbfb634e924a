"""Opens one data set, chooses its episodes, and reads their samples as they were recorded.

A :class:`Source` knows its frames from the metadata alone. Low-dimensional columns are mapped into memory, videos are
decoded as LeRobot decodes them, and pictures in data files are read through LeRobot.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from agent.data.configuration import DatasetConfig
from agent.data.frames.manifest import PREPARE
from agent.data.frames.store import FrameStore, WantedStore, find_store
from agent.data.recorded import files
from agent.data.recorded.columns import ColumnTable
from agent.data.recorded.dimension_names import names_of
from agent.data.recorded.episodes import choose_episodes
from agent.data.recorded.metadata import Metadata, read_metadata
from agent.data.recorded.picture_table import PictureTable
from agent.data.recorded.stretches import mapped_videos, moment_of, picture_problems, refusal
from agent.data.recorded.video import WrongTime, choose_video_backend, decode_frame

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass
class RawSample:
    """One frame as the data set has it."""

    images: dict[str, torch.Tensor]
    """Model camera → (3, H, W) uint8; a camera that the robot lacks is left out."""
    state: np.ndarray
    """(s,) float32."""
    actions: np.ndarray
    """(T, a) float32; past the end of the episode the last action is repeated."""
    action_is_pad: np.ndarray
    """(T,) bool, True past the end of the episode."""
    previous_action: np.ndarray | None
    """(a,) float32, the action recorded one frame earlier; None unless the source was asked for it."""
    previous_is_pad: bool
    """True on the first frame of an episode, where ``previous_action`` is that frame's own."""
    task: str
    episode: int
    frame: int


@dataclass
class Source:
    """The frames of the chosen episodes of one data set, in order of episode and frame."""

    config: DatasetConfig
    metadata: Metadata
    chosen: np.ndarray
    """The episodes that the config selects."""
    episodes: np.ndarray
    """The episodes of this source: the chosen ones, or what a hold-out leaves of them."""
    chunk_size: int
    video_backend: str
    tolerance_s: float
    table: ColumnTable
    """The low-dimensional columns, shared with the other views of the data set."""
    cameras: dict[str, str] = field(default_factory=dict)
    """Model camera → key in the data set."""
    with_previous_action: bool = False
    store: FrameStore | None = None
    """Where pictures are read from instead of being decoded from videos."""

    def __post_init__(self) -> None:
        self._ends = np.cumsum(self.metadata.episodes["length"][self.episodes])
        self._pictures: PictureTable | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __str__(self) -> str:
        return f"data set {self.config.repo_id}"

    @property
    def store_name(self) -> str | None:
        """The name of the frame store that pictures are read from; None where they are decoded."""
        return self.store.folder.name if self.store is not None else None

    def names(self, feature: str) -> tuple[str, ...] | None:
        """Reads the names of the dimensions of ``state`` or ``action``; None where there is not one for each."""
        return names_of(self.metadata.features[getattr(self.config, feature)])

    def view(self, episodes: np.ndarray, with_previous_action: bool = False) -> Source:
        """Returns the same data set, seen through fewer of its episodes."""
        return replace(self, episodes=np.sort(episodes), with_previous_action=with_previous_action)

    def frame(self, position: int) -> tuple[int, int]:
        """Finds the episode and the frame in it at a position of this source."""
        if not 0 <= position < len(self):
            raise IndexError(f"{self} has {len(self)} frames, asked for {position}")
        place = int(np.searchsorted(self._ends, position, side="right"))
        before = int(self._ends[place - 1]) if place else 0
        return int(self.episodes[place]), position - before

    def columns(self, name: str) -> np.ndarray:
        """Reads a low-dimensional column over this source's frames, (frames, dims), without decoding any image."""
        return np.concatenate(list(self.blocks(name)))

    def blocks(self, name: str) -> list[np.ndarray]:
        """Reads it in pieces, views of what is mapped into memory: consecutive episodes are one piece."""
        column, begins = self.table[name], self.table.begins(self.episodes)
        ends = begins + self.metadata.episodes["length"][self.episodes]
        first = np.append(True, begins[1:] != ends[:-1])
        last = np.append(first[1:], True)
        return [column[begin:end] for begin, end in zip(begins[first], ends[last], strict=True)]

    def tasks(self) -> list[str]:
        """Lists the instructions that occur in this source.

        Raises:
            ValueError: if a frame has no instruction or an empty one, naming its episode.
        """
        blocks = self.blocks("task_index")
        found = np.concatenate([np.unique(block) for block in blocks])
        used = sorted({int(index) if np.isfinite(index) else -1 for index in found})  # NaN where a row has none
        for index in used:
            known = index in self.metadata.tasks
            if not known or not self.metadata.tasks[index].strip():
                indices = np.nan_to_num(np.concatenate(blocks)[:, 0], nan=-1)
                episode, frame = self.frame(int(np.flatnonzero(indices == index)[0]))
                raise ValueError(
                    f"{self}: the instruction of episode {episode}, frame {frame} is {'empty' if known else 'missing'} "
                    f"({f'task {index} in meta/tasks.parquet' if index >= 0 else 'no task_index'}). Give it words there, "
                    "or leave the episode out with `episodes`."
                )
        return [self.metadata.tasks[index] for index in used]

    def recorded_sizes(self) -> dict[str, tuple[int, int]]:
        """Reads from the metadata, for each model camera, height and width of its pictures in the data set."""
        sizes = {}
        for slot, key in self.cameras.items():
            feature = self.metadata.features[key]
            # Colours last or first: LeRobot knows both. Names are not always given, nor always in the order of the shape.
            shape, names = feature["shape"], feature.get("names")
            first, last = (size in (1, 3, 4) for size in (shape[0], shape[-1]))
            if first == last:
                first = isinstance(names, list) and bool(names) and str(names[0]).startswith("channel")
            height, width = shape[1:] if first else shape[:2]
            sizes[slot] = (int(height), int(width))
        return sizes

    def open(self) -> None:
        """Reads once what workers take over."""
        self.table.load()
        if self.store is not None:
            self.store.open()
            return
        if self._pictures is None and (keys := self._image_keys()):
            self._pictures = PictureTable(self.metadata, self.chosen, keys)

    def read(self, position: int) -> RawSample:
        """Reads the sample at a position, and decodes one frame of every mapped camera.

        Raises:
            RuntimeError: if it cannot be read, naming data set, episode, frame and files.
        """
        episode, frame = self.frame(position)
        try:
            return self._sample(episode, frame)
        except Exception as error:
            told = f"{self}, episode {episode}, frame {frame} cannot be read ({type(error).__name__}: {error})"
            if self.store is not None:  # the data set's own files are not read
                raise RuntimeError(
                    f"{told}, of {self.store}. Run `{PREPARE}` again, which finds what is damaged in a store and makes it "
                    "anew; or set data.train.frame_store: none"
                ) from error
            used = [self.metadata.data_file(episode)]
            used += [self.metadata.video_file(episode, key) for key in self._mapped_videos()]
            names = ", ".join(str(path) for path in used)
            put_right = "Put that right" if isinstance(error, WrongTime) else "Copy them again"
            raise RuntimeError(
                f"{told}; its files: {names}. {put_right}, or leave the episode out with `episodes`; for a damaged video "
                "`python -m agent.data.prepare --skip_bad_episodes` finds all such episodes and leaves them out"
            ) from error

    def _sample(self, episode: int, frame: int) -> RawSample:
        first = int(self.table.begins(np.asarray(episode)))
        last = first + int(self.metadata.episodes["length"][episode]) - 1
        row = first + frame
        steps = np.arange(row - 1 if self.with_previous_action else row, row + self.chunk_size)
        inside = steps.clip(first, last)
        actions, is_pad = self.table[self.config.action][inside].astype(np.float32), inside != steps
        previous, previous_is_pad = None, False
        if self.with_previous_action:
            previous, actions = actions[0], actions[1:]
            previous_is_pad, is_pad = bool(is_pad[0]), is_pad[1:]
        return RawSample(
            images=self._images(episode, frame, row),
            state=self.table[self.config.state][row].astype(np.float32),
            actions=actions,
            action_is_pad=is_pad,
            previous_action=previous,
            previous_is_pad=previous_is_pad,
            task=self.metadata.tasks[int(self.table["task_index"][row, 0])],
            episode=episode,
            frame=frame,
        )

    def _images(self, episode: int, frame: int, row: int) -> dict[str, torch.Tensor]:
        """Model camera → (3, H, W) uint8."""
        if self.store is not None:
            return self._stored(self.store, episode, frame)
        stamp, images = float(self.table["timestamp"][row, 0]), {}
        for key in self._mapped_videos():
            moment = moment_of(self.metadata, key, episode, frame, stamp, self.tolerance_s)
            images[key] = decode_frame(self.metadata.video_file(episode, key), moment, self.video_backend)
        if self._image_keys():
            self.open()
            assert self._pictures is not None
            images |= self._pictures.read(episode, frame)
        return {slot: images[key] for slot, key in self.cameras.items()}

    def _stored(self, store: FrameStore, episode: int, frame: int) -> dict[str, torch.Tensor]:
        import torch

        return {slot: torch.from_numpy(store.image(key, episode, frame)) for slot, key in self.cameras.items()}

    def _mapped_videos(self) -> list[str]:
        return [key for key in self.metadata.video_keys if key in self.cameras.values()]

    def _image_keys(self) -> list[str]:
        """The mapped cameras whose pictures are in the data files."""
        return [key for key in dict.fromkeys(self.cameras.values()) if key not in self.metadata.video_keys]


def open_source(
    config: DatasetConfig,
    chunk_size: int,
    video_backend: str | None,
    tolerance_s: float,
    *,
    wanted: WantedStore | None = None,
    verify_videos: bool = True,
) -> Source:
    """Finds a data set, chooses its episodes and verifies their files.

    Args:
        config: the data set.
        chunk_size: T, actions per sample.
        video_backend: ``"torchcodec"``, ``"pyav"``, or None for the faster one that works here.
        tolerance_s: how far a video's time stamp may be from the asked one.
        wanted: the frame store to read from, if the config asks for one or one is there; None to do without.
        verify_videos: whether videos must be whole; they need not be where a store holds their frames.

    Raises:
        ValueError: if the data set or one of its files is missing or damaged, no episode is chosen, or the frame store
            does not fit.
    """
    root = files.locate(config.repo_id, config.root, config.revision)
    metadata = read_metadata(config.repo_id, root)
    chosen = choose_episodes(metadata, config.episodes, config.split)
    if config.root is None:
        metadata = files.fetch_missing(metadata, chosen, config.revision)
    store = find_store(metadata, config.frames, wanted, chosen) if wanted is not None else None
    if store is not None:
        chosen, warning = store.without_bad(chosen)
        if warning is not None:
            logger.warning("data set %s: %s", config.repo_id, warning)
        if not len(chosen):
            raise ValueError(
                f"data set {config.repo_id}: none of the episodes that `episodes` or `split` choose could be read when {store} "
                "was prepared: choose others, or copy the files again and run `python -m agent.data.prepare`"
            )
    files.verify_files(metadata, chosen, videos=verify_videos and store is None)
    names = dict.fromkeys([config.state, config.action, "task_index", "timestamp"])
    table = ColumnTable(metadata, chosen, tuple(names))
    backend = choose_video_backend(video_backend, needed=store is None and bool(metadata.video_keys))
    # A column that is not there is told with all else that does not fit the model.
    if verify_videos and store is None and {config.state, config.action} <= metadata.features.keys():
        problems = picture_problems(metadata, table, chosen, mapped_videos(metadata, config.cameras), tolerance_s)
        if problems:
            raise refusal(config.repo_id, problems)
    return Source(config, metadata, chosen, chosen, chunk_size, backend, tolerance_s, table, store=store)
