"""Passes from graphs: the same numbers as without, whatever shapes come, and none where a graph is wrong or slower.

Run: uv run pytest tests/training/test_step_graph.py      (a CPU stands in for the GPU; two runs are real processes)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.forked import ForkServer
from support.launching import Workplace
from support.small_model import CAMERAS, lively_model, make_batch

from agent.batch import Batch
from agent.models.pi.model import PI0
from agent.optim.optimizer import freeze
from agent.training import step_graph
from agent.training.step_graph import GraphedPasses, Losses

CPU = torch.device("cpu")


def dense(seed: int, cameras: int = 3, tokens: int = 5, size: int = 3) -> Batch:
    batch = make_batch(CAMERAS[:cameras], size=size, seed=seed)
    mask = torch.arange(8) < torch.full((size, 1), tokens)
    return replace(batch, observation=replace(batch.observation, token_mask=mask))


class Subject:
    """A model, its pass, and what was captured."""

    def __init__(self) -> None:
        self.model: PI0 = lively_model()
        freeze(self.model, self.model.frozen_parameters())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.captured, self.passes = 0, 0
        self.graphs = GraphedPasses(self.compute, self.trained, CPU, self.capture)

    def compute(self, batch: Batch) -> Losses:
        self.passes += 1
        losses = self.model(batch)["flow"]
        losses.sum().backward()
        return {"loss": losses.detach()}

    def capture(self, function: Callable[[], Losses]) -> Callable[[], Losses]:
        """Like a real graph: the result has the same memory at every replay."""
        self.captured += 1
        kept = function()

        def replay() -> Losses:
            for name, losses in function().items():
                kept[name].copy_(losses)
            return kept

        return replay

    def update(self, batches: list[Batch], graphs: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        losses = [(self.graphs(b, first=i == 0) if graphs else self.compute(b))["loss"] for i, b in enumerate(batches)]
        gradients = [p.grad.clone() for p in self.trained if p.grad is not None]
        for parameter in self.trained:
            if graphs and self.graphs.active:
                assert parameter.grad is not None
                parameter.grad.zero_()
            else:
                parameter.grad = None
        return losses, gradients


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_updates_are_the_same_whatever_shapes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "_GAIN", 0.0)
    ours, plain = Subject(), Subject()
    mixed = make_batch(size=3, seed=90)  # instructions of different lengths
    updates = [[dense(10 * i + j, cameras=1 + i % 2) for j in range(2)] for i in range(8)]
    updates[5] = [mixed, dense(50)]
    updates[6] = [dense(60, tokens=3), mixed]
    for batches in updates:
        ours_found, expected = ours.update(batches, graphs=True), plain.update(batches, graphs=False)
        assert same(ours_found[0], expected[0]) and same(ours_found[1], expected[1])
    assert ours.captured == 2 and ours.graphs.active  # one for each shape that came again and again


def test_a_graph_is_made_in_the_first_micro_batch_only_and_there_are_not_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "_GAIN", 0.0)
    monkeypatch.setattr(step_graph, "MOST_GRAPHS", 3)
    subject = Subject()
    for number in range(5):
        subject.graphs(dense(number), first=False)
    assert subject.captured == 0
    for tokens in (3, 5):
        for cameras in (1, 2):
            for number in range(4):
                subject.graphs(dense(number, cameras, tokens, size=1), first=True)
                subject.update([], graphs=True)
    assert subject.captured == 3
    large = Subject()
    for number in range(5):
        large.graphs(dense(number, size=step_graph.LARGEST_BATCH + 1), first=True)
    assert large.captured == 0


@pytest.mark.parametrize("how", ["raises", "wrong losses", "wrong gradients", "slower"])
def test_a_bad_graph_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(step_graph, "_GAIN", 1e9 if how == "slower" else 0.0)
    ours, plain = Subject(), Subject()

    def capture(function: Callable[[], Losses]) -> Callable[[], Losses]:
        if how == "raises":
            function()
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        factor = 1.01 if how == "wrong losses" else 1.0

        def replay() -> Losses:
            losses = function()
            if how == "wrong gradients":
                torch._foreach_mul_([p.grad for p in ours.trained], 2.0)
            return {name: some * factor for name, some in losses.items()}

        return replay

    monkeypatch.setattr(ours.graphs, "_capture", capture)
    for number in range(6):
        found, expected = (s.update([dense(number), dense(100 + number)], s is ours) for s in (ours, plain))
        assert same(found[0], expected[0]) and same(found[1], expected[1])
    assert not ours.graphs.active
    said = [record.getMessage() for record in caplog.records]
    words = {"raises": "not permitted", "slower": ", not used"}.get(how, "computes something else")
    assert len(said) == 1 and words in said[0]


def test_a_run_from_graphs_ends_with_the_same_weights(place: Workplace, server: ForkServer) -> None:
    short = ("--n_updates", "8", "--eval_freq", "4", "--save_model_freq", "4", "--ema_decay", "0.9")
    outputs = {
        name: server.start(place, name, *short, "--cuda_graph", "auto", hook=hook).wait()
        for name, hook in (("graphs", "graphs_without_a_gpu"), ("plain", ""))
    }
    assert "CUDA graph of a step of 2 samples" in outputs["graphs"] and "CUDA graph" not in outputs["plain"]
    assert place.metrics("graphs")[-1]["loss"] == place.metrics("plain")[-1]["loss"]
    assert place.tensors("graphs") == place.tensors("plain")
