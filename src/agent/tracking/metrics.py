"""What a run reports: ``metrics.jsonl`` always, wandb when asked for, lines in the log, and a progress bar
on a terminal."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from agent.lifecycle.records import MetricsLines, read_metrics
from agent.progress import LinesAboveBars, bar, clock
from agent.safe_files import write_text
from agent.tracking.wandb_follower import WandbFollower
from agent.tracking.wandb_sink import WandbConfig

log = logging.getLogger(__name__)


class JsonLines:
    """``metrics.jsonl``: one object per logged update, steps strictly increasing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._size = 0
        self._pending = b""  # lines that a full disk did not take; they go first once there is room

    def rewind(self, step: int, every: int = 0) -> list[dict[str, Any]]:
        """Opens the file for the updates after ``step``; lines beyond it, and a torn last line, are dropped.

        Damaged lines are set aside. They and lines that should be there and are not, one every ``every`` updates, are
        said in the log.

        Returns:
            The lines that stay.
        """
        found = read_metrics(self.path)
        kept = [record for record in found.records if record["step"] <= step]  # others will be done again
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if found.damaged:
            self._set_aside(found)
        last = kept[-1]["step"] if kept else 0
        if (step and not found.there) or (every and last + every <= step):
            what = f"ends at update {last}" if found.there else "is not there"
            log.warning(
                "%s %s, but the run continues after update %d: the lines between are lost, training loses nothing",
                self.path, what, step,
            )  # fmt: skip
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._handle).st_size
        return kept

    def _set_aside(self, found: MetricsLines) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged")
        try:
            with open(aside, "ab") as stream:
                stream.write(b"".join(line.raw + b"\n" for line in found.damaged))
        except OSError as error:
            log.warning("%s cannot be written, what is damaged is lost: %s", aside, error)
        log.warning(
            "%s is damaged and its bad lines were moved to %s, training loses nothing: %s",
            self.path, aside.name, "; ".join(found.problems()),
        )  # fmt: skip

    def has(self, step: int) -> bool:
        """Whether there is a line of this update."""
        return any(record["step"] == step for record in read_metrics(self.path).records)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line, whole. What a full disk does not take is kept and written later."""
        waiting = bool(self._pending)
        self._pending += (json.dumps(record) + "\n").encode()
        error = self._flush()
        if error is not None and not waiting:
            log.warning("%s cannot be written (%s); its lines wait until there is room", self.path, error.strerror)

    def _flush(self) -> OSError | None:
        assert self._handle is not None
        try:
            written = os.write(self._handle, self._pending)
            if written < len(self._pending):
                os.ftruncate(self._handle, self._size)  # no half lines
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            return error
        self._size += len(self._pending)
        self._pending = b""
        return None

    def sync(self) -> None:
        """Brings the lines to the disk: a checkpoint must not outlive the lines of its updates."""
        if self._handle is None:
            return
        self._flush()
        try:
            os.fsync(self._handle)
        except OSError as error:  # NFS says so late that the disk is full
            log.warning("%s could not be brought to the disk: %s", self.path, error.strerror)

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            self._flush()
            if self._pending:
                log.error("%d lines of %s are lost, the disk was full", self._pending.count(b"\n"), self.path)
            os.close(self._handle)
            self._handle = None


class Metrics:
    """All sinks of one run, on rank 0; the other ranks have none."""

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
        """After every update, for who looks on."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, record: dict[str, Any]) -> None:
        """One logged update."""
        self._lines.write(record)  # where wandb's process finds it
        text = "  ".join(
            f"{_short(key)} {_format(value)}" for key, value in record.items() if key in _SHOWN or "/" in key
        )
        log.info(f"update {record['step']}/{self._n_updates}  {text}  eta {clock(record['eta_s'])}")

    def sync(self) -> None:
        """Before a checkpoint: what was logged until now is on the disk."""
        self._lines.sync()

    def end(self) -> None:
        """No more lines: closes the file, and lets wandb take the last of them."""
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


def setup_logging(rank: int, debug: bool) -> None:
    """Rank 0 says what it does; the others only what goes wrong."""
    level = logging.DEBUG if debug else logging.INFO
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        level=level if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[LinesAboveBars(sys.stdout)],
        force=True,
    )
    for noisy in ("httpx", "httpcore", "urllib3", "fsspec", "datasets", "filelock", "asyncio", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
