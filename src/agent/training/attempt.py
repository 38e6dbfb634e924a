"""One attempt to train a run, from the run's folder to the exit code, whatever happens in between.

Read ``execute`` first: it is the whole story. Below it stands how the end is told: to people in the log and on the
terminal, to the programs that wait for it in ``status.json``, the launcher's status file and the exit code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from agent.lifecycle import history, software
from agent.lifecycle.disk_space import which_disk
from agent.lifecycle.run_folder import RunFolder, State, report_attempt, report_failure
from agent.lifecycle.stopping import StopRequest, by_hand
from agent.lifecycle.watchdog import Watchdog
from agent.parallel.launch import Launch, choose_device
from agent.reporting.writing import RunReport
from agent.simulation import starting

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.parallel.processes import Processes
    from agent.training.train_state import Run

EXIT_FINISHED, EXIT_FAILED, EXIT_CONFIG, EXIT_PREEMPTED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130

log = logging.getLogger(__name__)


def execute(config: TrainPipelineConfig, launch: Launch, stop: StopRequest) -> int:
    """Builds and trains, and returns the exit code; whatever happens is in ``status.json``, too."""
    attempt = Attempt(config, launch)
    stop.leave = attempt.leave
    with contextlib.closing(Watchdog(config.hang_timeout_minutes * 60, attempt.report_hang)) as watchdog:
        try:
            run = _start(attempt, stop, watchdog)
        except ValueError as error:
            return attempt.fail(str(error), "config", alone=attempt.begun)
        except Exception as error:
            log.exception("the run could not be started")
            return attempt.crash(error)
        exit_code = _train(attempt, run, stop, watchdog)
    if launch.rank == 0 and exit_code == EXIT_PREEMPTED and "VLA_ATTEMPT" not in os.environ:
        log.info("%s", _to_continue(launch))  # where a script has started the run, that says what comes next
    return exit_code


def _start(attempt: Attempt, stop: StopRequest, watchdog: Watchdog) -> Run:
    """Brings the processes together, takes the run's folder, and builds all that the training works with."""
    config, launch = attempt.config, attempt.launch
    if launch.rank == 0:
        # The launcher knows of the run from here on: a crash while torch is imported or a GPU started counts as its own.
        report_attempt("running", reason="starting", run_dir=str(config.run_dir))
    from agent.parallel.processes import Processes

    # A collective waits longer than any phase may take, so that the watchdog, which prints the stacks, ends a hang.
    hours = 8 * config.hang_timeout_minutes / 60 + 1 if config.hang_timeout_minutes else 24 * 30
    device = choose_device(launch, config.trainable.device)
    processes = Processes(launch, device, timedelta(hours=hours))
    attempt.folder = processes.on_main(lambda: _open_folder(config, stop, processes))
    attempt.begun = True
    watchdog.neighbours = processes.gather(os.getpid())
    from agent.training.building import build

    return build(config, launch, processes, attempt.folder, watchdog)


def _open_folder(config: TrainPipelineConfig, stop: StopRequest, processes: Processes) -> RunFolder:
    folder = RunFolder(config.run_dir)
    stop.watch_files(config.run_dir)
    folder.begin_attempt()
    folder.note(environment=software.describe(processes.world_size, processes.device.type))
    return folder


def _train(attempt: Attempt, run: Run, stop: StopRequest, watchdog: Watchdog) -> int:
    """Makes the updates that are left, then closes what was opened, in an order that loses no report."""
    exit_code = EXIT_FAILED
    try:
        exit_code = _updates(attempt, run, stop, watchdog)
        return exit_code
    except Exception as error:
        log.exception("update %d failed", run.state.step + 1)
        # A start would find nothing where the folder was, and begin at update 0: a person has to look.
        kind = "config" if attempt.folder is not None and attempt.folder.moved() else "runtime"
        return attempt.crash(error, kind, run.state.step)
    finally:
        watchdog.close()
        if attempt.folder is not None:
            _close_reports(run, attempt.folder, exit_code)
        if exit_code != EXIT_FAILED:
            # torchrun ends all processes once one has left, so nobody leaves before rank 0 has closed its files.
            run.processes.any(False)
            run.processes.close()
        if attempt.folder is not None:
            attempt.folder.close()


def _updates(attempt: Attempt, run: Run, stop: StopRequest, watchdog: Watchdog) -> int:
    """Makes the updates that are left, if any, and returns the exit code."""
    from agent.training.metrics_line import forget_reported, start_reporting
    from agent.training.trainer import train

    forget_reported(run)
    if run.state.step >= run.plan.n_updates and run.state.unreported is None:
        log.info("this run is finished: %d of %d updates done; nothing to do", run.state.step, run.plan.n_updates)
        return attempt.end("finished", run.state.step, "")
    start_reporting(run)
    if attempt.launch.rank == 0:
        starting.start(run.config.eval_cfg, run.config.run_dir)
    reason = train(run, stop, watchdog)
    return attempt.end("stopped" if by_hand(reason) else "preempted" if reason else "finished", run.state.step, reason)


def _close_reports(run: Run, folder: RunFolder, exit_code: int) -> None:
    """Ends what reports, on rank 0. The outcome is in ``status.json`` already, and nothing here changes it."""
    try:
        if run.metrics is not None:
            run.metrics.end()
        RunReport(folder.path).write()
        if run.metrics is not None:
            # A cluster that has asked the run to stop may kill it in half a minute; the next start sends the rest.
            run.metrics.close(60 if exit_code == EXIT_FINISHED else 3)
    except Exception:
        log.exception("the metrics could not be closed")


class Attempt:
    """What this process knows of the attempt, and how it tells the end, which a signal or the watchdog may bring."""

    def __init__(self, config: TrainPipelineConfig, launch: Launch) -> None:
        self.config, self.launch = config, launch
        self.folder: RunFolder | None = None
        """The run's folder, on rank 0 once it is taken."""
        self.begun = False
        """Whether rank 0 has taken the folder: from then on a rank that fails alone can write there why."""

    def end(self, state: State, step: int, reason: str) -> int:
        """Tells that the training came to an end of its own, and returns the exit code."""
        if self.folder is not None:
            self.folder.update(state, step, reason)
            figures = ", ".join(f"{key} {self.folder.status[key]}" for key in history.FIGURES)
            log.info("over all attempts: %s", figures)
        log.info("%s at update %d%s", state, step, f": {reason}" if reason else "")
        return EXIT_FINISHED if state == "finished" else EXIT_PREEMPTED

    def fail(self, reason: str, kind: str, step: int | None = None, *, alone: bool) -> int:
        """Tells why the run has failed, and returns the exit code.

        Args:
            reason: why.
            kind: ``config`` for what a person has to put right, else ``runtime``.
            step: the last update, where the training had begun.
            alone: whether this process may be the only one that knows.
        """
        if self.launch.rank == 0:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            self._tell("failed", reason, kind, step)
        elif alone and report_failure(self.config.run_dir, self.launch.rank, reason, kind):
            print(f"error: rank {self.launch.rank}: {reason}", file=sys.stderr, flush=True)
        return EXIT_CONFIG if kind == "config" else EXIT_FAILED

    def crash(self, error: Exception, kind: str = "runtime", step: int | None = None) -> int:
        """Tells of an error that nobody foresaw, and what to do where a disk or a GPU's memory is full."""
        text = f"{type(error).__name__}: {error}"
        if disk := which_disk(error, self.config.run_dir):
            text += f"\n{disk}"
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported yet
            from agent.training.memory_advice import when_exhausted

            text += f"\n{when_exhausted(self.config, self.launch.world_size)}"
        return self.fail(text, kind, step, alone=self.begun and not _lost_a_peer(error))

    def report_hang(self, reason: str) -> None:
        """Tells that a process hangs; every process does, as rank 0 may be the one that is stuck."""
        self._tell("failed", f"hang: {reason}", "runtime")

    def leave(self, reason: str) -> None:
        """Ends this process at once, with nothing saved, as a kill does. Every process of the run is asked on its own."""
        state: State = "stopped" if by_hand(reason) else "failed"
        if self.launch.rank == 0:
            self._tell(state, reason, None if state == "stopped" else "runtime")
            step = self.folder.status["checkpoint_step"] if self.folder is not None else 0
            where = f"from the checkpoint at update {step}, " if step else ""
            os.write(2, f"\n{reason}: left at once; {where}{_to_continue(self.launch)}\n".encode())
        os._exit(EXIT_INTERRUPTED if state == "stopped" else EXIT_FAILED)

    def _tell(self, state: State, reason: str, kind: str | None, step: int | None = None) -> None:
        if self.folder is not None:
            self.folder.update(state, self.folder.status["step"] if step is None else step, reason, kind)
        else:
            report_attempt(state, reason=reason, error_kind=kind, run_dir=str(self.config.run_dir))


def _lost_a_peer(error: Exception) -> bool:
    """Whether this is a collective's error because another process is gone, which then knows the reason."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)


def _to_continue(launch: Launch) -> str:
    arguments = sys.orig_argv[1:] if launch.world_size == 1 and not launch.under_torchrun else sys.argv
    launcher = f"torchrun --standalone --nproc_per_node={launch.world_size}" if launch.under_torchrun else "python"
    return f"to continue: {'uv run ' if 'UV' in os.environ else ''}{launcher} {shlex.join(arguments)}"
