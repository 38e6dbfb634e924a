"""Reports the updates of a run: in ``metrics.jsonl``, on wandb when that is asked for, in the log, by a bar on a terminal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from agent.tracking.jsonl import JsonLines
from agent.tracking.progress import bar, clock
from agent.tracking.wandb_follower import WandbFollower
from agent.tracking.wandb_sink import WandbConfig

log = logging.getLogger(__name__)


class Metrics:
    """Passes the lines of one run to all that reports, on rank 0; the other ranks have none."""

    def __init__(self, run_dir: Path, n_updates: int, log_freq: int = 0) -> None:
        self._log_freq = log_freq
        self._lines = JsonLines(run_dir / "metrics.jsonl")
        self._wandb: WandbFollower | None = None
        self._bar: Any = None
        self._n_updates = n_updates

    def has(self, step: int) -> bool:
        """Whether an earlier start has reported this update."""
        return self._lines.has(step)

    def open(self, step: int, wandb: WandbConfig | None, run_dir: Path, name: str) -> str | None:
        """Starts after ``step``. Returns the wandb id, if there is one."""
        self._lines.rewind(step, self._log_freq)
        if wandb is not None and "disabled" not in (wandb.mode, wandb.actual_mode()):
            try:
                self._wandb = WandbFollower(wandb, run_dir, name)
            except OSError as error:
                log.error(
                    "nothing goes to wandb, training goes on; later: python -m agent.sync_wandb %s: %s", run_dir, error
                )
        if sys.stderr.isatty():
            self._bar = bar(desc="training", total=self._n_updates, initial=step, unit="update", smoothing=0.1)
        return self._wandb.run_id if self._wandb else None

    def advance(self, step: int) -> None:
        """Moves the progress bar after an update."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, record: dict[str, Any]) -> None:
        """Reports one logged update."""
        self._lines.write(record)  # where wandb's process finds it
        text = "  ".join(
            f"{_short(key)} {_format(value)}" for key, value in record.items() if key in _SHOWN or "/" in key
        )
        log.info(f"update {record['step']}/{self._n_updates}  {text}  eta {clock(record['eta_s'])}")

    def sync(self) -> None:
        """Brings to the disk what was logged until now; called before a checkpoint."""
        self._lines.sync()

    def end(self) -> None:
        """Closes the file after the last line, and lets wandb take what it lacks."""
        if self._bar is not None:
            self._bar.close()
        self._lines.close()
        if self._wandb is not None:
            self._wandb.end()

    def close(self, patience_s: float) -> None:
        """Waits so many seconds at most for wandb, after :meth:`end`."""
        if self._wandb is not None:
            self._wandb.close(patience_s)


_SHOWN = ("loss", "lr", "grad_norm", "samples_per_s", "data_wait")


def _short(key: str) -> str:
    return {"samples_per_s": "samples/s", "grad_norm": "grad", "data_wait": "wait"}.get(key, key)


def _format(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
