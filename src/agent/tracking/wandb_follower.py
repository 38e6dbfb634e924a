"""Keeps wandb in a process of its own beside a training, which never waits for it and never ends with it.

The process is ``python -m agent.sync_wandb RUN_DIR --follow``: it reads ``metrics.jsonl`` as that grows. When it ends or
hangs, for whatever reason, it is started again after a while and sends everything that wandb does not have; so nothing
has to be remembered here. Its words come through a pipe into the training's log, each trouble once.
"""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading
from pathlib import Path

from agent.tracking.wandb_sink import WandbConfig, kept_id

log = logging.getLogger(__name__)

_AGAIN_AFTER_S = (10.0, 60.0, 300.0)
"""How long to wait after wandb's first, second and any later failure."""


class WandbFollower:
    """The process that sends a run to wandb, and the thread that looks after it. Nothing here raises or waits for it.

    Args:
        config: where to.
        run_dir: with ``metrics.jsonl``, which is there already, and ``config.yaml``.
        name: of the run on wandb.
    """

    def __init__(self, config: WandbConfig, run_dir: Path, name: str) -> None:
        self.run_id = config.run_id or kept_id(run_dir)
        self._run_dir = run_dir
        self._command = [sys.executable, "-m", "agent.sync_wandb", str(run_dir), "--follow", "--name", name]
        self._command += ["--id", self.run_id, "--project", config.project, "--mode", config.actual_mode()]
        self._command += ["--entity", config.entity] if config.entity else []
        self._told: set[str] = set()
        self._ending = threading.Event()
        self._whole = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._supervise, name="wandb", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Tells the process that there are no more lines: it sends the rest, and leaves."""
        self._ending.set()
        self._say_the_end()

    def close(self, patience_s: float) -> None:
        """Waits for it to leave; gives up after a while, for the cluster may be about to kill the job."""
        self._thread.join(patience_s)
        if self._whole:
            return
        if (process := self._process) is not None and process.poll() is None:
            process.kill()
        log.error(
            "wandb does not have the whole run; %s has. The next start sends it, or: python -m agent.sync_wandb %s",
            self._run_dir / "metrics.jsonl", self._run_dir,
        )  # fmt: skip

    def _say_the_end(self) -> None:
        if (process := self._process) is not None and process.stdin is not None:
            process.stdin.close()

    def _supervise(self) -> None:
        for wait_s in itertools.chain(_AGAIN_AFTER_S, itertools.repeat(_AGAIN_AFTER_S[-1])):
            last = self._ending.is_set()
            try:
                self._whole = self._attend() == 0
            except OSError as error:
                self._tell(logging.WARNING, f"wandb's process could not be started, training goes on: {error}")
            if self._whole or last:
                return
            self._ending.wait(wait_s)

    def _attend(self) -> int:
        """Starts the process and passes on what it says, until it ends; returns its exit code."""
        with open(self._run_dir / "wandb" / "errors.log", "ab") as errors:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # a person's Ctrl-C is for the training
            )
        self._process = process
        if self._ending.is_set():
            self._say_the_end()
        said = False
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                level, _, text = line.rstrip("\n").partition(" ")
                number = logging.getLevelNamesMapping().get(level, logging.DEBUG)
                said = said or number >= logging.WARNING
                self._tell(number, text)
        code = process.wait()
        if code and not said and not self._ending.is_set():  # else close() tells
            self._tell(
                logging.WARNING,
                f"wandb's process left with {code}, see {self._run_dir}/wandb/errors.log; training goes on, it is tried again",
            )
        return code

    def _tell(self, level: int, text: str) -> None:
        """Logs the same trouble once, however often it is tried again."""
        log.log(level if text not in self._told else logging.DEBUG, "%s", text)
        if level >= logging.WARNING:
            self._told.add(text)
