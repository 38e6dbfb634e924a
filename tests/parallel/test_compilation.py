"""How many variants of the layers a run compiles, and where it compiles by default.

Run: uv run pytest tests/parallel/test_compilation.py -m slow      (a minute; traces, but compiles nothing)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from support.small_model import CAMERAS, lively_model, make_batch, relative
from torch._dynamo.utils import counters

from agent.batch import Batch
from agent.optim.optimizer import freeze
from agent.parallel.compilation import choose_mode
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes
from agent.parallel.wrap import parallelize

ONE = Processes(Launch(), torch.device("cpu"))


def batches() -> Iterator[Batch]:
    """Batches of one, two and three cameras, dense and mixed, with instructions of many lengths."""
    random = torch.Generator().manual_seed(0)
    for number in range(9):
        cameras = CAMERAS[: 3 - number % 3]
        batch = make_batch(cameras, size=4, seed=number)
        lengths = torch.randint(2, 9, (1 if number % 2 else 4,), generator=random).expand(4)
        if number % 4 == 0:
            batch.observation.image_masks[cameras[-1]][1:3] = len(cameras) == 1
        mask = torch.arange(8) < lengths[:, None]
        yield replace(batch, observation=replace(batch.observation, token_mask=mask))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiler's front end alone: it makes graphs, one for each variant, and none may be cut."""
    compiler = torch.compile

    def trace(body: Callable[..., Any], mode: str) -> Callable[..., Any]:
        return compiler(body, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", trace)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_batches_of_all_shapes_share_a_few_variants(traced: None) -> None:
    eager, policy = lively_model(), lively_model()
    for some in (eager, policy):
        freeze(some, some.frozen_parameters())
    model = parallelize(policy, ONE, activation_checkpointing="full", compile_mode="default")
    model.train()
    known = []
    for batch in batches():
        losses = [some(batch)["flow"] for some in (model, eager)]
        for loss in losses:
            loss.sum().backward()
        assert relative(losses[0], losses[1]) < 1e-6
        known.append(counters["stats"]["unique_graphs"])
    assert policy.wrap_units()[0].forward.shared.failure is None
    for (name, own), other in zip(policy.named_parameters(), eager.parameters(), strict=True):
        if own.grad is not None and not name.endswith("k_proj.bias"):  # zero up to rounding
            assert relative(own.grad, other.grad) < 1e-5, name
    # A layer of the vision tower, of the language model, its last one, and of the expert: each as first met, and then dense or
    # packed with sizes that vary.
    assert known[-1] == known[2] <= 4 * 3, known
    model.eval()
    for batch in batches():
        with torch.no_grad():
            model(batch)
        known.append(counters["stats"]["unique_graphs"])
    assert known[-1] <= 2 * 4 * 3, known


@pytest.mark.parametrize(
    ("wanted", "device", "mode"),
    [
        (None, "cuda", "default"), (None, "cpu", None), (False, "cuda", None), (False, "cpu", None),
        (True, "cuda", "max-autotune"), (True, "cpu", "max-autotune"),
    ],
)  # fmt: skip
def test_a_gpu_compiles_by_default(wanted: bool | None, device: str, mode: str | None) -> None:
    assert choose_mode(wanted, "max-autotune", torch.device(device)) == mode
