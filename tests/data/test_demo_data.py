"""The committed demonstration data and tokenizer are what demo/README.md says.

Run from the repository root, without the simulator and without a network:

    uv run pytest tests/data/test_demo_data.py
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
EPISODES = 60
TASK = "Press a button from the top"
SHAPES = {
    "observation.image": (128, 128, 3),
    "observation.state": (4,),
    "action": (4,),
    "next.reward": (1,),
    "next.success": (1,),
}


@pytest.fixture(scope="module")
def dataset() -> LeRobotDataset:
    return LeRobotDataset("demo/metaworld", root=DEMO / "metaworld", video_backend="pyav")


@pytest.fixture(scope="module")
def columns(dataset) -> dict[str, np.ndarray]:
    rows = dataset.hf_dataset.with_format("numpy")
    names = ["action", "observation.state", "next.success", "episode_index", "task_index"]
    return {name: np.stack(rows[:][name]) for name in names}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "tokenizer")


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """All task descriptions; read as JSON because importing lerobot.envs.metaworld needs metaworld."""
    file = Path(find_spec("lerobot").submodule_search_locations[0]) / "envs" / "metaworld_config.json"
    return sorted(set(json.loads(file.read_text())["TASK_DESCRIPTIONS"].values()))


def test_demo_is_small():
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 10e6


def test_keys_shapes_and_rate(dataset):
    assert dataset.fps == 80
    assert {key: tuple(dataset.features[key]["shape"]) for key in SHAPES} == SHAPES
    assert dataset.features["observation.image"]["dtype"] == "video"
    item = dataset[0]
    assert item["observation.image"].shape == (3, 128, 128)
    assert item["observation.state"].shape == item["action"].shape == (4,)


def test_every_episode_is_of_the_task(dataset):
    assert [dataset.meta.episodes[index]["tasks"] for index in range(dataset.num_episodes)] == [[TASK]] * EPISODES


@pytest.mark.parametrize("episode", [0, EPISODES // 2, EPISODES - 1])
def test_frames_decode_and_show_the_scene(dataset, episode):
    start = dataset.meta.episodes[episode]["dataset_from_index"]
    stop = dataset.meta.episodes[episode]["dataset_to_index"]
    first, last = dataset[start], dataset[stop - 1]
    assert first["task"] == last["task"] == TASK
    for item in (first, last):
        image = item["observation.image"]
        assert 0.0 <= image.min() and image.max() <= 1.0
        assert image.std() > 0.1, "blank"
        red, green, _ = image
        # Right way up: the red arm is in the upper left, the brown table in the lower right.
        excess = red - green
        assert excess[:64, :64].mean() > excess[64:, 64:].mean()
    assert (first["observation.image"] - last["observation.image"]).abs().mean() > 0.02, "nothing moves"


def test_actions_are_finite_and_in_range(columns):
    for key in ("action", "observation.state"):
        assert columns[key].dtype == np.float32
        assert np.isfinite(columns[key]).all()
    assert np.abs(columns["action"]).max() <= 1.0


def test_every_episode_ends_soon_after_its_first_success(columns):
    success = columns["next.success"].reshape(-1)
    for episode in np.unique(columns["episode_index"]):
        of_episode = success[columns["episode_index"] == episode]
        assert len(of_episode) - 1 - np.argmax(of_episode) == 5 and of_episode.any()


def test_saved_statistics_agree_with_the_data(dataset, columns):
    for key in ("action", "observation.state"):
        np.testing.assert_allclose(dataset.meta.stats[key]["mean"], columns[key].mean(0), atol=1e-4)
        np.testing.assert_allclose(dataset.meta.stats[key]["std"], columns[key].std(0), atol=1e-4)


def test_tokenizer_special_tokens(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"])
    assert ids == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (tokenizer.bos_token_id, tokenizer.unk_token_id) == (2, 3)
    assert len(tokenizer) <= 512


def test_tokenizer_round_trip_of_every_task(tokenizer, sentences):
    assert len(sentences) == 49
    newline = tokenizer.convert_tokens_to_ids("\n")
    for sentence in sentences:
        text = sentence + "\n"
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert ids[-1] == newline and tokenizer.eos_token_id not in ids
        assert tokenizer.unk_token_id not in ids and max(ids) < 512
        assert len(ids) <= 48, "π0 cuts its prompt at 48 tokens"
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["it's 10:30, NOW!\n", " two  spaces ", "Süß 机器人 🤖\tend\n\nof", "a_b▂\r\n"])
def test_tokenizer_encodes_any_text(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_pads_as_the_policy_asks(tokenizer):
    batch = tokenizer(
        ["Open a drawer\n", "Reach a goal position\n"],
        max_length=48,
        padding="max_length",
        padding_side="right",
        truncation=True,
        return_tensors="pt",
    )
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 48)
    assert ((batch["input_ids"] == 0) == (batch["attention_mask"] == 0)).all()
    assert (batch["input_ids"][:, 0] == 2).all()


def test_tokenizer_script_makes_the_committed_files(tmp_path):
    script = ROOT / "scripts" / "make_tokenizer.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (DEMO / "tokenizer" / name).read_bytes(), name
