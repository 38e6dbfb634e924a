"""Finds a data set on disk or on the hub, and checks that its files are complete and readable, before LeRobot is asked.

A folder that is missing, half copied or cut short is named here with the episodes it costs, in seconds, rather than by a
decoder in the night; LeRobot would go to the hub instead of saying what is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from agent import hub
from agent.data.recorded.metadata import Metadata, read_metadata, spelled
from agent.data.recorded.mp4 import frame_times, outermost_boxes

logger = logging.getLogger(__name__)

_VERSION = "v3.0"


def locate(repo_id: str, root: str | None, revision: str | None) -> Path:
    """Finds the local folder of a data set's metadata, which is downloaded from the hub when it is not there yet.

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
    kinds = ["data", *(f"videos/{key}" for key in metadata.video_keys)]
    wanted = {path for kind in kinds for path, _ in files_of(metadata, episodes, kind)}
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
    """Opens the same files one after the other; yields the selected episodes in each, and what is wrong with it."""
    _, number = np.unique(metadata.data_places(), return_inverse=True)
    # Rows of episodes that are not selected are in the file, too.
    rows = np.bincount(number, weights=metadata.episodes["length"]).astype(np.int64)
    for path, members in files_of(metadata, episodes, "data"):
        expected = int(rows[number[members[0]]])
        yield members, _damaged(metadata.repo_id, path, members, _wrong_table(path, expected))
    for kind in [f"videos/{key}" for key in metadata.video_keys] if videos else []:
        for path, members in files_of(metadata, episodes, kind):
            last = float(metadata.episodes[f"{kind}/to_timestamp"][members].max())
            wrong = _wrong_video(path, last, float(metadata.info["fps"]))
            yield members, _damaged(metadata.repo_id, path, members, wrong)


def files_of(metadata: Metadata, episodes: np.ndarray, kind: str) -> list[tuple[Path, np.ndarray]]:
    """Lists the files of a kind, ``data`` or ``videos/<key>``, each with the selected episodes in it."""
    _, number = np.unique(metadata.places(kind)[episodes], return_inverse=True)
    members = np.split(episodes[np.argsort(number, kind="stable")], np.cumsum(np.bincount(number))[:-1])
    return [(metadata.file(kind, int(part[0])), part) for part in members]


def _damaged(repo_id: str, path: Path, episodes: np.ndarray, what: str | None) -> ValueError | None:
    if what is None:
        return None
    return ValueError(
        f"data set {repo_id}: {path} {what}. It holds episodes {spelled(episodes)}: "
        "copy the file again, or leave these episodes out with `episodes` or `split`."
    )


def _wrong_table(path: Path, rows: int) -> str | None:
    """Returns what is wrong with a data file that must have ``rows`` rows, or None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return "is missing"
    try:
        found = pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        return f"is empty, cut short or damaged ({str(error).splitlines()[0]})"
    return None if found == rows else f"has {found} rows where the metadata counts {rows}"


def _wrong_video(path: Path, last: float, fps: float) -> str | None:
    """Returns what is wrong with a video whose episodes reach ``last`` seconds, or None.

    Whether its frames are those of its episodes is found by `agent.data.recorded.stretches`, where its index tells.
    """
    import av

    if not path.is_file():
        return "is missing"
    try:
        gap = _missing_bytes(path)
    except OSError as error:  # of another user, perhaps
        return f"cannot be read ({error.strerror})"
    if gap is not None:
        return gap
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            known = stream.duration is not None and stream.time_base is not None
            duration = float(stream.duration * stream.time_base) if known else None  # type: ignore[operator]
    except (av.FFmpegError, IndexError) as error:
        return f"cannot be opened as a video ({error})"
    if duration is not None and duration < last - 1.5 / fps and frame_times(path) is None:
        return f"ends at {duration:.2f} s, its episodes reach {last:.2f} s"
    return None


def _missing_bytes(path: Path) -> str | None:
    """Returns what is wrong with the outermost boxes of an mp4, or None.

    LeRobot writes the index at the front, so a file that was cut short opens without complaint and fails only
    when a frame of its missing part is asked for. The lengths of the boxes tell.
    """
    size, kinds = path.stat().st_size, set()
    with path.open("rb") as file:
        for kind, offset, _, length in outermost_boxes(file, size):
            if length < 8 or offset + length > size:
                return f"is cut short or damaged after byte {offset} of {size}"
            kinds.add(kind)
    return None if {b"moov", b"mdat"} <= kinds else "is empty or no complete mp4"
