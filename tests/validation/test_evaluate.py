"""Validation: errors of a policy whose mistakes are known, by hand and for any number of processes.

Run: pytest tests/validation/test_evaluate.py   (a second)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from agent.batch import ActionChunk, Batch, Draws, Observation, ValidationBatch
from agent.data.recorded.dimension_names import labels_of
from agent.models.flow_matching import FlowDraws
from agent.models.policy import Policy
from agent.validation.measurement import DatasetNames, HeldOut, evaluate
from agent.validation.picture import draw
from agent.validation.record import Evaluation, ValidationRecords, document

T, A, OWN = 3, 4, 2  # steps, padded and own action dimensions
MEAN = np.array([10.0, -20.0], np.float32)


def unnormalize(values: torch.Tensor, _item: ValidationBatch) -> np.ndarray:
    """Normalised → physical: another scale and offset in each dimension."""
    return (values[..., :OWN] * torch.tensor([2.0, 4.0]) + torch.tensor([10.0, -20.0])).numpy()


class FakePolicy(Policy):
    """Loss and sampled actions of a sample are read off its noise; counts and checks its calls."""

    loss_weights: ClassVar[Mapping[str, float]] = {"flow": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout()
        self.sampled = 0

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        assert isinstance(batch.draws, FlowDraws)
        return {"flow": self.dropout(batch.draws.time * self.weight)}

    def sample_actions(self, observation: Observation, draws: Draws) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        assert isinstance(draws, FlowDraws)
        self.sampled += len(draws.noise)
        return self.dropout(draws.noise * self.weight)

    def frozen_parameters(self) -> dict[str, str]:
        return {}

    def wrap_units(self) -> list[nn.Module]:
        return []

    def init_weights(self, generator: torch.Generator) -> None:
        pass


def item(samples: list[dict]) -> ValidationBatch:
    """A validation batch; each sample gives ``predicted`` (T, a) in physical units and what was recorded."""
    size = len(samples)
    noise = torch.full((size, T, A), 77.0)  # beyond the robot's own dimensions: never looked at
    for row, sample in zip(noise, samples, strict=True):
        row[:, :OWN] = (torch.tensor(sample["predicted"]) - torch.tensor([10.0, -20.0])) / torch.tensor([2.0, 4.0])
    is_pad = torch.tensor([sample.get("is_pad", [False] * T) for sample in samples])
    numbers = torch.tensor([sample["index"] for sample in samples])
    return ValidationBatch(
        batch=Batch(
            observation=Observation({}, {}, torch.zeros(size, 4), torch.zeros(size, 1).long(), torch.ones(size, 1) > 0),
            actions=ActionChunk(torch.full((size, T, A), 55.0), is_pad, (torch.arange(A) < OWN).expand(size, A)),
            draws=FlowDraws(noise, torch.tensor([sample["loss"] for sample in samples])),
            sample_index=numbers,
            provenance=torch.tensor([[0, 3, sample["index"]] for sample in samples]),
        ),
        index=numbers.numpy(),
        state=np.zeros((size, 4), np.float32),
        actions=np.array([sample["actions"] for sample in samples], np.float32),
        previous_action=np.array([sample["previous"] for sample in samples], np.float32),
        has_previous=np.array([sample.get("has_previous", True) for sample in samples]),
    )


class FakeProcesses:
    """One of several processes that run one after the other: ``gather`` concatenates what the others left."""

    device = torch.device("cpu")

    def __init__(self, others: list | None = None) -> None:
        self.others = others or []
        self.share: list = []

    def gather(self, value: list) -> list[list]:
        self.share = value
        return [*self.others, value]


def evaluation(
    policy, batches, processes=None, thresholds=(0.5, 2.0), unnormalize=unnormalize, precision=None, size=2
) -> Evaluation:
    return evaluate(
        policy,
        batches,
        processes or FakeProcesses(),
        held_out=HeldOut(size, unnormalize, MEAN[None], [DatasetNames("lab/arm", ["lift", "turn"])]),
        thresholds=list(thresholds),
        precision=precision or contextlib.nullcontext,
    )


def run(*arguments, **keywords) -> dict[str, float]:
    found = evaluation(*arguments, **keywords)
    return found.metrics() | found.baselines()


TRUTH = [[11.0, -20.0], [12.0, -24.0], [10.0, -18.0]]
FIRST = {  # errors 0.25 0.5 | 1 0 | 2 4
    "index": 0,
    "loss": 0.5,
    "predicted": [[11.25, -20.5], [13.0, -24.0], [8.0, -14.0]],
    "actions": TRUTH,
    "previous": [12.0, -22.0],
}
PADDED = {  # errors 1 1 | 0.5 0, its last step is past the episode's end
    "index": 1,
    "loss": 2.0,
    "predicted": [[10.0, -19.0], [12.5, -24.0], [999.0, 999.0]],
    "actions": [*TRUTH[:2], [-5000.0, 7000.0]],
    "is_pad": [False, False, True],
    "previous": [11.0, -20.0],
}


def test_errors_accuracies_and_baselines_by_hand():
    metrics = run(FakePolicy(), [item([FIRST, PADDED])])
    values = 6 + 4
    assert list(metrics) == [
        "val/loss",
        "val/action_l1",
        "val/acc_0.5",
        "val/acc_2",
        "val/baseline_mean_l1",
        "val/baseline_last_l1",
    ]
    assert metrics["val/loss"] == (0.5 + 2.0) / 2
    assert metrics["val/action_l1"] == (0.25 + 0.5 + 1 + 0 + 2 + 4 + 1 + 1 + 0.5 + 0) / values
    # |truth - (10, -20)|: 1 0 | 2 4 | 0 2, and of the padded sample 1 0 | 2 4
    assert metrics["val/baseline_mean_l1"] == (9 + 7) / values
    # |truth - (12, -22)|: 1 2 | 0 2 | 2 4;  |truth - (11, -20)|: 0 0 | 1 4
    assert metrics["val/baseline_last_l1"] == (11 + 5) / values
    assert metrics["val/acc_0.5"] == (3 + 2) / values  # a distance equal to the threshold is within it
    assert metrics["val/acc_2"] == (5 + 4) / values
    found = evaluation(FakePolicy(), [item([FIRST, PADDED])])
    assert found.last.acc == {"0.5": (1 + 2) / values, "2": (5 + 3) / values}
    assert found.mean.acc == {"0.5": (2 + 1) / values, "2": (5 + 3) / values}


def test_errors_by_dimension_and_by_step_by_hand():
    found = evaluation(FakePolicy(), [item([FIRST, PADDED])])
    assert found.names == ["lift", "turn"] and found.samples == 2 and found.datasets == []
    # Five real steps: three of the first sample, two of the second. The third step is real in one sample only.
    assert found.errors.per_dimension_l1 == [(0.25 + 1 + 2 + 1 + 0.5) / 5, (0.5 + 0 + 4 + 1 + 0) / 5]
    assert found.errors.per_step_l1 == [(0.75 + 2) / 4, (1 + 0.5) / 4, 6 / 2]
    assert found.mean.per_dimension_l1 == [(1 + 2 + 0 + 1 + 2) / 5, (0 + 4 + 2 + 0 + 4) / 5]
    assert found.last.per_step_l1 == [(3 + 0) / 4, (2 + 5) / 4, 6 / 2]
    assert found.errors.action_l1 == pytest.approx(np.mean(found.errors.per_dimension_l1), rel=1e-15)


def test_a_step_that_is_padded_everywhere_has_no_error():
    found = evaluation(FakePolicy(), [item([PADDED])])
    assert found.errors.per_step_l1[:2] == [1.0, 0.25] and np.isnan(found.errors.per_step_l1[2])
    assert document(3, found, None, None)["per_step_l1"] == [1.0, 0.25, None]  # JSON has no NaN


def test_padded_steps_count_for_nothing():
    other = PADDED | {
        "predicted": [*PADDED["predicted"][:2], [float("inf"), 3.0]],
        "actions": [*TRUTH[:2], [0.0, float("nan")]],
    }
    assert run(FakePolicy(), [item([FIRST, other])]) == run(FakePolicy(), [item([FIRST, PADDED])])


def test_on_an_episodes_first_frame_the_last_action_is_the_mean():
    first_frame = FIRST | {"previous": TRUTH[0], "has_previous": False}
    metrics = run(FakePolicy(), [item([first_frame])])
    assert metrics["val/baseline_last_l1"] == metrics["val/baseline_mean_l1"] == 9 / 6
    # Only that sample: its neighbour in the batch keeps its own last action.
    metrics = run(FakePolicy(), [item([first_frame, PADDED])])
    assert metrics["val/baseline_last_l1"] == (9 + 5) / 10


def test_a_longer_chunk_weighs_more_than_a_cut_one():
    """The mean is over steps and dimensions, not over samples."""
    short = PADDED | {"is_pad": [False, True, True]}  # errors 1 1
    metrics = run(FakePolicy(), [item([FIRST]), item([short])])
    assert metrics["val/action_l1"] == (7.75 + 2) / 8


def random_samples(count: int) -> list[dict]:
    generator = np.random.default_rng(0)
    samples = []
    for index in range(count):
        actions = generator.normal(size=(T, OWN)) * [1, 1e4]
        samples.append(
            {
                "index": index,
                "loss": float(generator.exponential()) * 10.0 ** generator.integers(-6, 6),
                "predicted": (actions + generator.normal(size=(T, OWN))).astype(np.float32),
                "actions": actions,
                "is_pad": (np.arange(T) >= generator.integers(1, T + 1)).tolist(),
                "previous": generator.normal(size=OWN),
                "has_previous": bool(index % 5),
            }
        )
    return samples


@pytest.mark.parametrize(("world", "batch"), [(1, 1), (1, 5), (2, 2), (3, 4), (5, 2), (30, 2)])
def test_any_split_over_processes_and_batches_gives_the_same_bits(world, batch):
    samples = random_samples(23)
    expected = evaluation(FakePolicy(), [item(samples)], size=23)
    shares: list[list] = []
    for rank in range(world):
        mine = samples[rank::world]  # with 30 processes, some have nothing
        processes = FakeProcesses(shares)
        batches = [item(mine[i : i + batch]) for i in range(0, len(mine), batch)]
        found = evaluation(FakePolicy(), batches, processes=processes, size=23)  # complete on the last: it sees all
        shares.append(processes.share)
    assert found == expected
    assert [chunk.frame for chunk in found.chunks] == [0, 2, 5, 8, 11, 14, 17, 20]  # eight, evenly spaced


def test_a_second_evaluation_gives_the_same_and_changes_nothing():
    policy, samples = FakePolicy(), random_samples(7)
    before = torch.get_rng_state()
    first = run(policy, [item(samples[:4]), item(samples[4:])])
    assert run(policy, [item(samples[:4]), item(samples[4:])]) == first
    assert policy.sampled == 14 and policy.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_put_back(training):
    policy = FakePolicy().train(training)
    run(policy, [item([FIRST])])
    assert policy.training == policy.dropout.training == training


def test_the_precision_surrounds_the_policy():
    seen = []

    class Policy(FakePolicy):
        def forward(self, batch):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(batch)

        def sample_actions(self, observation, noise):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().sample_actions(observation, noise).bfloat16()

    def normalized_back(values, batch):
        assert values.dtype == torch.float32 and values.shape[-1] == A
        return unnormalize(values, batch)

    autocast = run(
        Policy(), [item([FIRST])], unnormalize=normalized_back, precision=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert seen == [True, True]
    assert autocast["val/action_l1"] == 7.75 / 6  # these numbers are exact in bfloat16


def test_robots_with_other_dimensions_are_counted_by_their_own():
    wide, narrow = item([FIRST]), item([FIRST | {"index": 1}])
    narrow.batch.provenance[0, 0] = 1
    narrow.batch.actions.dim_mask[:] = torch.arange(A) < 1  # it has the first dimension only
    narrow.actions[..., 1:] = 0
    datasets = [DatasetNames("lab/arm", ["lift", "turn"]), DatasetNames("lab/slide", ["along"])]
    held_out = HeldOut(2, unnormalize, np.stack([MEAN, MEAN]), datasets)
    found = evaluate(
        FakePolicy(),
        [wide, narrow],
        FakeProcesses(),
        held_out=held_out,
        thresholds=[1.0],
        precision=contextlib.nullcontext,
    )
    assert found.names == ["action 0", "action 1"]  # theirs differ
    assert found.errors.per_dimension_l1 == [2 * (0.25 + 1 + 2) / 6, (0.5 + 0 + 4) / 3]
    assert found.errors.action_l1 == (7.75 + 3.25) / (6 + 3)
    assert found.errors.acc == {"1": (4 + 2) / 9}
    assert [(one.name, one.names, one.errors.per_dimension_l1) for one in found.datasets] == [
        ("lab/arm", ["lift", "turn"], [3.25 / 3, 1.5]),
        ("lab/slide", ["along"], [3.25 / 3]),
    ]
    assert [(chunk.dataset, len(chunk.recorded[0])) for chunk in found.chunks] == [("lab/arm", 2), ("lab/slide", 1)]
    # Each beside its own baselines, and in a record also beside its own start and average.
    slide = found.datasets[1]
    assert slide.errors.acc == {"1": 2 / 3}
    assert slide.baselines["mean"].per_dimension_l1 == [(1 + 2 + 0) / 3] and slide.baselines["mean"].acc == {"1": 2 / 3}
    assert slide.baselines["last"].per_step_l1 == [1.0, 0.0, 2.0] and slide.baselines["last"].action_l1 == 1.0
    start = document(0, found, None, None)
    assert [one["baselines"]["start"] for one in start["datasets"]] == [None, None]
    block = document(5, found, found, start)["datasets"][1]
    assert block["ema"] == block["baselines"]["start"] == {
        "action_l1": 3.25 / 3, "per_dimension_l1": [3.25 / 3], "per_step_l1": [0.25, 1.0, 2.0], "acc": {"1": 2 / 3},
    }  # fmt: skip
    assert block["baselines"]["last"]["action_l1"] == 1.0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["dx", "dy", "grip"], ["dx", "dy", "grip"]),
        ({"motors": ["dx", "dy", "grip"]}, ["dx", "dy", "grip"]),
        ({"axes": ["dx", "dy"], "gripper": ["grip"]}, ["dx", "dy", "grip"]),
        ({"grip": 2, "dx": 0, "dy": 1}, ["dx", "dy", "grip"]),
        (None, ["action 0", "action 1", "action 2"]),
        (["actions"], ["action 0", "action 1", "action 2"]),
        (["x", "x", "x"], ["action 0", "action 1", "action 2"]),
    ],
)
def test_the_names_of_the_dimensions(names, expected):
    assert labels_of({"names": names, "shape": [3]}, "action") == expected


# ── the record in the run folder ────────────────────────────────────────────────────────────────────────────────


def test_the_record_of_a_validation(tmp_path):
    raw, ema = evaluation(FakePolicy(), [item([FIRST, PADDED])]), evaluation(FakePolicy(), [item([FIRST, FIRST])])
    records = ValidationRecords(tmp_path)
    records.write(document(0, raw, None, None))
    start = records.read(0)
    records.write(document(10, raw, ema, start))
    found = records.read(10)
    assert found["step"] == 10 and found["names"] == ["lift", "turn"] and found["loss"] == raw.loss
    assert found["action_l1"] == raw.errors.action_l1 and found["acc"] == {"0.5": 0.5, "2": 0.9}
    assert found["baselines"]["start"] == {
        "action_l1": raw.errors.action_l1,
        "per_dimension_l1": raw.errors.per_dimension_l1,
        "per_step_l1": raw.errors.per_step_l1,
        "acc": raw.errors.acc,
    }
    assert found["baselines"]["last"]["acc"] == raw.last.acc
    assert found["baselines"]["mean"]["per_step_l1"] == raw.mean.per_step_l1
    assert found["baselines"]["last"]["action_l1"] == raw.last.action_l1
    assert found["ema"]["action_l1"] == ema.errors.action_l1 and found["ema"]["acc"] == ema.errors.acc
    first, padded = found["chunks"]
    assert first == {
        "dataset": "lab/arm",
        "episode": 3,
        "frame": 0,
        "recorded": TRUTH,
        "predicted": FIRST["predicted"],
        "valid": [True] * 3,
    }
    assert padded["valid"] == [True, True, False] and padded["recorded"][2] == [-5000.0, 7000.0]


def test_a_start_on_other_samples_is_no_baseline(tmp_path):
    start = document(0, evaluation(FakePolicy(), [item([FIRST])]), None, None)
    assert document(10, evaluation(FakePolicy(), [item([FIRST, PADDED])]), None, start)["baselines"]["start"] is None


def write_records(run_dir, *entries: tuple[int, float | None, str]) -> ValidationRecords:
    """Records of (step, error, validation set)."""
    records = ValidationRecords(run_dir)
    complete = document(0, evaluation(FakePolicy(), [item([FIRST])]), None, None)
    for step, error, samples in entries:
        records.write(complete | {"step": step, "action_l1": error, "validation_set": samples})
    return records


def test_the_best_is_the_lowest_among_validations_of_the_same_samples(tmp_path):
    records = write_records(
        tmp_path, (10, 0.1, "a"), (20, 0.4, "b"), (30, 0.3, "b"), (40, None, "b"), (50, 0.3, "b"), (60, 0.2, "b")
    )
    assert records.best([10, 20, 30, 40, 50]) == 30  # that of 10 was on others; the earlier of two alike
    assert records.best([10]) == 10
    assert records.best([20, 25]) == 20  # 25 was not validated
    assert records.best([25]) is None and records.best([40]) is None and records.best([]) is None
    records.path(30).write_text('{"format": 1, "act')
    assert records.best([20, 30, 50]) == 50  # one that cannot be read counts for nothing


def test_a_rewind_removes_the_records_of_later_updates(tmp_path):
    records = write_records(tmp_path, (0, 0.5, "a"), (10, 0.4, "a"), (20, 0.3, "a"))
    records.path(20, ".png").write_bytes(b"")
    (records.folder / "notes.txt").write_text("mine")
    records.rewind(10)
    assert sorted(path.name for path in records.folder.iterdir()) == [
        "notes.txt",
        "step_00000000.json",
        "step_00000010.json",
    ]


# ── the picture ─────────────────────────────────────────────────────────────────────────────────────────────────


def pictured(path: Path, dims: int, *, ema: bool = True) -> Image.Image:
    """A picture in which the average hides what the weights predict, but for the legend."""
    times = np.linspace(0, 6, 50)[:, None]
    recorded = np.sin(times + np.arange(dims))
    chunk = {"dataset": "lab/arm", "episode": 3, "frame": 7, "valid": [True] * 50, "recorded": recorded.tolist()}
    chunks = [chunk | {"predicted": (recorded + 0.2).tolist()}] * 8
    names = [f"joint {place}" for place in range(dims)]
    draw(
        path,
        {"step": 5, "names": names, "action_l1": 0.2, "chunks": chunks, "ema": {"chunks": chunks} if ema else None},
    )
    return Image.open(path).convert("RGB")


def test_the_curves_of_a_picture_have_the_colours_of_the_legend(tmp_path: Path) -> None:
    picture = pictured(tmp_path / "chunks.png", dims=14)
    recorded, predicted, average = (picture.getpixel((x, 40)) for x in (18, 124, 240))
    for found, wanted in ((recorded, (90, 94, 102)), (predicted, (208, 76, 24)), (average, (24, 98, 190))):
        assert isinstance(found, tuple) and max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 45, found


def test_a_picture_shows_both_arms_and_says_when_there_is_more(tmp_path: Path) -> None:
    few, many = (pictured(tmp_path / f"{dims}.png", dims, ema=False) for dims in (14, 40))
    assert few.size == (150 + 14 * 200, 74 + 8 * 120) and many.size == (150 + 16 * 200, few.height)
    end = [picture.crop((340, 0, 900, 30)).getextrema() for picture in (few, many)]  # of the heading
    assert end[0][0][0] > 250 and end[1][0][0] < 128
