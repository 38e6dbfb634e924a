"""A saved policy acts from its folder alone as LeRobot does, and as validation during training does.

Run: pytest tests/deployment/test_inference.py      (about fifteen seconds, most of them importing LeRobot)
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.lerobot import (
    ACTION_DIM,
    CAMERAS,
    CHUNK,
    ROOT,
    SIZE,
    STATE_DIM,
    TOKENIZER,
    Recording,
    make_config,
    make_model,
    make_statistics,
    mapping,
    noise_of,
    our_actions,
    small,  # noqa: F401  (a fixture)
    their_actions,
    written,
)
from support.stores import write_pretrained

from agent.data.normalization.normalizer import compute_statistics, to_lerobot_stats
from agent.inference import LoadedPolicy, load_policy
from agent.models.lerobot_config import FeatureSpec


def observations(recording: Recording) -> list[dict]:
    return [
        {**{slot: image.numpy() for slot, image in frame.images.items()}, "observation.state": frame.state}
        | {"task": frame.task}
        for frame in recording.frames
    ]


def actions_of(policy: LoadedPolicy, given: list[dict]) -> torch.Tensor:
    return torch.from_numpy(np.stack(policy.act(given, [noise_of(k) for k in range(len(given))])))


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, in units of each dimension's spread."""
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs() / theirs.std(dim=(0, 1)).clamp_min(1e-3)).max())


def edit(path: Path, name: str, **values: object) -> None:
    """Changes the config of one step of a pipeline."""
    content = json.loads(path.read_text())
    (step,) = [step for step in content["steps"] if step["registry_name"] == name]
    step["config"].update(values)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_config()
    return written(tmp_path_factory.mktemp("checkpoint") / "pretrained_model", config, make_model(config))


@pytest.fixture(scope="module")
def policy(folder: Path) -> LoadedPolicy:
    return load_policy(str(folder), device="cpu")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


# ── the same actions ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["MEAN_STD", "QUANTILES", "IDENTITY"])
def test_acts_as_lerobot_does(tmp_path, mode):
    config = make_config(normalization_mapping=mapping(mode))
    folder = written(tmp_path / "pretrained_model", config, make_model(config))
    recording = Recording((SIZE, SIZE), size=3)
    actions = actions_of(load_policy(str(folder), device="cpu"), observations(recording))
    assert actions.shape == (3, CHUNK, ACTION_DIM)
    assert deviation(actions, their_actions(folder, recording)) < 1e-4


def test_reads_what_lerobot_itself_saves(folder, tmp_path):
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.pi0.modeling_pi0 import PI0Policy

    theirs = PI0Policy.from_pretrained(folder, strict=True)
    theirs.save_pretrained(tmp_path / "saved")
    for pipeline in make_pre_post_processors(theirs.config, pretrained_path=str(folder)):
        pipeline.save_pretrained(tmp_path / "saved")
    recording = Recording((SIZE, SIZE), size=2)
    actions = actions_of(load_policy(str(tmp_path / "saved"), device="cpu"), observations(recording))
    assert deviation(actions, their_actions(folder, recording)) < 1e-4


@pytest.mark.parametrize("size", [(SIZE, SIZE), (37, 61), (90, 40)], ids=str)
def test_acts_as_validation_during_training_does(policy, size):
    recording = Recording(size, size=3)
    expected = our_actions(make_model(make_config()), recording, resized_by_the_model=False)
    assert deviation(actions_of(policy, observations(recording)), expected) < 1e-5


def test_relative_actions_come_back_absolute_as_in_lerobot(copy):
    before, after = copy / "policy_preprocessor.json", copy / "policy_postprocessor.json"
    names = {"exclude_joints": ["Grip"], "action_names": ["x", "left_gripper", "y", "z"]}
    edit(before, "relative_actions_processor", enabled=True, **names)
    edit(after, "absolute_actions_processor", enabled=True)
    recording = Recording((SIZE, SIZE), size=3)
    actions = actions_of(load_policy(str(copy), device="cpu"), observations(recording))
    assert deviation(actions, their_actions(copy, recording)) < 1e-4
    edit(after, "absolute_actions_processor", enabled=False)
    with pytest.raises(ValueError, match="the preprocessor's actions are relative and the postprocessor's not"):
        load_policy(str(copy), device="cpu")


def test_one_of_several_robots_can_be_chosen(copy, tmp_path, policy):
    other = to_lerobot_stats(*(compute_statistics(np.random.default_rng(7).random((90, n))) for n in (3, 2)))
    entries = {"lab/arm": to_lerobot_stats(*make_statistics()), "lab/hand": other}
    robots = {
        name: {"statistics": {f: {k: v.tolist() for k, v in some.items()} for f, some in entry.items()}}
        for name, entry in entries.items()
    }
    (copy / "robots.json").write_text(json.dumps({"processors_are_of": "lab/arm", "robots": robots}))
    given = observations(Recording((SIZE, SIZE), size=2))
    own = load_policy(str(copy), device="cpu")
    assert own.robot == "lab/arm" and torch.equal(actions_of(own, given), actions_of(policy, given))

    features = make_config().input_features | {"observation.state": FeatureSpec("STATE", [3])}
    config = make_config(input_features=features, output_features={"action": FeatureSpec("ACTION", [2])})
    (tmp_path / "hand").mkdir()
    write_pretrained(tmp_path / "hand", config, make_model(config).state_dict(), other, last_update=200)
    for observation in given:
        observation["observation.state"] = observation["observation.state"][:3]
    hand = load_policy(str(copy), device="cpu", statistics="lab/hand")
    assert hand.robot == "lab/hand" and (hand.state_dim, hand.action_dim) == (3, 2)
    assert torch.equal(actions_of(hand, given), actions_of(load_policy(str(tmp_path / "hand"), device="cpu"), given))
    with pytest.raises(ValueError, match="--statistics: 'lab/leg' is no robot of"):
        load_policy(str(copy), statistics="lab/leg")


def test_a_camera_that_a_robot_lacks_is_masked_as_in_lerobot(folder, policy):
    recording = Recording((SIZE, SIZE), size=2)
    given = [{**observation, CAMERAS[1]: None} for observation in observations(recording)]
    for frame in recording.frames:
        del frame.images[CAMERAS[1]]
    assert deviation(actions_of(policy, given), their_actions(folder, recording)) < 1e-4


def test_alone_as_in_a_batch(policy):
    given = observations(Recording((40, 30), size=6))
    given[1] = {**given[1], CAMERAS[0]: None}  # a mask, an odd size and instructions of several lengths
    given[2] = {**given[2], "task": "Go", CAMERAS[1]: np.zeros((3, 11, 50), np.uint8)}
    given[4] = {**given[4], CAMERAS[0]: given[4][CAMERAS[0]].transpose(1, 2, 0)}  # channels last
    together = policy.act(given, [noise_of(k) for k in range(6)])
    for k, observation in enumerate(given):
        (alone,) = policy.act([observation], [noise_of(k)])
        assert np.abs(alone - together[k]).max() < 1e-5 * np.abs(together[k]).max()


def test_the_noise_is_a_function_of_its_name(policy):
    noise = policy.draws(3, "robot", 7).noise
    assert noise.shape == (CHUNK, 32) and noise.dtype == np.float32
    assert np.array_equal(noise, policy.draws(3, "robot", 7).noise)
    assert np.array_equal(noise, policy.noise(3, "robot", 7).noise)  # the older name
    for other in (policy.draws(4, "robot", 7), policy.draws(3, "task", 7), policy.draws(3, "robot", 8)):
        assert not np.array_equal(noise, other.noise)


def test_bfloat16_acts_nearly_so(folder, policy):
    given = observations(Recording((SIZE, SIZE), size=2))
    rounded = actions_of(load_policy(str(folder), device="cpu", dtype="bfloat16"), given)
    assert 0 < deviation(rounded, actions_of(policy, given)) < 0.2


def test_a_long_instruction_is_cut_and_said_so(policy, caplog):
    (observation,) = observations(Recording((SIZE, SIZE), size=1))
    with caplog.at_level(logging.WARNING):
        policy.act([{**observation, "task": "push " * 40}], [noise_of(0)])
    assert "is cut at 24" in caplog.text


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────


def wrong(key: str, value: object) -> dict:
    (observation,) = observations(Recording((SIZE, SIZE), size=1))
    return {**observation, key: value}


TOP = CAMERAS[0]
WANTED = r"expected uint8 of shape \(height, width, 3\) or \(3, height, width\)"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (TOP, np.zeros((3, 4, 4), np.float32), rf"{TOP}: got float32 of shape \(3, 4, 4\), {WANTED}"),
        (TOP, np.zeros((4, 4), np.uint8), rf"{TOP}: got uint8 of shape \(4, 4\), {WANTED}"),
        (TOP, np.zeros((1, 3, 4, 4), np.uint8), rf"{TOP}: got uint8 of shape \(1, 3, 4, 4\), {WANTED}"),
        (TOP, np.zeros((0, 4, 3), np.uint8), rf"{TOP}: got uint8 of shape \(0, 4, 3\), {WANTED}"),
        (TOP, [1, 2], f"{TOP}: got a list, {WANTED}"),
        ("observation.state", np.array([0, 0, np.nan, 0, 0]), r"observation.state: got nan at dimension 2, expected 5"),
        ("observation.state", np.array([0, 0, 0, 1e300, 0]), r"observation.state: got 1e\+300 at dimension 3"),
        ("observation.state", np.zeros(4), r"observation.state: got shape \(4,\), expected 5 finite numbers"),
        ("observation.state", "abc", "observation.state: got str, expected 5 finite numbers"),
        ("observation.state", None, "observation.state: got NoneType, expected 5 finite numbers"),
        ("observation.state", ["a"] * 5, "observation.state: got values of type <U1, expected 5"),
        ("task", " ", "task: got ' ', expected an instruction"),
        ("observation.state", [[0], [0, 1]], "observation.state: got lists of several lengths, expected 5"),
        ("task", "x" * 10_001, "task: got 10001 characters, expected at most 10000"),
        ("task", 3, "task: got 3, expected an instruction"),
        ("observation.wrist", 1, "the policy knows no 'observation.wrist'; an observation holds .*images.top, .*task"),
    ],
)
def test_a_wrong_observation_is_refused(policy, key, value, message):
    with pytest.raises(ValueError, match=message):
        policy.act([wrong(key, value)], [noise_of(0)])


def test_what_is_missing_is_refused(policy):
    (observation,) = observations(Recording((SIZE, SIZE), size=1))
    for key in observation:
        with pytest.raises(ValueError, match=f"the observation has no {key}; an observation holds"):
            policy.check({name: value for name, value in observation.items() if name != key})
    with pytest.raises(ValueError, match="got None, expected a picture of at least one camera"):
        policy.check({**observation, **dict.fromkeys(CAMERAS)})


def test_a_checkpoint_without_processors_is_refused(copy):
    (copy / "policy_postprocessor.json").unlink()
    with pytest.raises(ValueError, match="has no policy_postprocessor.json: .*copy the policy_"):
        load_policy(str(copy))


def test_a_checkpoint_without_statistics_is_refused(copy):
    for file in copy.glob("policy_preprocessor_step_*.safetensors"):
        file.unlink()
    with pytest.raises(
        ValueError, match="policy_preprocessor.json names .*normalizer_processor.safetensors, which is not there"
    ):
        load_policy(str(copy))
    content = json.loads((copy / "policy_preprocessor.json").read_text())
    del content["steps"][-1]["state_file"]
    (copy / "policy_preprocessor.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="statistics of observation.state do not serve: MEAN_STD needs mean and std"):
        load_policy(str(copy))


def test_a_step_that_nobody_knows_is_refused(copy):
    content = json.loads((copy / "policy_preprocessor.json").read_text())
    content["steps"].insert(2, {"registry_name": "crop_processor", "config": {}})
    (copy / "policy_preprocessor.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the step crop_processor is not known here; known are device_processor, "):
        load_policy(str(copy))


def test_a_tokenizer_of_another_machine_can_be_named(copy, policy):
    edit(copy / "policy_preprocessor.json", "tokenizer_processor", tokenizer_name="/elsewhere/tokenizer")
    with pytest.raises(ValueError, match="(?s)/elsewhere/tokenizer.*--tokenizer FOLDER"):
        load_policy(str(copy), device="cpu")
    given = observations(Recording((SIZE, SIZE), size=2))
    moved = load_policy(str(copy), device="cpu", tokenizer=str(ROOT / TOKENIZER))
    assert torch.equal(actions_of(moved, given), actions_of(policy, given))


def test_renamed_keys_and_no_gpu(copy, policy):
    edit(copy / "policy_preprocessor.json", "rename_observations_processor", rename_map={"wrist": CAMERAS[1]})
    given = observations(Recording((SIZE, SIZE), size=2))
    renamed = [{**o, "wrist": o[CAMERAS[1]]} for o in given]
    for observation in renamed:
        del observation[CAMERAS[1]]
    assert torch.equal(actions_of(load_policy(str(copy), device="cpu"), renamed), actions_of(policy, given))
    with pytest.raises(ValueError, match="--device: tpu9 cannot be used"):
        load_policy(str(copy), device="tpu9")


def test_the_features_are_the_models(policy, folder):
    assert policy.cameras == dict.fromkeys(CAMERAS, (3, SIZE, SIZE))
    assert (policy.state_dim, policy.action_dim, policy.chunk_size) == (STATE_DIM, ACTION_DIM, CHUNK)
    assert policy.action_steps == CHUNK and policy.pretrained == folder
