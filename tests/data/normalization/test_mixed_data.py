"""Data sets of different robots side by side: statistics of each, validation, the realised mix, export for one of them.

Run: uv run pytest tests/data/normalization/test_mixed_data.py      (twenty seconds, most of them for imports)
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.datasets import write_dataset
from support.forked import ForkServer
from support.launching import REPOSITORY, Workplace
from support.samples import prompt_of

from agent import export
from agent.batch import SampleSpec
from agent.data.build import Data, build_data
from agent.data.configuration import DataConfig, DatasetConfig, TrainDataConfig, ValDataConfig
from agent.data.loading.loader import Share, TrainLoader, ValidationBatches
from agent.data.normalization.normalizer import STATISTIC_NAMES, compute_statistics
from agent.data.normalization.robot_statistics import Normalization
from agent.data.samples.mixture import Mixture
from agent.data.samples.wording import Wording
from agent.models.flow_matching import FlowDraws
from agent.reproducibility import stream

FRONT = "observation.images.front"
SPEC = SampleSpec(4, 16, 10, (32, 32), 16)
ARM, HAND = {"state": 7, "action": 7}, {"state": 9, "action": 5}  # dimensions of the two robots


def draw(purpose: str, k: int) -> FlowDraws:
    return FlowDraws(stream(5, purpose, k).standard_normal((4, 10)).astype(np.float32), np.float32(0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two robots, three data sets; the hand's camera and one data set's columns have other names."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "arm", episodes=5, length=12)
    info = json.loads((folder / "arm" / "meta" / "info.json").read_text())
    info["features"]["observation.state"]["names"] = list("stuvwxy")
    (folder / "arm" / "meta" / "info.json").write_text(json.dumps(info))
    write_dataset(folder / "arm2", episodes=4, length=9, seed=1)
    wrist = {"observation.images.wrist": (48, 32)}
    write_dataset(folder / "hand", episodes=5, length=14, state_dim=9, action_dim=5, cameras=wrist, seed=2)
    return folder


def arm(folder: Path, name: str = "arm", **settings) -> DatasetConfig:
    return DatasetConfig(f"lab/{name}", str(folder / name), **settings)


def hand(folder: Path, **settings) -> DatasetConfig:
    return DatasetConfig("lab/hand", str(folder / "hand"), cameras={FRONT: "observation.images.wrist"}, **settings)


def built(
    *datasets: DatasetConfig, val: ValDataConfig | None = None, spec: SampleSpec = SPEC, given: Any = None, **settings
) -> Data:
    return build_data(
        DataConfig(TrainDataConfig(list(datasets), num_workers=0, **settings), val or ValDataConfig()),
        spec,
        seed=5,
        draw=partial(draw, "noise"),
        validation_draw=partial(draw, "validation"),
        normalization=Normalization({"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "QUANTILES"}, given),
        wording=Wording(prompt_of(REPOSITORY / "demo" / "tokenizer")),
    )


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Data:
    return built(hand(folder, episodes=[0, 1, 2, 4]), arm(folder), normalization="per_dataset", deploy="lab/arm")


# ── statistics of each robot ────────────────────────────────────────────────────────────────────────────────────


def test_each_robot_has_the_statistics_of_its_own_training_frames(mixed: Data) -> None:
    assert [robot.name for robot in mixed.robots] == ["lab/arm", "lab/hand"]  # the one to deploy first
    assert (mixed.spec.state_dim, mixed.spec.action_dim) == (7, 7)
    for robot, source in zip(reversed(mixed.robots), mixed.reader.sources, strict=True):
        for mine, key in ((robot.state_statistics, "observation.state"), (robot.action_statistics, "action")):
            expected = compute_statistics(source.columns(key))
            for name in STATISTIC_NAMES:
                np.testing.assert_array_equal(getattr(mine, name), getattr(expected, name))
        np.testing.assert_array_equal(robot.mean_action, robot.action_statistics.mean)
    assert any("robot lab/hand" not in line and "each robot is normalised" in line for line in mixed.report)


def test_samples_are_padded_and_masked_each_to_its_own_size(mixed: Data) -> None:
    loader = TrainLoader(mixed.reader, mixed.mixture, per_device_batch=32)
    batch = next(loader)
    datasets = batch.provenance[:, 0]
    assert set(datasets.tolist()) == {0, 1}
    assert batch.actions.dim_mask.sum(1).tolist() == [[5, 7][number] for number in datasets]
    for values, mask in zip(batch.actions.values, batch.actions.dim_mask, strict=True):
        assert (values[:, ~mask] == 0).all() and (values[:, mask] != 0).all()
    hands = batch.observation.state[datasets == 0]
    assert (hands[:, 9:] == 0).all() and (hands[:, :9] != 0).all()
    assert set(batch.provenance[datasets == 0][:, 1].tolist()) <= {0, 1, 2, 4}  # the episode filter
    for number, source in enumerate(mixed.reader.sources):  # its own camera, state and action
        place = datasets.tolist().index(number)
        _, episode, frame = batch.provenance[place].tolist()
        position = next(p for p in range(len(source)) if source.frame(p) == (episode, frame))
        robot, raw = mixed.reader.robots[number], source.read(position)
        expected = (raw.state - robot.state_statistics.mean) / (robot.state_statistics.std + 1e-8)
        np.testing.assert_allclose(batch.observation.state[place, : len(raw.state)], expected, rtol=1e-6)


def test_validation_brings_every_sample_back_to_its_own_units(mixed: Data) -> None:
    assert mixed.validation is not None
    seen = Counter()
    for item in ValidationBatches(mixed.validation, samples=0, batch=7):
        back = mixed.validation.unnormalize(item.batch.actions.values, item)
        np.testing.assert_allclose(back, item.actions, atol=1e-6)
        for number, actions, state in zip(item.batch.provenance[:, 0].tolist(), item.actions, item.state, strict=True):
            seen[number] += 1
            width = 7 if set(item.batch.provenance[:, 0].tolist()) != {0} else 5
            assert actions.shape == (4, width) and (number or not actions[:, 5:].any()) and state[:7].any()
    assert seen == {0: 14, 1: 12}
    means = mixed.validation.mean_actions
    assert means.shape == (2, 7) and not means[0, 5:].any()
    np.testing.assert_array_equal(means[1], mixed.robots[0].mean_action)


def test_data_sets_of_one_robot_share_their_statistics(folder: Path) -> None:
    named = built(
        arm(folder, robot="arm"),
        hand(folder),
        arm(folder, "arm2", robot="arm"),
        normalization="per_dataset",
        val=ValDataConfig([arm(folder, "arm2", robot="arm"), hand(folder)]),
    )
    assert [robot.name for robot in named.robots] == ["arm", "lab/hand"]
    both = np.concatenate([named.reader.sources[number].columns("action") for number in (0, 2)])
    np.testing.assert_array_equal(named.robots[0].action_statistics.q99, compute_statistics(both).q99)
    assert [robot.name for robot in named.validation.robots] == ["arm", "lab/hand"]


def test_states_of_one_robot_are_in_one_order(folder: Path, tmp_path: Path) -> None:
    joints = [f"joint_{number}" for number in range(7)]

    def both(one: list[str] | None, other: list[str] | None, **settings) -> Data:
        for name, names in (("arm", one), ("arm2", other)):
            shutil.copytree(folder / name, tmp_path / name, dirs_exist_ok=True)
            path = tmp_path / name / "meta" / "info.json"
            info = json.loads(path.read_text())
            info["features"]["observation.state"]["names"] = names
            path.write_text(json.dumps(info))
        return built(arm(tmp_path), arm(tmp_path, "arm2"), val=ValDataConfig(fraction=0), **settings)

    turned = [joints[1], joints[0], *joints[2:]]
    said = r"the states of data set lab/arm and data set lab/arm2 are not of the same things: dimension 0 of observation.state "
    with pytest.raises(
        ValueError, match=rf"{said}is 'joint_0' in one and 'joint_1' in the other \(the same names in another"
    ):
        both(joints, turned)
    with pytest.raises(ValueError, match=rf"{said}is 'joint_0' in one and 'joint_1.pos' in the other.*`state:`"):
        both(joints, [f"{name}.pos" for name in turned])
    apart = both(joints, turned, normalization="per_dataset")
    assert len(apart.robots) == 2 and apart.robots[1].state_names == tuple(turned)
    for other in (None, joints, [f"{name}.pos" for name in joints], {"motors": joints}):
        assert not any("taken for the same" in line for line in both(joints, other).report)  # type: ignore[arg-type]
    (line,) = [line for line in both(joints, list("abcdefg")).report if "taken for the same" in line]
    assert line.startswith("WARNING: dimension 0 of observation.state of data set lab/arm is 'joint_0', that of")


def test_given_statistics_are_of_the_same_dimensions(folder: Path, tmp_path: Path) -> None:
    from agent.data.normalization.robot_statistics import GivenStatistics

    shutil.copytree(folder / "arm", tmp_path / "arm")
    path = tmp_path / "arm" / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"]["observation.state"]["names"] = list("abcdefg")
    path.write_text(json.dumps(info))
    values = {name: np.ones(7, np.float32) for name in STATISTIC_NAMES} | {"q01": -np.ones(7, np.float32)}
    for names, fits in ({}, True), ({"state": list("ABCDEFG")}, True), ({"state": list("bacdefg")}, False):
        given = GivenStatistics("weights", {"state": values, "action": values}, names)
        if fits:
            assert built(arm(tmp_path), given=given).robots[0].state.statistics.std.tolist() == [1] * 7
            continue
        with pytest.raises(
            ValueError, match=r"data.statistics: dimension 0 of observation.state is 'a' in data set lab/arm, and in"
        ):
            built(arm(tmp_path), given=given)


def test_one_set_of_statistics_is_refused_for_different_robots(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state: 7 +\| observation.state: 9(.|\n)*normalization: per_dataset"):
        built(arm(folder), hand(folder))
    shutil.copytree(folder / "arm2", tmp_path / "arm2")
    for root, kind in ((tmp_path / "arm2", "so100"), (folder / "arm", None)):
        info = json.loads((root / "meta" / "info.json").read_text())
        (root / "meta" / "info.json").write_text(json.dumps({**info, "robot_type": kind}))
    other = arm(tmp_path, "arm2")
    assert len(built(arm(folder), other).robots) == 1  # only one of the two says what it is
    with pytest.raises(ValueError, match=r"different robots \(data set lab/arm of koch, data set lab/arm2 of so100\)"):
        built(arm(folder, robot="koch"), other)
    assert len(built(arm(folder, robot="koch"), other, normalization="merged").robots) == 1
    assert len(built(arm(folder, robot="koch"), other, normalization="per_dataset").robots) == 2
    with pytest.raises(ValueError, match=r"state: 9 +\| observation.state: 7"):
        built(hand(folder, robot="x"), arm(folder, robot="x"), normalization="per_dataset")
    with pytest.raises(ValueError, match="deploy is 'lab/leg', which is no robot.*write one of lab/arm, lab/hand"):
        built(arm(folder), hand(folder), normalization="per_dataset", deploy="lab/leg")
    with pytest.raises(ValueError, match="would be normalised as 'lab/arm2', which is not trained on: write `robot:`"):
        built(arm(folder), hand(folder), normalization="per_dataset", val=ValDataConfig([arm(folder, "arm2")]))


def test_a_data_set_of_another_robot_can_be_looked_at_by_itself(mixed: Data, folder: Path) -> None:
    from agent.data.features import check_features
    from agent.data.normalization.robot_names import robot_alone

    train = TrainDataConfig([arm(folder), hand(folder)], normalization="per_dataset")
    of_hand, of_arm = mixed.reader.sources
    assert robot_alone(of_hand.config, train) == (["lab/hand"], "lab/arm")
    check_features([of_hand], mixed.spec, *robot_alone(of_hand.config, train))
    assert check_features([of_hand], SPEC, *robot_alone(of_hand.config, train))[0].action_dim == 5
    with pytest.raises(ValueError, match=r"state: 7 +\| observation.state: 9"):
        check_features([of_hand], mixed.spec, *robot_alone(of_hand.config, TrainDataConfig([arm(folder)])))
    check_features([of_arm], mixed.spec, *robot_alone(of_arm.config, train))


# ── the stream ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_balance_says_which_share_each_data_set_gives(folder: Path) -> None:
    def shares(balance: str | None, *weights: float | None) -> list[float]:
        datasets = [arm(folder, weight=weights[0]), arm(folder, "arm2", weight=weights[1])]
        return built(*datasets, balance=balance, val=ValDataConfig(fraction=0)).mixture.shares

    assert shares(None, None, None) == shares("frames", None, None) == [60 / 96, 36 / 96]
    assert shares("equal", None, None) == [0.5, 0.5]
    assert shares(None, 3, 1) == shares("given", 3, 1) == [0.75, 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"balance": "frames", "weights": (1, None)},
            "balance is frames, but lab/arm has a weight: leave `weight` out, or",
        ),
        ({"balance": "equal", "weights": (1, 2)}, "balance is equal, but lab/arm, lab/arm2 has a weight"),
        (
            {"balance": "given", "weights": (None, 2)},
            "balance is given, but lab/arm has no weight: write `weight: NUMBER`",
        ),
        ({"deploy": "lab/arm"}, "there is one set of statistics: leave it out, or write data.train.normalization"),
    ],
    ids=str,
)
def test_contradictions_are_refused_with_the_config(tmp_path: Path, settings: dict, message: str) -> None:
    weights = settings.pop("weights", (None, None))
    with pytest.raises(ValueError, match=message):
        TrainDataConfig([arm(tmp_path, weight=weights[0]), arm(tmp_path, "arm2", weight=weights[1])], **settings)


def test_given_statistics_and_per_dataset_contradict(tmp_path: Path) -> None:
    train = TrainDataConfig([arm(tmp_path)], normalization="per_dataset")
    with pytest.raises(ValueError, match="statistics: checkpoint is one set.*write data.statistics: dataset, or"):
        DataConfig(train, statistics="checkpoint")


def test_a_loader_at_a_billion_costs_what_it_costs_at_the_start(mixed: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in what the mixture computes, not in seconds."""
    from agent.data.samples import mixture

    calls, scramble = [0], mixture._scramble
    monkeypatch.setattr(mixture, "_scramble", lambda *a: (calls.__setitem__(0, calls[0] + 1), scramble(*a))[1])
    costs = []
    for weights in (None, [1.0, 3.0]):
        order = Mixture(mixed.mixture.lengths, weights, seed=5)
        for update in (0, 10**9 // 32):
            calls[0] = 0
            batch = next(TrainLoader(mixed.reader, order, per_device_batch=32, share=Share(first_sample=32 * update)))
            assert batch.sample_index.tolist() == list(range(update * 32, update * 32 + 32))
            order.counts(update * 32, update * 32 + 32)
            costs.append(calls[0])
    assert all(cost < 32 * 15 for cost in costs), costs  # some three evaluations of the bijection a sample


# ── real runs ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """``tiny.yaml`` trains on both robots, the hand three times as much as the arm."""
    place = Workplace.make(tmp_path_factory.mktemp("place"))
    config = json.loads((place.folder / "tiny.yaml").read_text())
    cameras = {FRONT: "observation.images.wrist"}
    config["data"]["train"] |= {
        "normalization": "per_dataset",
        "datasets": [
            {"repo_id": "lab/arm", "root": str(folder / "arm"), "weight": 1.0},
            {"repo_id": "lab/hand", "root": str(folder / "hand"), "weight": 3.0, "cameras": cameras},
        ],
    }
    config["model_cfg"]["max_state_dim"] = 12
    config |= {"n_updates": 8, "save_model_freq": 3, "keep_checkpoints": 3, "eval_freq": 8, "eval_size": 4}
    (place.folder / "tiny.yaml").write_text(json.dumps(config), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def through(place: Workplace, server: ForkServer) -> str:
    output = server.start(place, "through", hook="record", RECORD=str(place.folder / "through")).wait()
    assert place.status("through")["state"] == "finished", output
    return "through"


def samples(place: Workplace, name: str) -> dict[int, list[list[float]]]:
    """Update → [k, data set, episode, frame, time] of its samples."""
    lines = (place.folder / f"{name}.0").read_text().splitlines()
    return {record["step"]: record["samples"] for record in map(json.loads, lines)}


def mixes(place: Workplace, name: str) -> list[tuple[float, float]]:
    return [(line["mix/arm"], line["mix/hand"]) for line in place.metrics(name)]


def counted(place: Workplace, name: str) -> list[tuple[float, float]]:
    """The mix after each update, from the samples that were trained on."""
    updates, datasets, found = samples(place, name), Counter(), []
    for step in sorted(updates):
        datasets.update(sample[1] for sample in updates[step])
        found.append((datasets[0] / datasets.total(), datasets[1] / datasets.total()))
    return found


def test_the_realised_mix_is_that_of_the_samples(place: Workplace, through: str) -> None:
    assert mixes(place, through) == counted(place, through)
    assert place.metrics(through)[-1]["val/action_l1"] > 0


def test_weights_change_on_resume_only_by_saying_so(place: Workplace, server: ForkServer, through: str) -> None:
    run = place.folder / "runs" / "resumed"
    shutil.copytree(place.folder / "runs" / through, run, symlinks=True)
    for later in ("step_00000006", "step_00000008"):
        shutil.rmtree(run / "checkpoints" / later, ignore_errors=True)
    status = json.loads((run / "status.json").read_text()) | {"state": "preempted", "step": 3}
    (run / "status.json").write_text(json.dumps(status))
    first = {"hook": "record", "RECORD": str(place.folder / "resumed")}
    shares = ("--data.train.datasets", json.dumps(_reweighted(place)))
    output = server.start(place, "resumed", *shares, **first).wait()
    assert "data.train.datasets.1.weight: 3.0 → 0.5" in output and "--resume_changes true" in output, output
    assert place.status("resumed")["state"] == "failed" and not (place.folder / "resumed.0").exists()

    output = server.start(place, "resumed", *shares, "--resume_changes", "true", **first).wait()
    assert place.status("resumed")["state"] == "finished", output
    # From the checkpoint on, the samples are those that the new weights give at these numbers.
    steps = samples(place, "resumed")
    start = min(steps)
    assert 1 < start <= 7
    lengths = [48, 56]  # one episode of each is held out
    order = Mixture(lengths, [1.0, 0.5], seed=42)
    for step, found in steps.items():
        assert [sample[:2] for sample in found] == [[k, order[k][0]] for k in range((step - 1) * 8, step * 8)]
    # And the mix is over all samples of the run, those before the change included.
    before = [sample for step, found in samples(place, through).items() if step < start for sample in found]
    datasets = Counter(sample[1] for found in [before, *steps.values()] for sample in found)
    assert mixes(place, "resumed")[-1] == (datasets[0] / 64, datasets[1] / 64)
    assert mixes(place, "resumed")[: start - 1] == mixes(place, through)[: start - 1]


def _reweighted(place: Workplace) -> list[dict]:
    datasets = json.loads((place.folder / "tiny.yaml").read_text())["data"]["train"]["datasets"]
    datasets[1]["weight"] = 0.5
    return datasets


def test_a_checkpoint_is_exported_for_either_robot(
    place: Workplace, through: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from agent.inference import load_policy

    pretrained = place.checkpoint(through) / "pretrained_model"
    document = json.loads((pretrained / "robots.json").read_text())
    assert document["processors_are_of"] == "lab/arm" and set(document["robots"]) == {"lab/arm", "lab/hand"}
    arguments = ["--checkpoint", str(place.folder / "runs" / through), "--to", "lerobot"]
    assert export.main([*arguments, "--out", str(tmp_path / "arm")]) == 0
    assert "it acts on lab/arm; --statistics exports it for lab/hand" in capsys.readouterr().out
    assert export.main([*arguments, "--out", str(tmp_path / "hand"), "--statistics", "lab/hand"]) == 0
    assert "it acts on lab/hand; --statistics exports it for lab/arm" in capsys.readouterr().out
    policies = [load_policy(str(tmp_path / name)) for name in ("arm", "hand")]
    assert [policy.dimension_names for policy in policies] == [{"observation.state": list("stuvwxy")}, {}]
    assert load_policy(str(place.folder / "runs" / through), statistics="lab/hand").dimension_names == {}
    assert [(policy.state_dim, policy.action_dim) for policy in policies] == [(7, 7), (9, 5)]

    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    noise = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    acted = []
    for policy, name in zip(policies, ("lab/arm", "lab/hand"), strict=True):
        entries = document["robots"][name]["statistics"]
        state, action = (
            {key: np.asarray(values, np.float32) for key, values in entries[feature].items()}
            for feature in ("observation.state", "action")
        )
        observation = {FRONT: image, "task": "push the red button", "observation.state": state["mean"] + state["std"]}
        (actions,) = policy.act([observation], [noise])
        # The same weights straight from the run, told whose statistics to take.
        (direct,) = load_policy(str(place.folder / "runs" / through), statistics=name).act([observation], [noise])
        np.testing.assert_array_equal(actions, direct)
        acted.append((actions - action["mean"]) / action["std"])
        assert actions.shape == (4, policy.action_dim)
    # Both robots are at one standard deviation from their mean, so the network sees ones, seven or nine of them, and says
    # nearly the same of both; in their own units they act differently.
    assert not np.array_equal(acted[0][:, :5], acted[1])
    np.testing.assert_allclose(acted[0][:, :5], acted[1], atol=0.5)
    assert export.main([*arguments, "--out", str(tmp_path / "x"), "--statistics", "lab/hnad"]) == 2
    assert "'lab/hnad' is no robot of" in (said := capsys.readouterr().err) and "write lab/hand" in said


def test_lerobots_processors_of_an_export_normalise_as_the_training_does(
    place: Workplace, through: str, tmp_path: Path, folder: Path
) -> None:
    import lerobot.policies.pi0.processor_pi0  # noqa: F401  registers its steps
    import torch
    from lerobot.processor import DataProcessorPipeline
    from lerobot.processor.converters import create_transition

    out = tmp_path / "hand"
    arguments = ["--checkpoint", str(place.folder / "runs" / through), "--to", "lerobot", "--out", str(out)]
    assert export.main([*arguments, "--statistics", "lab/hand"]) == 0
    before = DataProcessorPipeline.from_pretrained(out, config_filename="policy_preprocessor.json")
    step = next(step for step in before.steps if type(step).__name__ == "NormalizerProcessorStep")
    data = built(arm(folder), hand(folder), normalization="per_dataset")
    raw, robot = data.reader.sources[1].read(3), data.reader.robots[1]
    assert robot.action.mode == "QUANTILES"  # the run's is MEAN_STD, so only the state can be compared
    transition = create_transition(
        observation={"observation.state": torch.from_numpy(raw.state)}, action=torch.from_numpy(raw.actions)
    )
    theirs = step(transition)
    np.testing.assert_array_equal(theirs["observation"]["observation.state"], robot.state.normalize(raw.state))
    statistics = robot.action_statistics
    expected = (raw.actions - statistics.mean) / (statistics.std + np.float32(1e-8))
    np.testing.assert_allclose(theirs["action"], expected, rtol=1e-6, atol=1e-6)
