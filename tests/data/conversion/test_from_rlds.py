"""RLDS trees to LeRobot v3.

Run: uv run --extra rlds --group rlds-test pytest tests/data/conversion/test_from_rlds.py   (two minutes)

The trees are written with tensorflow-datasets, in a process of its own; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from support.datasets import frame_image
from support.launching import MODEL, REPOSITORY, RUN, kill_alone, with_support
from support.rlds import EPISODES, SIZE, episode_length, instruction, numbers

NEEDED = ("tensorflow_datasets", "tensorflow", "google_crc32c")
MISSING = [name for name in NEEDED if find_spec(name) is None]
if MISSING and not os.environ.get("REQUIRE_RLDS"):
    pytest.skip(f"{', '.join(MISSING)} not installed: uv run --extra rlds --group rlds-test", allow_module_level=True)

FRAMES = sum(episode_length(episode) for episode in range(EPISODES))
CONVERT = [sys.executable, "-m", "agent.data.from_rlds"]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlds")
    environment = with_support(CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="3")
    command = [sys.executable, "-m", "support.rlds", str(folder)]
    written = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert written.returncode == 0, written.stderr[-3000:]
    return folder


def convert(source: Path, out: Path, *arguments: str) -> tuple[int, str]:
    command = [*CONVERT, "--source", str(source), "--out", str(out), "--processes", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def bridge(trees, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "bridge"
    code, output = convert(trees / "bridge_dataset", out)
    assert code == 0, output
    assert f"{EPISODES} episodes, {FRAMES} frames" in output
    return out


def lerobot(root: Path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("test/rlds", root=root)


def expected_picture(episode: int, frame: int, camera: int, size: int) -> np.ndarray:
    import torch

    from agent.data.resizing import resize_with_pad

    picture = torch.from_numpy(frame_image(episode, frame, camera, SIZE).transpose(2, 0, 1).copy())
    return resize_with_pad(picture, size, size).numpy()


def check(root: Path, camera: str, number: int, fps: int, size: int, state, action) -> None:
    """Every frame is what was written, read by LeRobot."""
    dataset = lerobot(root)
    assert (dataset.fps, dataset.num_episodes, len(dataset)) == (fps, EPISODES, FRAMES)
    position = 0
    for episode in range(EPISODES):
        for frame in range(episode_length(episode)):
            item = dataset[position]
            assert (int(item["episode_index"]), int(item["frame_index"]), int(item["index"])) == (
                episode,
                frame,
                position,
            )
            assert item["task"] == instruction(episode)
            np.testing.assert_array_equal(item["observation.state"].numpy(), state(episode, frame))
            np.testing.assert_array_equal(item["action"].numpy(), action(episode, frame))
            picture = item[f"observation.images.{camera}"].numpy() * 255
            wanted = expected_picture(episode, frame, number, size)
            assert picture.shape == wanted.shape
            # a frame is 4 apart in red from its neighbours
            assert abs(picture[0].mean() - wanted[0].mean()) < 1.5
            assert 20 * np.log10(255 / np.sqrt(np.mean((picture - wanted) ** 2))) > 30
            position += 1


def test_bridge(bridge):
    check(bridge, "image_0", 0, 5, 224, lambda *at: numbers(*at, "state", 7), lambda *at: numbers(*at, "action", 7))
    stats = json.loads((bridge / "meta" / "stats.json").read_text())
    values = np.stack([numbers(e, f, "action", 7) for e in range(EPISODES) for f in range(episode_length(e))])
    np.testing.assert_allclose(stats["action"]["mean"], values.mean(0), atol=1e-6)
    assert np.shape(stats["observation.images.image_0"]["mean"]) == (3, 1, 1)
    assert not list(bridge.parent.glob("*.partial"))


def test_fractal(trees, tmp_path):
    code, output = convert(trees / "fractal20220817_data", tmp_path / "out", "--size", "64")
    assert code == 0, output
    vectors = ("world_vector", 3), ("rotation_delta", 3), ("gripper_closedness_action", 1)
    check(
        tmp_path / "out",
        "image",
        0,
        3,
        64,
        lambda *at: np.concatenate([numbers(*at, "pose", 7), numbers(*at, "gripper", 1)]),
        lambda *at: np.concatenate([numbers(*at, name, dims) for name, dims in vectors]),
    )


def test_a_layout_given_by_hand(trees, tmp_path):
    code, output = convert(trees / "other", tmp_path / "out")
    assert code == 2
    assert "give --image, --state, --action, --instruction, --fps" in output and "observation/joints (Tensor)" in output
    options = ["--image", "hand=observation/wrist", "--state", "observation/joints", "--state", "observation/gripper"]
    options += ["--instruction", "order", "--fps", "7", "--size", "48"]
    code, output = convert(trees / "other", tmp_path / "out", *options, "--action", "moove")
    assert code == 2 and "moove: there is no such feature" in output
    code, output = convert(trees / "other", tmp_path / "out", *options, "--action", "observation/wrist")
    assert code == 2 and "it is of kind Image, not Tensor or Scalar" in output
    code, output = convert(trees / "other", tmp_path / "out", *options, "--action", "move")
    assert code == 0, output
    state = lambda *at: np.concatenate([numbers(*at, "joints", 4), numbers(*at, "gripper", 1)])  # noqa: E731
    check(tmp_path / "out", "hand", 2, 7, 48, state, lambda *at: numbers(*at, "move", 5))


def test_training_opens_it(bridge, tmp_path):
    config = {
        "model_cfg": MODEL,
        "data": {"train": {"datasets": [{"repo_id": "test/rlds", "root": str(bridge)}], "num_workers": 0}},
        "global_batch_size": 2,
        "per_device_batch_size": 2,
        "n_updates": 2,
        "use_wandb": False,
    }
    (tmp_path / "rlds.yaml").write_text(json.dumps(config))
    command = [sys.executable, str(RUN), "--config_path", str(tmp_path / "rlds.yaml")]
    environment = {**os.environ, "VLA_LOG_DIR": str(tmp_path / "runs")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_killed_conversion_goes_on(trees, bridge, tmp_path):
    out = tmp_path / "out"
    command = [*CONVERT, "--source", str(trees / "bridge_dataset"), "--out", str(out), "--processes", "1"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    shards = tmp_path / "out.partial" / "shards"
    while not list(shards.glob("*.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    kill_alone(process)
    assert not out.exists()
    done = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.json")}
    code, output = convert(trees / "bridge_dataset", out, "--crf", "30")
    assert code == 2 and "begun with other settings (crf: 18 → 30)" in output
    assert {name: (shards / name).stat().st_mtime_ns for name in done} == done
    code, output = convert(trees / "bridge_dataset", out)
    assert code == 0 and f"3 files, {len(done)} of them done before" in output
    whole = {path.relative_to(bridge): path.read_bytes() for path in bridge.rglob("*.parquet")}
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*.parquet")} == whole
    code, output = convert(trees / "bridge_dataset", out)
    assert code == 2 and "exists: name another folder" in output


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, r"-00002-of-00003 is cut short in record 1; copy the file again"),
        (flip, r"-00002-of-00003: record 0 is damaged \(its checksum does not hold\)"),
        (Path.unlink, r"lacks 1 of the 3 files of train, such as bridge_dataset-train.tfrecord-00002-of-00003"),
        (lambda path: path.write_bytes(b""), r"holds 0 episodes where dataset_info.json counts 2"),
    ],
)
def test_damaged_trees(trees, tmp_path, damage, message):
    import re

    shutil.copytree(trees / "bridge_dataset", tmp_path / "tree")
    (path,) = (tmp_path / "tree" / "1.0.0").glob("*-train*-00002-*")
    damage(path)
    code, output = convert(tmp_path / "tree", tmp_path / "out", "--size", "32")
    assert code == 2 and re.search(message, output), output
    assert not (tmp_path / "out").exists()


def test_two_conversions_to_one_place(tmp_path):
    import fcntl

    from agent.data.conversion import converting, layouts
    from agent.data.conversion.rlds import Tree

    def convert():
        converting.convert(Tree("none", tmp_path, [], [], {}), layouts._BRIDGE, tmp_path / "out", "lab/out", 1)

    with pytest.raises(ValueError, match="no episode has an instruction"):
        convert()
    with (tmp_path / "out.partial" / "conversion.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(
            ValueError, match=rf"another conversion is at work in {tmp_path / 'out.partial'}; wait for it"
        ):
            convert()


def test_wrong_places(trees, tmp_path):
    for source, message in ((tmp_path, "found none"), (trees, "found ")):
        code, output = convert(source, tmp_path / "out")
        assert code == 2 and "must hold one TFDS data set" in output and message in output
    code, output = convert(trees / "other", tmp_path / "out", "--split", "test")
    assert code == 2 and "has train, val" in output
