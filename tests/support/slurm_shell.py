"""The shell around a run: the shipped scripts, run in plain bash with stand-ins for uv, Slurm and Singularity.

The stand-ins are on PATH and write down their arguments.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurms" / "train_scripts").glob("*.sh"))
STEMS = {
    "pi0_finetune_bridge",
    "pi0_finetune_bridge_paraphrase",
    "pi0_train_bridge",
    "pi0_train_bridge_freeze_vlm",
    "pi0_train_fractal",
    "pi0_demo",
    "pi0_metaworld",
}
SHELL_FILES = [
    *(ROOT / "set_path.sh", ROOT / "slurms" / "common.sh"),
    *SCRIPTS,
    *sorted((ROOT / "slurms" / "eval_scripts").glob("*.sh")),
]

# Every stand-in appends its name and arguments to $CALLS, one unit separator after each, one record separator at
# the end; arguments may hold newlines. One at a time: bash writes line by line.
RECORD = r"""#!/bin/bash
exec 9>>"$CALLS"; flock 9; printf '%s\x1f' "$(basename "$0")" "$@" >&9; printf '\x1e' >&9; exec 9>&-
"""
STAND_INS = {
    "uv": RECORD
    + r"""
[[ -z "${FAKE_UV_FAILS:-}" ]] || { echo "error: no environment" >&2; exit 2; }
shift # run
while [[ "$1" == --* ]]; do shift; done
if [[ "$1" == python ]]; then shift; sleep "${FAKE_SLOW_UV:-0}"; exec "$REAL_PYTHON" "$@"; fi
[[ -z "${FAKE_RUN:-}" ]] || exec "$REAL_PYTHON" "$FAKE_RUN"
env -0 >"$CALLS.env"
if [[ -n "${FAKE_STATUS:-}" ]]; then printf '%s' "${FAKE_STATUS//ATTEMPT/$VLA_ATTEMPT}" >"$VLA_STATUS_FILE"; fi
exit "${FAKE_EXIT:-0}"
""",
    "scontrol": RECORD
    + r"""
case "$1 $2" in
    "show hostnames") printf 'node7\nnode8\n' ;;
    "show job")
        [[ -z "${FAKE_OTHER_TASK:-}" ]] || echo "$FAKE_OTHER_TASK"
        echo "JobId=$4 JobName=gpu TRES=cpu=4 ${FAKE_TRES:-} ${FAKE_JOB:-JobState=RUNNING Reason=None}" ;;
    requeue*) exit "${FAKE_REQUEUE_EXIT:-0}" ;;
esac
""",
    "nvidia-smi": RECORD
    + r"""
[[ -n "${FAKE_GPUS:-}" ]] || { echo "NVIDIA-SMI has failed" >&2; exit 9; }
for ((i = 0; i < FAKE_GPUS; i++)); do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done
""",
    "singularity": RECORD
    + r"""
while [[ "$1" != /bin/bash ]]; do shift; done
exec "$@"
""",
    # The step runs as it would under SLURM.
    "srun": RECORD
    + r"""
while [[ "$1" != bash ]]; do shift; done
echo $$ >"$CALLS.step"
exec "$@"
""",
    "nproc": "#!/bin/bash\necho ${OMP_NUM_THREADS:-16}\n",
}


def status(state: str, error_kind: str | None = None, **other: Any) -> str:
    """A status file as run.py writes it; the stand-in puts the attempt in."""
    return json.dumps({"attempt": "ATTEMPT", "state": state, "error_kind": error_kind, "step": 7, **other})


FINISHED = status("finished")


@dataclass
class Outcome:
    """What a script did."""

    exit_code: int
    text: str
    calls: list[list[str]]
    environment: dict[str, str]

    @property
    def torchrun(self) -> list[str]:
        """The arguments after ``torchrun``, of the one time it was called."""
        command = ["uv", "run", "--no-sync", "torchrun"]
        (found,) = [call[4:] for call in self.calls if call[:4] == command]
        return found

    @property
    def requeued(self) -> list[str]:
        return [call[2] for call in self.calls if call[:2] == ["scontrol", "requeue"]]

    @property
    def held(self) -> list[str]:
        return [call[2] for call in self.calls if call[:2] == ["scontrol", "requeuehold"]]


# Stands for uv, torchrun and the training processes in one: it leaves when it sees the stop file, and notes every
# signal that it gets.
RUN = """
import json, os, pathlib, signal, sys, time
notes = open(os.environ["CALLS"] + ".run", "a", buffering=1)
for number in {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}:
    signal.signal(number, lambda number, frame: print(signal.Signals(number).name, file=notes))
status, stop = (pathlib.Path(os.environ[name]) for name in ("VLA_STATUS_FILE", "VLA_STOP_FILE"))
assert not stop.exists()
print("started", file=notes)
end = time.monotonic() + 20
while not stop.exists() and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(float(os.environ["FAKE_SAVE_S"]))  # the update, and the checkpoint
reason = stop.read_text().strip()
state = "stopped" if "Ctrl-C" in reason else "preempted"
outcome = {"attempt": os.environ["VLA_ATTEMPT"], "state": state, "error_kind": None, "step": 7, "reason": reason}
status.write_text(json.dumps(outcome))
print("saved", file=notes)
sys.exit(1)
"""


class Started:
    """A script on its way."""

    def __init__(self, shell: Shell, process: subprocess.Popen[str]) -> None:
        self.shell, self.process = shell, process

    @property
    def notes(self) -> list[str]:
        """What the run stand-in wrote: started, signals, saved."""
        path = Path(f"{self.shell.calls}.run")
        return path.read_text().split() if path.exists() else []

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)

    def stop_file(self) -> Path | None:
        return next((self.shell.folder / "runs" / ".attempts").glob("*.stop"), None)

    def outcome(self) -> Outcome:
        text, _ = self.process.communicate(timeout=30)
        return self.shell.outcome(self.process.returncode, text)


class Shell:
    """Runs scripts of the repository in an environment of which the test knows everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.binaries = folder / "bin"
        self.binaries.mkdir()
        for name, text in STAND_INS.items():
            (self.binaries / name).write_text(text)
            (self.binaries / name).chmod(0o755)

    def run(self, script: Path | str, *arguments: str, **variables: str) -> Outcome:
        return self.run_in(ROOT, script, *arguments, **variables)

    def run_in(self, cwd: Path, script: Path | str, *arguments: str, **variables: str) -> Outcome:
        process = self._start(cwd, script, *arguments, **variables)
        text, _ = process.communicate(timeout=60)
        return self.outcome(process.returncode, text)

    def start(self, *arguments: str, save_s: float = 0.3, **variables: str) -> Started:
        """The demo's script, with a run that goes on until it is asked to stop."""
        run = self.folder / "run.py"
        run.write_text(RUN)
        process = self._start(ROOT, DEMO, *arguments, FAKE_RUN=str(run), FAKE_SAVE_S=str(save_s), **variables)
        return Started(self, process)

    def _start(self, cwd: Path, script: Path | str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        self.calls.write_text("")
        environment = {
            "PATH": f"{self.binaries}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "VLA_LOG_DIR": str(self.folder / "runs"),
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls),
            "VLA_REQUEUE_PAUSE": "0",
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            cwd=cwd,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def outcome(self, exit_code: int, text: str) -> Outcome:
        records = self.calls.read_text().split("\x1e")[:-1]
        seen = Path(f"{self.calls}.env")
        pairs = seen.read_text().split("\0")[:-1] if seen.exists() else []
        return Outcome(
            exit_code=exit_code,
            text=text,
            calls=[record.split("\x1f")[:-1] for record in records],
            environment=dict(pair.split("=", 1) for pair in pairs),
        )


DEMO = ROOT / "slurms" / "train_scripts" / "pi0_demo.sh"
SLURM_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NODELIST": "node[7-8]",
}


def attempt(state: str, at_start: int, saved: int | None = None, reason: str = "") -> dict[str, Any]:
    """An entry of ``attempts`` in ``status.json``; without ``saved``, no new checkpoint."""
    saved = at_start if saved is None else saved
    return {
        "attempt": f"4711-{at_start}-1",
        "started": 1000.0,
        "state": state,
        "reason": reason,
        "first_step": at_start,
        "step": saved + 2,
        "checkpoint_step": saved,
        "checkpoint_step_at_start": at_start,
    }


CRASH, FAILURE, STOP = attempt("running", 5), attempt("failed", 5, reason="CUDA"), attempt("preempted", 5, reason="T")
