"""Runs the training loop: update after update, with the validations, reports and checkpoints that are due in between."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator

from agent.batch import Batch, to_device
from agent.data.loading.loader import Share, TrainLoader
from agent.lifecycle.stopping import StopRequest
from agent.lifecycle.watchdog import Watchdog
from agent.parallel.compilation import agree_on_compilation, is_compiled
from agent.parallel.wrap import forget_gradients
from agent.reporting.writing import RunReport
from agent.training.metrics_line import numbers_of, write_line
from agent.training.saving import Saver
from agent.training.step import Clock, train_step
from agent.training.train_state import Run
from agent.training.validating import held_out, validate, validate_start

log = logging.getLogger(__name__)


def train(run: Run, stop: StopRequest, watchdog: Watchdog) -> str:
    """Trains to the last update, or until asked to stop.

    Returns:
        The reason for an early stop, empty when the run is finished.
    """
    config, state, processes = run.config, run.state, run.processes
    loader = _loader(run)
    run.model.train()
    saver, clock = Saver(run), Clock()
    report = RunReport(config.run_dir) if run.folder is not None else None
    with contextlib.closing(loader), contextlib.closing(saver):
        if processes.any(stop.pending()):  # asked before the first update: there is nothing new to save
            return stop.reasons(processes)
        watchdog.alive("the pass before the first update", patience=4)  # compiles the model, when that is asked for
        batches = _warmed_up(run, iter(loader))
        if not _validated_before(run, loader, stop, watchdog, clock, saver):
            return stop.reasons(processes)
        stop.can_save = True
        while state.step < run.plan.n_updates:
            watchdog.alive(f"update {state.step + 1}")
            with clock.updating():
                result = train_step(run, batches, clock)
            _note_update(run)
            last = state.step == run.plan.n_updates
            due = bool(config.eval_freq) and (state.step % config.eval_freq == 0 or last)
            validation: dict[str, float] | None = {}
            if due:
                watchdog.alive(f"validation at update {state.step}", patience=4)
                saver.settle()  # a skipped update does not wait for the copies that a save began
                validation = validate(run, loader, stop)
            if due or last or state.step % config.log_freq == 0:
                numbers = numbers_of(run, result, clock)
                if validation is None:  # cut short: the save below counts; the next start validates and reports
                    state.unreported = numbers
                else:
                    write_line(run, numbers | validation, clock, saver)
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


def _note_update(run: Run) -> None:
    """Counts the update's samples by data set, moves the bar, and notes when the first update of this start was made."""
    seen = run.state.samples_seen
    run.data.count(run.state.drawn, seen - run.config.global_batch_size, seen)
    if run.metrics is not None:
        run.metrics.advance(run.state.step)
    if run.folder is not None and "first_update_s" not in run.folder.attempt:
        run.folder.note(first_update_s=round(time.time() - run.folder.attempt["started"], 1))


def _validated_before(
    run: Run, loader: TrainLoader, stop: StopRequest, watchdog: Watchdog, clock: Clock, saver: Saver
) -> bool:
    """Makes the validation that is due before an update: of the starting weights, or the one that a stop has cut short.

    Returns:
        False if a stop has cut it short; there is nothing new to save then.
    """
    state = run.state
    if state.unreported is not None:
        watchdog.alive(f"validation at update {state.step}", patience=4)
        # Nothing is owed any more if validation was turned off since.
        validation = validate(run, loader, stop) if run.config.eval_freq else {}
        if validation is None:
            return False
        write_line(run, state.unreported | validation, clock, saver)
        state.unreported = None
        run.processes.on_main(run.checkpoints.link_best)
    elif state.step == 0 and run.config.eval_freq and run.config.eval_start:
        watchdog.alive("validation of the starting weights", patience=4)
        return validate_start(run, loader, stop)
    return True


def _loader(run: Run) -> TrainLoader:
    """Gives this process's micro-batches, beginning with the first sample that the run has not seen, and its validations'."""
    config = run.config
    return TrainLoader(
        run.data.reader,
        run.data.mixture,
        per_device_batch=config.per_device_batch_size,
        share=Share(run.processes.rank, run.processes.world_size, run.state.samples_seen),
        validation=held_out(run),
        num_workers=config.data.train.num_workers,
        prefetch_factor=config.data.train.prefetch_factor,
        pin=run.processes.device.type == "cuda",
    )


def _warmed_up(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Returns the same batches, after passes over the first of them whose gradients are thrown away.

    In the first synchronised backward pass DDP learns the graph, in the second the order of the gradients, by which it
    then sorts its buckets. Without these passes the first updates of every start would add in another order than the
    same updates of a run that was not interrupted. And blocks that cannot be compiled show it here. Where there is neither
    DDP nor the compiler, there is nothing to learn.
    """
    alone = run.model is run.policy
    compiled = is_compiled(run.policy)
    if alone and not compiled:
        return batches
    if compiled:
        log.info("the first pass compiles the model, which may take minutes")
    first = next(batches)
    for number in range(1 if alone else 2):
        if number:  # these are in the buckets as they were
            run.optimizer.zero_grad(set_to_none=True)
        with run.precision():
            loss = run.policy.total(run.model(to_device(first, run.processes.device))).sum()
        loss.backward()
    forget_gradients(run.model, run.optimizer)
    agree_on_compilation(run.policy, run.processes)
    return itertools.chain([first], batches)
