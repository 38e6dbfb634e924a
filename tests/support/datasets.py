"""Small real data sets and a tokenizer for tests, written with the libraries that write the large ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DEFAULT_CAMERAS = {"observation.images.front": (64, 80)}
DEFAULT_TASKS = ("push the red button", "open the drawer")


def frame_image(episode: int, frame: int, camera: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A smooth (H, W, 3) uint8 picture of which every frame has another one."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    red = 40 + 15 * episode + 4 * frame
    green = 200 * rows / height
    blue = 200 * columns / width + 20 * camera + seed % 20
    return np.stack(np.broadcast_arrays(red, green, blue), axis=-1).clip(0, 255).astype(np.uint8)


def write_dataset(
    root: Path,
    *,
    repo_id: str = "test/data",
    episodes: int = 4,
    length: int | Sequence[int] = 12,
    cameras: dict[str, tuple[int, int]] | None = None,
    state_dim: int = 7,
    action_dim: int = 7,
    fps: int = 10,
    video: bool = True,
    seed: int = 0,
    tasks: Sequence[str] = DEFAULT_TASKS,
) -> Path:
    """Writes a LeRobot v3 data set to ``root``, which must not exist yet, and returns ``root``.

    Args:
        length: frames of every episode, or of each.
        cameras: key → (height, width).
        video: whether cameras are mp4 files, or PNGs in the parquet files.
        tasks: the instructions, taken in turn by the episodes.
    """
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    cameras = DEFAULT_CAMERAS if cameras is None else cameras
    lengths = [length] * episodes if isinstance(length, int) else list(length)
    features: dict = {
        "observation.state": {"dtype": "float32", "shape": (state_dim,), "names": None},
        "action": {"dtype": "float32", "shape": (action_dim,), "names": None},
    }
    for key, (height, width) in cameras.items():
        shape, names = (height, width, 3), ["height", "width", "channels"]
        features[key] = {"dtype": "video" if video else "image", "shape": shape, "names": names}
    dataset = LeRobotDataset.create(
        repo_id,
        fps=fps,
        root=root,
        features=features,
        use_videos=video,
        rgb_encoder=RGBEncoderConfig(vcodec="h264", pix_fmt="yuv420p", g=2, crf=18, preset="veryfast"),
        encoder_threads=1,
    )
    generator = np.random.default_rng(seed)
    for episode in range(episodes):
        state = generator.normal(size=state_dim)
        for frame in range(lengths[episode]):
            action = 0.1 * generator.normal(size=action_dim)
            item = {key: frame_image(episode, frame, n, size, seed) for n, (key, size) in enumerate(cameras.items())}
            item["observation.state"] = state.astype(np.float32)
            item["action"] = action.astype(np.float32)
            dataset.add_frame({**item, "task": tasks[episode % len(tasks)]})
            state = state + np.resize(action, state_dim)
        dataset.save_episode()
    dataset.finalize()
    return root


def write_tokenizer(folder: Path, words: Sequence[str] = ()) -> Path:
    """Writes a word tokenizer in the format of PaliGemma's (bos in front, pad 0) and returns ``folder``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = " ".join([*DEFAULT_TASKS, *words, "a the please now"]).split()
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "\n"])}
    for word in known:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
