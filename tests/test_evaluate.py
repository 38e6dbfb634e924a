"""Validation: errors of a policy whose mistakes are known, by hand and for any number of processes.

Run: pytest tests/test_evaluate.py   (a second)
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from agent.batch import ActionChunk, Batch, Observation, ValidationBatch
from agent.evaluate import evaluate

T, A, OWN = 3, 4, 2  # steps, padded and own action dimensions
MEAN = np.array([10.0, -20.0], np.float32)


def unnormalize(values: torch.Tensor, _item: ValidationBatch) -> np.ndarray:
    """Normalised → physical: another scale and offset in each dimension."""
    return (values[..., :OWN] * torch.tensor([2.0, 4.0]) + torch.tensor([10.0, -20.0])).numpy()


class FakePolicy(nn.Module):
    """Loss and sampled actions of a sample are read off its noise; counts and checks its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout()
        self.sampled = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return self.dropout(batch.time * self.weight)

    def sample_actions(self, observation: Observation, noise: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.sampled += len(noise)
        return self.dropout(noise * self.weight)


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
            actions=ActionChunk(torch.full((size, T, A), 55.0), is_pad, torch.ones(size, A) > 0),
            noise=noise,
            time=torch.tensor([sample["loss"] for sample in samples]),
            sample_index=numbers,
            provenance=torch.zeros(size, 3, dtype=torch.int64),
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


def run(policy, batches, processes=None, thresholds=(0.5, 2.0), unnormalize=unnormalize, precision=None):
    return evaluate(
        policy,
        batches,
        processes or FakeProcesses(),
        unnormalize=unnormalize,
        mean_actions=MEAN[None],
        thresholds=list(thresholds),
        precision=precision or contextlib.nullcontext,
    )


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
        "val/baseline_mean_l1",
        "val/baseline_last_l1",
        "val/acc_0.5",
        "val/acc_2",
    ]
    assert metrics["val/loss"] == (0.5 + 2.0) / 2
    assert metrics["val/action_l1"] == (0.25 + 0.5 + 1 + 0 + 2 + 4 + 1 + 1 + 0.5 + 0) / values
    # |truth - (10, -20)|: 1 0 | 2 4 | 0 2, and of the padded sample 1 0 | 2 4
    assert metrics["val/baseline_mean_l1"] == (9 + 7) / values
    # |truth - (12, -22)|: 1 2 | 0 2 | 2 4;  |truth - (11, -20)|: 0 0 | 1 4
    assert metrics["val/baseline_last_l1"] == (11 + 5) / values
    assert metrics["val/acc_0.5"] == (3 + 2) / values  # a distance equal to the threshold is within it
    assert metrics["val/acc_2"] == (5 + 4) / values


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
    expected = run(FakePolicy(), [item(samples)])
    shares: list[list] = []
    for rank in range(world):
        mine = samples[rank::world]  # with 30 processes, some have nothing
        processes = FakeProcesses(shares)
        batches = [item(mine[i : i + batch]) for i in range(0, len(mine), batch)]
        metrics = run(FakePolicy(), batches, processes=processes)  # complete on the last, which sees every share
        shares.append(processes.share)
    assert metrics == expected


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
