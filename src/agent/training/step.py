"""Makes one update of the weights from the micro-batches of a global batch, and measures how long it took."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from agent.batch import Batch, to_device
from agent.optim.optimizer import apply_update, clip_gradients
from agent.parallel.wrap import accumulating, forget_gradients
from agent.training import step_graph
from agent.training.step_graph import GraphedPasses
from agent.training.train_state import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What is known of an update once it is made."""

    loss_sums: dict[str, torch.Tensor]
    """Name of each loss, and ``loss`` for the weighted sum → sum over this process's samples."""
    grad_norm: float
    """Before clipping; not finite if the update was skipped."""
    lr: float


def train_step(run: Run, batches: Iterator[Batch], clock: Clock) -> StepResult:
    """Makes one optimizer update over ``accumulation_steps`` micro-batches.

    Raises:
        FloatingPointError: if the gradient is not finite, before any weight changes, and ``skip_nonfinite`` does not
            allow one more skipped update.
    """
    config, state, steps = run.config, run.state, run.plan.accumulation_steps
    seen: list[_Seen] = []
    for micro in range(steps):
        with clock.waiting_for_data():
            batch = next(batches)
        with accumulating(run.model, last=micro == steps - 1):
            if run.graphs is not None:
                losses = run.graphs(batch, first=micro == 0)
            else:
                losses = make_pass(run, to_device(batch, run.processes.device))
        # Copies: a batch is one block of memory, which any of its tensors would keep until the update's end.
        seen.append(_Seen(batch.sample_index.clone(), batch.provenance.clone(), losses))
    max_norm = config.max_grad_norm or math.inf
    grad_norm = float(clip_gradients(run.optimizer, max_norm))
    lr = run.learning_rate.at(state.step)
    # DDP has summed the gradients, so the norm is the same number on every process, and so is what follows from it.
    if math.isfinite(grad_norm):
        apply_update(run.optimizer, lr, state.step)
        if run.ema is not None:
            run.ema.update(state.step - state.skipped_updates)
        state.skipped_in_a_row = 0
    else:
        problem = _name_the_samples(run, seen, grad_norm)
        if state.skipped_in_a_row >= config.skip_nonfinite:
            raise FloatingPointError(problem)
        state.skipped_updates += 1
        state.skipped_in_a_row += 1
        log.warning("%s; skipped (%d in a row, %d in all)", problem, state.skipped_in_a_row, state.skipped_updates)
    forget_gradients(run.model, run.optimizer, keep=run.graphs is not None and run.graphs.active)
    state.step += 1
    state.samples_seen += config.global_batch_size
    sums = {name: torch.stack([part.losses[name].sum() for part in seen]).sum() for name in seen[0].losses}
    return StepResult(sums, grad_norm, lr)


def make_pass(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    """Makes the forward and backward pass of a micro-batch on the device, which adds to the gradients.

    Returns:
        ``loss``, the weighted sum, and, where a policy has several, each of them as ``loss/<name>``; (B,) without gradient.
    """
    # DDP averages over the processes; with this factor the sum over everything is the mean over the global batch.
    scale = run.processes.world_size / run.config.global_batch_size
    with run.precision():
        named = run.model(batch)
        losses = run.policy.total(named)
    (losses.sum() * scale).backward()
    parts = run.policy.loss_weights if len(run.policy.loss_weights) > 1 else {}  # a single one is the loss itself
    return {"loss": losses.detach(), **{f"loss/{name}": named[name].detach() for name in parts}}


def graphed_passes(run: Run) -> GraphedPasses | None:
    """Returns what makes a run's passes from CUDA graphs, or None where that is not asked for or not possible."""
    if run.config.cuda_graph == "none" or not step_graph.possible(run.processes):
        return None
    trained = [parameter for parameter in run.policy.parameters() if parameter.requires_grad]
    return GraphedPasses(partial(make_pass, run), trained, run.processes.device, step_graph.cuda_capture)


class _Seen(NamedTuple):
    """What is remembered of a micro-batch of B samples until the end of its update."""

    sample_index: torch.Tensor
    provenance: torch.Tensor
    losses: dict[str, torch.Tensor]
    """(B,) on the device, see :func:`make_pass`."""


def _name_the_samples(run: Run, seen: list[_Seen], grad_norm: float) -> str:
    bad = [
        (int(part.sample_index[i]), *part.provenance[i].tolist())
        for part in seen
        for i in torch.nonzero(~torch.isfinite(part.losses["loss"].cpu())).flatten().tolist()
    ]
    everywhere = sorted(sample for share in run.processes.gather(bad) for sample in share)
    where = f"update {run.state.step + 1}: "
    if not everywhere:
        first = run.state.samples_seen
        return (
            f"{where}the gradient's norm is {grad_norm} although every loss is finite (samples {first} to "
            f"{first + run.config.global_batch_size - 1}); the weights are unchanged. Lower the learning rate, or look "
            "for the operation with --debug true"
        )
    named = "; ".join(f"sample {k}: data set {d}, episode {e}, frame {f}" for k, d, e, f in everywhere[:8])
    return f"{where}the loss of {len(everywhere)} samples is not finite ({named}); the weights are unchanged"


class Clock:
    """Measures where the time of the updates goes. Validation and checkpoints are not counted."""

    def __init__(self) -> None:
        self.total_s = 0.0
        """Seconds of all updates of this attempt."""
        self._updates, self._busy, self._waited = 0, 0.0, 0.0

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Times one update, which happens in the block."""
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin
        self._busy += took
        self.total_s += took
        self._updates += 1

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Times the wait for a micro-batch, which happens in the block."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def read(self) -> tuple[float, float]:
        """Returns the seconds per update and the fraction of them spent waiting for data, since the last reading."""
        step_s, fraction = self._busy / self._updates, self._waited / self._busy
        self._updates, self._busy, self._waited = 0, 0.0, 0.0
        return step_s, fraction
