"""Reads and checks what the ``meta`` folder of a LeRobot v3 data set says."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent import hub
from agent.data.recorded.episode_table import read_episodes
from agent.data.recorded.info_file import check_info, first_empty_line, read_json_object, split_bounds, splits_of
from agent.data.recorded.task_table import read_tasks
from agent.spelling import ranges


@dataclass(frozen=True)
class Metadata:
    """What the ``meta`` folder of a LeRobot v3 data set says."""

    repo_id: str
    root: Path
    info: dict[str, Any]
    episodes: dict[str, np.ndarray]
    """Column → (episodes,): lengths, places in files, video time stamps; row e is episode e."""
    tasks: dict[int, str]
    """``task_index`` → instruction."""

    @property
    def total_episodes(self) -> int:
        return len(self.episodes["episode_index"])

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    @property
    def video_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature["dtype"] == "video"]

    @property
    def camera_keys(self) -> list[str]:
        """Keys of colour images; depth maps are no input of these policies."""
        return [
            key
            for key, feature in self.features.items()
            if feature["dtype"] in ("video", "image") and not _is_depth(feature)
        ]

    def splits(self) -> dict[str, Any]:
        """Returns what ``meta/info.json`` says of each split; see ``split``.

        Raises:
            ValueError: if it says nothing that could be a split.
        """
        return splits_of(f"data set {self.repo_id}", self._info_file, self.info, self.total_episodes)

    def split(self, name: str) -> tuple[int, int]:
        """Returns the first episode of a split, and the one behind its last.

        Raises:
            ValueError: if that is not what stands there.
        """
        of, path = f"data set {self.repo_id}", self._info_file
        return split_bounds(of, path, name, self.splits()[name], self.total_episodes)

    @property
    def _info_file(self) -> Path:
        return self.root / "meta" / "info.json"

    def data_places(self) -> np.ndarray:
        """Numbers the parquet file of each episode, (episodes,): the same number for episodes in one file."""
        return self.places("data")

    def places(self, kind: str) -> np.ndarray:
        """Numbers each episode's file of a kind, ``data`` or ``videos/<key>``: (episodes,)."""
        return self.episodes[f"{kind}/chunk_index"].astype(np.int64) << 32 | self.episodes[f"{kind}/file_index"]

    def file(self, kind: str, episode: int) -> Path:
        """Names the file of a kind that holds an episode: ``data``, or ``videos/<key>`` for its frames of one camera."""
        numbers = {name: int(self.episodes[f"{kind}/{name}"][episode]) for name in ("chunk_index", "file_index")}
        template = self.info["data_path" if kind == "data" else "video_path"]
        return self.root / template.format(video_key=kind.removeprefix("videos/"), **numbers)

    def data_file(self, episode: int) -> Path:
        """Names the parquet file that holds an episode."""
        return self.file("data", episode)

    def video_file(self, episode: int, key: str) -> Path:
        """Names the mp4 file that holds an episode's frames of one camera."""
        return self.file(f"videos/{key}", episode)


def _is_depth(feature: dict[str, Any]) -> bool:
    details = [feature.get("info") or {}, feature.get("video_info") or {}]
    return any(detail.get(name) for detail in details for name in ("is_depth_map", "video.is_depth_map"))


def spelled(episodes: Sequence[int] | np.ndarray) -> str:
    """Spells episode numbers for a message: ``0-3, 7``; long lists are cut."""
    return ranges(np.unique(np.asarray(episodes, dtype=np.int64)).tolist(), most=8)


def read_metadata(repo_id: str, root: Path) -> Metadata:
    """Reads ``meta``.

    Raises:
        ValueError: if a file there is missing or damaged, or the format is not v3.
    """
    name = f"data set {repo_id}"
    info_file, tasks_file = root / "meta" / "info.json", root / "meta" / "tasks.parquet"
    info = read_json_object(name, info_file)
    _check_version(repo_id, root, str(info.get("codebase_version")))
    check_info(name, info_file, info)
    episode_files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not episode_files or not tasks_file.is_file():
        raise ValueError(
            f"data set {repo_id}: {root / 'meta'} lacks its episodes/ or tasks.parquet. A recording that was not "
            "closed with finalize() looks like this; otherwise copy the folder again."
        )
    episodes = _by_number(repo_id, info, read_episodes(repo_id, root, episode_files))
    return Metadata(repo_id, root, info, episodes, read_tasks(name, tasks_file))


def _check_version(repo_id: str, root: Path, version: str) -> None:
    if version.startswith("v3."):
        return
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    if root.is_relative_to(HF_LEROBOT_HUB_CACHE):  # a cache, where only the metadata are yet
        repository = hub.Repository(repo_id, "dataset", root.name)
        raise ValueError(
            f"data set {repo_id} has format {version} at the hub, this program reads v3: get it with {repository.command}, "
            "and start again, to be told how to convert it there"
        )
    folder = shlex.quote(str(root.absolute()))
    commands = {
        "v2.0": f"`uv run python -m agent.data.from_v20 --root={folder}`, which completes it for LeRobot's own converter",
        "v2.1": "LeRobot's own `uv run python -m lerobot.scripts.convert_dataset_v21_to_v30 "
        f"--repo-id={shlex.quote(repo_id)} --root={folder} --push-to-hub=false`",
    }
    advice = f"convert it in place, which needs no network, with {commands.get(version)}; what it was stays as {root.name}_old"
    for path in sorted((root / "meta").glob("*.jsonl")):
        if (trouble := first_empty_line(path)) is not None and version in commands:
            advice = f"first mend its metadata: {trouble}; then {advice}"
            break
    old = root.absolute().with_name(f"{root.name}_old")
    if old.exists():
        advice = f"first move {old} away, by which the converter would replace it, or delete it; then {advice}"
    if version not in commands:
        advice = "convert it with the LeRobot that wrote it, or its successors, to v2.1 or later"
    raise ValueError(f"data set {repo_id} has format {version}, this program reads v3: {advice}.")


def _by_number(repo_id: str, info: dict[str, Any], episodes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the columns, and brings episode n into row n."""
    places = ("chunk_index", "file_index")
    whole, seconds = ["episode_index", "length", *(f"data/{name}" for name in places)], []
    for key in (key for key, feature in info["features"].items() if feature["dtype"] == "video"):
        whole += [f"videos/{key}/{name}" for name in places]
        seconds += [f"videos/{key}/{name}" for name in ("from_timestamp", "to_timestamp")]
    rows = max(len(column) for column in episodes.values())  # a file may lack what others have
    needed = [*whole, *seconds]
    lacking = [name for name in needed if len(episodes.get(name, ())) < rows or not np.isfinite(episodes[name]).all()]
    if lacking:
        raise ValueError(
            f"data set {repo_id}: meta/episodes lacks {', '.join(lacking[:4])}, for all episodes or for some; copy the folder "
            "again, or take what was not recorded out of the features in meta/info.json"
        )
    for name in whole:  # pandas makes floats of integers where one was missing, and others write unsigned ones
        values = episodes[name]
        if len(odd := np.flatnonzero((values != np.floor(values)) | (values < 0))):
            raise ValueError(
                f"data set {repo_id}: {name} in row {odd[0]} of meta/episodes is {values[odd[0]]}, which must be a whole number "
                "from 0 on; copy the folder again"
            )
    episodes = {**episodes, **{name: episodes[name].astype(np.int64) for name in whole}}
    numbers, count = episodes["episode_index"], info["total_episodes"]
    if len(numbers) != count:
        raise ValueError(
            f"data set {repo_id}: meta/info.json counts {count} episodes, meta/episodes holds {len(numbers)} "
            f"({spelled(numbers)}); copy the folder again"
        )
    order = np.argsort(numbers, kind="stable")
    if (numbers[order] != np.arange(count)).any():
        row = np.flatnonzero(numbers != np.arange(count))[0]
        raise ValueError(
            f"data set {repo_id}: row {row} of meta/episodes is episode {numbers[row]}, and LeRobot takes the n-th for "
            f"episode n: number the episodes from 0 to {count - 1}, there in this order and in the data files alike"
        )
    if (numbers != np.arange(count)).any():  # else they stay as they are, which may be mapped into memory
        episodes = {name: column[order] for name, column in episodes.items() if len(column) == count}
    return episodes
