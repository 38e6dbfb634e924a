"""Puts the converted parts of a data set together: LeRobot v3's data files and ``meta`` folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agent.data.conversion.shard import Layout, Place

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass
class Totals:
    """What was put together so far."""

    episodes: int = 0
    frames: int = 0
    left_out: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the table of episodes."""
    named: dict[str, list[int]] = field(default_factory=dict)
    """Episodes that were left out, by the number of their source file."""


def write_metadata(folder: Path, layout: Layout, places: Sequence[Place]) -> Totals:
    """Writes ``data`` and ``meta`` of a data set whose videos are there.

    Raises:
        ValueError: if no episode is left, or they are of different dimensions.
    """
    totals = Totals()
    columns: dict[str, list[np.ndarray]] = {"observation.state": [], "action": []}
    histograms = {camera: np.zeros((3, 256), dtype=np.int64) for camera in layout.images}
    for place in places:
        report = json.loads(place.report.read_text())
        totals.left_out += len(report["left_out"])
        if report["left_out"]:
            totals.named[str(place.number)] = report["left_out"]
        if not report["episodes"]:
            continue
        with np.load(place.columns) as part:
            vectors = {"observation.state": part["state"], "action": part["action"]}
        for key, values in vectors.items():
            columns[key].append(values)
            if values.shape[1] != columns[key][0].shape[1]:
                raise ValueError(
                    f"file {place.number}: {key} has {values.shape[1]} dimensions, not {columns[key][0].shape[1]}"
                )
        for camera, histogram in report["histograms"].items():
            histograms[camera] += histogram
        _add(totals, place, report["episodes"], vectors, layout)
    if not totals.episodes:
        raise ValueError("no episode has an instruction: name the feature that holds it with --instruction")
    whole = {key: np.concatenate(parts) for key, parts in columns.items()}
    _write_tables(folder, totals)
    if totals.named:
        (folder / "meta" / "left_out.json").write_text(json.dumps(totals.named))
    stats = {key: _of_columns(values) for key, values in whole.items()}
    stats |= {f"observation.images.{camera}": _of_pixels(histogram) for camera, histogram in histograms.items()}
    (folder / "meta" / "stats.json").write_text(json.dumps(stats, indent=4))
    dims = {key: values.shape[1] for key, values in whole.items()}
    info = _info(
        layout, totals, dims, next(place for place in places if place.video(next(iter(layout.images))).is_file())
    )
    (folder / "meta" / "info.json").write_text(json.dumps(info, indent=4))
    return totals


def _add(
    totals: Totals, place: Place, episodes: list[dict[str, Any]], vectors: dict[str, np.ndarray], layout: Layout
) -> None:
    """Writes the data file of one part, and adds its rows to the table of episodes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = place.numbered("data", "parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    chunk, file = place.chunk_and_file
    columns = {key: _column(values) for key, values in vectors.items()}
    names = ("frame_index", "episode_index", "index", "task_index")
    integers = {name: pa.int64() for name in names}
    kinds = {**{key: column.type for key, column in columns.items()}, "timestamp": pa.float32(), **integers}
    with pq.ParquetWriter(path, pa.schema(kinds)) as writer:
        begin = 0
        for episode in episodes:
            length, task = episode["length"], totals.tasks.setdefault(episode["task"], len(totals.tasks))
            frame = np.arange(length)
            values = [frame, np.full(length, totals.episodes), totals.frames + frame, np.full(length, task)]
            table = {key: column.slice(begin, length) for key, column in columns.items()}
            table |= {"timestamp": pa.array(frame / layout.fps, pa.float32()), **dict(zip(names, values, strict=True))}
            writer.write_table(pa.table(table, schema=writer.schema))  # a row group of its own, as LeRobot writes
            row = {"episode_index": totals.episodes, "tasks": [episode["task"]], "length": length}
            row |= {"data/chunk_index": chunk, "data/file_index": file}
            row |= {"dataset_from_index": totals.frames, "dataset_to_index": totals.frames + length}
            for camera in layout.images:
                video = {"chunk_index": chunk, "file_index": file, "from_timestamp": begin / layout.fps}
                video["to_timestamp"] = (begin + length) / layout.fps
                row |= {f"videos/observation.images.{camera}/{name}": value for name, value in video.items()}
            totals.rows.append(row)
            totals.episodes, totals.frames, begin = totals.episodes + 1, totals.frames + length, begin + length


def _column(values: np.ndarray) -> Any:
    import pyarrow as pa

    flat = pa.array(values.ravel())
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _write_tables(folder: Path, totals: Totals) -> None:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0} for row in totals.rows]
    pq.write_table(pa.Table.from_pylist(rows), path)
    index = pd.Index(list(totals.tasks), name="task")
    pd.DataFrame({"task_index": list(totals.tasks.values())}, index=index).to_parquet(folder / "meta" / "tasks.parquet")


def _of_columns(values: np.ndarray) -> dict[str, list]:
    wide = values.astype(np.float64)
    stats = {name: getattr(wide, name)(axis=0).tolist() for name in ("min", "max", "mean", "std")}
    quantiles = {name: np.quantile(wide, share, axis=0).tolist() for name, share in _QUANTILES.items()}
    return {**stats, "count": [len(wide)], **quantiles}


def _of_pixels(histogram: np.ndarray) -> dict[str, list]:
    """Computes statistics per colour and in [0, 1], of shape (3, 1, 1), as LeRobot has them."""
    values, counts = np.arange(256) / 255, histogram.sum(axis=1)
    mean = histogram @ values / counts
    stats = {"mean": mean, "std": np.sqrt(np.maximum(0, histogram @ values**2 / counts - mean**2))}
    reached = np.cumsum(histogram, axis=1) / counts[:, None]
    stats |= {name: values[(reached >= share).argmax(axis=1)] for name, share in _QUANTILES.items()}
    stats |= {
        "min": values[(histogram > 0).argmax(axis=1)],
        "max": values[255 - (histogram > 0)[:, ::-1].argmax(axis=1)],
    }
    shaped = {name: value.reshape(3, 1, 1).tolist() for name, value in stats.items()}
    return {**shaped, "count": [int(counts[0])]}


def _info(layout: Layout, totals: Totals, dims: dict[str, int], place: Place) -> dict[str, Any]:
    import av

    features: dict[str, Any] = {key: {"dtype": "float32", "shape": [size], "names": None} for key, size in dims.items()}
    for camera in layout.images:
        with av.open(str(place.video(camera))) as container:
            codec = container.streams.video[0].codec.canonical_name
        details = {"height": layout.size, "width": layout.size, "codec": codec, "pix_fmt": "yuv420p", "fps": layout.fps}
        features[f"observation.images.{camera}"] = {
            "dtype": "video",
            "shape": [layout.size, layout.size, 3],
            "names": ["height", "width", "channels"],
            "info": {f"video.{name}": value for name, value in details.items()}
            | {"video.channels": 3, "has_audio": False, "is_depth_map": False},
        }
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "fps": layout.fps,
        "features": features,
        "total_episodes": totals.episodes,
        "total_frames": totals.frames,
        "total_tasks": len(totals.tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "robot_type": None,
        "splits": {"train": f"0:{totals.episodes}"},
    }
