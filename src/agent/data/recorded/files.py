"""Is the data set on disk, complete and readable? Asked before LeRobot, which would go to the hub instead of saying.

A folder that is missing, half copied or cut short is named here with the episodes it costs, in seconds, rather
than by a decoder in the night.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from agent import hub
from agent.data.recorded.metadata import Metadata, read_metadata, spelled
from agent.data.recorded.mp4 import frame_times

logger = logging.getLogger(__name__)

_VERSION = "v3.0"


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
            ends = metadata.episodes[f"{place}/to_timestamp"][members]
            fps = float(metadata.info["fps"])
            yield members, _problem(partial(_verify_video, metadata.repo_id, path, members, ends, fps))


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


def _verify_video(repo_id: str, path: Path, episodes: np.ndarray, ends: np.ndarray, fps: float) -> None:
    """Whether its frames are those of its episodes is found by `agent.data.recorded.stretches`, where its index tells."""
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
    if duration is not None and duration < (last := ends.max()) - 1.5 / fps and frame_times(path) is None:
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
