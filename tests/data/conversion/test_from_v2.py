"""LeRobot v2 data sets are refused with the command that converts them, and it does.

Run: pytest tests/data/conversion/test_from_v2.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.datasets import DEFAULT_TASKS, frame_image
from support.forked import ForkServer
from support.launching import MODEL, Workplace, kill_alone

from agent.data.configuration import DatasetConfig
from agent.data.source import open_source

CAMERA, STILL = "observation.images.front", "observation.images.still"
LENGTHS = (6, 9, 7, 8)
SIZE, FPS = (48, 64), 10


def vector(episode: int, frame: int) -> np.ndarray:
    return np.random.default_rng([episode, frame]).normal(size=7).astype(np.float32)


def write_v2(root: Path, version: str, still: bool = False) -> Path:
    """A data set as LeRobot's v2 wrote it: a parquet file and a video for every episode, JSON lines in meta."""
    numbers = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    features = {key: {"dtype": "float32", "shape": [7], "names": None} for key in ("observation.state", "action")}
    picture = {"shape": [*SIZE, 3], "names": ["height", "width", "channel"]}
    features[CAMERA] = {"dtype": "video", **picture, "info": {"video.fps": float(FPS), "video.is_depth_map": False}}
    if still:
        features[STILL] = {"dtype": "image", **picture}
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in numbers}
    features["timestamp"]["dtype"] = "float32"
    info = {
        "codebase_version": version,
        "robot_type": "test",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": 2,
        "total_videos": len(LENGTHS),
        "total_chunks": 1,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    for folder in ("meta", "data/chunk-000", f"videos/chunk-000/{CAMERA}"):
        (root / folder).mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    write_lines(root, "tasks", [{"task_index": n, "task": task} for n, task in enumerate(DEFAULT_TASKS)])
    rows = [{"episode_index": n, "tasks": [DEFAULT_TASKS[n % 2]], "length": length} for n, length in enumerate(LENGTHS)]
    write_lines(root, "episodes", rows)
    statistics = [{"episode_index": n, "stats": write_episode(root, n, still)} for n in range(len(LENGTHS))]
    if version == "v2.1":
        write_lines(root, "episodes_stats", statistics)
    return root


def write_lines(root: Path, name: str, rows: list[dict]) -> None:
    (root / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_episode(root: Path, episode: int, still: bool) -> dict:
    """Writes an episode's files; returns its statistics."""
    import av
    import datasets
    from PIL import Image

    length, before = LENGTHS[episode], sum(LENGTHS[:episode])
    frames = np.arange(length)
    vectors = np.stack([vector(episode, frame) for frame in frames])
    columns = {
        "observation.state": vectors,
        "action": 2 * vectors,
        "timestamp": (frames / FPS).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(length, episode),
        "index": before + frames,
        "task_index": np.full(length, episode % 2),
    }
    kinds = {
        key: datasets.Sequence(datasets.Value("float32"), length=7)
        if value.ndim == 2
        else datasets.Value(str(value.dtype))
        for key, value in columns.items()
    }
    rows = {key: list(value) for key, value in columns.items()}
    pictures = [frame_image(episode, frame, 0, SIZE) for frame in frames]
    if still:
        kinds[STILL], rows[STILL] = datasets.Image(), [Image.fromarray(picture) for picture in pictures]
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    table.to_parquet(root / f"data/chunk-000/episode_{episode:06d}.parquet")
    with av.open(str(root / f"videos/chunk-000/{CAMERA}/episode_{episode:06d}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = SIZE
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10", "g": "2", "bf": "0", "threads": "1"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    columns[CAMERA] = np.stack(pictures).transpose(3, 0, 1, 2).reshape(3, -1).T / 255
    return {
        key: {
            **{name: shaped(getattr(value, name)(axis=0), key).tolist() for name in ("min", "max", "mean", "std")},
            "count": [length],
        }
        for key, value in columns.items()
    }


def shaped(value, key: str) -> np.ndarray:
    return np.asarray(value).reshape(3, 1, 1) if key == CAMERA else np.atleast_1d(value)


def command_in(root: Path) -> list[str]:
    """The command that the refusal gives, as the shell would read it."""
    with pytest.raises(ValueError, match="this program reads v3: convert it in place, which needs no network") as error:
        open_source(DatasetConfig("test/old", root=str(root)), 4, None, 1e-4)
    (command,) = re.findall(r"`uv run python (.*?)`", str(error.value))
    return [sys.executable, *shlex.split(command)]


def check(root: Path, tmp_path: Path, server: ForkServer, still: bool = False) -> None:
    """Every frame is what was written; LeRobot and a training open it."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    source = open_source(DatasetConfig("test/old", root=str(root)), 4, None, 1e-4)
    source.cameras = {CAMERA: CAMERA, **({STILL: STILL} if still else {})}
    theirs = LeRobotDataset("test/old", root=root)
    assert len(source) == len(theirs) == sum(LENGTHS)
    for position in range(len(source)):
        sample, item = source.read(position), theirs[position]
        picture = frame_image(sample.episode, sample.frame, 0, SIZE).transpose(2, 0, 1).astype(float)
        np.testing.assert_array_equal(sample.state, vector(sample.episode, sample.frame))
        np.testing.assert_array_equal(sample.actions[0], item["action"].numpy())
        assert sample.task == item["task"] == DEFAULT_TASKS[sample.episode % 2]
        assert abs(sample.images[CAMERA].numpy()[0].mean() - picture[0].mean()) < 2
        np.testing.assert_array_equal(sample.images[CAMERA].numpy(), (item[CAMERA].numpy() * 255).round())
        if still:
            np.testing.assert_array_equal(sample.images[STILL].numpy(), picture)
    config = {
        "model_cfg": MODEL,
        "data": {"train": {"datasets": [{"repo_id": "test/old", "root": str(root)}], "num_workers": 0}},
        "global_batch_size": 2,
        "per_device_batch_size": 2,
        "n_updates": 1,
        "use_wandb": False,
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    code, output = server.run(Workplace(tmp_path), "old")
    assert code == 0, output


def offline(command: list[str]) -> subprocess.CompletedProcess:
    """Any question to a hub would fail."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True)


def test_v21(tmp_path, server):
    root = write_v2(tmp_path / "my data", "v2.1")
    done = offline(command_in(root))
    assert done.returncode == 0, done.stderr
    check(root, tmp_path, server)
    assert json.loads((tmp_path / "my data_old" / "meta" / "info.json").read_text())["codebase_version"] == "v2.1"


def test_v20(tmp_path, server):
    root = write_v2(tmp_path / "old", "v2.0", still=True)
    command = command_in(root)
    done = offline(command)
    assert done.returncode == 0, done.stderr
    check(root, tmp_path, server, still=True)
    stats = json.loads((root / "meta" / "stats.json").read_text())
    values = np.stack([vector(e, f) for e in range(len(LENGTHS)) for f in range(LENGTHS[e])])
    np.testing.assert_allclose(stats["observation.state"]["mean"], values.mean(0), atol=1e-5)
    assert np.shape(stats[CAMERA]["mean"]) == np.shape(stats[STILL]["mean"]) == (3, 1, 1)
    done = offline(command)
    assert done.returncode == 2 and "says v3.0, not v2.0" in done.stderr


def test_a_killed_conversion_leaves_no_process_and_is_repeated(tmp_path):
    root = write_v2(tmp_path / "old", "v2.0")
    command = command_in(root)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    meta = root / "meta"
    while not (list(meta.glob(".episodes_stats.jsonl.*.tmp")) and psutil.Process(process.pid).children()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    kill_alone(process)
    done = offline(command)
    assert done.returncode == 0, done.stderr
    assert json.loads((root / "meta" / "info.json").read_text())["codebase_version"] == "v3.0"


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_what_an_earlier_conversion_left_is_not_put_in_its_place(tmp_path, version, capsys):
    from agent.data import from_v20

    root, old = write_v2(tmp_path / "data", version), tmp_path / "data_old"
    old.mkdir()
    if version == "v2.0":
        assert from_v20.main(["--root", str(root)]) == 2
        assert f"would replace it by {old}, of an earlier conversion: move that away" in capsys.readouterr().err
        assert json.loads((root / "meta" / "info.json").read_text())["codebase_version"] == "v2.0"
    with pytest.raises(ValueError, match=rf"first move {old} away, by which .*; then convert it in place"):
        open_source(DatasetConfig("test/old", root=str(root)), 4, None, 1e-4)


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_an_empty_line_is_named_before_anything_is_converted(tmp_path, version, capsys):
    from agent.data import from_v20

    root = write_v2(tmp_path / "data", version)
    path = root / "meta" / "episodes.jsonl"
    path.write_text(path.read_text() + "\n")
    said = f"line {len(LENGTHS) + 1} of {path} is empty"
    with pytest.raises(ValueError, match=rf"first mend its metadata: {said}.*; then convert it in place"):
        open_source(DatasetConfig("test/old", root=str(root)), 4, None, 1e-4)
    if version == "v2.0":
        assert from_v20.main(["--root", str(root)]) == 2
        assert said in (told := capsys.readouterr().err)
        (command,) = re.findall(r"with (sed .*)", told)
        subprocess.run(shlex.split(command), check=True)
        assert path.read_text().count("\n") == len(LENGTHS)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "episodes.jsonl",
            lambda text: text.replace('"length"', '"length'),
            r"line 1 of .*episodes.jsonl is not valid JSON",
        ),
        (
            "episodes.jsonl",
            lambda text: "[]\n" + text,
            r"line 1 of .*episodes.jsonl needs a int `episode_index`, it is \[\]",
        ),
        ("tasks.jsonl", lambda text: text.replace('"task"', '"text"'), r"line 1 of .*tasks.jsonl needs a str `task`"),
        (
            "info.json",
            lambda text: text.replace('"chunks_size"', '"chunk_size"'),
            r"info.json has chunks_size None; copy",
        ),
        (
            "info.json",
            lambda text: text.replace("{episode_chunk:03d}", "{chunk}"),
            r"data_path .*cannot be filled in with",
        ),
    ],
)
def test_metadata_that_cannot_be_converted_are_named(tmp_path, file, change, message, capsys):
    from agent.data import from_v20

    root = write_v2(tmp_path / "data", "v2.0")
    path = root / "meta" / file
    path.write_text(change(path.read_text()))
    assert from_v20.main(["--root", str(root)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_still_older(tmp_path):
    root = write_v2(tmp_path / "old", "v1.6")
    with pytest.raises(
        ValueError, match="has format v1.6, this program reads v3: convert it with the LeRobot that wrote"
    ):
        open_source(DatasetConfig("test/old", root=str(root)), 4, None, 1e-4)
