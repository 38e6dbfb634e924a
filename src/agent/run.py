"""Trains one policy: ``torchrun --standalone --nproc_per_node=N src/agent/run.py --config_path config/train/X.yaml``.

One process needs no torchrun: ``python src/agent/run.py …``.

With ``--check true`` nothing is trained; see ``agent.preflight``.

Exit codes: 0 finished (now or earlier), 2 a mistake in the config, the data or the weights, 75 stopped on request
with a checkpoint saved, 130 left at once on Ctrl-C (the second one, or one before the first update), 1 anything else.
"""

from __future__ import annotations

import logging
import os
import sys
import time

from agent import command_line
from agent.lifecycle.run_folder import report_attempt
from agent.lifecycle.stopping import StopRequest
from agent.lifecycle.watchdog import watch_launcher
from agent.parallel.launch import Launch, read_launch
from agent.tracking.console import setup_logging
from agent.training.attempt import EXIT_CONFIG, EXIT_FINISHED, EXIT_INTERRUPTED, execute

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
        # torchrun ends all processes when the first one leaves. So every process reports, as rank 0 may not live to do
        # it, and the others wait for the signal that torchrun sends them once rank 0 has spoken and left.
        report_attempt("failed", reason=str(error), error_kind="config")
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)
        return EXIT_CONFIG
    if parsed is None:  # --help
        return EXIT_FINISHED
    config, notes = parsed
    setup_logging(launch.rank, config.debug)
    for note in notes:
        log.info(note)
    log.info("the config is read; PyTorch and what reads the data are loaded")
    if config.check:
        from agent.preflight.check import check

        return check(config, launch)
    with stop.listening():
        return execute(config, launch, stop)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # while the config is read, or in a check
        print("\nCtrl-C: stopped; nothing was started", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
