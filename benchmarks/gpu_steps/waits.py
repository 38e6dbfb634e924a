"""No micro-batch waits for the GPU, compiled blocks compute what uncompiled ones do, and how often they are compiled anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from contenders import Ours, make_batch, model_config, train_config
from torch import Tensor

from agent.batch import Batch, map_tensors, to_device
from gpu_steps.place import Place, away

COMPILED = 2e-3  # of a loss in bfloat16: what is fused is rounded less often
# Cameras, tokens, padding: as batches of a run differ.
SHAPES = (
    (3, 1.0, "none"),
    (3, 0.8, "language"),
    (2, 0.8, "language"),
    (1, 0.5, "none"),
    (3, 0.7, "mixed"),
    (2, 0.4, "none"),
)


def run(place: Place) -> None:
    """Eager first, so that a compiler that does not work costs its own lines alone."""
    size = place.size("reduced")
    config = model_config(size, 3)
    hosts = [
        make_batch(config, present, 4, max(int(share * config.tokenizer_max_length), 1), padding=padding)
        for present, share, padding in (SHAPES if place.gpu else SHAPES[:2])
    ]
    if place.gpu:  # as the loader gives them: from other memory no copy is asynchronous
        hosts = [map_tensors(host, lambda tensor: tensor.pin_memory()) for host in hosts]
    expected = []
    eager = Ours(train_config(config, 4, use_bf16=True), hosts[0], place.device)
    for host in hosts:
        expected.append(_quietly(place, eager, host, "eager"))
    del eager
    with _compiler(place):
        compiled = Ours(train_config(config, 4, use_bf16=True, use_torch_compile=True), hosts[0], place.device)
        graphs = [_compiled(place, compiled, host, losses) for host, losses in zip(hosts, expected, strict=True)]
    failures = [f for f in (unit.forward.shared.failure for unit in _units(compiled)) if f]
    place.tell("compilation", not failures, graphs=graphs, why=failures[0] if failures else None)


def _units(ours: Ours) -> list[Any]:
    return list(ours.policy.wrap_units())


@contextlib.contextmanager
def _compiler(place: Place) -> Iterator[None]:
    """In a rehearsal blocks are traced, but no code is made of them."""
    real: Any = torch.compile
    if not place.gpu:
        torch.compile = lambda body, mode: real(body, backend="eager")  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real


def _micro_batch(place: Place, ours: Ours, host: Batch) -> Tensor:
    """Forward and backward pass, as `agent.training.step.train_step` makes them; the losses."""
    ours.arm()
    assert ours.run is not None
    with ours.run.precision():
        losses = ours.policy.total(ours.run.model(to_device(host, place.device)))
    losses.sum().backward()
    return losses.detach()


def _quietly(place: Place, ours: Ours, host: Batch, kind: str) -> Tensor:
    """Once to allocate and to compile, then with CUDA raising at every wait."""
    losses = _micro_batch(place, ours, host)
    present, tokens = len(host.observation.images), host.observation.tokens.shape[1]
    problem = None
    try:
        if place.gpu:
            torch.cuda.set_sync_debug_mode("error")
        _micro_batch(place, ours, host)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    finally:
        if place.gpu:
            torch.cuda.set_sync_debug_mode("default")
    check = f"waits, {kind}, {present} cameras, {tokens} tokens, {sum(host.observation.parts().tokens)} words"
    place.tell(check, problem is None, why=problem)
    return losses


def _compiled(place: Place, ours: Ours, host: Batch, expected: Tensor) -> int:
    """How many graphs this shape needed that were not there."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    losses = _quietly(place, ours, host, "compiled")
    difference = away(losses, expected)
    present, tokens = len(host.observation.images), host.observation.tokens.shape[1]
    place.tell(f"compiled losses, {present} cameras, {tokens} tokens", difference < COMPILED, loss=difference)
    return int(counters["stats"]["unique_graphs"] - before)
