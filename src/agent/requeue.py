"""What becomes of a job whose training process has ended: done, fail or requeue.

``slurms/common.sh`` asks this after every attempt::

    python -m agent.requeue STATUS_FILE ATTEMPT EXIT_CODE

and gets one line, ``word: reason``, on standard output, and the exit code that the job should leave with. The
exit code of torchrun is 1 for every failure of a worker, so the answer comes from the status file that the run
writes at its start and at every outcome. Only the standard library: this must work, and quickly, on a node where
importing torch does not.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Action = Literal["done", "fail", "requeue"]

EXIT_CODE_CONFIG = 2


@dataclass(frozen=True)
class Decision:
    """What the job does now, the exit code it leaves with if it stays, and why."""

    action: Action
    exit_code: int
    reason: str

    def __str__(self) -> str:
        return f"{self.action}: {self.reason}"


def read_status(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The status a run wrote to ``path``, or None and what is wrong with the file."""
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, "it wrote no status"
    except (OSError, ValueError) as error:
        return None, f"its status {path} cannot be read ({error})"
    if not isinstance(status, dict):
        return None, f"its status {path} is not a JSON object"
    return status, ""


def decide(status: dict[str, Any] | None, attempt: str, exit_code: int, problem: str = "") -> Decision:
    """The decision for one attempt.

    Args:
        status: what the run wrote, ``{"attempt", "state", "error_kind", "reason", "step", …}``; None if unreadable.
        attempt: the name that this attempt was given; a status with another name is left over from an earlier one.
        exit_code: of torchrun.
        problem: why ``status`` is None.
    """
    if status is not None and status.get("attempt") != attempt:
        problem = f"the status is of another attempt, {status.get('attempt')!r}"
        status = None
    if status is None and exit_code == 0:
        # torchrun leaves with 0 only when every worker did. To start again would do the same again, for ever.
        return Decision("done", 0, f"the run ended without an error, but {problem}: not a training, or --help?")
    if status is None:
        return Decision("requeue", 1, f"the run crashed with exit code {exit_code}: {problem}")

    state, reason, step = status.get("state"), status.get("reason") or "no reason given", status.get("step")
    if state == "finished":
        return Decision("done", 0, f"finished at step {step}")
    if state == "preempted":
        return Decision("requeue", 1, f"preempted at step {step}: {reason}")
    if state == "running":
        return Decision("requeue", 1, f"the run crashed with exit code {exit_code} after its start, without a word")
    if state == "failed" and status.get("error_kind") == "config":
        return Decision("fail", EXIT_CODE_CONFIG, f"the configuration has to be corrected first: {reason}")
    if state == "failed":
        return Decision("requeue", 1, f"failed at step {step}: {reason}")
    return Decision("fail", 1, f"the status has an unknown state, {state!r}")


def main(arguments: list[str]) -> int:
    """Prints the decision; returns the exit code for the job."""
    path, attempt, exit_code = arguments
    status, problem = read_status(Path(path))
    decision = decide(status, attempt, int(exit_code), problem)
    print(str(decision).replace("\n", " "))
    return decision.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
