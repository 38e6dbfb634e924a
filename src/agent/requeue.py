"""Decides what becomes of a job whose training process has ended: done, fail, stop, requeue or hold.

``slurms/common.sh`` asks this after every attempt::

    python -m agent.requeue STATUS_FILE ATTEMPT EXIT_CODE [JOB]

and gets one line, ``word: reason``, on standard output, and the exit code that the job should leave with. The
exit code of torchrun is 1 for every failure of a worker, so the answer comes from the status file that the run
writes at its start and at every outcome, and from the list of attempts in the run folder. Only the standard library:
this must work, and quickly, on a node where importing torch does not.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.lifecycle import records
from agent.lifecycle.history import refused
from agent.safe_files import write_text

Action = Literal["done", "fail", "stop", "requeue", "hold"]

EXIT_CODE_CONFIG = 2
PATIENCE = 3
"""So many attempts in a row may bring no new checkpoint before the job is held."""


@dataclass(frozen=True)
class Decision:
    """What the job does now, the exit code it leaves with if it stays, and why."""

    action: Action
    exit_code: int
    reason: str

    def __str__(self) -> str:
        return f"{self.action}: {self.reason}"


def decide(
    status: dict[str, Any] | None, attempts: list[dict[str, Any]], exit_code: int, problem: str = ""
) -> Decision:
    """Decides about the attempt that just ended.

    Args:
        status: what it wrote, ``{"state", "error_kind", "reason", "step", …}``; None if it wrote nothing.
        attempts: all of this run, the last one being that which just ended.
        exit_code: of torchrun.
        problem: why ``status`` is None.
    """
    if status is None and exit_code == 0:
        # torchrun leaves with 0 only when every worker did. To start again would do the same again, for ever.
        return Decision("done", 0, f"the run ended without an error, but {problem}: not a training, or --help?")
    if status is None:
        why = f"the run crashed with exit code {exit_code}: {problem}"
    else:
        state, reason, step = status.get("state"), status.get("reason") or "no reason given", status.get("step")
        if state == "finished":
            return Decision("done", 0, f"finished at step {step}")
        if state == "failed" and status.get("error_kind") == "config":
            return Decision("fail", EXIT_CODE_CONFIG, f"the configuration has to be corrected first: {reason}")
        if state == "stopped":
            return Decision("stop", 1, f"stopped at step {step}: {reason}")
        if state == "running":
            why = f"the run crashed with exit code {exit_code} after its start, without a word"
        elif state in ("preempted", "failed"):
            why = f"{state} at step {step}: {reason}"
        else:  # damaged; what it was to say is not known
            why = f"the run left with exit code {exit_code}, and its status has an unknown state, {state!r}"

    # A person's mistakes and stops say nothing of what an attempt can do.
    latest = [attempt for attempt in attempts if attempt.get("state") != "stopped" and not refused(attempt)][-PATIENCE:]
    # What an attempt began from was saved before it.
    starts = {
        attempt.get("checkpoint_step_at_start") or 0 for attempt in latest if "checkpoint_step_at_start" in attempt
    }
    stuck = len(starts) <= 1 and not any(_brought_something(attempt) for attempt in latest)
    if len(latest) == PATIENCE and stuck:
        story = "; ".join(f"attempt {attempt.get('attempt') or '?'} {_describe(attempt)}" for attempt in latest)
        return Decision("hold", 1, f"{why}. {PATIENCE} attempts in a row brought no new checkpoint: {story}")
    return Decision("requeue", 1, why)


def _brought_something(attempt: dict[str, Any]) -> bool:
    saved, at_start = attempt.get("checkpoint_step"), attempt.get("checkpoint_step_at_start")
    return attempt.get("state") == "finished" or (saved or 0) > (at_start or 0)


def _describe(attempt: dict[str, Any]) -> str:
    state = "crashed" if attempt.get("state") == "running" else attempt.get("state")
    step = attempt.get("step")
    where = f" at step {step}" if step is not None else ""
    return f"{state}{where} ({attempt.get('reason') or 'without a word'})"


def read_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Reads the JSON object in ``path``; gives None and what is wrong where the file holds none."""
    try:
        content, problem = records.read_object(path)
    except OSError as error:
        problem, content = str(error), None
    if content is None:
        return None, f"its status {path} cannot be read: {problem}" if problem else "it wrote no status"
    return content, ""


def read_status(path: Path, attempt: str) -> tuple[dict[str, Any] | None, str]:
    """Reads what ``attempt`` wrote to ``path``; gives None and why where it wrote nothing, or another attempt's is left over."""
    status, problem = read_object(path)
    if status is not None and status.get("attempt") != attempt:
        return None, f"the status is of another attempt, {status.get('attempt')!r}"
    stop_file = path.with_suffix(".stop")
    if status is None and stop_file.exists():
        problem += f"; it was asked to stop: {stop_file.read_text(encoding='utf-8', errors='replace').strip()}"
    return status, problem


def listed_attempts(status: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Lists the attempts in the ``status.json`` of the run folder that the status names; none where it names none."""
    if not (status and isinstance(status.get("run_dir"), str) and status["run_dir"]):
        return []
    try:
        attempts = records.read_status(Path(status["run_dir"]) / "status.json")[0].get("attempts", [])
    except OSError:
        attempts = []
    # Killed right after a checkpoint, an attempt had no time to enter it.
    last = Path(status["run_dir"]) / "checkpoints" / "last"
    newest = last.readlink().name.rpartition("_")[2] if last.is_symlink() else ""
    if attempts and newest.isdigit():
        attempts[-1]["checkpoint_step"] = max(int(newest), attempts[-1].get("checkpoint_step") or 0)
    return attempts


def with_crashes(listed: list[dict[str, Any]], attempt: str, reason: str, crashes: Path) -> list[dict[str, Any]]:
    """Adds to the listed attempts those that ended before they could enter themselves in the run folder.

    Those are kept in ``crashes``, a file of the job. The attempt that just ended joins them if it is not listed.

    Raises:
        OSError: if the file cannot be written.
    """
    unlisted = records.read_status(crashes)[0].get("attempts", []) if crashes.is_file() else []
    if not any(entry.get("attempt") == attempt for entry in listed[-1:]):
        started = attempt.rpartition("-")[2]
        entry = {"attempt": attempt, "state": "running", "reason": reason, "step": None}
        unlisted.append({**entry, "started": int(started) if started.isdigit() else 0})
        write_text(crashes, json.dumps({"attempts": unlisted[-PATIENCE:]}, indent=1) + "\n")
    return sorted(listed + unlisted, key=lambda entry: entry.get("started") or 0)


def main(arguments: list[str]) -> int:
    """Prints the decision; returns the exit code for the job."""
    path, attempt, exit_code = Path(arguments[0]), arguments[1], int(arguments[2])
    job = arguments[3] if len(arguments) > 3 else ""
    status, problem = read_status(path, attempt)
    attempts = listed_attempts(status)
    decision = decide(status, attempts, exit_code, problem)
    if job and decision.action in ("requeue", "hold"):
        try:
            attempts = with_crashes(attempts, attempt, decision.reason, path.parent / f"{job}.crashes")
            decision = decide(status, attempts, exit_code, problem)
        except OSError as error:
            # Uncounted it might start for ever; a disk that takes no line takes no checkpoint either.
            decision = Decision("hold", 1, f"{decision.reason}. This could not be counted: {error}")
    if job and (decision.action in ("done", "fail", "stop") or (attempts and _brought_something(attempts[-1]))):
        (path.parent / f"{job}.crashes").unlink(missing_ok=True)
    print(str(decision).replace("\n", " "))
    return decision.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
