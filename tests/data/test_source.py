"""Opens data sets and reads samples, on small real files.

Run: uv run pytest tests/data/test_source.py
"""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from support.datasets import DEFAULT_TASKS, frame_image
from support.samples import FRONT, WRIST, dataset_config, opened

from agent.data import source as source_module
from agent.data.recorded.episodes import hold_out
from agent.data.recorded.video import choose_video_backend
from agent.data.source import open_source


@pytest.mark.parametrize("backend", ["pyav", None])
def test_read_gives_what_was_recorded(video, backend):
    source = open_source(dataset_config(video, episodes=[1, 3]), 4, backend, 1e-4)
    source.cameras = {FRONT: FRONT}
    assert len(source) == 24
    assert source.frame(0) == (1, 0)
    assert source.frame(23) == (3, 11)
    states, actions = source.columns("observation.state"), source.columns("action")
    for position in (0, 10, 12, 23):
        sample = source.read(position)
        episode, frame = source.frame(position)
        assert (sample.episode, sample.frame, sample.task) == (episode, frame, DEFAULT_TASKS[episode % 2])
        recorded = frame_image(episode, frame, 0, (64, 80)).transpose(2, 0, 1).astype(int)
        assert np.abs(sample.images[FRONT].numpy() - recorded).mean() < 6  # H.264 loses some; a frame is 4 apart in red
        assert abs(sample.images[FRONT].numpy()[0].mean() - recorded[0].mean()) < 2
        np.testing.assert_array_equal(sample.state, states[position])
        real = min(4, 12 - frame)
        np.testing.assert_array_equal(sample.actions[:real], actions[position : position + real])
        assert sample.action_is_pad.tolist() == [False] * real + [True] * (4 - real)
        assert sample.previous_action is None


def test_png_images_are_exact_and_previous_actions_are_read(pictures):
    source = opened(pictures)
    source = source.view(np.array([1, 2]), with_previous_action=True)
    source.cameras = {"slot": WRIST}
    actions = source.columns("action")
    for position in (0, 1, 9, 14):
        sample = source.read(position)
        recorded = frame_image(sample.episode, sample.frame, 1, (48, 48), seed=1)
        np.testing.assert_array_equal(sample.images["slot"].numpy(), recorded.transpose(2, 0, 1))
        assert set(sample.images) == {"slot"}
        assert sample.previous_is_pad == (sample.frame == 0)
        np.testing.assert_array_equal(sample.actions[0], actions[position])
        np.testing.assert_array_equal(sample.previous_action, actions[position - (sample.frame > 0)])


def test_choice_of_episodes(video):
    def chosen(**settings):
        return opened(video, **settings).episodes.tolist()

    assert chosen() == [0, 1, 2, 3]
    assert chosen(episodes=[3, 1]) == [1, 3]
    assert chosen(split="train") == [0, 1, 2, 3]
    assert chosen(split="train[:50%]") == [0, 1]
    assert chosen(split="train[50%:]") == [2, 3]
    assert chosen(split="train[1:3]") == [1, 2]
    assert chosen(split="train[-1:]") == [3]
    for split in ("train[:95", "test", "train[1-3]", "train[5]"):
        with pytest.raises(ValueError, match=r"split .* is not understood; write one of train"):
            chosen(split=split)
    with pytest.raises(ValueError, match="selects none of the 4 episodes"):
        chosen(split="train[:1%]")
    with pytest.raises(ValueError, match="asks for 4, 9, the data set has the episodes 0 to 3"):
        chosen(episodes=[9, 1, 4])
    with pytest.raises(ValueError, match="names 1 twice"):
        chosen(episodes=[1, 1])
    with pytest.raises(ValueError, match="not both"):
        chosen(episodes=[1], split="train")


def test_a_split_that_reaches_beyond_the_episodes(video, tmp_path):
    shutil.copytree(video, tmp_path / "copy")
    info = tmp_path / "copy" / "meta" / "info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "splits": {"train": "0:9"}}))
    with pytest.raises(
        ValueError, match=r"'train' is the episodes 0:9, of which there are 4: correct it there to FIRST:END"
    ):
        opened(tmp_path / "copy", split="train[:50%]")


def test_hold_out():
    for count in (2, 3, 10, 20, 101):
        for fraction in (0.01, 0.05, 0.5, 0.99):
            train, held = hold_out(np.arange(count) + 5, fraction)
            assert len(train) and len(held)
            assert sorted([*train, *held]) == list(range(5, count + 5))
    train, held = hold_out(np.arange(100), 0.05)
    assert held.tolist() == [10, 30, 50, 70, 90]
    assert len(hold_out(np.arange(3), 0)[1]) == 0
    with pytest.raises(ValueError, match="set data.val.fraction to 0"):
        hold_out(np.arange(1), 0.1)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        hold_out(np.arange(9), 1.0)


def test_a_failing_frame_is_named(video, monkeypatch):
    source = opened(video)
    monkeypatch.setattr(source_module, "decode_frame", lambda *where: 1 / 0)
    with pytest.raises(RuntimeError, match=r"data set test/data, episode 2, frame 1 .*by zero.*file-000.mp4"):
        source.read(25)


def test_video_backend(monkeypatch):
    assert choose_video_backend("pyav") == "pyav"
    with pytest.raises(ValueError, match="write torchcodec, pyav"):
        choose_video_backend("cv2")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # installed, but does not import
    choose_video_backend.cache_clear()
    assert choose_video_backend(None) == "pyav"
    with pytest.raises(ValueError, match="does not load here"):
        choose_video_backend("torchcodec")
    choose_video_backend.cache_clear()
