"""Keeps the folder of one run: locks it, and writes the status that users, scripts and reports read."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from agent.lifecycle import history
from agent.lifecycle.records import read_status, set_aside
from agent.safe_files import is_locked, lock, write_text

log = logging.getLogger(__name__)

State = Literal["running", "stopped", "preempted", "finished", "failed"]
"""``stopped`` by a person (Ctrl-C), ``preempted`` by a cluster or another program, which starts it again."""


def report_attempt(state: State, *, reason: str = "", error_kind: str | None = None, **details: Any) -> None:
    """Tells the script that launched this process how it ended, through ``$VLA_STATUS_FILE``.

    torchrun turns every failure into exit code 1, so a launcher cannot tell a config error from a crash by it.
    Does nothing when the variable is not set. Where the file cannot be written, the log says so, and the launcher takes
    the end for a crash.
    """
    target = os.environ.get("VLA_STATUS_FILE")
    if not target:
        return
    record = {"attempt": os.environ.get("VLA_ATTEMPT", ""), "state": state, "error_kind": error_kind, "reason": reason}
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(target), json.dumps({**record, **details}, indent=1) + "\n")
    except OSError as error:
        log.error("the launcher is not told how this run does (VLA_STATUS_FILE): %s", error)


def holder(path: Path) -> str | None:
    """Says who runs in this folder now, None if nobody does or it cannot be told; asking disturbs nobody."""
    return is_held(path)[1]


def is_held(path: Path) -> tuple[bool | None, str | None]:
    """Whether a process runs in this folder, None where that cannot be told, and who it is."""
    held, who = is_locked(path / ".lock")
    return held, (who or "an unknown process") if held else None


def report_failure(path: Path, rank: int, reason: str, kind: str, patience_s: float = 2.0) -> bool:
    """Ends the present attempt in ``status.json``; for a rank other than 0, which fails by itself.

    Rank 0 may be failing as well, and what it says counts: it has so many seconds to end the attempt itself. If it does
    not, it waits for this rank in a collective, perhaps until the launcher kills it, and if not, then with an error of
    the network, which would say nothing.

    Returns:
        False if the attempt has ended already, with a reason of its own.
    """
    file, end = path / "status.json", time.monotonic() + patience_s
    while not (ended := _has_ended(status := _sound_status(file))) and time.monotonic() < end:
        time.sleep(0.05)
    if ended:
        return False
    now: dict[str, Any] = {"state": "failed", "reason": f"rank {rank}: {reason}", "error_kind": kind}
    if "attempts" in status:
        now["updated"] = time.time()
        status["attempts"][-1].update({**now, "ended": now["updated"]})
        status |= now | history.summary(status["attempts"])
        write_text(file, json.dumps(status, indent=1) + "\n")
    report_attempt("failed", reason=now["reason"], error_kind=kind, step=status.get("step", 0), run_dir=str(path))
    return True


def _has_ended(status: dict[str, Any]) -> bool:
    """Whether the present attempt has ended."""
    return "attempts" in status and status["attempts"][-1].get("ended") is not None


def _sound_status(path: Path) -> dict[str, Any]:
    """What of ``status.json`` has the right form. It only reports: what a run continues from is in its checkpoints.

    Raises:
        OSError: if it cannot be read for the moment.
    """
    status, problems = read_status(path)
    if not problems:
        return status
    try:
        kept = f"was kept as {set_aside(path).name}"
        write_text(path, json.dumps(status, indent=1) + "\n")  # so that it is said once
    except OSError as error:
        kept = f"could not be kept ({error})"
    count = len(status.get("attempts", []))
    log.warning(
        "%s is damaged and %s; the run goes on, and the starts are counted from the %d that can be read: %s",
        path, kept, count, "; ".join(problems),
    )  # fmt: skip
    return status


class RunFolder:
    """``${VLA_LOG_DIR}/<name>`` while this process runs it. Only rank 0 makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        self._place = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._status = _sound_status(path / "status.json")

    def _in_use(self, who: str) -> str:
        return (
            f"the run folder {self.path} is in use by {who or 'an unknown process'}; wait for it, stop it, or give this run "
            "another name: --name …"
        )

    def _acquire(self) -> int:
        # In a job nobody waits for the answer, and what a killed attempt left may take a while to be gone.
        patience_s = 60.0 if "SLURM_JOB_ID" in os.environ else 5.0
        handle = lock(self.path / ".lock", "job", self._in_use, patience_s)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"host {socket.gethostname()}, process {os.getpid()}, since {started}".encode())
        except OSError as error:  # of a full disk, which does not say which
            os.close(handle)
            raise OSError(error.errno, error.strerror, str(self.path / ".lock")) from None
        return handle

    def moved(self) -> str | None:
        """Says what has become of the folder if it is not where this run began it; None if it is."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._place)):
                return None
        except FileNotFoundError:
            pass
        except OSError:  # a file server that restarts: whoever writes there learns what is wrong
            return None
        now = os.readlink(f"/proc/self/fd/{self._place}")
        what = "removed" if now.endswith(" (deleted)") else f"moved to {now}"
        return f"the run folder was {what} while the run goes on; nothing is written until it is back"

    def require_in_place(self) -> None:
        """Keeps a run from beginning its folder anew, or writing to that of another run, when somebody has moved it.

        Raises:
            OSError: if the folder is not where this run began it.
        """
        if (what := self.moved()) is not None:
            raise OSError(errno.ENOENT, what, str(self.path))

    @property
    def status(self) -> dict[str, Any]:
        """What ``status.json`` holds."""
        return dict(self._status)

    @property
    def attempt(self) -> dict[str, Any]:
        """The present attempt's record."""
        return self._status["attempts"][-1]

    def begin_attempt(self) -> None:
        """Adds this start to the history; earlier attempts stay as they ended."""
        attempts = self._status.setdefault("attempts", [])
        attempts.append(
            {
                "attempt": os.environ.get("VLA_ATTEMPT", ""),
                "job": os.environ.get("SLURM_JOB_ID"),
                "restart_count": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
                "host": socket.gethostname(),
                "started": time.time(),
                "ended": None,
                "checkpoint_step": self._status.get("checkpoint_step", 0),
                "checkpoint_step_at_start": self._status.get("checkpoint_step", 0),
            }
        )
        self.update("running", self._status.get("step", 0), reason="starting")

    def note(self, **details: Any) -> None:
        """Adds facts to the present attempt; the next :meth:`update` writes them."""
        self.attempt.update(details)
        if "checkpoint_step" in details:
            self._status["checkpoint_step"] = details["checkpoint_step"]

    def update(self, state: State, step: int, reason: str = "", error_kind: str | None = None) -> None:
        """Writes ``status.json`` and the launcher's status file. An error of the disk is a warning, not the end."""
        if self.attempt["ended"] is not None:
            return  # the watchdog has ended this attempt while the training loop was still at work
        try:
            recorded = _sound_status(self.path / "status.json").get("attempts", [])[-1:]
        except OSError as error:
            log.warning("%s cannot be read: %s", self.path / "status.json", error)
            recorded = []
        if recorded and recorded[0].get("started") == self.attempt["started"] and recorded[0].get("ended") is not None:
            return  # another rank has ended it: that rank failed first, and knows why
        now = {"state": state, "step": step, "reason": reason, "error_kind": error_kind}
        ended = None if state == "running" else time.time()
        self._status |= {**now, "updated": time.time()}
        self.attempt.update({**now, "updated": time.time(), "ended": ended})
        self._status |= history.summary(self._status["attempts"])
        try:
            self.require_in_place()
            write_text(self.path / "status.json", json.dumps(self._status, indent=1) + "\n")
        except OSError as error:
            log.warning("status.json could not be written, it stays at its last state: %s", error)
        report_attempt(state, reason=reason, error_kind=error_kind, step=step, run_dir=str(self.path))

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._lock)
        os.close(self._place)
