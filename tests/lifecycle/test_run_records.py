"""What a run tells of itself, damaged: nothing stops, nothing is lost unsaid, nothing decides that should not.

Run: uv run pytest tests/lifecycle/test_run_records.py      (a second)
"""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import RunFolderSpec, write_run

from agent.deployment.model_card import last_validation
from agent.lifecycle.records import follow_metrics, read_metrics, read_status
from agent.lifecycle.run_folder import RunFolder, report_failure
from agent.tracking.jsonl import JsonLines
from agent.validation.record import ValidationRecords


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 0.5, "samples_seen": 4 * step, **more}


def write_lines(path: Path, *lines: Any) -> None:
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines))


def steps_in(path: Path) -> list[int]:
    return [json.loads(one)["step"] for one in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        ('{"stdp": 3, "loss": 0.5}', "line 3 has no 'step'"),
        ('{"step": 3 "loss": 0.5}', "line 3 is not JSON"),
        ('{"step": "3"}', "line 3 has the step '3'"),
        ('{"step": 3.5}', "line 3 has the step 3.5"),
        ("[3]", "line 3 is not a JSON object"),
        ("\x00" * 30, "line 3 is not JSON"),
        (line(3) | {"step": 2}, "line 3 tells of update 2, out of order behind 2"),
        (line(3) | {"step": 7}, "line 3 tells of update 7, out of order behind 2"),
        (line(3) | {"step": 4}, "line 3 tells of update 4, out of order behind 2"),
        (line(3) | {"step": 3000003}, "line 3 tells of update 3000003, out of order behind 2"),
    ],
)
def test_a_damaged_line_is_set_aside_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: Any, problem: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, line(1), line(2), damaged, line(4, good=True), line(5), line(6), line(7), line(8))
    lines = JsonLines(path)
    assert lines.has(4) and not lines.has(3)
    assert [one["step"] for one in lines.rewind(6, 1)] == [1, 2, 4, 5, 6]
    lines.write(line(7))
    lines.close()
    assert steps_in(path) == [1, 2, 4, 5, 6, 7] and json.loads(path.read_text().splitlines()[2])["good"]
    aside = (tmp_path / "metrics.jsonl.damaged").read_text()
    assert aside == (damaged if isinstance(damaged, str) else json.dumps(damaged)) + "\n"
    assert caplog.text.count("metrics.jsonl is damaged") == 1 and problem in caplog.text
    caplog.clear()
    again = JsonLines(path)
    again.rewind(7, 1)
    again.close()
    assert caplog.text == "" and (tmp_path / "metrics.jsonl.damaged").read_text() == aside


def test_any_flipped_bit_costs_at_most_two_lines(tmp_path: Path) -> None:
    path, draw = tmp_path / "metrics.jsonl", random.Random(11)
    write_lines(path, *map(line, range(1, 31)))
    sound = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(sound)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found = read_metrics(path)
        steps = [one["step"] for one in found.records]
        assert len(steps) >= 28 and steps == sorted(set(steps)) and set(steps) <= set(range(1, 31)) | {max(steps)}
        assert len(steps) + len(found.damaged) + (found.torn is not None) >= 29


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is not there, but the run continues after update 8"), ("", "ends at update 0"), ("short", "at update 2")],
)
def test_lines_that_are_not_there_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None, said: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        write_lines(path, *([line(1), line(2)] if content else []))
    lines = JsonLines(path)
    lines.rewind(8, 2)
    lines.close()
    assert said in caplog.text and "training loses nothing" in caplog.text


def test_nothing_is_said_where_nothing_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, contents in ((0, None), (1, ""), (9, [line(4), line(8)]), (8, [line(4), line(8), line(12)])):
        if contents is not None:
            write_lines(path, *contents)
        lines = JsonLines(path)
        lines.rewind(step, 4)
        lines.close()
    assert caplog.text == ""


def test_a_model_card_is_written_from_what_is_sound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, line(1), line(2) | {"val/loss": 0.25}, '{"stdp": 3, "val/loss": 9}', line(4) | {"val/loss": 1})
    assert last_validation(path, 3)["val/loss"] == 0.25
    assert "line 3 has no 'step'" in caplog.text


ATTEMPT = {
    "attempt": "a",
    "started": 100.0,
    "updated": 150.0,
    "ended": 150.0,
    "state": "preempted",
    "reason": "SIGTERM",
}
STATUS = {"state": "preempted", "step": 6, "restarts": 1, "attempts": [ATTEMPT, {**ATTEMPT, "started": 200.0}]}


@pytest.mark.parametrize(
    ("old", "new", "left", "problem"),
    [
        ('"started": 100', '"rtarted": 100', 1, "attempt 1: it has no 'started'"),
        ('"started": 100.0', '"started": null', 1, "attempt 1: started is None"),
        ('"attempts": [', '"attempts": 3, "x": [', 0, "attempts is 3"),
        ('"attempts": [', '"auuempts": [', 0, ""),
        ('"step": 6', '"step": "6"', 2, "step is '6'"),
        ('"step": 6', '"step" 6', 0, "it is not JSON"),
        ('"ended": 150.0, "state"', '"ended": 1e400, "state"', 1, "ended is inf"),
    ],
)
def test_a_damaged_status_keeps_what_is_sound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old: str, new: str, left: int, problem: str
) -> None:
    path = tmp_path / "status.json"
    damaged = json.dumps(STATUS).replace(old, new, 1)
    assert damaged != json.dumps(STATUS)
    path.write_text(damaged)
    folder = RunFolder(tmp_path)
    folder.begin_attempt()
    folder.update("finished", 8)
    folder.close()
    status = json.loads(path.read_text())
    assert (status["state"], status["step"], len(status["attempts"])) == ("finished", 8, left + 1)
    assert read_status(path)[1] == []
    if problem:
        assert (tmp_path / "status.json.damaged").read_text() == damaged
        assert problem in caplog.text and caplog.text.count("status.json is damaged") == 1


def test_a_status_that_is_damaged_while_the_run_goes_on_is_mended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin_attempt()
    for content in ("{", '{"attempts": [{"started": "x"}]}', "[]"):
        (tmp_path / "status.json").write_text(content)
        folder.update("running", 5)
        assert json.loads((tmp_path / "status.json").read_text())["step"] == 5
    (tmp_path / "status.json").write_text("{")
    assert report_failure(tmp_path, 1, "no such kernel", "runtime", patience_s=0)
    folder.close()
    kept = sorted(tmp_path.glob("status.json.damaged*"))
    assert [path.read_text() for path in kept] == ["{", '{"attempts": [{"started": "x"}]}', "[]", "{"]


@pytest.mark.parametrize("end", ["", "\n", '\n{"step": 3, "lo', '\n{"step": 3}', '\n{"step": 3, "loss": nul\n'])
def test_who_follows_a_run_reads_what_others_read_afterwards(tmp_path: Path, end: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, line(1))
    written = iter([json.dumps(line(2))[:9], json.dumps(line(2))[9:] + end])

    def ended(_: float) -> bool:
        new = next(written, None)
        with open(path, "a") as stream:
            stream.write(new or "")
        return new is None

    assert list(follow_metrics(path, ended)) == read_metrics(path).records
    assert [record["step"] for record in read_metrics(path).records][:2] == [1, 2]


def test_a_rank_that_fails_leaves_the_word_to_rank_0(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin_attempt()
    slow = threading.Timer(0.3, lambda: folder.update("failed", 5, "no memory", "runtime"))
    slow.start()
    begin = time.monotonic()
    assert not report_failure(tmp_path, 1, "no memory", "runtime", patience_s=60)
    assert 0.2 < time.monotonic() - begin < 30  # no longer than it takes
    slow.join()
    folder.close()
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "no memory"


def test_what_one_rank_alone_knows_is_told_once_and_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin_attempt()
    told = [report_failure(tmp_path, rank, "no such kernel", "runtime", patience_s=0.1) for rank in (1, 2)]
    folder.update("failed", 5, "Connection closed by peer", "runtime")  # rank 0 waited for rank 1
    folder.close()
    assert told == [True, False]
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "rank 1: no such kernel"


def test_the_validations_that_choose_the_best_are_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records, errors = ValidationRecords(tmp_path), {10: 0.5, 20: 0.3, 30: 0.4}
    sample = write_run(tmp_path / "sample", RunFolderSpec()) / "validation" / "step_00000040.json"
    for step, error in errors.items():
        records.write(json.loads(sample.read_text()) | {"step": step, "action_l1": error, "validation_set": "a"})
    assert records.best(errors) == 20
    sound = records.path(10).read_text()
    flipped = sound.replace('"action_l1":0.5', '"action_l1":0.1')  # would be the best
    assert flipped != sound
    records.path(10).write_text(flipped)
    assert records.best(errors) == records.best(errors) == 20
    assert caplog.text.count("update 10 counts as not validated: its checksum is another one") == 1
    records.path(30).write_text(records.path(30).read_text().replace('"action_l1":0.4', '"acuion_l1":0.4'))
    records.rewind(20)
    assert sorted(path.name for path in records.folder.iterdir()) == [
        "step_00000010.json.damaged",
        "step_00000020.json",
    ]
    assert records.path(10).with_name("step_00000010.json.damaged").read_text() == flipped


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": 11}, "its step is 11"),
        ({"action_l1": "0.5"}, "its action_l1 is '0.5'"),
        ({"baselines": []}, "its baselines is []"),
        ({"datasets": 3}, "its datasets is 3"),
        ({"acc": {"0.1": "x"}}, "its acc 0.1 is 'x'"),
        ({"format": 2}, "its format is 2"),
        ("action_l1", "it has no 'action_l1'"),
        ("validation_set", ""),
    ],
)
def test_a_record_without_a_checksum_is_checked_by_its_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, problem: str
) -> None:
    sample = write_run(tmp_path / "run", RunFolderSpec()) / "validation" / "step_00000040.json"
    contents = json.loads(sample.read_text()) | {"step": 10, "validation_set": "a"}
    contents = {k: v for k, v in contents.items() if k != change} if isinstance(change, str) else contents | change
    records = ValidationRecords(tmp_path)
    records.folder.mkdir()
    records.path(10).write_text(json.dumps(contents))
    assert records.best([10]) == (None if problem else 10)
    assert problem in caplog.text
