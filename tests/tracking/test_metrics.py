"""What a run reports: metrics.jsonl and wandb across restarts, text lines and the progress bar.

Run: pytest tests/tracking/test_metrics.py   (about fifteen seconds: wandb's own processes)
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.launching import with_support
from support.records import offline_records, record, wandb_process

from agent.tracking import progress
from agent.tracking.jsonl import JsonLines
from agent.tracking.metrics import Metrics
from agent.tracking.wandb_sink import WandbConfig


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ── metrics.jsonl ───────────────────────────────────────────────────────────────────────────────────────────────


def write_lines(path: Path, after: int, steps: range, attempt: int = 1) -> list[dict]:
    sink = JsonLines(path)
    kept = sink.rewind(after)
    for step in steps:
        sink.write(record(step, attempt))
    sink.close()
    return kept


def test_a_first_start_makes_the_file(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    assert write_lines(path, 0, range(1, 4)) == []
    assert lines(path) == [record(1), record(2), record(3)]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.rewind(0)
    sink.write(record(1))
    assert lines(sink.path) == [record(1)]
    sink.close()


def test_a_rewind_drops_what_comes_later_and_returns_what_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, 0, range(1, 11))
    kept = write_lines(path, 6, range(7, 13), attempt=2)
    assert kept == [record(step) for step in range(1, 7)]
    assert lines(path) == kept + [record(step, 2) for step in range(7, 13)]
    assert write_lines(path, 0, range(1, 2), attempt=3) == []
    assert lines(path) == [record(1, 3)]


@pytest.mark.parametrize(
    "torn", ['{"step": 5, "loss": 0.', '{"step": 5, "loss": 0.2', "{", "\0" * 40, '\n{"step"'], ids=repr
)
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, 0, range(1, 5))
    with open(path, "a") as stream:
        stream.write(torn)
    write_lines(path, 5, range(6, 8), attempt=2)
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 6, 7]


def test_a_whole_last_line_without_its_newline_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, 0, range(1, 5))
    path.write_text(path.read_text().rstrip("\n"))
    write_lines(path, 4, range(5, 7))
    assert lines(path) == [record(step) for step in range(1, 7)]


def test_many_restarts_leave_every_step_once(tmp_path):
    path, at = tmp_path / "metrics.jsonl", 0
    for attempt, (start, stop) in enumerate([(0, 4), (2, 9), (6, 7), (6, 11), (11, 13)]):
        write_lines(path, start, range(start + 1, stop + 1), attempt)
        with open(path, "a") as stream:
            stream.write('{"step": 99')  # killed in the middle of a line
        at = stop
    write_lines(path, at, range(0))
    assert [(line["step"], line["attempt"]) for line in lines(path)] == [
        *((step, 0) for step in (1, 2)),
        *((step, 1) for step in range(3, 7)),
        *((step, 3) for step in range(7, 12)),
        *((step, 4) for step in (12, 13)),
    ]


# ── wandb ───────────────────────────────────────────────────────────────────────────────────────────────────────

START = """
import json, os, signal, sys, time
from pathlib import Path
from agent.tracking.console import setup_logging
from agent.tracking.metrics import Metrics
from agent.tracking.wandb_sink import WandbConfig
run_dir, after, first, last, attempt, end = Path(sys.argv[1]), *map(int, sys.argv[2:6]), sys.argv[6]
setup_logging(0, debug=False)
metrics = Metrics(run_dir, 12)
print(metrics.open(after, WandbConfig(mode="offline", project="a project"), run_dir, "a run"), flush=True)
for step in range(first, last + 1):
    metrics.write({"step": step, "loss": 1 / step, "attempt": attempt, "eta_s": 0.0})
    while end == "disturbed" and step == last - 2 and not (run_dir / "disturbed").exists():
        time.sleep(0.02)
if end == "killed":
    while not list((run_dir / "wandb").glob("offline-run-*")):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
begin = time.monotonic()
metrics.end()
metrics.close(float(sys.argv[7]))
print(f"closed within {time.monotonic() - begin:.0f} s")
"""


def begin(run_dir: Path, after: int, steps: range, attempt: int, end: str, patience: int = 120, **more: str) -> Any:
    """One start of a run in a process of its own."""
    arguments = [str(run_dir), str(after), str(steps[0]), str(steps[-1]), str(attempt), end, str(patience)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | more
    command = [sys.executable, "-c", START, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start(run_dir: Path, after: int, steps: range, attempt: int, end: str, **more: str) -> str:
    """One start of a run to its end; returns the wandb id."""
    process = begin(run_dir, after, steps, attempt, end, **more)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == (-signal.SIGKILL if end == "killed" else 0), said
    return said.splitlines()[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_wandbs_process_ends_or_hangs_and_the_run_goes_on_and_is_whole(tmp_path: Path, number: signal.Signals) -> None:
    hangs = number == signal.SIGSTOP
    process = begin(tmp_path, 0, range(1, 7), 1, "disturbed", patience=1 if hangs else 120)
    service = wandb_process(tmp_path)
    try:
        service.send_signal(number)
        (tmp_path / "disturbed").touch()
        said = process.communicate(timeout=240)[0]
    finally:
        if hangs:
            service.kill()
    assert process.returncode == 0 and [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, 7))
    if hangs:
        assert "wandb does not have the whole run" in said and f"python -m agent.sync_wandb {tmp_path}" in said
        start(tmp_path, 6, range(7, 9), 2, "closed")
    else:
        assert said.count("training goes on, and it is tried again") == 1, said
    newest, *others = tmp_path.glob("wandb/offline-run-*")
    assert not others and len(list(tmp_path.glob("wandb/superseded/*"))) == 1
    steps = [entry["_step"] for entry in offline_records(newest)[1]]
    assert steps == list(range(1, 9 if hangs else 7))


@pytest.mark.parametrize(
    ("end", "more"),
    [("closed", {}), ("killed", {}), ("killed", {"WANDB_MODE": "dryrun"})],
    ids=lambda value: str(value),
)
def test_the_newest_offline_folder_alone_holds_the_whole_run(tmp_path, end, more):
    first = start(tmp_path, 0, range(1, 11), attempt=1, end=end, **more)
    # wandb's process of a killed run may still be at work; that of the second waits for it.
    second = start(tmp_path, 6, range(7, 13), attempt=2, end="closed", **more)
    assert first == second and len(first) >= 8

    (newest,) = (tmp_path / "wandb").glob("offline-run-*")
    (superseded,) = (tmp_path / "wandb" / "superseded").iterdir()
    assert superseded.name.endswith(first)
    run_id, history = offline_records(newest)
    assert run_id == first and newest.name.endswith(first)
    assert [entry["_step"] for entry in history] == list(range(1, 13))
    assert [entry["attempt"] for entry in history] == [1] * 6 + [2] * 6
    assert [entry["loss"] for entry in history] == [1 / step for step in range(1, 13)]
    steps = [(line["step"], line["attempt"]) for line in lines(tmp_path / "metrics.jsonl")]
    assert steps == [(entry["_step"], entry["attempt"]) for entry in history]


def test_the_validation_of_the_starting_weights_is_there_after_every_start(tmp_path: Path) -> None:
    folder = tmp_path / "validation"
    folder.mkdir()
    baselines = {"last": {"action_l1": 0.2}, "mean": {"action_l1": 0.3}, "start": None}
    record = {"format": 1, "step": 0, "loss": None, "action_l1": 0.5, "acc": {"0.1": 0.25}, "baselines": baselines}
    (folder / "step_00000000.json").write_text(json.dumps(record))
    for step in (0, 2):
        Image.new("RGB", (8, 4)).save(folder / f"step_{step:08d}.png")
    for after, attempt in ((0, 1), (2, 2)):
        start(tmp_path, after, range(after + 1, 4), attempt, end="closed")
        (newest,) = (tmp_path / "wandb").glob("offline-run-*")
        _, (first, *others) = offline_records(newest)
        shown = {key: value for key, value in first.items() if key.startswith("val/") and "chunks" not in key}
        assert shown == {
            "val/action_l1": 0.5, "val/acc_0.1": 0.25, "val/baseline_last_l1": 0.2, "val/baseline_mean_l1": 0.3,
        }  # fmt: skip
        assert [entry["_step"] for entry in (first, *others)] == [0, 1, 2, 3]
        assert [entry["_step"] for entry in (first, *others) if "val/chunks.path" in entry] == [0, 2]


def test_restarts_within_a_second_set_every_folder_aside(tmp_path):
    from agent.tracking.wandb_sink import Wandb

    name = "offline-run-20260101_120000-abc"
    for content in ("first", "second", "third"):
        folder = tmp_path / "wandb" / name
        folder.mkdir(parents=True)
        (folder / "run-abc.wandb").write_text(content)
        Wandb._set_aside_offline(tmp_path)
    aside = sorted((tmp_path / "wandb" / "superseded").glob("*/*.wandb"))
    assert sorted(path.read_text() for path in aside) == ["first", "second", "third"]
    assert not list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_online_without_a_key_is_refused_at_once(no_key):
    with pytest.raises(ValueError) as caught:
        WandbConfig().check()
    for hint in ("no wandb key for api.wandb.ai", "wandb login", "WANDB_API_KEY", "offline", "use_wandb: false"):
        assert hint in str(caught.value)


def test_online_with_a_key_offline_and_disabled_are_fine(no_key, tmp_path, monkeypatch):
    WandbConfig(mode="offline").check()
    WandbConfig(mode="disabled").check()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    WandbConfig().check()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    with pytest.raises(ValueError, match="no wandb key for wandb.example.org"):
        WandbConfig().check()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    WandbConfig().check()


def test_the_environment_can_turn_it_on_and_must_say_a_mode(no_key, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match="WANDB_MODE is online but there is no wandb key"):
        WandbConfig(mode="offline").check()
    for mode in ("", "OFFLINE", "off"):  # a run would end at its first line
        monkeypatch.setenv("WANDB_MODE", mode)
        with pytest.raises(ValueError, match=f"WANDB_MODE is '{mode}': export WANDB_MODE=offline, online or disabled"):
            WandbConfig().check()


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun"])
def test_the_environment_can_turn_online_off(no_key, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    WandbConfig().check()


def test_a_key_in_the_netrc_of_the_home_folder_counts(no_key, tmp_path, monkeypatch):
    monkeypatch.delenv("NETRC")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    (tmp_path / ".netrc").chmod(0o600)
    WandbConfig().check()


def test_a_broken_netrc_is_no_key(no_key, tmp_path):
    (tmp_path / "netrc").write_text("machine")
    with pytest.raises(ValueError, match="no wandb key"):
        WandbConfig().check()


def test_without_wandb_there_is_no_id_and_no_folder(tmp_path, monkeypatch):
    for config, mode in ((None, None), (WandbConfig(mode="disabled"), None), (WandbConfig(), "disabled")):
        if mode is not None:
            monkeypatch.setenv("WANDB_MODE", mode)
        metrics = Metrics(tmp_path, 10)
        assert metrics.open(0, config, tmp_path, "name") is None
        metrics.end()
        metrics.close(0)
    assert not (tmp_path / "wandb").exists()


# ── what the user sees ──────────────────────────────────────────────────────────────────────────────────────────

SHOW = """
import logging, sys
from pathlib import Path
from agent.tracking.console import setup_logging
from agent.tracking.metrics import Metrics
from agent.tracking.progress import followed
from support.launching import with_support
from support.records import record
setup_logging(0, debug=False)
run_dir = Path(sys.argv[1])
metrics = Metrics(run_dir, 12)
(run_dir / "metrics.jsonl").write_text('{"step": 6}')
metrics.open(6, None, run_dir, "name")
for step in (7, 8):
    metrics.advance(step)
metrics.write(record(8))
for item in followed([1, 2], "a long step", 2, "thing"):
    logging.getLogger("x").info("a word %s", "in between") if item == 1 else None
metrics.advance(12)
metrics.write(record(12, **{"val/loss": 0.25, "val/acc_0.1": 0.75}))
metrics.end()
"""


def command(run_dir: Path) -> list[str]:
    return [sys.executable, "-c", SHOW, str(run_dir)]


def test_a_file_gets_plain_lines(tmp_path):
    with open(tmp_path / "job.out", "w") as stdout, open(tmp_path / "job.err", "w") as stderr:
        subprocess.run(command(tmp_path), env=with_support(), stdout=stdout, stderr=stderr, check=True, timeout=120)
    said = (tmp_path / "job.out").read_text()
    assert (tmp_path / "job.err").read_text() == "" and "\r" not in said and "\x1b" not in said
    first, _, second = said.splitlines()
    shown = "  lr 0.0001  grad 0.5  samples/s 8  wait 0.125  "
    assert first.endswith(f" I update 8/12  loss 0.125{shown}eta 1:02:05")
    assert second.endswith(f" I update 12/12  loss 0.08333{shown}val/loss 0.25  val/acc_0.1 0.75  eta 1:02:05")


def on_terminal(arguments: list[str]) -> str:
    """What a program shows on a terminal of 200 columns."""
    import fcntl
    import struct
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = subprocess.Popen(arguments, env=with_support(), close_fds=True, **streams)
    os.close(terminal)
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline and select.select([controller], [], [], 120)[0]:
        try:
            part = os.read(controller, 4096)
        except OSError:  # Linux says so when the last process has left the terminal
            break
        if not part:
            break
        shown += part
    os.close(controller)
    assert process.wait(timeout=60) == 0, shown.decode()
    return shown.decode()


def test_a_terminal_gets_a_bar_below_the_lines(tmp_path):
    shown = on_terminal(command(tmp_path))
    # What stands on each line of the terminal at the end; a bar is drawn over what was there.
    shown = shown.replace("\x1b[A", "")  # up to the upper of two bars
    rows = [row.rstrip("\r").split("\r")[-1].strip() for row in shown.split("\n")]
    logged = [row for row in rows if " I " in row]
    assert [re.sub(r"^[\d:]+ I (update \d+/12|a word).*", r"\1", row) for row in logged] == [
        "update 8/12", "a word", "update 12/12",
    ], shown  # fmt: skip
    bars = [part.strip() for part in re.split(r"[\r\n]", shown) if part.strip().startswith("training:")]
    assert " 6/12 [" in bars[0] and any(" 7/12 [" in frame or " 8/12 [" in frame for frame in bars)
    assert bars[-1].startswith("training: 100%") and " 12/12 [" in bars[-1] and "update/s]" in bars[-1]
    assert any(frame.startswith("a long step:") for frame in re.split(r"[\r\n]", shown))
    assert not any("training:" in row or "a long step" in row for row in logged)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [6, 8, 12]


def test_a_long_step_without_a_terminal_says_now_and_then_how_far_it_is(monkeypatch, caplog):
    times = iter(range(0, 10000, 4))  # an item takes four seconds
    monkeypatch.setattr(time, "monotonic", lambda: float(next(times)))
    caplog.set_level("INFO")
    assert list(progress.followed(iter("abcdefghijklmnopqrstuvwxyz"), "validation", 26, "batch")) == list(
        "abcdefghijklmnopqrstuvwxyz"
    )
    assert [record.getMessage() for record in caplog.records] == [
        "validation: batch 2 of 26, about 0:01:36 left",
        "validation: batch 17 of 26, about 0:00:36 left",
    ]
    caplog.clear()
    assert list(progress.followed([1, 2, 3], "validation", 3, "batch", speaks=False)) == [1, 2, 3]
    assert list(progress.followed([1], "short", 1, "batch")) == [1] and not caplog.records


def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.rewind(0)
    lines.write({"step": 1})
    disk, lines._handle = lines._handle, os.open("/dev/full", os.O_WRONLY)
    lines.write({"step": 2})
    lines.write({"step": 3})
    assert caplog.text.count("No space left on device") == 1
    lines._handle = disk
    lines.write({"step": 4})
    lines.close()
    written = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [1, 2, 3, 4]


@pytest.mark.parametrize("end", ["sync", "close"])
def test_lines_that_waited_for_room_are_written_before_a_checkpoint_and_at_the_end(tmp_path: Path, end: str) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.rewind(0)
    disk, lines._handle = lines._handle, os.open("/dev/full", os.O_WRONLY)
    lines.write({"step": 1})
    lines._handle = disk
    getattr(lines, end)()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
