"""One data set: which of its episodes are used, and its raw samples.

A :class:`Source` knows its frames from the metadata alone. LeRobot's reader is opened for the first sample and
travels to the workers with the source.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.data import files
from agent.data.episodes import choose_episodes

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass
class DatasetConfig:
    """One data set of a mixture."""

    repo_id: str
    """Name of the LeRobot v3 data set, ``user/name``; downloaded from the hub when `root` is not given."""
    root: str | None = None
    """Local folder of the data set: the one that holds ``meta/``, ``data/`` and ``videos/``."""
    weight: float | None = None
    """Relative share of the samples. Give it to every data set or to none; with none, all frames form one pool."""
    episodes: list[int] | None = None
    """The episodes to use; all when neither this nor `split` is given."""
    split: str | None = None
    """The episodes to use, as a slice: ``train``, ``train[:95%]``, ``train[10:200]``, ``train[5%:]``."""
    cameras: dict[str, str | None] | None = None
    """Model camera → key in the data set, or null where this robot has no such camera. Without it the keys must
    be the model's own. Cameras of the data set that are not named here are left out."""
    state: str = "observation.state"
    """Key of the robot's state in the data set."""
    action: str = "action"
    """Key of the actions in the data set."""
    revision: str | None = None
    """Revision on the hub: a branch, tag or commit; LeRobot's v3.0 tag when not given."""


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
    metadata: files.Metadata
    chosen: np.ndarray
    """The episodes that the config selects; LeRobot's reader is opened on these."""
    episodes: np.ndarray
    """The episodes of this source: the chosen ones, or what a hold-out leaves of them."""
    chunk_size: int
    video_backend: str
    tolerance_s: float
    cameras: dict[str, str] = field(default_factory=dict)
    """Model camera → key in the data set."""
    with_previous_action: bool = False

    def __post_init__(self) -> None:
        self._ends = np.cumsum(self.metadata.episodes["length"][self.episodes])
        self._dataset: Any = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __str__(self) -> str:
        return f"data set {self.config.repo_id}"

    def view(self, episodes: np.ndarray, with_previous_action: bool = False) -> Source:
        """The same data set, seen through fewer of its episodes."""
        return replace(self, episodes=np.sort(episodes), with_previous_action=with_previous_action)

    def frame(self, position: int) -> tuple[int, int]:
        """The episode and the frame in it at a position of this source."""
        if not 0 <= position < len(self):
            raise IndexError(f"{self} has {len(self)} frames, asked for {position}")
        place = int(np.searchsorted(self._ends, position, side="right"))
        before = int(self._ends[place - 1]) if place else 0
        return int(self.episodes[place]), position - before

    def columns(self, name: str) -> np.ndarray:
        """A low-dimensional column over this source's frames, (frames, dims), read without decoding any image."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths = dict.fromkeys(self.metadata.data_file(int(episode)) for episode in self.episodes)
        parts, owners, frames = [], [], []
        for path in paths:
            table = pq.read_table(path, columns=list(dict.fromkeys([name, "episode_index", "frame_index"])))
            values = table[name].combine_chunks()
            while pa.types.is_nested(values.type):
                values = values.flatten()
            parts.append(values.to_numpy(zero_copy_only=False).reshape(len(table), -1))
            owners.append(table["episode_index"].to_numpy())
            frames.append(table["frame_index"].to_numpy())
        owner, frame = np.concatenate(owners), np.concatenate(frames)
        wanted = np.flatnonzero(np.isin(owner, self.episodes))
        order = wanted[np.lexsort((frame[wanted], owner[wanted]))]
        if len(order) != len(self):
            raise ValueError(f"{self}: its files hold {len(order)} of the {len(self)} frames of the metadata")
        return np.concatenate(parts)[order]

    def tasks(self) -> list[str]:
        """The instructions that occur in this source.

        Raises:
            ValueError: if a frame has no instruction or an empty one, naming its episode.
        """
        indices = self.columns("task_index")[:, 0]
        for index in (used := np.unique(indices)):
            known = 0 <= index < len(self.metadata.tasks)
            if not known or not self.metadata.tasks[index].strip():
                episode, frame = self.frame(int(np.flatnonzero(indices == index)[0]))
                raise ValueError(
                    f"{self}: the instruction of episode {episode}, frame {frame} is {'empty' if known else 'missing'} "
                    f"(task {index} in meta/tasks.parquet). Give it words there, or leave the episode out with "
                    "`episodes`."
                )
        return [self.metadata.tasks[index] for index in used]

    def open(self) -> Any:
        """LeRobot's reader, opened once."""
        if self._dataset is None:
            self._dataset = self._opened()
        return self._dataset

    def read(self, position: int) -> RawSample:
        """The sample at a position; decodes one frame of every mapped camera.

        Raises:
            RuntimeError: if it cannot be read, naming data set, episode, frame and files.
        """
        episode, frame = self.frame(position)
        try:
            item = self.open()[self._row(episode) + frame]
            assert (int(item["episode_index"]), int(item["frame_index"])) == (episode, frame), "rows are out of order"
            return self._sample(item, episode, frame)
        except Exception as error:
            used = [self.metadata.data_file(episode)]
            used += [self.metadata.video_file(episode, key) for key in self._mapped_videos()]
            names = ", ".join(str(path) for path in used)
            raise RuntimeError(
                f"{self}, episode {episode}, frame {frame} cannot be read ({type(error).__name__}: {error}); "
                f"its files: {names}"
            ) from error

    def _sample(self, item: dict[str, Any], episode: int, frame: int) -> RawSample:
        actions, is_pad = item[self.config.action].numpy(), item[f"{self.config.action}_is_pad"].numpy()
        actions = actions.astype(np.float32).reshape(len(actions), -1)
        previous, previous_is_pad = None, False
        if self.with_previous_action:
            previous, actions = actions[0], actions[1:]
            previous_is_pad, is_pad = bool(is_pad[0]), is_pad[1:]
        return RawSample(
            images={slot: _as_uint8(item[key]) for slot, key in self.cameras.items()},
            state=item[self.config.state].numpy().astype(np.float32).reshape(-1),
            actions=actions,
            action_is_pad=is_pad,
            previous_action=previous,
            previous_is_pad=previous_is_pad,
            task=item["task"],
            episode=episode,
            frame=frame,
        )

    def _mapped_videos(self) -> list[str]:
        return [key for key in self.metadata.video_keys if key in self.cameras.values()]

    def _row(self, episode: int) -> int:
        """Where an episode begins in LeRobot's table of the chosen episodes."""
        if "_starts" not in self.__dict__:
            lengths = self.metadata.episodes["length"][self.chosen]
            self._starts = np.cumsum(lengths) - lengths
        return int(self._starts[np.searchsorted(self.chosen, episode)])

    def _opened(self) -> Any:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        steps = range(-1 if self.with_previous_action else 0, self.chunk_size)
        fps = self.metadata.info["fps"]
        every = len(self.chosen) == self.metadata.total_episodes
        dataset = LeRobotDataset(
            self.config.repo_id,
            root=self.metadata.root,
            # "all" costs LeRobot no table of indices
            episodes=None if every else [int(episode) for episode in self.chosen],
            delta_timestamps={self.config.action: [step / fps for step in steps]},
            tolerance_s=self.tolerance_s,
            video_backend=self.video_backend,
            return_uint8=True,
        )
        # LeRobot decodes every camera that its metadata lists; forget those that the model does not see.
        unused = [
            key
            for key, feature in dataset.meta.info.features.items()
            if feature["dtype"] in ("video", "image") and key not in self.cameras.values()
        ]
        table = dataset.reader.hf_dataset
        dataset.reader.hf_dataset = table.remove_columns([key for key in unused if key in table.column_names])
        for key in unused:
            del dataset.meta.info.features[key]
        return dataset


def _as_uint8(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) uint8 from what LeRobot gives: uint8 from a video, float in [0, 1] from a PNG."""
    import torch

    if image.dtype != torch.uint8:
        image = (image * 255.0).round().clamp(0, 255).to(torch.uint8)
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image


def open_source(config: DatasetConfig, chunk_size: int, video_backend: str | None, tolerance_s: float) -> Source:
    """Finds a data set, chooses its episodes and verifies their files.

    Args:
        config: the data set.
        chunk_size: T, actions per sample.
        video_backend: ``"torchcodec"``, ``"pyav"``, or None for the faster one that works here.
        tolerance_s: how far a video's time stamp may be from the asked one.

    Raises:
        ValueError: if the data set or one of its files is missing or damaged, or no episode is chosen.
    """
    root = files.locate(config.repo_id, config.root, config.revision)
    metadata = files.read_metadata(config.repo_id, root)
    chosen = choose_episodes(metadata, config.episodes, config.split)
    if config.root is None:
        metadata = files.fetch_missing(metadata, chosen, config.revision)
    files.verify_files(metadata, chosen)
    return Source(config, metadata, chosen, chosen, chunk_size, choose_video_backend(video_backend), tolerance_s)


@cache
def choose_video_backend(asked: str | None) -> str:
    """The decoder to use: ``torchcodec`` when it really loads, else ``pyav``; logged once.

    Raises:
        ValueError: if the one that is asked for is unknown or does not load.
    """
    if asked not in (None, "torchcodec", "pyav"):
        raise ValueError(f"data.train.video_backend is {asked!r}: write torchcodec, pyav, or leave it out")
    if asked == "pyav":
        return asked
    try:
        # Installed is not enough: it binds FFmpeg's shared libraries when it is imported.
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        if asked == "torchcodec":
            raise ValueError(
                f"data.train.video_backend is torchcodec, which does not load here ({str(error).splitlines()[0]}). "
                "Install FFmpeg's shared libraries, or leave the setting out to decode with pyav."
            ) from error
        logger.info("videos are decoded with pyav; torchcodec is faster but does not load here")
        return "pyav"
    logger.info("videos are decoded with torchcodec")
    return "torchcodec"
