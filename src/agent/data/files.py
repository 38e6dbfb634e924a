"""Is the data set on disk, complete and readable? Asked before LeRobot, which would go to the hub instead of saying.

A folder that is missing, half copied or cut short is named here with the episodes it costs, in seconds, rather
than by a decoder in the night.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agent import hub
from agent.data.episode_table import read_episodes

logger = logging.getLogger(__name__)

_VERSION = "v3.0"


@dataclass(frozen=True)
class Metadata:
    """What the ``meta`` folder of a LeRobot v3 data set says."""

    repo_id: str
    root: Path
    info: dict[str, Any]
    episodes: dict[str, np.ndarray]
    """Column → (episodes,): lengths, places in files, video time stamps; row e is episode e."""
    tasks: list[str]
    """The instruction of each task index."""

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

    def data_places(self) -> np.ndarray:
        """(episodes,) a number for each one's parquet file, the same for episodes in one file."""
        return self.places("data")

    def places(self, kind: str) -> np.ndarray:
        """(episodes,) a number for each one's file of a kind: ``data`` or ``videos/<key>``."""
        return self.episodes[f"{kind}/chunk_index"].astype(np.int64) << 32 | self.episodes[f"{kind}/file_index"]

    def data_file(self, episode: int) -> Path:
        """The parquet file that holds an episode."""
        chunk, file = (int(self.episodes[f"data/{name}"][episode]) for name in ("chunk_index", "file_index"))
        return self.root / self.info["data_path"].format(chunk_index=chunk, file_index=file)

    def video_file(self, episode: int, key: str) -> Path:
        """The mp4 file that holds an episode's frames of one camera."""
        names = (f"videos/{key}/chunk_index", f"videos/{key}/file_index")
        chunk, file = (int(self.episodes[name][episode]) for name in names)
        return self.root / self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)


def _is_depth(feature: dict[str, Any]) -> bool:
    details = [feature.get("info") or {}, feature.get("video_info") or {}]
    return any(detail.get(name) for detail in details for name in ("is_depth_map", "video.is_depth_map"))


def spelled(episodes: Sequence[int] | np.ndarray) -> str:
    """Episode numbers for a message: ``0-3, 7``; long lists are cut."""
    numbers = np.unique(np.asarray(episodes, dtype=np.int64))
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    parts = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run)]
    return ", ".join(parts[:8]) + (", …" if len(parts) > 8 else "")


def locate(repo_id: str, root: str | None, revision: str | None) -> Path:
    """The local folder of a data set's metadata; from the hub it is downloaded when it is not there yet.

    Raises:
        ValueError: if the folder is missing or holds no data set, or the hub cannot be reached.
    """
    if root is not None:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            here = "" if folder.is_absolute() else f" in {Path.cwd()}"
            raise ValueError(
                f"data set {repo_id}: the folder {folder} does not exist{here}. "
                "Correct `root`, or leave `root` out to take the data set from the Hugging Face hub."
            )
        if not (folder / "meta" / "info.json").is_file():
            holds = "is empty" if not any(folder.iterdir()) else "has no meta/info.json"
            raise ValueError(
                f"data set {repo_id}: the folder {folder} {holds}. `root` is the folder that holds "
                "meta/, data/ and videos/ of one LeRobot data set; copy it again if the copy was cut short."
            )
        return folder
    from lerobot.datasets.utils import has_legacy_hub_download_metadata
    from lerobot.utils.constants import HF_LEROBOT_HOME

    # A data set recorded on this machine, where LeRobot keeps it.
    recorded = HF_LEROBOT_HOME / repo_id
    if (recorded / "meta" / "info.json").is_file() and not has_legacy_hub_download_metadata(recorded):
        return recorded
    return _from_hub(repo_id, revision, ["meta/*"])


def fetch_missing(metadata: Metadata, episodes: np.ndarray, revision: str | None) -> Metadata:
    """Downloads what the selected episodes of a data set on the hub still lack; returns the metadata there."""
    wanted = {path for path, _ in files_of(metadata, episodes, "data", metadata.data_file)}
    for key in metadata.video_keys:
        found = files_of(metadata, episodes, f"videos/{key}", partial(metadata.video_file, key=key))
        wanted |= {path for path, _ in found}
    if all(path.is_file() for path in wanted):
        return metadata
    patterns = sorted(str(path.relative_to(metadata.root)) for path in wanted)
    return read_metadata(metadata.repo_id, _from_hub(metadata.repo_id, revision, ["meta/*", *patterns]))


def _from_hub(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    repository = hub.Repository(repo_id, "dataset", revision or _VERSION)
    folder = hub.snapshot(repository, f"data set {repo_id}", patterns, HF_LEROBOT_HUB_CACHE)
    if not (folder / "meta" / "info.json").is_file():
        raise ValueError(
            f"data set {repo_id}: {repository.page} has no meta/info.json, so it is no LeRobot data set; check the "
            f"spelling of `repo_id`, or get it with {repository.command}"
        )
    return folder


def read_metadata(repo_id: str, root: Path) -> Metadata:
    """Reads ``meta``.

    Raises:
        ValueError: if a file there is missing or damaged, or the format is not v3.
    """
    info_file, tasks_file = root / "meta" / "info.json", root / "meta" / "tasks.parquet"
    try:
        info = json.loads(info_file.read_text())
    except ValueError as error:
        raise ValueError(f"data set {repo_id}: {info_file} is not valid JSON ({error}); copy it again") from error
    if not isinstance(info, dict):
        raise ValueError(f"data set {repo_id}: {info_file} holds a {type(info).__name__}, not an object; copy it again")
    _check_version(repo_id, root, str(info.get("codebase_version")))
    _check_info(repo_id, info_file, info)
    episode_files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not episode_files or not tasks_file.is_file():
        raise ValueError(
            f"data set {repo_id}: {root / 'meta'} lacks its episodes/ or tasks.parquet. A recording that was not "
            "closed with finalize() looks like this; otherwise copy the folder again."
        )
    episodes = read_episodes(repo_id, root, episode_files)
    _check_episodes(repo_id, info, episodes)
    return Metadata(repo_id, root, info, episodes, _read_tasks(repo_id, tasks_file))


def _read_tasks(repo_id: str, path: Path) -> list[str]:
    """The instructions in the order of the rows, which is LeRobot's order; pandas stores them as an index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"data set {repo_id}: {path} is damaged ({error}); copy it again") from error
    texts = [
        name
        for name in table.column_names
        if pa.types.is_string(kind := table.schema.field(name).type) or pa.types.is_large_string(kind)
    ]
    if len(texts) != 1:
        raise ValueError(f"data set {repo_id}: {path} needs one column of instructions, it has {texts}")
    return [text or "" for text in table[texts[0]].to_pylist()]


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
    old = root.absolute().with_name(f"{root.name}_old")
    if old.exists():
        advice = f"first move {old} away, by which the converter would replace it, or delete it; then {advice}"
    if version not in commands:
        advice = "convert it with the LeRobot that wrote it, or its successors, to v2.1 or later"
    raise ValueError(f"data set {repo_id} has format {version}, this program reads v3: {advice}.")


def _check_info(repo_id: str, path: Path, info: dict[str, Any]) -> None:
    kinds: dict[str, type | tuple[type, ...]] = {
        "fps": (int, float),
        "total_episodes": int,
        "features": dict,
        "data_path": str,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(info.get(name), kind) or info[name] == 0]
    if wrong:
        found = ", ".join(f"{name} {info.get(name)!r:.40}" for name in wrong)
        raise ValueError(f"data set {repo_id}: {path} has {found}; copy the file again, or write what was recorded")
    for key, feature in info["features"].items():
        known = feature if isinstance(feature, dict) else {}
        shape = known.get("shape")
        sizes = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
        if not sizes or not isinstance(known.get("dtype"), str):
            raise ValueError(
                f"data set {repo_id}: {path} describes {key} as {json.dumps(feature):.60}, which needs a dtype and a shape, "
                'such as {"dtype": "float32", "shape": [7], "names": null}; copy the file again, or write what was recorded'
            )
        if known["dtype"] == "video" and not isinstance(info.get("video_path"), str):
            raise ValueError(
                f"data set {repo_id}: {path} says that {key} is a video and has no video_path; copy the file again"
            )


def _check_episodes(repo_id: str, info: dict[str, Any], episodes: dict[str, np.ndarray]) -> None:
    places = ("chunk_index", "file_index")
    needed = ["episode_index", "length", *(f"data/{name}" for name in places)]
    for key in (key for key, feature in info["features"].items() if feature["dtype"] == "video"):
        needed += [f"videos/{key}/{name}" for name in (*places, "from_timestamp", "to_timestamp")]
    rows = max(len(column) for column in episodes.values())  # a file may lack what others have
    lacking = [name for name in needed if len(episodes.get(name, ())) < rows or not np.isfinite(episodes[name]).all()]
    if lacking:
        raise ValueError(
            f"data set {repo_id}: meta/episodes lacks {', '.join(lacking[:4])}, for all episodes or for some; copy the folder "
            "again, or take what was not recorded out of the features in meta/info.json"
        )
    numbers, count = episodes["episode_index"], info["total_episodes"]
    if len(numbers) != count:
        raise ValueError(
            f"data set {repo_id}: meta/info.json counts {count} episodes, meta/episodes holds {len(numbers)} "
            f"({spelled(numbers)}); copy the folder again"
        )
    if len(wrong := np.flatnonzero(numbers != np.arange(count))):
        raise ValueError(
            f"data set {repo_id}: row {wrong[0]} of meta/episodes is episode {numbers[wrong[0]]}, and LeRobot takes the n-th for "
            f"episode n: number the episodes from 0 to {count - 1}, there in this order and in the data files alike"
        )


def verify_files(metadata: Metadata, episodes: np.ndarray, videos: bool = True) -> None:
    """Opens every data file of the selected episodes, and every video unless ``videos`` is false.

    Raises:
        ValueError: on the first file that is missing, empty, cut short or holds too few rows or frames, naming
            the file and the selected episodes that it holds.
    """
    for _, problem in look_through(metadata, episodes, videos):
        if problem is not None:
            raise problem


def look_through(
    metadata: Metadata, episodes: np.ndarray, videos: bool = True
) -> Iterator[tuple[np.ndarray, ValueError | None]]:
    """Opens the same files one after the other: the selected episodes in each, and what is wrong with it."""
    _, number = np.unique(metadata.data_places(), return_inverse=True)
    # Rows of episodes that are not selected are in the file, too.
    rows = np.bincount(number, weights=metadata.episodes["length"]).astype(np.int64)
    for path, members in files_of(metadata, episodes, "data", metadata.data_file):
        expected = int(rows[number[members[0]]])
        yield members, _problem(partial(_verify_parquet, metadata.repo_id, path, members, expected))
    for key in metadata.video_keys if videos else []:
        place = f"videos/{key}"
        for path, members in files_of(metadata, episodes, place, partial(metadata.video_file, key=key)):
            last = float(metadata.episodes[f"{place}/to_timestamp"][members].max())
            fps = float(metadata.info["fps"])
            yield members, _problem(partial(_verify_video, metadata.repo_id, path, members, last, fps))


def _problem(verify: Callable[[], None]) -> ValueError | None:
    try:
        verify()
    except ValueError as error:
        return error
    return None


def files_of(
    metadata: Metadata, episodes: np.ndarray, place: str, path_of: Callable[[int], Path]
) -> list[tuple[Path, np.ndarray]]:
    """Each file of one kind with the selected episodes in it."""
    _, number = np.unique(metadata.places(place)[episodes], return_inverse=True)
    members = np.split(episodes[np.argsort(number, kind="stable")], np.cumsum(np.bincount(number))[:-1])
    return [(path_of(int(part[0])), part) for part in members]


def _damaged(repo_id: str, path: Path, episodes: np.ndarray, what: str) -> ValueError:
    return ValueError(
        f"data set {repo_id}: {path} {what}. It holds episodes {spelled(episodes)}: "
        "copy the file again, or leave these episodes out with `episodes` or `split`."
    )


def _verify_parquet(repo_id: str, path: Path, episodes: np.ndarray, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise _damaged(repo_id, path, episodes, "is missing")
    try:
        found = pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise _damaged(repo_id, path, episodes, f"is empty, cut short or damaged ({reason})") from error
    if found != rows:
        raise _damaged(repo_id, path, episodes, f"has {found} rows where the metadata counts {rows}")


def _verify_video(repo_id: str, path: Path, episodes: np.ndarray, last: float, fps: float) -> None:
    import av

    if not path.is_file():
        raise _damaged(repo_id, path, episodes, "is missing")
    try:
        gap = _missing_bytes(path)
    except OSError as error:  # of another user, perhaps
        raise _damaged(repo_id, path, episodes, f"cannot be read ({error.strerror})") from error
    if gap is not None:
        raise _damaged(repo_id, path, episodes, gap)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            known = stream.duration is not None and stream.time_base is not None
            duration = float(stream.duration * stream.time_base) if known else None  # type: ignore[operator]
    except (av.FFmpegError, IndexError) as error:
        raise _damaged(repo_id, path, episodes, f"cannot be opened as a video ({error})") from error
    if duration is not None and duration < last - 1.5 / fps:
        raise _damaged(repo_id, path, episodes, f"ends at {duration:.2f} s, its episodes reach {last:.2f} s")


def _missing_bytes(path: Path) -> str | None:
    """What is wrong with the outermost boxes of an mp4, or None.

    LeRobot writes the index at the front, so a file that was cut short opens without complaint and fails only
    when a frame of its missing part is asked for. The lengths of the boxes tell.
    """
    size, offset, kinds = path.stat().st_size, 0, set()
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if length == 1:  # a 64-bit length follows
                length = int.from_bytes(header[8:16], "big")
            elif length == 0:  # to the end of the file
                length = size - offset
            if length < 8 or offset + length > size:
                return f"is cut short or damaged after byte {offset} of {size}"
            kinds.add(kind)
            offset += length
    return None if {b"moov", b"mdat"} <= kinds else "is empty or no complete mp4"
