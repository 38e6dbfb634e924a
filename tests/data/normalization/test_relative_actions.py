"""Actions relative to the state: exact statistics, absolute actions at the end, the same as LeRobot does both.

Run: uv run pytest tests/data/normalization/test_relative_actions.py      (twenty seconds, most of them for imports)
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.datasets import write_dataset
from support.forked import ForkServer
from support.launching import REPOSITORY, Workplace
from support.lerobot import (  # ``small``: sizes that LeRobot takes for its own
    ACTION_DIM,
    CHUNK,
    SIZE,
    Recording,
    make_config,
    make_model,
    make_statistics,
    our_actions,
    small,  # noqa: F401
    their_actions,
)
from support.samples import prompt_of
from support.stores import write_pretrained

from agent import export
from agent.batch import SampleSpec
from agent.data.build import Data, build_data
from agent.data.configuration import DataConfig, DatasetConfig, TrainDataConfig, ValDataConfig
from agent.data.loading.loader import ValidationBatches
from agent.data.normalization import kept as statistics_cache
from agent.data.normalization.normalizer import compute_statistics, merge_statistics, to_lerobot_stats
from agent.data.normalization.relative import Chunks, chunk_statistics, relative_mask
from agent.data.normalization.robot_statistics import Normalization, RelativeActions
from agent.data.recorded.dimension_names import names_of
from agent.data.samples.wording import Wording
from agent.models.flow_matching import FlowDraws
from agent.models.pi import statistics as given
from agent.reproducibility import stream

NAMES = ["shoulder", "elbow", "wrist", "Gripper_left"]
SPEC = SampleSpec(4, 16, 10, (32, 32), 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six episodes, two of them shorter than a chunk of 4; five state and four action dimensions with names."""
    root = tmp_path_factory.mktemp("data") / "arm"
    write_dataset(root, episodes=6, length=[9, 3, 12, 4, 2, 30], state_dim=5, action_dim=4)
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = NAMES
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root


def draw(purpose: str, k: int) -> FlowDraws:
    return FlowDraws(stream(5, purpose, k).standard_normal((4, 10)).astype(np.float32), np.float32(0.5))


def built(
    root: Path, relative: RelativeActions | None, val: ValDataConfig | None = None, spec: SampleSpec = SPEC, **dataset
) -> Data:
    train = TrainDataConfig([DatasetConfig("lab/arm", str(root), **dataset)], num_workers=0)
    return build_data(
        DataConfig(train, val or ValDataConfig(fraction=0)),
        spec,
        seed=5,
        draw=partial(draw, "noise"),
        validation_draw=partial(draw, "validation"),
        normalization=Normalization({"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}, relative=relative),
        wording=Wording(prompt_of(REPOSITORY / "demo" / "tokenizer")),
    )


# ── statistics ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_statistics_are_those_that_lerobot_computes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.datasets.compute_stats import compute_relative_action_stats
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("lab/arm", root=root)
    theirs = compute_relative_action_stats(
        dataset.hf_dataset.with_format("numpy"), dataset.meta.features, SPEC.chunk_size, ["gripper"]
    )
    data = built(root, RelativeActions(["gripper"], None))
    robot = data.robots[0]
    assert robot.relative.tolist() == [True, True, True, False]
    assert "actions relative to the state: shoulder, elbow, wrist; absolute: Gripper_left" in data.report
    ours = robot.action_statistics
    for name in ("min", "max"):
        np.testing.assert_array_equal(getattr(ours, name), theirs[name])
    np.testing.assert_allclose(ours.mean, theirs["mean"], atol=1e-6)
    np.testing.assert_allclose(ours.std, theirs["std"], rtol=1e-4)
    bins = (theirs["max"] - theirs["min"]) / 5000  # LeRobot finds quantiles by a histogram; ours are values that occur
    chunks = 6 + 9 + 1 + 27
    every = _by_hand(data)
    assert len(every) == 4 * chunks
    for name in ("q01", "q10", "q90", "q99"):
        gap = np.sort(every, axis=0)
        gap = np.abs(np.diff(gap, axis=0)).max(axis=0)
        assert (np.abs(getattr(ours, name) - theirs[name]) <= bins + gap).all(), name
    # exactly, by holding every chunk in memory
    for name, values in compute_statistics(every).to_dict().items():
        np.testing.assert_array_equal(getattr(ours, name), values)
    # the mean-action baseline is of the actions themselves
    np.testing.assert_allclose(robot.mean_action, data.reader.sources[0].columns("action").mean(0), atol=1e-6)

    monkeypatch.setattr(statistics_cache, "chunk_statistics", lambda *_: pytest.fail("they are kept"))
    np.testing.assert_array_equal(
        built(root, RelativeActions(["gripper"], None)).robots[0].action_statistics.std, ours.std
    )
    with pytest.raises(pytest.fail.Exception, match="they are kept"):  # of another chunk they are others
        built(root, RelativeActions(["gripper"], None), spec=SampleSpec(3, 16, 10, (32, 32), 16))


def _by_hand(data: Data, number: int = 0) -> np.ndarray:
    """(chunks * T, a) relative actions of all whole chunks of a data set."""
    source, mask = data.reader.sources[number], data.robots[0].relative
    samples = [source.read(position) for position in range(len(source))]
    return np.concatenate(
        [s.actions - np.where(mask, s.state[: len(mask)], np.float32(0)) for s in samples if not s.action_is_pad.any()]
    )


@pytest.mark.parametrize("shares", [[0.25, 0.75], [0.9, 0.1]], ids=str)
def test_quantiles_are_exact_with_weights_ties_and_signs(shares: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.data.normalization import relative

    monkeypatch.setattr(relative, "_AT_ONCE", 7)  # many pieces
    generator = np.random.default_rng(0)
    parts, pooled = [], []
    for lengths in ([5, 1, 17], [40, 33]):
        frames = sum(lengths)
        actions = generator.normal(size=(frames, 4)).astype(np.float32) * [1, 1e-6, 1e8, 1]
        actions[:, 3] = generator.integers(-2, 3, frames)  # mostly ties, zeros of both signs
        states = np.zeros((frames, 4), np.float32)
        states[:, :3] = generator.normal(size=(frames, 3))
        actions, cut = actions.astype(np.float32), frames // 3
        mask = np.array([True, False, True, True])
        part = Chunks([states], [actions[:cut], -actions[cut:]], np.asarray(lengths), 3, mask)
        flat = np.concatenate([actions[:cut], -actions[cut:]])
        pooled.append(np.concatenate([flat[s : s + 3] - np.where(mask, states[s], 0) for s in part.starts]))
        assert len(part) == len(pooled[-1]) == 3 * sum(max(0, length - 2) for length in lengths)
        parts.append(part)
    pooled = [values.astype(np.float32) for values in pooled]
    expected, found = merge_statistics([[values] for values in pooled], shares), chunk_statistics(parts, shares)
    for name, values in expected.to_dict().items():
        if name in ("mean", "std"):  # sums in another order
            np.testing.assert_allclose(getattr(found, name), values, rtol=1e-5)
        else:
            np.testing.assert_array_equal(getattr(found, name), values)


def test_the_mask_is_lerobots() -> None:
    from lerobot.processor import RelativeActionsProcessorStep

    for exclude in (["gripper"], ["WRIST", "elb"], [], [""], ["nothing"]):
        step = RelativeActionsProcessorStep(enabled=True, exclude_joints=exclude, action_names=NAMES)
        assert relative_mask(NAMES, exclude, 4).tolist() == step._build_mask(4)


@pytest.mark.parametrize(
    "names",
    [NAMES, {"motors": NAMES}, {"arm": NAMES[:3], "hand": NAMES[3:]}, {name: n for n, name in enumerate(NAMES)}],
    ids=["list", "group", "groups", "places"],
)
def test_names_are_read_as_data_sets_have_them(names: list | dict) -> None:
    assert names_of({"shape": [4], "names": names}) == tuple(NAMES)
    assert names_of({"shape": [5], "names": names}) is None  # not one for each
    for unknown in ({"motors": None}, {"x": 0, "y": 1, "z": 2.5, "gripper": None}):
        assert names_of({"shape": [4], "names": unknown}) is None


# ── samples and validation ──────────────────────────────────────────────────────────────────────────────────────


def test_validation_is_in_absolute_units(root: Path) -> None:
    data = built(root, RelativeActions(["gripper"], None), ValDataConfig(fraction=0.5))
    assert data.validation is not None
    robot, items = data.robots[0], list(ValidationBatches(data.validation, samples=0, batch=5))
    assert sum(len(item.index) for item in items) == len(data.validation.sources[0])
    for item in items:
        normalised = item.batch.actions.values.numpy()[..., :4]
        relative = normalised * robot.action_statistics.std + robot.action_statistics.mean
        offset = np.where(robot.relative, item.state[:, :4], 0)
        np.testing.assert_allclose(relative, item.actions - offset[:, None], atol=1e-4)
        back = data.validation.unnormalize(item.batch.actions.values, item)
        np.testing.assert_allclose(back, item.actions, atol=1e-5)


@pytest.mark.parametrize(
    ("relative", "settings", "message"),
    [
        (
            RelativeActions(["e", "r"], None),
            {},
            r"excludes every action dimension \(shoulder, elbow.*use_relative_actions: false",
        ),
        (
            RelativeActions([], None),
            {"state": "action", "action": "observation.state"},
            r"action \(4 dimensions\) from .*\(5\)",
        ),
        (
            RelativeActions([], None),
            {"spec": SampleSpec(31, 16, 10, (32, 32), 16)},
            "longest has 30.*lower model_cfg.chunk",
        ),
        (
            RelativeActions(["x"], None),
            {"state": "action", "action": "observation.state"},
            "has no names of its 5 action",
        ),
        (RelativeActions(["x"], ["a"]), {"state": "action", "action": "observation.state"}, "has 1 names for 5 action"),
    ],
    ids=["all excluded", "state too small", "chunk too long", "no names", "too few names"],
)
def test_what_cannot_be_relative_is_refused(
    root: Path, relative: RelativeActions, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        built(root, relative, **settings)


def named(root: Path, **names: list[str]) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    for key, some in names.items():
        info["features"]["observation.state" if key == "state" else key]["names"] = some
    path.write_text(json.dumps(info))


MOVED = ["elbow", "shoulder", "wrist", "Gripper_left", "base"]


@pytest.mark.parametrize(
    ("state", "exclude", "message"),
    [
        (
            MOVED,
            [],
            r"dimension 0 is 'shoulder' in action, 'elbow' in observation.state \('shoulder' is dimension 1 there\)",
        ),
        (
            [f"{name}.pos" for name in MOVED],
            [],
            "dimension 0 is 'shoulder' in action, 'elbow.pos' in observation.state",
        ),
        ([f"state.{name}" for name in MOVED], ["gripper"], "dimension 0 is 'shoulder' in action, 'state.elbow' in"),
        (
            ["shoulder", "elbow", "wrist", "base", "Gripper_left"],
            [],
            r"dimension 3 is 'Gripper_left' in action, 'base' in",
        ),
        (["shoulder", "shoulder.vel", "elbow", "elbow.vel", "wrist"], ["gripper"], "dimension 1 is 'elbow' in action"),
        (["shoulder", "elbow", "wrist", "base", "Gripper_left"], ["gripper"], None),  # which stays absolute
        ([f"{name}.pos" for name in [*NAMES, "base"]], [], None),
        ([f"state_{number}" for number in range(5)], [], None),  # no name of an action among them
        (["x", "y", "z", "gripper", "pad"], [], None),
        (["one name"], [], None),
    ],
)
def test_an_action_is_relative_to_the_state_of_its_own_joint(
    root: Path, tmp_path: Path, state: list[str], exclude: list[str], message: str | None
) -> None:
    import shutil

    shutil.copytree(root, tmp_path / "arm")
    named(tmp_path / "arm", state=state)
    if message is None:
        data = built(tmp_path / "arm", RelativeActions(exclude, None))
        assert data.fingerprint == built(root, RelativeActions(exclude, None)).fingerprint
        return
    with pytest.raises(ValueError, match=message):
        built(tmp_path / "arm", RelativeActions(exclude, None))
    built(tmp_path / "arm", None)  # absolute actions are of no state


def test_names_of_the_config_are_not_those_of_the_data_set_in_another_order(root: Path) -> None:
    built(root, RelativeActions([], ["a", "b", "c", "d"]))
    with pytest.raises(
        ValueError, match=r"is 'shoulder', and in model_cfg.action_feature_names 'elbow'.*leave that out"
    ):
        built(root, RelativeActions([], MOVED[:4]))


def test_data_sets_normalised_together_agree_on_what_is_relative(root: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(root, other)
    info = json.loads((other / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = ["gripper", *NAMES[:3]]
    (other / "meta" / "info.json").write_text(json.dumps(info))
    datasets = [DatasetConfig("lab/arm", str(root)), DatasetConfig("lab/other", str(other))]

    def both(**settings) -> Data:
        return build_data(
            DataConfig(TrainDataConfig(datasets, num_workers=0, **settings), ValDataConfig(fraction=0)),
            SPEC,
            seed=5,
            draw=partial(draw, "noise"),
            validation_draw=partial(draw, "validation"),
            normalization=Normalization(
                {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}, relative=RelativeActions(["gripper"], None)
            ),
            wording=Wording(prompt_of(REPOSITORY / "demo" / "tokenizer")),
        )

    with pytest.raises(ValueError, match="lab/other.*(names|stay absolute)"):
        both()
    first, second = both(normalization="per_dataset").robots
    assert first.relative.tolist() == [True, True, True, False] and second.relative.tolist() == [
        False,
        True,
        True,
        True,
    ]
    # one set of statistics over both: every chunk counts, the shorter ones of either data set too
    shutil.copytree(root, tmp_path / "copy")
    datasets[1] = DatasetConfig("lab/copy", str(tmp_path / "copy"), episodes=[0, 2])
    merged = both()
    every = np.concatenate([_by_hand(merged, number) for number in (0, 1)])
    np.testing.assert_array_equal(merged.robots[0].action_statistics.max, compute_statistics(every).max)
    frames = np.concatenate([source.columns("action") for source in merged.reader.sources])
    np.testing.assert_allclose(merged.robots[0].mean_action, frames.mean(0), atol=1e-6)


# ── LeRobot ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lerobot_acts_as_we_do_with_relative_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By LeRobot's own code from the folder alone, against our data path and ``Robot.decode``."""
    from agent.data.normalization import robot as robot_module

    config = make_config(use_relative_actions=True, action_feature_names=NAMES)
    model, folder = make_model(config), tmp_path / "pretrained_model"
    folder.mkdir()
    write_pretrained(folder, config, model.state_dict(), to_lerobot_stats(*make_statistics()), last_update=200)
    recording = Recording((SIZE, SIZE), size=3)
    theirs = their_actions(folder, recording)
    absolute = our_actions(model, recording, resized_by_the_model=False)  # what the network says, un-normalised
    mask = relative_mask(NAMES, config.relative_exclude_joints, ACTION_DIM)
    expected = torch.stack(
        [
            chunk + torch.from_numpy(np.where(mask, frame.state[:ACTION_DIM], 0)).float()
            for chunk, frame in zip(absolute, recording.frames, strict=True)
        ]
    )
    assert theirs.shape == (3, CHUNK, ACTION_DIM) and mask.tolist() == [True, True, True, False]
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, absolute, atol=1.0)

    # Normalising a recorded action on the way in, LeRobot's preprocessor does what ``Robot.encode`` does.
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.pi0.modeling_pi0 import PI0Policy

    from agent.data.normalization.normalizer import Normalizer

    before, _ = make_pre_post_processors(PI0Policy.from_pretrained(folder).config, pretrained_path=str(folder))
    frame = recording.frames[1]
    recorded = np.random.default_rng(1).normal(size=(1, CHUNK, ACTION_DIM)).astype(np.float32)
    raw = {slot: image.float() / 255 for slot, image in frame.images.items()}
    raw |= {"observation.state": torch.from_numpy(frame.state)[None], "task": [frame.task]}
    state, action = (Normalizer("MEAN_STD", statistics) for statistics in make_statistics())
    ours = robot_module.Robot("arm", state, action, np.zeros(ACTION_DIM, np.float32), mask)
    np.testing.assert_allclose(
        before({**raw, "action": torch.from_numpy(recorded)})["action"][0].numpy(),
        ours.encode(recorded[0], frame.state),
        rtol=1e-5,
    )
    # Taken elsewhere: LeRobot of 2025 would take relative actions for absolute ones; openpi has to be told.
    arguments = ["--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--to"]
    assert export.main([*arguments, "lerobot_v1"]) == 2
    assert export.main([*arguments, "openpi"]) == 0
    # Statistics of relative actions serve no model of absolute ones, nor of others.
    files = [folder / "model.safetensors"]
    assert set(given.read_statistics(files, config)) == {"state", "action"}
    for changes, message in (
        ({}, "was trained on relative actions, and model_cfg.use_relative_actions is false"),
        (
            {"use_relative_actions": True, "relative_exclude_joints": []},
            r"trained with relative_exclude_joints \['gripper'\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            given.read_statistics(files, make_config(**changes))


# ── a real run ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_with_relative_actions_saves_a_policy_that_acts_in_absolute_ones(
    root: Path, tmp_path: Path, server: ForkServer
) -> None:
    from agent.inference import load_policy

    config = json.loads((Workplace.make(tmp_path).folder / "tiny.yaml").read_text())
    config["data"]["train"]["datasets"] = [{"repo_id": "lab/arm", "root": str(root)}]
    config["model_cfg"]["use_relative_actions"] = True
    config |= {"n_updates": 4, "eval_freq": 4, "save_model_freq": 4}
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    place = Workplace(tmp_path)
    output = server.start(place, "relative").wait()
    assert place.status("relative")["state"] == "finished", output
    assert "actions relative to the state: shoulder, elbow, wrist; absolute: Gripper_left" in output

    pretrained = place.checkpoint("relative") / "pretrained_model"
    saved = json.loads((pretrained / "config.json").read_text())
    assert saved["use_relative_actions"] and saved["action_feature_names"] == NAMES
    steps = {
        name: [step["registry_name"] for step in json.loads((pretrained / f"{name}.json").read_text())["steps"]]
        for name in ("policy_preprocessor", "policy_postprocessor")
    }
    assert steps["policy_preprocessor"][-2:] == ["relative_actions_processor", "normalizer_processor"]
    assert steps["policy_postprocessor"][:2] == ["unnormalizer_processor", "absolute_actions_processor"]

    # Far away in the state's own units, the network sees nothing new if it is normalised away; the action moves along.
    policy = load_policy(str(place.folder / "runs" / "relative"))
    statistics = policy._processors.state.statistics
    image = np.zeros((3, 64, 80), np.uint8)
    noise = np.zeros((policy.chunk_size, 8), np.float32)
    observation = {"observation.images.front": image, "task": "push the red button"}
    (there,) = policy.act([{**observation, "observation.state": statistics.mean}], [noise])
    object.__setattr__(statistics, "mean", statistics.mean + np.float32(100))
    (moved,) = policy.act([{**observation, "observation.state": statistics.mean}], [noise])
    np.testing.assert_allclose(moved - there, np.broadcast_to([100, 100, 100, 0], moved.shape), atol=1e-3)
    assert place.metrics("relative")[-1]["val/action_l1"] < 50
