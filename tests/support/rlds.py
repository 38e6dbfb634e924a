"""Writes small RLDS trees in the layouts of Open X-Embodiment's data sets, with the library that writes the large ones.

Run: PYTHONPATH=tests uv run --group rlds-test python -m support.rlds FOLDER      (prints the folder of each tree)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from support.datasets import frame_image

EPISODES = 5
SIZE = (48, 64)  # height and width


def episode_length(episode: int) -> int:
    """Frames of an episode."""
    return 4 + episode


def instruction(episode: int) -> str:
    """What an episode's robot is told."""
    return ("pick the spoon", "öffne die Schublade")[episode % 2]


def numbers(episode: int, frame: int, name: str, dims: int) -> np.ndarray:
    """(dims,) float32, another one for every frame and name."""
    generator = np.random.default_rng([episode, frame, *name.encode()])
    return generator.uniform(-1, 1, dims).astype(np.float32)


def write_tree(layout: str, folder: Path, shards: int = 3) -> Path:
    """Writes a tree below ``folder`` and returns the folder with its ``dataset_info.json``."""
    import tensorflow_datasets as tfds

    step = {"bridge": _bridge_step, "fractal": _fractal_step, "other": _other_step}[layout]
    features = tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset({**step(tfds.features, 0, None), **_flags(tfds.features)}),
            "episode_metadata": {"file_path": tfds.features.Text()},
        }
    )
    episodes = [
        {
            "steps": [
                {**step(tfds.features, episode, frame), **_flag_values(frame, episode_length(episode))}
                for frame in range(episode_length(episode))
            ],
            "episode_metadata": {"file_path": f"episode {episode}"},
        }
        for episode in range(EPISODES)
    ]
    name = {"bridge": "bridge_dataset", "fractal": "fractal20220817_data", "other": "other"}[layout]
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name,
        "1.0.0",
        features,
        {"train": list(enumerate(episodes)), "val": list(enumerate(episodes[:shards]))},
        data_dir=str(folder),
        file_format="tfrecord",
        disable_shuffling=True,
        download_config=tfds.download.DownloadConfig(num_shards=shards),
    )
    return Path(builder.data_dir)


def _flags(kinds: Any) -> dict[str, Any]:
    return {name: np.bool_ for name in ("is_first", "is_last", "is_terminal")} | {"reward": np.float32}


def _flag_values(frame: int, length: int) -> dict[str, Any]:
    last = frame == length - 1
    return {"is_first": frame == 0, "is_last": last, "is_terminal": last, "reward": float(last)}


def _bridge_step(kinds: Any, episode: int, frame: int | None) -> dict[str, Any]:
    """Of the feature kinds when there is no frame, else the values."""
    if frame is None:
        picture = kinds.Image(shape=(*SIZE, 3), encoding_format="jpeg")
        return {
            "observation": {
                "image_0": picture,
                "image_1": picture,
                "state": kinds.Tensor(shape=(7,), dtype=np.float32),
            },
            "action": kinds.Tensor(shape=(7,), dtype=np.float32),
            "language_instruction": kinds.Text(),
            "language_embedding": kinds.Tensor(shape=(512,), dtype=np.float32),
        }
    return {
        "observation": {
            "image_0": frame_image(episode, frame, 0, SIZE),
            "image_1": frame_image(episode, frame, 1, SIZE),
            "state": numbers(episode, frame, "state", 7),
        },
        "action": numbers(episode, frame, "action", 7),
        "language_instruction": instruction(episode),
        "language_embedding": np.zeros(512, np.float32),
    }


def _fractal_step(kinds: Any, episode: int, frame: int | None) -> dict[str, Any]:
    vectors = {"world_vector": 3, "rotation_delta": 3, "gripper_closedness_action": 1, "terminate_episode": 3}
    if frame is None:
        return {
            "observation": {
                "image": kinds.Image(shape=(*SIZE, 3), encoding_format="jpeg"),
                "base_pose_tool_reached": kinds.Tensor(shape=(7,), dtype=np.float32),
                "gripper_closed": kinds.Tensor(shape=(1,), dtype=np.float32),
                "natural_language_instruction": kinds.Text(),
            },
            "action": {
                name: kinds.Tensor(shape=(dims,), dtype=np.int32 if name == "terminate_episode" else np.float32)
                for name, dims in vectors.items()
            },
        }
    return {
        "observation": {
            "image": frame_image(episode, frame, 0, SIZE),
            "base_pose_tool_reached": numbers(episode, frame, "pose", 7),
            "gripper_closed": numbers(episode, frame, "gripper", 1),
            "natural_language_instruction": instruction(episode),
        },
        "action": {
            name: np.zeros(3, np.int32) if name == "terminate_episode" else numbers(episode, frame, name, dims)
            for name, dims in vectors.items()
        },
    }


def _other_step(kinds: Any, episode: int, frame: int | None) -> dict[str, Any]:
    """PNGs, a state of several keys, one of them a scalar, and an action in double precision."""
    if frame is None:
        return {
            "observation": {
                "wrist": kinds.Image(shape=(*SIZE, 3), encoding_format="png"),
                "joints": kinds.Tensor(shape=(4,), dtype=np.float32),
                "gripper": kinds.Scalar(dtype=np.float32),
            },
            "move": kinds.Tensor(shape=(5,), dtype=np.float64),
            "order": kinds.Text(),
        }
    return {
        "observation": {
            "wrist": frame_image(episode, frame, 2, SIZE),
            "joints": numbers(episode, frame, "joints", 4),
            "gripper": numbers(episode, frame, "gripper", 1)[0],
        },
        "move": numbers(episode, frame, "move", 5).astype(np.float64),
        "order": instruction(episode),
    }


if __name__ == "__main__":
    for kind in ("bridge", "fractal", "other"):
        print(write_tree(kind, Path(sys.argv[1])))
