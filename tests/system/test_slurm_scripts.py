"""The shell around a run: set_path.sh, slurms/common.sh, slurms/train_scripts/ and the requeue decision.

Run: uv run pytest tests/system/test_slurm_scripts.py              (a minute; needs bash, no SLURM and no GPU)
     uv run pytest tests/system/test_slurm_scripts.py -m slow      (shellcheck, where it is installed)

The shipped scripts themselves are run, in plain bash, with stand-ins for uv, scontrol, nvidia-smi and singularity
on PATH that write down their arguments. tests/system/test_slurm_cluster.py submits them to a real SLURM.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.requeue import decide, main, read_status

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


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


DEMO = ROOT / "slurms" / "train_scripts" / "pi0_demo.sh"
SLURM_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NODELIST": "node[7-8]",
}


# ---- the decision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "exit_code", "action", "leaves_with"),
    [
        ({"state": "finished", "step": 9}, 0, "done", 0),
        ({"state": "finished", "step": 9}, 1, "done", 0),  # torn down badly, but the work is done
        ({"state": "failed", "error_kind": "config", "reason": "chunk_sise"}, 1, "fail", 2),
        ({"state": "failed", "error_kind": "runtime", "reason": "CUDA"}, 1, "requeue", 1),
        ({"state": "failed"}, 1, "requeue", 1),
        ({"state": "preempted", "reason": "SIGUSR1"}, 0, "requeue", 1),
        ({"state": "stopped", "reason": "Ctrl-C"}, 1, "stop", 1),
        ({"state": "running"}, 1, "requeue", 1),
        ({"state": "running"}, 0, "requeue", 1),
        (None, 137, "requeue", 1),
        (None, 0, "done", 0),  # --help
        ({"state": "preempued"}, 1, "requeue", 1),  # a bit has flipped; counted as a crash
        ({"rtate": "preempted"}, 1, "requeue", 1),
    ],
)
def test_decision(written: dict[str, Any] | None, exit_code: int, action: str, leaves_with: int) -> None:
    decision = decide(written, [], exit_code, problem="it wrote no status")
    assert (decision.action, decision.exit_code) == (action, leaves_with)
    assert decision.reason
    assert ((written or {}).get("reason") or "") in decision.reason


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
PROGRESS = attempt("running", 5, 9)
REFUSED, STOPPED = attempt("failed", 5) | {"error_kind": "config"}, attempt("stopped", 5)


@pytest.mark.parametrize(
    ("attempts", "action"),
    [
        ([CRASH], "requeue"),
        ([CRASH, CRASH], "requeue"),
        ([CRASH, CRASH, CRASH], "hold"),
        ([CRASH, FAILURE, STOP], "hold"),  # whatever their state
        ([STOP, STOP, STOP], "hold"),  # preempted before the first update each time
        ([CRASH, REFUSED, STOPPED, CRASH], "requeue"),  # a person's mistakes and stops are no failures of the job
        ([CRASH, REFUSED, CRASH, STOPPED, CRASH], "hold"),
        ([PROGRESS, CRASH, CRASH], "requeue"),
        ([CRASH, PROGRESS, CRASH], "requeue"),
        ([CRASH, CRASH, PROGRESS], "requeue"),
        ([PROGRESS, CRASH, CRASH, CRASH], "hold"),
        ([CRASH, attempt("finished", 5), CRASH, CRASH], "requeue"),
        ([attempt("preempted", step, step + 1) for step in range(10)], "requeue"),
        ([attempt("running", step, step + 1) for step in range(10)], "requeue"),
        ([*(attempt("preempted", step, step + 1) for step in range(10)), CRASH, CRASH, CRASH], "hold"),
        ([attempt("running", step) for step in (5, 6, 7)], "requeue"),  # killed before it could enter its checkpoint
        ([attempt("running", 5), {}, attempt("running", 5)], "hold"),
        ([{}, {}, {}], "hold"),  # not one entry that says anything
        ([{"checkpoint_step": None, "checkpoint_step_at_start": 0}] * 3, "hold"),
        ([{"checkpoint_step": 1, "checkpoint_step_at_start": None}] * 3, "requeue"),
    ],
)
@pytest.mark.parametrize("state", [None, "running", "failed", "preempted"])
def test_three_attempts_in_a_row_without_a_checkpoint_are_held(
    attempts: list[dict[str, Any]], action: str, state: str | None
) -> None:
    decision = decide(state and {"state": state}, attempts, 1, problem="it wrote no status")
    assert (decision.action, decision.exit_code) == (action, 1)


def test_a_hold_tells_why_each_of_the_three_ended() -> None:
    reason = decide({"state": "failed", "step": 7, "reason": "CUDA"}, [CRASH, STOP, FAILURE], 1).reason
    assert "3 attempts in a row brought no new checkpoint" in reason
    for part in ("crashed at step 7 (without a word)", "preempted at step 7 (T)", "failed at step 7 (CUDA)"):
        assert part in reason


def test_a_finished_run_and_a_config_error_are_never_held() -> None:
    assert decide({"state": "finished"}, [CRASH, CRASH, CRASH], 0).action == "done"
    assert decide({"state": "failed", "error_kind": "config"}, [CRASH, CRASH, CRASH], 1).action == "fail"
    assert decide(None, [CRASH, CRASH, CRASH], 0).action == "done"


@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", '"finished"', "\udcff", '{"attempt": "b"}', "{}"])
def test_unreadable_status_is_no_status(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "status.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    found, problem = read_status(path, "a")
    assert found is None
    assert problem


class Job:
    """The decisions about one job, attempt after attempt, as common.sh asks for them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys, self.number = folder, capsys, 0
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        self.listed: list[dict[str, Any]] = []

    def ends(self, state: str | None, listed: dict[str, Any] | None = None, job: str = "4711", **more: Any) -> str:
        """One more attempt. ``state``: what it wrote to its status file. ``listed``: its entry in the run folder."""
        name = f"4711-{self.number}-{1000 + self.number}"
        self.number += 1
        path = self.folder / f"{name}.json"
        if state is not None:
            path.write_text(json.dumps({"attempt": name, "state": state, "run_dir": str(self.run_dir), **more}))
        if listed is not None:
            self.listed.append(listed | {"attempt": name, "started": 1000 + self.number})
            (self.run_dir / "status.json").write_text(json.dumps({"state": state, "attempts": self.listed}))
        main([str(path), name, "1", job])
        return self.capsys.readouterr().out.partition(":")[0]


@pytest.fixture
def job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(tmp_path, capsys)


def test_the_list_in_the_run_folder_is_the_counter(job: Job) -> None:
    assert [job.ends("preempted", attempt("preempted", n, n + 1)) for n in range(10)] == ["requeue"] * 10
    assert [job.ends("failed", FAILURE), job.ends("running", CRASH)] == ["requeue"] * 2
    assert job.ends("preempted", STOP) == "hold"
    assert job.ends("running", CRASH) == "hold"  # released, and no better
    assert job.ends("running", PROGRESS) == "requeue"
    assert not list(job.folder.glob("*.crashes"))


@pytest.mark.parametrize("state", [None, "running"])  # before or after the config was read
def test_crashes_before_the_run_folder_is_known_are_counted_by_job(job: Job, state: str | None) -> None:
    assert [job.ends(state), job.ends(state)] == ["requeue"] * 2
    assert job.ends(state) == "hold"
    assert job.ends("running", PROGRESS) == "requeue"
    assert [job.ends(state), job.ends(state), job.ends(state)] == ["requeue", "requeue", "hold"]
    assert job.ends("finished", attempt("finished", 9)) == "done"
    assert not list(job.folder.glob("*.crashes"))


def test_a_checkpoint_that_was_not_entered_any_more_counts(job: Job) -> None:
    assert [job.ends("running", CRASH), job.ends("running", CRASH)] == ["requeue"] * 2
    (job.run_dir / "checkpoints").mkdir()
    (job.run_dir / "checkpoints" / "last").symlink_to("step_00000006")
    assert job.ends("running", CRASH) == "requeue"


def test_both_counters_together(job: Job) -> None:
    assert [job.ends("failed", FAILURE), job.ends(None)] == ["requeue"] * 2
    assert job.ends("failed", FAILURE) == "hold"


def test_without_slurm_nothing_is_counted_by_job(job: Job) -> None:
    assert [job.ends(None, job="") for _ in range(4)] == ["requeue"] * 4
    assert not list(job.folder.glob("*.crashes"))


@pytest.mark.parametrize("content", ["", "[]", '{"attempts": 3}', '{"attempts": [3, null]}', "\0\0"])
def test_a_damaged_list_counts_nothing_and_stops_nobody(job: Job, content: str) -> None:
    (job.run_dir / "status.json").write_text(content)
    assert [job.ends("running"), job.ends("running"), job.ends("running")] == ["requeue", "requeue", "hold"]


def test_what_cannot_be_counted_is_held(job: Job) -> None:
    (job.folder / "4711.crashes").mkdir()
    assert job.ends(None) == "hold"


def test_decision_needs_only_the_standard_library() -> None:
    program = "import sys, agent.requeue; print([m for m in ('torch', 'lerobot', 'draccus') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


# ---- what follows from an outcome ------------------------------------------------------------------------------


def test_finished_run_leaves_with_zero(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.exit_code == 0
    assert outcome.requeued == []
    assert "done: finished at step 7" in outcome.text


@pytest.mark.parametrize(
    ("written", "exit_code"),
    [("", "1"), ("", "137"), (status("running"), "1"), (status("failed", "runtime"), "1"), (status("preempted"), "0")],
)
def test_crash_failure_and_preemption_are_requeued_under_slurm(shell: Shell, written: str, exit_code: str) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT=exit_code, **SLURM_JOB)
    assert outcome.requeued == ["4711"]
    assert outcome.calls[-1][:2] == ["scontrol", "requeue"]  # the last thing done: it ends the job
    assert outcome.exit_code == 1
    assert "requeue: " in outcome.text


def test_config_error_is_never_requeued(shell: Shell) -> None:
    written = status("failed", "config", reason="unknown key chunk_sise; did you mean chunk_size?")
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT="1", **SLURM_JOB)
    assert outcome.exit_code == 2
    assert outcome.requeued == []
    assert "did you mean chunk_size?" in outcome.text


def test_status_of_another_attempt_is_a_crash(shell: Shell) -> None:
    written = status("finished").replace("ATTEMPT", "4711-0-1")
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT="1", **SLURM_JOB)
    assert outcome.requeued == ["4711"]
    assert "another attempt" in outcome.text


def test_refused_requeue_is_tried_again_and_says_how_to_continue(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_EXIT="1", FAKE_REQUEUE_EXIT="1", **SLURM_JOB)
    assert outcome.exit_code == 1
    assert outcome.requeued == ["4711"] * 3
    assert "submit the same command again" in outcome.text


@pytest.mark.parametrize(
    ("job", "requeued"),
    [
        ("JobState=COMPLETING Reason=None EndTime=2026-11-22T09:49:20 PreemptTime=None", False),  # scancel
        ("JobState=COMPLETING Reason=None EndTime=Unknown", False),  # scontrol requeue, by somebody else
        ("JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True),
        ("JobState=COMPLETING Reason=None PreemptTime=2026-11-22T09:49:20", True),
        ("JobState=RUNNING Reason=None PreemptTime=2026-11-22T09:49:20", True),
    ],
)
@pytest.mark.parametrize("state", ["preempted", "running"])
def test_a_cancelled_job_is_not_revived(shell: Shell, job: str, requeued: bool, state: str) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=status(state), FAKE_EXIT="1", FAKE_JOB=job, **SLURM_JOB)
    assert outcome.requeued == (["4711"] if requeued else [])
    assert ("submit the same command again" in outcome.text) is not requeued
    assert outcome.exit_code == 1


def test_a_task_of_an_array_is_put_back_alone(shell: Shell) -> None:
    # The number of an array's last task is the whole array's: SLURM shows all tasks for it, and would requeue them all.
    others = "JobId=4712 ArrayJobId=4711 ArrayTaskId=1 JobState=PENDING Reason=BeginTime BatchFlag=1"
    own = "ArrayJobId=4711 ArrayTaskId=3 JobState=RUNNING Reason=None BatchFlag=1"
    variables = SLURM_JOB | {"FAKE_OTHER_TASK": others, "FAKE_JOB": own, "FAKE_EXIT": "1"}
    for count in ("0", "1"):
        outcome = shell.run(DEMO, SLURM_RESTART_COUNT=count, **variables)
        assert (outcome.requeued, outcome.held) == (["4711_3"], [])
    outcome = shell.run(DEMO, SLURM_RESTART_COUNT="2", **variables)
    assert (outcome.requeued, outcome.held) == ([], ["4711_3"])
    assert "'scontrol release 4711_3' continues it" in outcome.text


def test_an_allocation_in_which_somebody_works_is_not_requeued(shell: Shell) -> None:
    for _ in range(3):  # and none of the starts that he makes in it is counted
        outcome = shell.run(DEMO, FAKE_EXIT="1", FAKE_JOB="JobState=RUNNING Reason=None BatchFlag=0", **SLURM_JOB)
        assert outcome.exit_code == 1
        assert outcome.requeued == outcome.held == []
        assert "run the same command again: bash " in outcome.text
        assert "queue" not in outcome.text.replace("requeue: the run crashed", "")
        assert list((shell.folder / "runs" / ".attempts").iterdir()) == []


def test_three_crashes_in_a_row_hold_the_job(shell: Shell) -> None:
    for count in ("0", "1"):
        outcome = shell.run(DEMO, FAKE_EXIT="1", SLURM_RESTART_COUNT=count, **SLURM_JOB)
        assert (outcome.requeued, outcome.held) == (["4711"], [])
    outcome = shell.run(DEMO, FAKE_EXIT="1", SLURM_RESTART_COUNT="2", **SLURM_JOB)
    assert (outcome.requeued, outcome.held) == ([], ["4711"])
    assert outcome.calls[-1][:2] == ["scontrol", "requeuehold"]
    assert outcome.exit_code == 1
    assert "hold: the run crashed with exit code 1" in outcome.text
    assert outcome.text.count("crashed (the run crashed with exit code 1: it wrote no status)") == 3
    assert "'scontrol release 4711' continues it" in outcome.text

    # Another job that is given this number, years later, begins with a clean sheet.
    assert shell.run(DEMO, FAKE_EXIT="1", **SLURM_JOB).requeued == ["4711"]


def test_the_attempts_in_the_run_folder_hold_the_job(shell: Shell) -> None:
    run_dir = shell.folder / "runs" / "pi0_demo"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text(json.dumps({"attempts": [CRASH, STOP]}))
    written = status("failed", "runtime", reason="CUDA", run_dir=str(run_dir))
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT="1", **SLURM_JOB)
    assert (outcome.requeued, outcome.held) == ([], ["4711"])
    assert "3 attempts in a row brought no new checkpoint" in outcome.text


def test_without_slurm_nothing_is_held(shell: Shell) -> None:
    run_dir = shell.folder / "runs" / "pi0_demo"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text(json.dumps({"attempts": [CRASH, STOP, FAILURE | {"attempt": "x"}]}))
    written = status("failed", "runtime", reason="CUDA", run_dir=str(run_dir))
    outcome = shell.run(DEMO, FAKE_STATUS=written, FAKE_EXIT="1")
    assert outcome.held == outcome.requeued == []
    assert "to continue, run the same command again" in outcome.text


# ---- signals ---------------------------------------------------------------------------------------------------

USR1, TERM, INT, HUP = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize("variables", [SLURM_JOB, {}], ids=["slurm", "bash"])
@pytest.mark.parametrize("to_all", [False, True], ids=["script", "process-group"])
@pytest.mark.parametrize(
    "signals",
    [[USR1], [USR1, USR1], [TERM], [TERM, USR1, TERM], [HUP], [INT]],
    ids=lambda s: "-".join(n.name for n in s),
)
def test_a_signal_becomes_a_stop_file_and_kills_nothing(
    shell: Shell, signals: list[signal.Signals], to_all: bool, variables: dict[str, str]
) -> None:
    script = shell.start("--name", "a b", **variables)
    script.wait_for(lambda: "started" in script.notes)
    assert script.stop_file() is None
    for number in signals:
        if to_all:
            os.killpg(script.process.pid, number)
        else:
            script.process.send_signal(number)
        script.wait_for(lambda: script.stop_file() is not None)
        time.sleep(0.05)
    assert script.process.poll() is None  # waiting for the run to save
    outcome = script.outcome()
    assert script.notes == ["started", "saved"], outcome.text
    reason = {USR1: "SIGUSR1 (", TERM: "SIGTERM (", HUP: "SIGHUP (", INT: "Ctrl-C"}[signals[0]]
    assert outcome.text.count("the run saves at its next update and ends") == 1
    person = signals == [INT]  # whom the run waits for; no queue takes it back
    assert f"{'stop: stopped' if person else 'requeue: preempted'} at step 7: {reason}" in outcome.text
    assert outcome.requeued == (["4711"] if variables and not person else [])
    assert outcome.exit_code == 1
    if variables and person:
        assert "run the same command again: sbatch, with the same script" in outcome.text
    elif variables:
        assert outcome.calls[-1][:2] == ["scontrol", "requeue"]
    else:
        assert r"run the same command again: bash " in outcome.text and r"--name a\ b" in outcome.text
    left = [path.suffix for path in (shell.folder / "runs" / ".attempts").iterdir()]
    assert left == ([".crashes"] if variables and not person else [])  # the stand-in lists itself in no run folder


def test_ctrl_c_twice_ends_the_run_through_torchrun(shell: Shell) -> None:
    script = shell.start(save_s=1.0)
    script.wait_for(lambda: "started" in script.notes)
    for _ in range(2):
        os.killpg(script.process.pid, INT)
        script.wait_for(lambda: script.stop_file() is not None)
        time.sleep(0.1)
    outcome = script.outcome()
    assert script.notes == ["started", "SIGTERM", "saved"]
    assert "not saved within 30 seconds is killed" in outcome.text
    assert "run the same command again" in outcome.text


@pytest.mark.parametrize("number", [USR1, TERM])
def test_what_slurm_sends_to_job_steps_only_reaches_the_script(shell: Shell, number: signal.Signals) -> None:
    script = shell.start(**SLURM_JOB, SLURMD_NODENAME="node7")
    step = Path(f"{shell.calls}.step")
    script.wait_for(lambda: "started" in script.notes and step.exists() and bool(step.read_text()))
    time.sleep(0.1)
    os.kill(int(step.read_text()), number)
    outcome = script.outcome()
    assert f"preempted at step 7: {number.name}" in outcome.text
    assert script.notes == ["started", "saved"]
    (call,) = [call for call in outcome.calls if call[0] == "srun"]
    assert {"--overlap", "--nodelist=node7", "--gres=none", "--mem=0", "--ntasks=1"} <= set(call)
    end = time.monotonic() + 10
    while Path(f"/proc/{step.read_text().strip()}/cmdline").exists():  # nothing of it stays behind
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_step_that_slurm_refuses_costs_only_itself(shell: Shell) -> None:
    (shell.binaries / "srun").write_text("#!/bin/bash\necho 'srun: error: no such thing' >&2\nexit 1\n")
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.exit_code == 0
    assert "no such thing" not in outcome.text


def test_a_step_is_started_under_slurm_only(shell: Shell) -> None:
    assert not [call for call in shell.run(DEMO, FAKE_STATUS=FINISHED).calls if call[0] == "srun"]


@pytest.mark.parametrize("to_all", [False, True], ids=["script", "process-group"])
def test_a_stop_before_the_run_starts_it_not(shell: Shell, to_all: bool) -> None:
    script = shell.start(FAKE_SLOW_UV="1", **SLURM_JOB)
    script.wait_for(lambda: "\x1f-c\x1f" in shell.calls.read_text())  # uv sets the environment up
    time.sleep(0.1)
    (os.killpg if to_all else os.kill)(script.process.pid, USR1)
    outcome = script.outcome()
    assert script.notes == []
    assert outcome.requeued == ["4711"]
    assert (
        "requeue: the run crashed with exit code 143: it wrote no status; it was asked to stop: SIGUSR1" in outcome.text
    )
    assert (shell.folder / "runs" / ".attempts" / "4711.crashes").exists()  # a limit too short to start must not loop


def test_each_start_has_a_stop_file_of_its_own(shell: Shell) -> None:
    folder = shell.folder / "runs" / ".attempts"
    folder.mkdir(parents=True)
    (folder / "4711-0-1.stop").write_text("old")
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.environment["VLA_STOP_FILE"] == f"{folder}/{outcome.environment['VLA_ATTEMPT']}.stop"
    assert list(folder.iterdir()) == []


def test_without_slurm_nothing_is_restarted_and_the_next_step_is_said(shell: Shell) -> None:
    outcome = shell.run("slurms/train_scripts/pi0_demo.sh", "--name", "a b", FAKE_EXIT="1")
    assert outcome.exit_code == 1
    assert outcome.requeued == []
    assert len([call for call in outcome.calls if "torchrun" in call]) == 1
    assert r"run the same command again: bash slurms/train_scripts/pi0_demo.sh --name a\ b" in outcome.text


def test_broken_environment_is_not_requeued(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_UV_FAILS="1", **SLURM_JOB)
    assert outcome.exit_code == 1
    assert outcome.requeued == []
    assert not [call for call in outcome.calls if "torchrun" in call]
    assert "not requeued" in outcome.text


def test_missing_uv_is_not_requeued(shell: Shell) -> None:
    (shell.binaries / "uv").unlink()
    path = f"{shell.binaries}:/usr/bin:/bin"
    if shutil.which("uv", path=path):
        pytest.skip("uv is installed among the system's own programs")
    outcome = shell.run(DEMO, PATH=path, **SLURM_JOB)
    assert outcome.exit_code == 1
    assert outcome.requeued == []
    assert "pip install uv" in outcome.text


def test_each_attempt_has_its_own_name_and_leaves_no_file(shell: Shell) -> None:
    folder = shell.folder / "runs" / ".attempts"
    folder.mkdir(parents=True)
    (folder / "4711-0-1.json").write_text("{}")  # SLURM killed the first attempt with its script
    (folder / "12-0-1.json").write_text("{}")  # another job, perhaps alive
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, SLURM_RESTART_COUNT="3", **SLURM_JOB)
    assert re.fullmatch(r"4711-3-\d{10}", outcome.environment["VLA_ATTEMPT"])
    assert outcome.environment["VLA_STATUS_FILE"] == f"{folder}/{outcome.environment['VLA_ATTEMPT']}.json"
    assert [path.name for path in folder.iterdir()] == ["12-0-1.json"]
    assert "restart count 3" in outcome.text


# ---- what torchrun is given ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_command_line(shell: Shell, script: Path) -> None:
    outcome = shell.run(script, "--model_cfg.chunk_size", "8", "--name", "a b", FAKE_STATUS=FINISHED)
    assert outcome.exit_code == 0, outcome.text
    arguments = outcome.torchrun
    assert {"--standalone", "--nnodes=1", "--nproc_per_node=1", "--max-restarts=0"} <= set(arguments)
    assert arguments[arguments.index("src/agent/run.py") :] == [
        "src/agent/run.py",
        "--config_path",
        f"config/train/{script.stem}.yaml",
        "--model_cfg.chunk_size",
        "8",
        "--name",
        "a b",
    ]


@pytest.mark.parametrize(
    ("variables", "processes", "threads"),
    [
        ({}, 1, 16),
        ({"FAKE_GPUS": "1"}, 1, 16),
        ({"FAKE_GPUS": "4"}, 4, 4),
        ({"FAKE_GPUS": "4", "CUDA_VISIBLE_DEVICES": "2"}, 1, 16),
        ({"FAKE_GPUS": "4", "CUDA_VISIBLE_DEVICES": ""}, 1, 16),
        ({"FAKE_GPUS": "4", "CUDA_VISIBLE_DEVICES": "-1"}, 1, 16),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, 4),
        ({"CUDA_VISIBLE_DEVICES": "0, 1"}, 2, 8),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,3"}, 2, 8),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f1c,MIG-77aa"}, 2, 8),
        ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(32)))}, 32, 1),
        ({**SLURM_JOB, "SLURM_GPUS_ON_NODE": "4", "FAKE_GPUS": "8"}, 4, 4),
        ({**SLURM_JOB, "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, 8),
        ({**SLURM_JOB, "FAKE_GPUS": "8"}, 1, 16),  # a job without GPUs on a node full of other people's
        ({**SLURM_JOB, "FAKE_GPUS": "4", "FAKE_TRES": "TresPerNode=gres:gpu:4"}, 4, 4),
        ({**SLURM_JOB, "SLURM_CPUS_ON_NODE": "6", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, 3),
        ({**SLURM_JOB, "SLURM_CPUS_ON_NODE": "64", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, 8),
        ({"OMP_NUM_THREADS": "1"}, 1, 16),  # nproc would answer 1
    ],
)
def test_processes_and_threads(shell: Shell, variables: dict[str, str], processes: int, threads: int) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **variables)
    assert outcome.exit_code == 0, outcome.text
    assert f"--nproc_per_node={processes}" in outcome.torchrun
    assert outcome.environment["OMP_NUM_THREADS"] == str(threads)


def test_without_a_gpu_none_is_visible(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, FAKE_GPUS="8", **SLURM_JOB)
    assert outcome.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "one process on the CPU" in outcome.text


def test_job_that_asked_for_gpus_and_sees_none_stops(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, FAKE_TRES="TresPerNode=gres:gpu:4", **SLURM_JOB)
    assert outcome.exit_code == 1
    assert outcome.requeued == []
    assert "asked for GPUs" in outcome.text


@pytest.mark.parametrize(("variables", "address"), [({}, "localhost"), (SLURM_JOB, "node7")])
def test_master_address_and_port(shell: Shell, variables: dict[str, str], address: str) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, **variables)
    port = int(outcome.environment["MASTER_PORT"])
    assert 1024 <= port < 65536
    assert outcome.environment["MASTER_ADDR"] == address
    assert f"--rdzv_endpoint={address}:{port}" in outcome.torchrun
    assert f"MASTER_ADDR={address}, MASTER_PORT={port}" in outcome.text


def test_real_torchrun_takes_the_command_line_and_hands_the_attempt_on(shell: Shell) -> None:
    checkout = shell.folder / "checkout"
    shutil.copytree(ROOT / "slurms", checkout / "slurms")
    shutil.copy(ROOT / "set_path.sh", checkout)
    run = checkout / "src" / "agent" / "run.py"
    run.parent.mkdir(parents=True)
    run.write_text(
        "import json, os, sys\n"
        "assert os.environ['WORLD_SIZE'] == '2' and sys.argv[1:] == ['--config_path', 'config/train/pi0_demo.yaml']\n"
        "status = {'attempt': os.environ['VLA_ATTEMPT'], 'state': 'failed', 'error_kind': 'config', 'reason': 'why'}\n"
        "if os.environ['RANK'] == '0':\n"
        "    open(os.environ['VLA_STATUS_FILE'], 'w').write(json.dumps(status))\n"
        "sys.exit(2)\n"
    )
    uv = 'shift; [[ "$1" != --* ]] || shift; [[ "$1" != torchrun ]] || set -- python -m torch.distributed.run "${@:2}"'
    (shell.binaries / "uv").write_text(f'{RECORD}{uv}\nshift; exec "$REAL_PYTHON" "$@"\n')
    outcome = shell.run(checkout / "slurms" / "train_scripts" / "pi0_demo.sh", CUDA_VISIBLE_DEVICES="0,1")
    assert "fail: the configuration has to be corrected first: why" in outcome.text
    assert "torchrun left with exit code 1" in outcome.text  # and not 2, which is why the status file decides
    assert outcome.exit_code == 2


def test_restart_count_of_a_first_start(shell: Shell) -> None:
    assert "restart count 0" in shell.run(DEMO, FAKE_STATUS=FINISHED).text


# ---- where it is started ---------------------------------------------------------------------------------------


def test_plain_bash_from_anywhere(shell: Shell) -> None:
    for cwd, script in ((ROOT, "slurms/train_scripts/pi0_demo.sh"), (shell.folder, DEMO), (DEMO.parent, DEMO.name)):
        outcome = shell.run_in(cwd, script, FAKE_STATUS=FINISHED)
        assert outcome.exit_code == 0, outcome.text
        assert outcome.environment["PWD"] == str(ROOT)


def test_started_with_another_shell_or_through_cdpath(shell: Shell) -> None:
    shutil.copy(shutil.which("dash") or "/bin/sh", shell.binaries / "bash-less")
    launch = f'cd {ROOT}/slurms && exec bash-less train_scripts/pi0_demo.sh --name "a b"\n'
    (shell.folder / "launch.sh").write_text(launch)
    outcome = shell.run(shell.folder / "launch.sh", FAKE_STATUS=FINISHED, CDPATH=f".:{ROOT}")
    assert outcome.exit_code == 0, outcome.text
    assert outcome.environment["PWD"] == str(ROOT)
    assert outcome.torchrun[-2:] == ["--name", "a b"]


def test_a_log_folder_that_cannot_be_made_is_named(shell: Shell) -> None:
    outcome = shell.run(DEMO, VLA_LOG_DIR="/proc/runs")
    assert outcome.exit_code == 2
    assert "VLA_LOG_DIR=/proc/runs" in outcome.text and "set_path.sh" in outcome.text


def test_copy_in_the_spool_finds_the_repository(shell: Shell) -> None:
    spool = shell.folder / "spool" / "job4711"
    spool.mkdir(parents=True)
    copy = spool / "slurm_script"
    shutil.copy(DEMO, copy)
    outcome = shell.run_in(shell.folder, copy, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.exit_code == 0, outcome.text
    assert outcome.environment["PWD"] == str(ROOT)

    elsewhere = shell.run_in(shell.folder, copy, **{**SLURM_JOB, "SLURM_SUBMIT_DIR": str(shell.folder)})
    assert elsewhere.exit_code == 2
    assert "cd REPOSITORY && sbatch slurms/train_scripts/pi0_demo.sh" in elsewhere.text

    chdir = shell.run(copy, FAKE_STATUS=FINISHED, **{**SLURM_JOB, "SLURM_SUBMIT_DIR": str(shell.folder)})
    assert chdir.exit_code == 0, chdir.text  # sbatch --chdir=REPOSITORY


# ---- Singularity -----------------------------------------------------------------------------------------------


def test_singularity_only_with_an_image(shell: Shell) -> None:
    outcome = shell.run(DEMO, FAKE_STATUS=FINISHED, OVERLAY_EXT3="/scratch/overlay.ext3")
    assert outcome.exit_code == 0
    assert not [call for call in outcome.calls if call[0] == "singularity"]


@pytest.mark.parametrize("overlay", ["", "/scratch/my overlay.ext3"])
def test_singularity_holds_every_command_of_the_run(shell: Shell, overlay: str) -> None:
    outcome = shell.run(
        DEMO, "--name", "a b", FAKE_STATUS=FINISHED, SINGULARITY_IMAGE="/images/cuda 12.sif", OVERLAY_EXT3=overlay
    )
    assert outcome.exit_code == 0, outcome.text
    calls = [call for call in outcome.calls if call[0] == "singularity"]
    expected = ["exec", "--nv", *(["--overlay", f"{overlay}:ro"] if overlay else []), "/images/cuda 12.sif"]
    assert len(calls) == len([call for call in outcome.calls if call[0] == "uv"]) == 3
    for call in calls:
        assert call[1 : 1 + len(expected)] == expected
    assert outcome.torchrun[-2:] == ["--name", "a b"]


# ---- set_path.sh -----------------------------------------------------------------------------------------------

VARIABLES = (
    "VLA_DATA_DIR",
    "VLA_LOG_DIR",
    "VLA_WANDB_ENTITY",
    "HF_HOME",
    "TRANSFORMERS_CACHE",
    "UV_CACHE_DIR",
    "UV_PYTHON_INSTALL_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "OVERLAY_EXT3",
    "SINGULARITY_IMAGE",
)


def paths(**variables: str) -> dict[str, str]:
    """The exported variables after sourcing set_path.sh under ``set -eu``."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/someone", **variables}
    command = ["bash", "-euc", 'source "$0" && env -0', str(ROOT / "set_path.sh")]
    output = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True).stdout
    return dict(pair.split("=", 1) for pair in output.split("\0")[:-1])


def test_set_path_defaults() -> None:
    found = paths()
    assert {name for name in VARIABLES if name not in found} == set()
    assert found["VLA_LOG_DIR"] == found["PWD"] + "/runs"
    assert found["OVERLAY_EXT3"] == found["SINGULARITY_IMAGE"] == found["VLA_WANDB_ENTITY"] == ""
    assert found["HF_HOME"] == "/home/someone/.cache/huggingface"


@pytest.mark.parametrize("name", VARIABLES)
def test_set_path_keeps_what_is_set(name: str) -> None:
    assert paths(**{name: "/some where/else"})[name] == "/some where/else"


INT_ACT = """
export VLA_DATA_DIR=
export VLA_LOG_DIR=
export VLA_WANDB_ENTITY=
export TRANSFORMERS_CACHE=
export HF_HOME=
export UV_CACHE_DIR=
export UV_PYTHON_INSTALL_DIR=
export OVERLAY_EXT3=/scratch/overlay.ext3
"""
SURVIVED = {
    "errexit": "set -euo pipefail\n{shipped}",
    "errexit-fails": "set -e\n{shipped}\nfalse\ntrue\n",
    "last-is-false": "{shipped}\n[ -d /nowhere ] && export HF_HOME=/nowhere\n",
    "returns": "{shipped}\nreturn 3\n",
    "unset-variable": "{shipped}\nexport LD_LIBRARY_PATH=/opt/lib:$LD_LIBRARY_PATH\n",
    "elsewhere": "{shipped}\ncd /\n",
    "options": "{shipped}\nset -f; shopt -s nullglob failglob nocasematch; IFS=/; trap 'exit 9' EXIT ERR\n",
    "arguments": "{shipped}\nset -- something else; repository=/nowhere root=/nowhere\n",
    "template": INT_ACT,
    "not-exported": "VLA_LOG_DIR=$HOME/logs; HF_HOME=/my/hub\n",
    "nothing": "",
}


@pytest.fixture
def checkout(shell: Shell) -> Path:
    """A repository of scripts alone, whose set_path.sh is the test's own."""
    shutil.copytree(ROOT / "slurms", shell.folder / "checkout" / "slurms")
    return shell.folder / "checkout"


@pytest.mark.parametrize("case", SURVIVED)
def test_what_a_set_path_does_to_the_shell_changes_no_script(shell: Shell, checkout: Path, case: str) -> None:
    shipped = (ROOT / "set_path.sh").read_text()
    (checkout / "set_path.sh").write_text(SURVIVED[case].replace("{shipped}", shipped))
    script = checkout / "slurms" / "train_scripts" / "pi0_demo.sh"
    written = status("failed", "config", reason="n_updates")
    ended = shell.run(script, "--name", "a b", FAKE_STATUS=written, FAKE_EXIT="1", VLA_LOG_DIR="", **SLURM_JOB)
    assert ended.exit_code == 2 and "fail: the configuration has to be corrected first" in ended.text, ended.text
    assert ended.requeued == [] and ended.torchrun[-2:] == ["--name", "a b"]
    assert "unbound variable" not in ended.text
    seen = ended.environment
    assert seen["PWD"] == str(checkout)
    assert seen["VLA_LOG_DIR"] == (f"{shell.folder}/home/logs" if case == "not-exported" else f"{checkout}/runs")
    assert "" not in [seen.get(name) for name in ("HF_HOME", "UV_CACHE_DIR", "VLA_DATA_DIR", "TRANSFORMERS_CACHE")]
    assert case != "not-exported" or seen["HF_HOME"] == "/my/hub"
    told = {"last-is-false": "last command left with exit code 1", "returns": "last command left with exit code 3"}
    told["template"] = "no container: OVERLAY_EXT3 is set, SINGULARITY_IMAGE is not"
    assert told.get(case, "") in ended.text, ended.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("exit 0\n", "set_path.sh ended the script (exit code 0), with an exit or with the error above"),
        ("set -u\necho $NOTHING\n", "set_path.sh ended the script (exit code 1), with an exit or with the error above"),
        ("if true\n", "set_path.sh cannot be read: ./set_path.sh: line"),
        (
            "export HF_HOME=/scratch\r\n",
            "set_path.sh has the line ends of Windows; write: sed -i 's/\\r$//' set_path.sh",
        ),
        (None, "set_path.sh cannot be read: bash: ./set_path.sh: No such file"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_set_path_that_no_script_survives_is_named(
    shell: Shell, checkout: Path, content: str | None, said: str, kind: str
) -> None:
    if content is not None:
        (checkout / "set_path.sh").write_text(content)
    script = checkout / "slurms" / f"{kind}_scripts" / ("pi0_demo.sh" if kind == "train" else "pi0_metaworld.sh")
    outcome = shell.run(script, FAKE_STATUS=FINISHED, **SLURM_JOB)
    assert outcome.exit_code == 2 and outcome.requeued == [], outcome.text
    (line,) = [line for line in outcome.text.splitlines() if line.startswith("set_path.sh ")]
    assert line.startswith(said) and line.endswith("; not requeued")
    assert "no repository here" not in outcome.text and not [call for call in outcome.calls if call[0] == "uv"]


# ---- the files -------------------------------------------------------------------------------------------------


def header(script: Path) -> dict[str, str | None]:
    """The #SBATCH options; every line must be one that sbatch would read, before the first command."""
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[end:] if line.startswith("#SBATCH")]
    options: dict[str, str | None] = {}
    for line in lines[:end]:
        if line.startswith("#SBATCH"):
            found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert found, line
            assert found[1] not in options, line
            options[found[1]] = found[2]
    return options


def test_one_script_per_training_config() -> None:
    assert {path.stem for path in SCRIPTS} == STEMS
    assert {path.stem for path in (ROOT / "config" / "train").glob("*.yaml")} == STEMS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_header(script: Path) -> None:
    shared: dict[str, str | None] = {
        "job-name": script.stem,
        "output": "log/slurm/train/%x.out",
        "error": "log/slurm/train/%x.err",
        "open-mode": "append",
        "nodes": "1",
        "ntasks-per-node": "1",
        "requeue": None,
        "signal": "B:USR1@60" if script.stem == "pi0_demo" else "B:USR1@300",
    }
    big: dict[str, str | None] = {
        "time": "44:00:00",
        "gres": "gpu:4",
        "constraint": '"a100|h100"',
        "cpus-per-task": "54",
        "mem": "440G",
    }
    small: dict[str, str | None] = {"time": "00:10:00", "cpus-per-task": "2", "mem": "8G"}
    own = {"pi0_demo": small, "pi0_metaworld": {"time": "02:00:00", "cpus-per-task": "2", "mem": "8G"}}
    assert header(script) == shared | own.get(script.stem, big)
    assert "\n##SBATCH --account=" in script.read_text()
    assert os.access(script, os.X_OK)


def test_what_follows_the_header_is_the_same_in_all() -> None:
    bodies = {
        re.sub(rf"\b{path.stem}\b", "NAME", path.read_text().split("##SBATCH", 1)[1].split("\n", 1)[1])
        for path in SCRIPTS
    }
    assert len(bodies) == 1


def test_log_folder_is_in_the_repository() -> None:
    # SLURM does not make the folder of --output, and the job then fails without a word.
    assert (ROOT / "log" / "slurm" / "train" / ".gitkeep").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (apt install shellcheck)")
def test_shellcheck() -> None:
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *map(str, SHELL_FILES)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
