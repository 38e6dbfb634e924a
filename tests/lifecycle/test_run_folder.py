"""The folder of a run where the file system is not what it should be.

Run: uv run pytest tests/lifecycle/test_run_folder.py      (seconds)

That a second job is refused while the first lives is tested with whole runs, in tests/training/test_training.py.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.checkpoints.store import CheckpointStore
from agent.lifecycle.disk_space import which_disk
from agent.lifecycle.run_folder import RunFolder, report_attempt, write_text
from agent.lifecycle.stopping import StopRequest
from agent.validation.record import ValidationRecords


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/status.json'"):
        write_text(tmp_path / "status.json", "{}")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk on which a file can still be made, and nothing written to it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free))
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_at_the_start_is_named(
    full_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = full_disk / "run"
    with pytest.raises(OSError, match=f"No space left on device: '{run_dir}/.lock'"):
        RunFolder(run_dir)
    monkeypatch.setenv("VLA_STATUS_FILE", str(full_disk / "script" / "status.json"))
    report_attempt("running")  # no reason to end: the launcher learns less
    assert f"VLA_STATUS_FILE): [Errno 28] No space left on device: '{full_disk}/script/status.json'" in caplog.text
    # Of a library, which does not say where it wrote: as an OSError, in the text of another, behind another.
    monkeypatch.setenv("HF_HOME", str(full_disk / "hub"))
    nameless = OSError(errno.ENOSPC, "No space left on device")
    behind = RuntimeError("the table could not be read")
    behind.__cause__ = nameless
    elsewhere = tmp_path / "runs" / "not" / "there"
    for error in (nameless, RuntimeError("exit code 1: OSError: [Errno 28] No space left on device"), behind):
        assert which_disk(error, run_dir).startswith(f"full: the run folder ({run_dir})")
        assert which_disk(error, elsewhere) == f"full: HF_HOME ({full_disk}/hub)"
    assert which_disk(OSError(errno.ENOSPC, "No space left on device", "/x"), run_dir) == ""
    assert which_disk(OSError(errno.EACCES, "Permission denied"), run_dir) == ""
    monkeypatch.delenv("HF_HOME")
    quota = which_disk(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), elsewhere)
    assert quota.startswith(f"free is now: the run folder ({elsewhere}) ") and quota.endswith(
        "a quota does not show here"
    )


def test_a_folder_that_is_moved_under_a_run_is_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "script.json"
    monkeypatch.setenv("VLA_STATUS_FILE", str(script))
    path, elsewhere = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    folder = RunFolder(path)
    folder.begin_attempt()
    store = CheckpointStore(path, 2, require_place=folder.require_in_place)
    store.begin(1)
    store.abandon(1)
    path.rename(elsewhere)
    with pytest.raises(OSError, match=f"the run folder was moved to {elsewhere} while the run goes on; .*: '{path}'"):
        store.begin(2)
    with pytest.raises(OSError, match="No such file"):
        ValidationRecords(path).write({"step": 2})
    folder.update("running", 2)
    assert not path.exists() and "it stays at its last state: [Errno 2] the run folder was moved to" in caplog.text
    assert json.loads((elsewhere / "status.json").read_text())["step"] == 0
    assert json.loads(script.read_text())["step"] == 2  # the launcher is told all the same
    # Another run that begins there meanwhile is left alone.
    other = RunFolder(path)
    with pytest.raises(OSError, match="the run folder was moved to"):
        store.begin(3)
    folder.update("running", 3)
    assert not (path / "status.json").exists() and not (path / "checkpoints").exists()
    other.close()
    shutil.rmtree(path)
    # And once it is back the run goes on in it.
    elsewhere.rename(path)
    folder.update("running", 4)
    assert json.loads((path / "status.json").read_text())["step"] == 4 and folder.moved() is None
    store.begin(4)
    shutil.rmtree(path)
    assert str(folder.moved()).startswith("the run folder was removed while the run goes on")
    folder.close()


def test_the_holder_of_the_lock_is_named_and_its_death_frees_it(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys\nfrom agent.lifecycle.run_folder import RunFolder\n"
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
