"""Starts the evaluation of a run beside its training, which goes on whatever becomes of it."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.simulation.configuration import SimulationConfig

log = logging.getLogger(__name__)
_PATIENCE_S = 60.0
# Beginnings of the variables that mean the training's own processes and outcome.
_OF_THE_TRAINING = tuple(
    "TORCHELASTIC_ VLA_ATTEMPT VLA_STATUS_FILE VLA_STOP_FILE RANK LOCAL_RANK ROLE_ WORLD_SIZE LOCAL_WORLD_SIZE GROUP_ "
    "MASTER_ OMP_NUM_THREADS".split()
)


def start(config: SimulationConfig | None, run_dir: Path) -> threading.Thread | None:
    """Does what ``eval_cfg.start`` says, in a thread, for `sbatch` may take long to answer; None if it says nothing.

    A failure is an error in the log and nothing more.
    """
    if config is None or config.start == "by_hand":
        return None
    thread = threading.Thread(target=_start, args=(config, run_dir), name="evaluation in simulation")
    thread.start()
    return thread


def _start(config: SimulationConfig, run_dir: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_OF_THE_TRAINING)}
    folder = run_dir.resolve() / "simulation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not Path(config.script).is_file():  # a shell that does not find it says so in another log
            raise FileNotFoundError(f"eval_cfg.script: there is no {config.script} in {Path.cwd()}")
        if config.start == "sbatch":
            done = subprocess.run(
                ["sbatch", config.script, str(run_dir.resolve())],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE_S,
                check=True,
            )
            log.info("evaluation in simulation: %s", done.stdout.strip())
            return
        # Nothing of it is to wait for, or to be stopped with, the training; and no GPU is for it.
        with open(folder / "log.txt", "ab") as output:
            process = subprocess.Popen(
                ["nice", "-n", "19", "bash", config.script, str(run_dir.resolve())],
                env=environment | {"CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        log.info("evaluation in simulation: process %d, its log is %s", process.pid, folder / "log.txt")
    except Exception as error:
        said = getattr(error, "stderr", None) or error
        log.error("evaluation in simulation could not be started, training goes on: %s", str(said).strip())
