"""Trains one policy: ``torchrun --standalone --nproc_per_node=N src/agent/run.py --config_path config/train/X.yaml``.

One process needs no torchrun: ``python src/agent/run.py …``.

With ``--check true`` nothing is trained; see ``agent.preflight``.

Exit codes: 0 finished (now or earlier), 2 a mistake in the config, the data or the weights, 75 stopped on request
with a checkpoint saved, 130 left at once on Ctrl-C (the second one, or one before the first update), 1 anything else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from agent import command_line
from agent.lifecycle import history, software
from agent.lifecycle.disk_space import which_disk
from agent.lifecycle.run_folder import RunFolder, report_attempt, report_failure
from agent.lifecycle.stopping import StopRequest, by_hand
from agent.lifecycle.watchdog import Watchdog, watch_launcher
from agent.parallel.launch import Launch, choose_device, read_launch
from agent.parallel.processes import Processes, lost_a_peer
from agent.reporting.writing import RunReport
from agent.simulation import starting

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.training.train_state import Run

EXIT_FINISHED, EXIT_FAILED, EXIT_CONFIG, EXIT_PREEMPTED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130

log = logging.getLogger("agent")


def main(arguments: list[str]) -> int:
    """Parses before anything heavy is imported, so that a mistake in the config answers at once."""
    launch = Launch()
    try:
        launch = read_launch()
        stop = StopRequest(speaks=launch.rank == 0)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # other launchers may leave before their processes
            watch_launcher(stop.abandoned)
        parsed = command_line.parse(arguments, launch.world_size)
    except ValueError as error:
        # torchrun ends all processes when the first one leaves. So every process reports, which rank 0 might not live
        # to do, and the others leave last, so that it can speak.
        report_attempt("failed", reason=str(error), error_kind="config")
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)
        return EXIT_CONFIG
    if parsed is None:  # --help
        return EXIT_FINISHED
    config, notes = parsed
    from agent.tracking.console import setup_logging

    setup_logging(launch.rank, config.debug)
    for note in notes:
        log.info(note)
    log.info("the config is read; PyTorch and what reads the data are loaded")
    if config.check:
        from agent.preflight.check import check

        return check(config, launch)
    with stop.listening():
        return execute(config, launch, stop)


def execute(config: TrainPipelineConfig, launch: Launch, stop: StopRequest) -> int:
    """Builds and trains; whatever happens is in ``status.json`` and in the exit code."""
    folder: RunFolder | None = None
    opened = False  # by rank 0
    stop.leave = lambda reason: _leave(folder, launch, config, reason)
    watchdog = Watchdog(config.hang_timeout_minutes * 60, lambda reason: _report_hang(folder, config, reason))
    with contextlib.closing(watchdog):
        try:
            if launch.rank == 0:
                # Known from here on: a crash while torch is imported or a GPU started is counted to this run.
                report_attempt("running", reason="starting", run_dir=str(config.run_dir))
            model_config: Any = config.model_cfg
            # Longer than any phase may be silent: the watchdog, which prints the stacks, is to be what ends a hang.
            hours = 8 * config.hang_timeout_minutes / 60 + 1 if config.hang_timeout_minutes else 24 * 30
            processes = Processes(launch, choose_device(launch, model_config.device), timedelta(hours=hours))
            folder = processes.on_main(lambda: _open_folder(config, stop, processes))
            opened = True
            watchdog.neighbours = processes.gather(os.getpid())
            from agent.training.building import build

            run = build(config, launch, processes, folder, watchdog)
        except ValueError as error:
            return _fail(folder, launch, config, str(error), "config", alone=opened)
        except Exception as error:
            log.exception("the run could not be started")
            alone = opened and not lost_a_peer(error)
            return _fail(folder, launch, config, _describe(error, config, launch), "runtime", alone=alone)
        exit_code = _train(run, launch, stop, watchdog)
    if folder is not None and exit_code == EXIT_PREEMPTED and "VLA_ATTEMPT" not in os.environ:
        log.info("%s", _to_continue(launch))  # where a script has started the run, that says what comes next
    return exit_code


def _train(run: Run, launch: Launch, stop: StopRequest, watchdog: Watchdog) -> int:
    from agent.training.metrics_line import forget_reported, start_reporting
    from agent.training.trainer import train

    config, folder, processes, exit_code = run.config, run.folder, run.processes, EXIT_FAILED
    try:
        forget_reported(run)
        if run.state.step >= run.plan.n_updates and run.state.unreported is None:
            log.info("this run is finished: %d of %d updates done; nothing to do", run.state.step, run.plan.n_updates)
            exit_code = _end(folder, "finished", run.state.step, "")
            return exit_code
        start_reporting(run)
        if launch.rank == 0:
            starting.start(config.eval_cfg, config.run_dir)
        reason = train(run, stop, watchdog)
        state = "stopped" if by_hand(reason) else "preempted" if reason else "finished"
        exit_code = _end(folder, state, run.state.step, reason)
        return exit_code
    except Exception as error:
        log.exception("update %d failed", run.state.step + 1)
        reason, alone = _describe(error, config, launch), not lost_a_peer(error)
        # A start would find nothing where the folder was, and begin at update 0: a person has to look.
        kind = "config" if folder is not None and folder.moved() else "runtime"
        return _fail(folder, launch, config, reason, kind, run.state.step, alone=alone)
    finally:
        watchdog.close()
        if folder is not None:
            _close_reports(run, folder, exit_code)
        if exit_code != EXIT_FAILED:
            # torchrun ends all once one has left: nobody leaves before rank 0 has closed its files
            processes.any(False)
            processes.close()
        if folder is not None:
            folder.close()


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


def _open_folder(config: TrainPipelineConfig, stop: StopRequest, processes: Processes) -> RunFolder:
    folder = RunFolder(config.run_dir)
    stop.watch_files(config.run_dir)
    folder.begin_attempt()
    folder.note(environment=software.describe(processes.world_size, processes.device.type))
    return folder


def _report_hang(folder: RunFolder | None, config: TrainPipelineConfig, reason: str) -> None:
    if folder is not None:
        folder.update("failed", folder.status["step"], f"hang: {reason}", "runtime")
    else:  # every process reports: rank 0 may be the one that is stuck
        report_attempt("failed", reason=f"hang: {reason}", error_kind="runtime", run_dir=str(config.run_dir))


def _end(folder: RunFolder | None, state: str, step: int, reason: str) -> int:
    if folder is not None:
        folder.update(state, step, reason)  # type: ignore[arg-type]
        figures = ", ".join(f"{key} {folder.status[key]}" for key in history.FIGURES)
        log.info("over all attempts: %s", figures)
    log.info("%s at update %d%s", state, step, f": {reason}" if reason else "")
    return EXIT_FINISHED if state == "finished" else EXIT_PREEMPTED


def _to_continue(launch: Launch) -> str:
    arguments = sys.orig_argv[1:] if launch.world_size == 1 and not launch.under_torchrun else sys.argv
    launcher = f"torchrun --standalone --nproc_per_node={launch.world_size}" if launch.under_torchrun else "python"
    return f"to continue: {'uv run ' if 'UV' in os.environ else ''}{launcher} {shlex.join(arguments)}"


def _leave(folder: RunFolder | None, launch: Launch, config: TrainPipelineConfig, reason: str) -> None:
    """Ends this process at once, with nothing saved, as a kill does. The run's other processes are told on their own."""
    person = by_hand(reason)
    if launch.rank == 0:
        state: Any = "stopped" if person else "failed"
        kind = None if person else "runtime"
        if folder is not None:
            folder.update(state, folder.status["step"], reason, kind)
        else:
            report_attempt(state, reason=reason, error_kind=kind, run_dir=str(config.run_dir))
        step = folder.status["checkpoint_step"] if folder is not None else 0
        where = f"from the checkpoint at update {step}, " if step else ""
        os.write(2, f"\n{reason}: left at once; {where}{_to_continue(launch)}\n".encode())
    os._exit(EXIT_INTERRUPTED if person else EXIT_FAILED)


def _fail(
    folder: RunFolder | None,
    launch: Launch,
    config: TrainPipelineConfig,
    reason: str,
    kind: str,
    step: int | None = None,
    *,
    alone: bool,
) -> int:
    """Tells why the run has failed; ``alone`` says whether this process may be the only one that knows."""
    if launch.rank == 0:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if folder is not None:
            folder.update("failed", folder.status["step"] if step is None else step, reason, kind)
        else:
            report_attempt("failed", reason=reason, error_kind=kind, run_dir=str(config.run_dir))
    elif alone:
        time.sleep(2)  # rank 0 speaks first if it fails as well
        if report_failure(config.run_dir, launch.rank, reason, kind):
            print(f"error: rank {launch.rank}: {reason}", file=sys.stderr, flush=True)
    return EXIT_CONFIG if kind == "config" else EXIT_FAILED


def _describe(error: Exception, config: TrainPipelineConfig, launch: Launch) -> str:
    text = f"{type(error).__name__}: {error}"
    if disk := which_disk(error, config.run_dir):
        text += f"\n{disk}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported yet
        from agent.training.memory_advice import when_exhausted

        text += f"\n{when_exhausted(config, launch.world_size)}"
    return text


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # while the config is read, or in a check
        print("\nCtrl-C: stopped; nothing was started", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
