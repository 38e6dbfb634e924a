"""The requeue decision: what follows from an attempt's status and from those before it.

Run: uv run pytest tests/system/test_requeue.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.slurm_shell import CRASH, FAILURE, STOP, attempt

from agent.requeue import decide, main, read_status


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
