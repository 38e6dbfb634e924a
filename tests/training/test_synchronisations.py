"""No micro-batch waits for the device: neither a value nor a shape that depends on one is read.

Without a GPU the profiler's trace of real runs is searched for operations that would wait, and the model runs on
stand-ins for a GPU's tensors, which have no values to read. On a GPU CUDA itself counts.

Run: pytest tests/training/test_synchronisations.py   (half a minute)
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked import ForkServer
from support.launching import Workplace
from support.small_model import make_batch, several_pairs, small_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from agent.batch import to_device
from agent.models.common import attention
from agent.models.pi.model import PI0


def waits(place: Workplace, server: ForkServer, name: str, *overrides: str, ranks: int = 1, **environment: str) -> list:
    """What waited in each update of a run, rank after rank."""
    target = place.folder / name
    short = ("--n_updates", "2", "--eval_freq", "0", "--per_device_batch_size", "2")
    run = server.start(
        place,
        name,
        *short,
        *overrides,
        ranks=ranks,
        hook="count_waits",
        WAITS=str(target),
        **environment,
    )
    output = run.wait()
    assert place.status(name)["state"] == "finished", output
    return [json.loads(line) for rank in range(ranks) for line in Path(f"{target}.{rank}").read_text().splitlines()]


KINDS = {
    "plain": (),
    "bfloat16": ("--use_bf16", "true"),
    "several draws": ("--flow_samples_per_observation", "3"),
    "checkpointed": ("--activation_checkpointing", "full"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_micro_batch_waits(place: Workplace, server: ForkServer, kind: str) -> None:
    updates = waits(place, server, kind.replace(" ", "-"), *KINDS[kind])
    assert [update["within"] for update in updates] == [[], []]
    # Whether the gradient is finite is asked once, before the weights change.
    assert all(update["after"] for update in updates)
    if torch.cuda.is_available():
        assert [len(update["after"]) for update in updates] == [1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: on a CPU DDP itself reads numbers")
def test_no_micro_batch_waits_with_two_processes(place: Workplace, server: ForkServer) -> None:
    updates = waits(place, server, "two", ranks=2)
    assert [update["within"] for update in updates] == [[]] * 4


def test_a_wait_would_be_seen(place: Workplace, server: ForkServer) -> None:
    updates = waits(place, server, "looking", LOOK="1")
    assert all(len(update["within"]) >= 4 for update in updates)  # one in each of four micro-batches


class Copies(TorchDispatchMode):
    """Remembers copies that leave the stand-in for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        before = [x for x in args if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.left += [str(function)] if any(x.device.type == "cuda" for x in before) else []
        return result


@pytest.mark.parametrize("padded", [True, False])
def test_nothing_leaves_the_gpu_in_a_pass(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # stand-ins cannot be pinned
    # Nor have they contents; the lengths are on the host, where they can be read without a wait.
    monkeypatch.setattr(attention, "_groups", lambda lengths: [(0, 16, 16), (16, 33, 17), (33, 51, 18)])
    batch = several_pairs(make_batch())
    if not padded:
        batch = replace(batch, observation=replace(batch.observation, token_mask=torch.ones(3, 8, dtype=torch.bool)))
    # What is real is noted where the batch is made.
    batch = replace(batch, observation=replace(batch.observation, real=batch.observation.parts()))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Copies() as copies:
        batch = to_device(batch, "cuda")
        with torch.device("cuda"):
            model = PI0(small_config())
        assert model.state_proj.weight.device.type == "cuda"
        loss = model(batch)["flow"]
        assert loss.device.type == "cuda" and loss.shape == (3,)
        assert fake is not None and copies.left == []
        loss.cpu()
    assert copies.left != []
