"""The folder of a run where the file system is not what it should be.

Run: uv run pytest tests/test_run_folder.py      (seconds)

That a second job is refused while the first lives is tested with whole runs, in tests/test_training.py.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from agent.distributed import StopRequest
from agent.run_folder import RunFolder, report_attempt, write_atomically


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/status.json'"):
        write_atomically(tmp_path / "status.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_the_holder_of_the_lock_is_named_and_its_death_frees_it(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys\nfrom agent.run_folder import RunFolder\n"
        "folder = RunFolder(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ninput()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by host .*, process {process.pid}, since .*--name"):
            RunFolder(tmp_path)
    finally:
        process.kill()
        process.communicate()
    RunFolder(tmp_path).close()


def test_a_file_system_without_locks_is_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    folder = RunFolder(tmp_path)
    assert "cannot be locked" in caplog.text and "Function not implemented" in caplog.text
    folder.begin_attempt()
    folder.close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"starts": 3'])
def test_a_damaged_status_is_said_and_replaced(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "status.json").write_text(content)
    folder = RunFolder(tmp_path)
    assert "status.json is damaged" in caplog.text
    folder.begin_attempt()
    folder.update("finished", 7)
    folder.close()
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 7


def test_a_status_that_cannot_be_read_for_a_moment_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    folder.begin_attempt()

    def stale(*arguments: Any, **keywords: Any) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", stale)
        folder.update("running", 5)
    assert "status.json cannot be read" in caplog.text and "Stale file handle" in caplog.text
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 5
    folder.close()


def test_starts_are_counted_over_restarts(tmp_path: Path) -> None:
    for restarts in range(3):
        folder = RunFolder(tmp_path)
        folder.begin_attempt()
        folder.note(first_step=max(restarts - 1, 0) * 10, busy_s=1.0)
        folder.update("preempted", restarts * 10, reason="received SIGTERM")
        folder.close()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["restarts"], status["step"], status["state"]) == (2, 20, "preempted")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "status.json"]


def test_a_start_refused_for_its_config_is_no_restart(tmp_path: Path) -> None:
    for state, kind in (("preempted", None), ("failed", "config"), ("failed", "config"), ("finished", None)):
        folder = RunFolder(tmp_path)
        folder.begin_attempt()
        folder.update(state, 10, error_kind=kind)  # type: ignore[arg-type]
        folder.close()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["restarts"], len(status["attempts"])) == (1, 4)


def test_the_outcome_carries_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_attempt("failed", reason="nobody asked")  # no variable, no file
    target = tmp_path / "new" / "status.json"
    monkeypatch.setenv("VLA_STATUS_FILE", str(target))
    monkeypatch.setenv("VLA_ATTEMPT", "42.1")
    folder = RunFolder(tmp_path / "run")
    folder.begin_attempt()
    folder.update("failed", 3, "out of memory", "runtime")
    folder.close()
    written = json.loads(target.read_text())
    assert (written["attempt"], written["state"], written["error_kind"]) == ("42.1", "failed", "runtime")
    assert (written["reason"], written["step"], written["run_dir"]) == ("out of memory", 3, str(tmp_path / "run"))


def test_the_reason_in_a_stop_file_is_read_once_it_is_written(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.watch_files(tmp_path)
    assert not stop.pending()
    with open(tmp_path / "stop", "w") as file:
        writer = threading.Timer(0.05, lambda: (file.write("another world size"), file.flush()))
        writer.start()
        assert stop.pending()
        writer.join()
    assert stop.reason == "another world size"


def test_a_stop_file_that_cannot_be_read_stops_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()
    stop.watch_files(tmp_path)
    (tmp_path / "stop").write_text("of a colleague, mode 600")

    def forbidden(*arguments: Any, **keywords: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", forbidden)
    assert stop.pending() and stop.reason == f"asked to by the file {tmp_path / 'stop'}"


def test_a_folder_that_does_not_answer_for_a_moment_is_no_request_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, stat = StopRequest(), os.stat
    stop.watch_files(tmp_path)

    def stale(path: Any, *arguments: Any, **keywords: Any) -> os.stat_result:
        if Path(path).name == "stop":
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, *arguments, **keywords)

    monkeypatch.setattr(os, "stat", stale)
    assert not stop.pending()
