"""Trains one policy: ``torchrun --standalone --nproc_per_node=N src/agent/run.py --config_path config/train/X.yaml``.

Exit codes: 0 finished (now or earlier), 2 a mistake in the config, the data or the weights, 75 stopped on request
with a checkpoint saved, 1 anything else.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from agent import command_line
from agent.distributed import Launch, Processes, StopRequest, choose_device, read_launch
from agent.run_folder import RunFolder, report_attempt

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig

EXIT_FINISHED, EXIT_FAILED, EXIT_CONFIG, EXIT_PREEMPTED = 0, 1, 2, 75

log = logging.getLogger("agent")


def main(arguments: list[str]) -> int:
    """Parses before anything heavy is imported, so that a mistake in the config answers at once."""
    launch = Launch()
    try:
        launch = read_launch()
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
    from agent.metrics import setup_logging

    setup_logging(launch.rank, config.debug)
    for note in notes:
        log.info(note)
    with StopRequest().listening() as stop:
        return execute(config, launch, stop)


def execute(config: TrainPipelineConfig, launch: Launch, stop: StopRequest) -> int:
    """Builds and trains; whatever happens is in ``status.json`` and in the exit code."""
    folder: RunFolder | None = None
    step = 0
    try:
        model_config: Any = config.model_cfg
        processes = Processes(launch, choose_device(launch, model_config.device))
        folder = processes.on_main(lambda: RunFolder(config.run_dir))
        if folder is not None:
            folder.count_start()
            folder.update("running", int(folder.status.get("step", 0)), reason="starting")
        from agent.trainer import build, start_reporting, train

        run = build(config, launch, processes, folder)
    except ValueError as error:
        return _fail(folder, launch, step, str(error), "config")
    except Exception as error:
        log.exception("the run could not be started")
        return _fail(folder, launch, step, _describe(error), "runtime")
    exit_code = EXIT_FAILED
    try:
        if run.state.step >= run.plan.n_updates:
            log.info("this run is finished: %d of %d updates done; nothing to do", run.state.step, run.plan.n_updates)
            exit_code = _end(folder, "finished", run.state.step, "")
            return exit_code
        start_reporting(run)
        reason = train(run, stop)
        exit_code = _end(folder, "preempted" if reason else "finished", run.state.step, reason)
        return exit_code
    except Exception as error:
        log.exception("update %d failed", run.state.step + 1)
        return _fail(folder, launch, run.state.step, _describe(error), "runtime")
    finally:
        if run.metrics is not None:
            run.metrics.close(exit_code)
        if exit_code != EXIT_FAILED:
            processes.close()
        if folder is not None:
            folder.close()


def _end(folder: RunFolder | None, state: str, step: int, reason: str) -> int:
    if folder is not None:
        folder.update(state, step, reason)  # type: ignore[arg-type]
    log.info("%s at update %d%s", state, step, f": {reason}" if reason else "")
    return EXIT_FINISHED if state == "finished" else EXIT_PREEMPTED


def _fail(folder: RunFolder | None, launch: Launch, step: int, reason: str, kind: str) -> int:
    if launch.rank == 0:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if folder is not None:
            folder.update("failed", step, reason, kind)
        else:
            report_attempt("failed", reason=reason, error_kind=kind)
    return EXIT_CONFIG if kind == "config" else EXIT_FAILED


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
