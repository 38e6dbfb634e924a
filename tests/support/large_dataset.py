"""Writes a LeRobot v3 data set of millions of frames in under a minute: the columns and metadata of a large one, tiny pictures.

Run: PYTHONPATH=tests uv run python -m support.large_dataset FOLDER [EPISODES FRAMES]
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from agent.data.configuration import DatasetConfig
from agent.models.flow_matching import FlowDraws
from support.launching import REPOSITORY

CAMERA = "observation.images.front"
FPS = 10
DIMS = 7
TASKS = 200
EPISODES_PER_FILE = 500


def write_large_dataset(root: Path, episodes: int = 50_000, frames: int = 2_000_000, seed: int = 0) -> Path:
    """Writes the data set to ``root``, which must not exist yet, and returns ``root``.

    Every video file is a hard link to one and the same long video of 16 by 16 pixels. As in data sets that LeRobot
    records, the metadata hold statistics of every episode, and every episode is a row group of its parquet file.
    """
    generator = np.random.default_rng(seed)
    share = generator.uniform(0.5, 1.5, episodes)
    ends = np.maximum(1, np.round(np.cumsum(share) * frames / share.sum())).astype(np.int64)
    starts = np.append(0, ends[:-1])
    assert (ends > starts).all()
    table = {
        "episode": np.arange(episodes),
        "file": np.arange(episodes) // EPISODES_PER_FILE,
        "start": starts,
        "end": ends,
        "task": generator.integers(0, TASKS, episodes),
    }
    for number in range(int(table["file"][-1]) + 1):
        _write_columns(root, {name: values[table["file"] == number] for name, values in table.items()}, generator)
    _write_videos(root, table)
    _write_meta(root, table)
    return root


def _write_columns(root: Path, table: dict[str, np.ndarray], generator: np.random.Generator) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = table["end"] - table["start"]
    rows = int(lengths.sum())
    index = np.arange(table["start"][0], table["end"][-1])
    frame = index - np.repeat(table["start"], lengths)
    vectors = [generator.normal(size=rows * DIMS).astype(np.float32) for _ in range(2)]
    columns = {
        "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(vectors[0]), DIMS),
        "action": pa.FixedSizeListArray.from_arrays(pa.array(vectors[1]), DIMS),
        "timestamp": pa.array(frame / FPS, pa.float32()),
        "frame_index": pa.array(frame),
        "episode_index": pa.array(np.repeat(table["episode"], lengths)),
        "index": pa.array(index),
        "task_index": pa.array(np.repeat(table["task"], lengths)),
    }
    path = _numbered(root / "data", int(table["file"][0]), "parquet")
    whole = pa.table(columns)
    with pq.ParquetWriter(path, whole.schema) as writer:
        for start, length in zip(table["start"] - table["start"][0], lengths, strict=True):
            writer.write_table(whole.slice(start, length))


def _write_videos(root: Path, table: dict[str, np.ndarray]) -> None:
    import av

    lengths = np.bincount(table["file"], weights=table["end"] - table["start"]).astype(int)
    paths = [_numbered(root / "videos" / CAMERA, number, "mp4") for number in range(len(lengths))]
    with av.open(str(paths[0]), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        stream.options = {"g": "20", "preset": "ultrafast", "threads": "1"}
        for number in range(lengths.max()):
            picture = np.full((16, 16, 3), number % 200, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    for path in paths[1:]:
        os.link(paths[0], path)


def _write_meta(root: Path, table: dict[str, np.ndarray]) -> None:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    episodes = len(table["episode"])
    lengths = table["end"] - table["start"]
    first = table["start"][np.searchsorted(table["file"], table["file"])]
    zeros = np.zeros(episodes, dtype=np.int64)
    columns = {
        "episode_index": table["episode"],
        "tasks": [[f"do task {task}"] for task in table["task"]],
        "length": lengths,
        "data/chunk_index": zeros,
        "data/file_index": table["file"],
        "dataset_from_index": table["start"],
        "dataset_to_index": table["end"],
        f"videos/{CAMERA}/chunk_index": zeros,
        f"videos/{CAMERA}/file_index": table["file"],
        f"videos/{CAMERA}/from_timestamp": (table["start"] - first) / FPS,
        f"videos/{CAMERA}/to_timestamp": (table["end"] - first) / FPS,
    }
    for key in (
        "observation.state",
        "action",
        CAMERA,
        "timestamp",
        "frame_index",
        "episode_index",
        "index",
        "task_index",
    ):
        dims = {"observation.state": DIMS, "action": DIMS, CAMERA: 3}.get(key, 1)
        vector = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(episodes * dims)), dims)
        for name in ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"):
            columns[f"stats/{key}/{name}"] = vector.cast(pa.list_(pa.float64()))
    columns |= {f"meta/episodes/{name}": zeros for name in ("chunk_index", "file_index")}
    pq.write_table(pa.table(columns), _numbered(root / "meta" / "episodes", 0, "parquet"), row_group_size=10)
    tasks = pd.DataFrame(
        {"task_index": range(TASKS)}, index=pd.Index([f"do task {n}" for n in range(TASKS)], name="task")
    )
    tasks.to_parquet(root / "meta" / "tasks.parquet")
    features = {
        key: {"dtype": "float32", "shape": [DIMS], "names": None} for key in ("observation.state", "action")
    } | {
        CAMERA: {"dtype": "video", "shape": [16, 16, 3], "names": ["height", "width", "channels"]},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{
            name: {"dtype": "int64", "shape": [1], "names": None}
            for name in ("frame_index", "episode_index", "index", "task_index")
        },
    }  # fmt: skip
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "features": features,
        "total_episodes": episodes,
        "total_frames": int(table["end"][-1]),
        "total_tasks": TASKS,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "robot_type": None,
        "splits": {"train": f"0:{episodes}"},
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))


def _numbered(folder: Path, number: int, kind: str) -> Path:
    path = folder / "chunk-000" / f"file-{number:03d}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def draw(k: int) -> FlowDraws:
    return FlowDraws(np.zeros((4, 8), np.float32), np.float32(0.5))


def most_memory() -> int:
    """Most bytes that this process had at once; getrusage counts those of the process that started it, too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def start(*roots: tuple[Path | str, float | None]) -> dict:
    """From the config of the data to the first batch of 32 samples: what it took and what it gave."""
    begin = time.perf_counter()
    from agent.batch import SampleSpec
    from agent.data.build import build_data
    from agent.data.configuration import DataConfig, TrainDataConfig
    from agent.data.loading.loader import TrainLoader
    from agent.data.normalization.robot_statistics import Normalization
    from agent.data.samples.wording import Wording
    from support.samples import prompt_of

    datasets = [DatasetConfig(f"test/{n}", str(root), weight=weight) for n, (root, weight) in enumerate(roots)]
    data = build_data(
        DataConfig(TrainDataConfig(datasets, num_workers=0)),
        SampleSpec(4, 8, 8, (32, 32), 16, (CAMERA,), 7, 7),
        seed=0,
        draw=draw,
        validation_draw=draw,
        normalization=Normalization({"STATE": "MEAN_STD", "ACTION": "QUANTILES"}),
        wording=Wording(prompt_of(REPOSITORY / "demo" / "tokenizer")),
    )
    batch = next(TrainLoader(data.reader, data.mixture, per_device_batch=32))
    statistics = [data.robots[0].state_statistics, data.robots[0].action_statistics]
    return {
        "seconds": time.perf_counter() - begin,
        "bytes": most_memory(),
        "statistics": [{name: value.tolist() for name, value in part.to_dict().items()} for part in statistics],
        "fingerprint": data.fingerprint,
        "provenance": batch.provenance.tolist(),
        "actions": batch.actions.values.tolist(),
        "images": int(batch.observation.images[CAMERA].sum()),
    }


if __name__ == "__main__":
    write_large_dataset(Path(sys.argv[1]), *(int(number) for number in sys.argv[2:4]))
