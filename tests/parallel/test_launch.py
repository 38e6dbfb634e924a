"""What torchrun says of a process, and which device the process takes.

Run: uv run pytest tests/parallel/test_launch.py
"""

from __future__ import annotations

import pytest
from support.launching import TORCHRUN

from agent.parallel.launch import Launch, choose_device, read_launch


def test_local_rank_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_launch() == Launch()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="LOCAL_RANK set but RANK, WORLD_SIZE.* not: .*Start with `torchrun"):
        read_launch()


def test_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(TORCHRUN, ("5", "1", "8", "4", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="8 processes on several nodes; one node is supported: --nnodes=1"):
        read_launch()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert read_launch() == Launch(5, 1, 8, 8, under_torchrun=True)


def test_more_gpus_asked_for_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes were started but 2 GPUs are visible; write --nproc_per_node=2"):
        choose_device(Launch(0, 0, 4, 4, under_torchrun=True), None)
    assert choose_device(Launch(0, 0, 4, 4, under_torchrun=True), "cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_device(Launch(), None).type == "cpu"
    with pytest.raises(ValueError, match="model_cfg.device is cuda, but no GPU is visible"):
        choose_device(Launch(), "cuda")
    with pytest.raises(ValueError, match="model_cfg.device: 'tpu' is not supported; write cuda, cpu or null"):
        choose_device(Launch(), "tpu")


@pytest.mark.parametrize(
    ("given", "warned"),
    [("0,1", True), ("GPU-8f1c", True), ("MIG-77aa", True), ("", False), ("-1", False), ("NoDevFiles", False)],
)
def test_gpus_that_were_given_and_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: str, warned: bool
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # as with a driver that does not answer
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert choose_device(Launch(), "cpu").type == "cpu" and not caplog.records
    assert choose_device(Launch(), None).type == "cpu"
    assert [f"CUDA_VISIBLE_DEVICES={given} gives this run GPUs" in r.getMessage() for r in caplog.records] == [
        True
    ] * warned
    with pytest.raises(ValueError, match="no GPU is visible"):
        choose_device(Launch(), "cuda")
