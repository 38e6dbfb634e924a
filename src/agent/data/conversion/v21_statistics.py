"""Brings a LeRobot v2.0 data set to v2.1 in place: adds the statistics of every episode, which LeRobot's converter wants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from agent.data.orphans import end_with_parent
from agent.data.recorded.info_file import check_v2_info, read_json_object, read_lines
from agent.data.recorded.pictures import NoColours, raw_picture, stored_picture
from agent.data.recorded.video_frame import rgb
from agent.safe_files import replacing, write_text


def to_v21(root: Path, processes: int) -> None:
    """Computes the statistics in ``processes`` processes, and writes the new version last.

    Raises:
        ValueError: if this is no whole v2.0 data set, or an earlier conversion is in the way.
    """
    from tqdm import tqdm

    name = f"data set {root.name}"
    info_file = root / "meta" / "info.json"
    info = read_json_object(name, info_file)
    if info.get("codebase_version") != "v2.0":
        raise ValueError(f"{info_file} says {info.get('codebase_version')}, not v2.0")
    old = root.with_name(f"{root.name}_old")
    if old.exists():
        raise ValueError(
            f"LeRobot's converter would replace it by {old}, of an earlier conversion: move that away, or delete it"
        )
    check_v2_info(name, info_file, info)
    episodes = [row["episode_index"] for row in read_lines(name, root / "meta" / "episodes.jsonl", episode_index=int)]
    for _ in read_lines(
        name, root / "meta" / "tasks.jsonl", task_index=int, task=str
    ):  # which LeRobot's converter reads
        pass
    target = root / "meta" / "episodes_stats.jsonl"
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent) as pool,
        replacing(target) as unfinished,
        unfinished.open("w") as file,
    ):
        computed = pool.map(partial(_statistics, root, info), episodes, chunksize=4)
        for episode, stats in zip(episodes, tqdm(computed, total=len(episodes), unit="episode"), strict=True):
            file.write(json.dumps({"episode_index": episode, "stats": stats}) + "\n")
    write_text(info_file, json.dumps({**info, "codebase_version": "v2.1"}, indent=4))


def _statistics(root: Path, info: dict[str, Any], episode: int) -> dict[str, dict[str, list]]:
    """Computes the statistics of every feature of one episode, as LeRobot does."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from lerobot.datasets.compute_stats import get_feature_stats

    place = {"episode_chunk": episode // info["chunks_size"], "episode_index": episode}
    path = root / info["data_path"].format(**place)
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again") from error
    if missing := [
        key for key, feature in info["features"].items() if _in_table(feature) and key not in table.column_names
    ]:
        raise ValueError(f"{path} has no column {', '.join(missing)}, which meta/info.json describes; copy it again")
    stats: dict[str, dict[str, np.ndarray]] = {}
    for key, feature in info["features"].items():
        if feature["dtype"] == "string":
            continue
        if feature["dtype"] in ("video", "image"):
            video = root / info["video_path"].format(video_key=key, **place) if feature["dtype"] == "video" else None
            pictures = _pictures(video, len(table)) if video else _stored_pictures(table[key])
            found = get_feature_stats(np.stack(list(pictures)), axis=(0, 2, 3), keepdims=True)
            stats[key] = {name: value if name == "count" else value[0] / 255 for name, value in found.items()}
        else:
            values = np.asarray(table[key].to_pylist())
            stats[key] = get_feature_stats(values, axis=0, keepdims=values.ndim == 1)
    return {key: {name: value.tolist() for name, value in values.items()} for key, values in stats.items()}


def _in_table(feature: dict[str, Any]) -> bool:
    return feature["dtype"] not in ("string", "video")


def _pictures(video: Path, frames: int) -> Iterator[np.ndarray]:
    """Reads some frames of a video, (3, H, W) uint8, made smaller as LeRobot does."""
    import av
    from lerobot.datasets.compute_stats import auto_downsample_height_width, sample_indices

    wanted = set(sample_indices(frames))
    with av.open(str(video)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                yield auto_downsample_height_width(rgb(frame).transpose(2, 0, 1))


def _stored_pictures(column: Any) -> Iterator[np.ndarray]:
    """Reads some pictures of a data file, likewise."""
    from lerobot.datasets.compute_stats import auto_downsample_height_width, sample_indices

    for number in sample_indices(len(column)):
        entry = column[number].as_py()
        try:
            picture = stored_picture(entry)
        except NoColours:  # depths, say, in their own unit, which is not divided by 255 with the others
            picture = 255.0 * np.repeat(np.atleast_3d(raw_picture(entry))[:, :, :1], 3, axis=2)
        yield auto_downsample_height_width(picture.transpose(2, 0, 1))
