"""The training loop."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from agent.batch import Batch, to_device
from agent.configuration_pipeline import dump_yaml
from agent.data.loading.loader import Share, TrainLoader
from agent.lifecycle.watchdog import Watchdog
from agent.optim.optimizer import apply_update, clip_gradients
from agent.parallel.processes import StopRequest
from agent.parallel.wrap import accumulating, agree_on_compilation, forget_gradients
from agent.reporting.writing import RunReport
from agent.safe_files import write_text
from agent.training.saving import Saver
from agent.training.train_state import Run
from agent.training.validating import validate, validate_start, which_may_be_best
from agent.validation.record import ValidationRecords

log = logging.getLogger(__name__)


def train(run: Run, stop: StopRequest, watchdog: Watchdog) -> str:
    """Trains to the last update, or until asked to stop.

    Returns:
        The reason for an early stop, empty when the run is finished.
    """
    config, state, processes = run.config, run.state, run.processes
    loader = TrainLoader(
        run.data.reader,
        run.data.mixture,
        global_batch=config.global_batch_size,
        per_device_batch=config.per_device_batch_size,
        share=Share(processes.rank, processes.world_size, state.samples_seen),
        num_workers=config.data.train.num_workers,
        prefetch_factor=config.data.train.prefetch_factor,
        pin=processes.device.type == "cuda",
    )
    run.model.train()
    saver, clock = Saver(run), _Clock()
    report = RunReport(config.run_dir) if run.folder is not None else None
    with contextlib.closing(loader), contextlib.closing(saver):
        if processes.any(stop.pending()):  # asked before the first update: there is nothing new to save
            return stop.reasons(processes)
        watchdog.alive("the pass before the first update", patience=4)  # compiles the model, when that is asked for
        batches = _warmed_up(run, iter(loader))
        if not _validated_before(run, stop, watchdog, clock, saver):
            return stop.reasons(processes)
        stop.can_save = True
        while state.step < run.plan.n_updates:
            watchdog.alive(f"update {state.step + 1}")
            with clock.updating():
                result = train_step(run, batches, clock)
            run.data.count(state.drawn, state.samples_seen - config.global_batch_size, state.samples_seen)
            _tell(run)
            last = state.step == run.plan.n_updates
            due = bool(config.eval_freq) and (state.step % config.eval_freq == 0 or last)
            validation: dict[str, float] | None = {}
            if due:
                watchdog.alive(f"validation at update {state.step}", patience=4)
                saver.settle()  # a skipped update does not wait for the copies that a save began
                validation = validate(run, stop)
            if due or last or state.step % config.log_freq == 0:
                numbers = _numbers(run, result, clock)
                if validation is None:  # cut short: the save below counts; the next start validates and reports
                    state.unreported = numbers
                else:
                    _write(run, numbers | validation, clock, saver)
            if validation and report is not None:
                report.refresh()
            saver.prepare()
            saver.poll()
            # One small collective for all that the processes have to agree on at an update's end.
            stopping, interval_over = processes.sum([stop.pending(), processes.is_main and saver.interval_over()])
            if last or stopping or interval_over or state.step % config.save_model_freq == 0:
                watchdog.alive(f"checkpoint at update {state.step}", patience=4)
                saver.save()
            if stopping and (not last or state.unreported is not None):
                saver.finish(must_succeed=True)
                return stop.reasons(processes)
        watchdog.alive("the last checkpoint", patience=4)
        saver.finish(must_succeed=True)
    return ""


def _tell(run: Run) -> None:
    """That there was one more update, and when the first of this start was."""
    if run.metrics is not None:
        run.metrics.advance(run.state.step)
    if run.folder is not None and "first_update_s" not in run.folder.attempt:
        run.folder.note(first_update_s=round(time.time() - run.folder.attempt["started"], 1))


def _validated_before(run: Run, stop: StopRequest, watchdog: Watchdog, clock: _Clock, saver: Saver) -> bool:
    """The validation that is due before an update: of the starting weights, or the one that a stop has cut short.

    Returns:
        False if a stop has cut it short; there is nothing new to save then.
    """
    state = run.state
    if state.unreported is not None:
        watchdog.alive(f"validation at update {state.step}", patience=4)
        # unless validation was turned off since
        validation = validate(run, stop) if run.config.eval_freq else {}
        if validation is None:
            return False
        _write(run, state.unreported | validation, clock, saver)
        state.unreported = None
        run.processes.on_main(run.checkpoints.link_best)
    elif state.step == 0 and run.config.eval_freq and run.config.eval_start:
        watchdog.alive("validation of the starting weights", patience=4)
        return validate_start(run, stop)
    return True


def _warmed_up(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, after passes over the first whose gradients are thrown away.

    In the first synchronised backward pass DDP learns the graph, in the second the order of the gradients, by which it
    then sorts its buckets. Without these passes the first updates of every start would add in another order than the
    same updates of a run that was not interrupted. And blocks that cannot be compiled show it here. Where there is neither
    DDP nor the compiler, there is nothing to learn.
    """
    alone = run.model is run.policy
    if alone and not run.config.use_torch_compile:
        return batches
    if run.config.use_torch_compile:
        log.info("the first pass compiles the model, which may take minutes")
    first = next(batches)
    for number in range(1 if alone else 2):
        if number:  # these are in the buckets as they were
            run.optimizer.zero_grad(set_to_none=True)
        with run.precision():
            loss = run.model(to_device(first, run.processes.device)).sum()
        loss.backward()
    forget_gradients(run.model, run.optimizer)
    agree_on_compilation(run.policy, run.processes)
    return itertools.chain([first], batches)


@dataclass(frozen=True)
class StepResult:
    """One update, still on the device."""

    loss_sum: torch.Tensor
    """Sum of this process's sample losses."""
    grad_norm: float
    """Before clipping; not finite if the update was skipped."""
    lr: float


class _Seen(NamedTuple):
    """What is remembered of a micro-batch of B samples until the end of its update."""

    sample_index: torch.Tensor
    provenance: torch.Tensor
    losses: torch.Tensor
    """(B,) on the device."""


def train_step(run: Run, batches: Iterator[Batch], clock: _Clock) -> StepResult:
    """One optimizer update over ``accumulation_steps`` micro-batches.

    Raises:
        FloatingPointError: if the gradient is not finite, before any weight changes, and ``skip_nonfinite`` does not
            allow one more skipped update.
    """
    config, state, steps = run.config, run.state, run.plan.accumulation_steps
    # DDP averages over the processes; with this factor the sum over everything is the mean over the global batch.
    scale = run.processes.world_size / config.global_batch_size
    seen: list[_Seen] = []
    for micro in range(steps):
        with clock.waiting_for_data():
            batch = next(batches)
        with accumulating(run.model, last=micro == steps - 1):
            with run.precision():
                losses = run.model(to_device(batch, run.processes.device))
            (losses.sum() * scale).backward()
        # Copies: a batch is one block of memory, which any of its tensors would keep until the update's end.
        seen.append(_Seen(batch.sample_index.clone(), batch.provenance.clone(), losses.detach()))
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
    forget_gradients(run.model, run.optimizer)
    state.step += 1
    state.samples_seen += config.global_batch_size
    return StepResult(torch.stack([part.losses.sum() for part in seen]).sum(), grad_norm, lr)


def _name_the_samples(run: Run, seen: list[_Seen], grad_norm: float) -> str:
    bad = [
        (int(part.sample_index[i]), *part.provenance[i].tolist())
        for part in seen
        for i in torch.nonzero(~torch.isfinite(part.losses.cpu())).flatten().tolist()
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


class _Clock:
    """Where the time of the updates goes. Validation and checkpoints are not counted."""

    def __init__(self) -> None:
        self.total_s = 0.0
        """Seconds of all updates of this attempt."""
        self._updates, self._busy, self._waited = 0, 0.0, 0.0

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Around one update."""
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin
        self._busy += took
        self.total_s += took
        self._updates += 1

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the wait for a micro-batch."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def read(self) -> tuple[float, float]:
        """Seconds per update and the fraction of them spent waiting for data, since the last reading."""
        step_s, fraction = self._busy / self._updates, self._waited / self._busy
        self._updates, self._busy, self._waited = 0, 0.0, 0.0
        return step_s, fraction


def _numbers(run: Run, result: StepResult, clock: _Clock) -> dict[str, float | None]:
    """What ``metrics.jsonl`` says of an update, gathered from all processes once."""
    config, state, processes = run.config, run.state, run.processes
    step_s, waited = clock.read()
    of_this_process = [waited if rank == processes.rank else 0.0 for rank in range(processes.world_size)]
    loss, *waits = processes.sum([float(result.loss_sum), *of_this_process])
    return {
        "step": state.step,
        "loss": _finite(loss / config.global_batch_size),
        "lr": result.lr,
        "grad_norm": _finite(result.grad_norm),
        "step_s": step_s,
        "samples_per_s": config.global_batch_size / step_s,
        "data_wait": sum(waits) / processes.world_size,
        "data_wait_max": max(waits),  # of the process that all others wait for in the next collective
        "memory_gb": _peak_memory_gb(processes.device),
        "epoch": state.samples_seen / run.plan.train_frames,
        "samples_seen": state.samples_seen,
        **run.data.mix(state.drawn),
        "skipped_updates": state.skipped_updates,
        "eta_s": (run.plan.n_updates - state.step) * step_s,
    }


def _write(run: Run, numbers: Mapping[str, float | None], clock: _Clock, saver: Saver) -> None:
    """One line of metrics, from rank 0."""
    if run.metrics is not None and run.folder is not None:
        run.metrics.write({name: _finite(value) for name, value in numbers.items()})
        run.folder.note(busy_s=round(clock.total_s, 2), checkpoint_stall_s=round(saver.stall_s, 2))
        run.folder.update("running", run.state.step)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN: the numbers of a skipped update are null."""
    return value if value is not None and math.isfinite(value) else None


def _peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held: the GPU's where there is one, else the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def forget_reported(run: Run) -> None:
    """Forgets the validation that is owed if an earlier start has made it and saved nothing since."""
    state = run.state

    def reported() -> bool:
        assert run.metrics is not None
        return run.metrics.has(state.step)

    if state.unreported is not None and run.processes.main_decides(reported):
        state.unreported = None


def start_reporting(run: Run) -> None:
    """Opens metrics, wandb and ``config.yaml`` on rank 0."""

    def on_main() -> str | None:
        assert run.metrics is not None and run.folder is not None
        write_text(run.config.run_dir / "config.yaml", dump_yaml(run.config))
        ValidationRecords(run.config.run_dir).rewind(run.state.step or -1)
        if (note := which_may_be_best(run.config)) is not None:
            log.info(note)
        wandb = run.config.wandb if run.config.use_wandb else None
        if wandb is not None and wandb.run_id is None:
            wandb = replace(wandb, run_id=run.state.wandb_run_id)
        assert run.config.name is not None
        reported = run.state.step - (run.state.unreported is not None)
        return run.metrics.open(reported, wandb, run.config.run_dir, run.config.name)

    run.state.wandb_run_id = run.processes.main_decides(on_main) or run.state.wandb_run_id
