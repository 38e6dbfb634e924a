"""The report of a run: what it reads, draws and says, also of folders that lack something or hold hostile text.

Run: uv run pytest tests/reporting/test_report.py
What the page looks like in Chromium is tested in tests/reporting/test_report_browser.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.forked import ForkServer
from support.launching import Workplace
from support.run_folders import RunFolderSpec, attempt, write_run

from agent.report import main
from agent.reporting.axes import linear_ticks, log_ticks, text_width, tick_text
from agent.reporting.charts import SMALL, Frame, Line, dot_chart, line_chart
from agent.reporting.markup import duration, number
from agent.reporting.sampling import columns_of
from agent.safe_files import lock

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & \'"`'


class Page(HTMLParser):
    """Tags, attributes and text of a page, section by section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"": []}
        self.rows: list[list[str]] = []
        self._section, self._in_cell = "", False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.texts[self._section] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._section = ""
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.texts[self._section].append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    def text(self, section: str | None = None) -> str:
        """All text, or that of one section."""
        return " ".join("".join(parts) for name, parts in self.texts.items() if section in (None, name))

    def row(self, name: str) -> list[str]:
        """The cells of the first row that is called so."""
        return next(row for row in self.rows if row and row[0] == name)[1:]

    def charts(self) -> list[ElementTree.Element]:
        """Every drawing, the small ones and those of legends included."""
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg viewBox=.*?</svg>", self.source, re.DOTALL)]


def report(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = write_run(
        tmp_path_factory.mktemp("one") / "first", RunFolderSpec(ema=True, config={"flow_samples_per_observation": 4})
    )
    assert report(run) == 0
    return Page(run / "report.html")


# ---------------------------------------------------------------- axes, ticks, curves


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0, 1, 6, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1, 5, [0, 0.5, 1]),
        (-3, 7, 6, [-2, 0, 2, 4, 6]),
        (10, 300, 6, [50, 100, 150, 200, 250, 300]),
        (0, 2.5e-5, 6, [0, 5e-6, 1e-5, 1.5e-5, 2e-5, 2.5e-5]),
        (1000.1, 1000.4, 4, [1000.1, 1000.2, 1000.3, 1000.4]),
    ],
)
def test_linear_ticks(low: float, high: float, most: int, ticks: list[float]) -> None:
    assert linear_ticks(low, high, most) == ticks


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0.1, 10, 8, [0.1, 0.2, 0.5, 1, 2, 5, 10]),
        (0.08, 12, 6, [0.1, 0.3, 1, 3, 10]),
        (1e-6, 1, 7, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
        (1e-6, 1, 4, [1e-6, 1e-4, 1e-2, 1]),
    ],
)
def test_log_ticks(low: float, high: float, most: int, ticks: list[float]) -> None:
    assert log_ticks(low, high, most) == ticks


def test_numbers_are_short() -> None:
    values = [0, 0.25, -3, 1500, 20_000, 100_500, 2_000_000, 5e-5, 1.5e-5, 3e12, 0.30000000000000004]
    assert [tick_text(value) for value in values] == [
        "0", "0.25", "-3", "1500", "20k", "100.5k", "2M", "5e-5", "1.5e-5", "3e12", "0.3",
    ]  # fmt: skip
    assert [number(value) for value in (None, math.nan, 0.123456, 12345.6)] == ["–", "–", "0.1235", "12,346"]
    seconds = (None, 8.25, 59.99, 200, 18_200, 7199.9, 200_000)
    said = ["–", "8.25 s", "60 s", "3 min 20 s", "5 h 03 min", "2 h 00 min", "2 d 7 h"]
    assert [duration(value) for value in seconds] == said


def test_a_long_curve_keeps_its_spike_its_dip_and_its_gap() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[54_321], points[70_000] = (54_321.0, 50.0), (70_000.0, -9.0)
    points[20_000:21_000] = [(x, math.nan) for x, _ in points[20_000:21_000]]
    columns = columns_of(points, 340)
    whole = [column for column in columns if column is not None]
    assert len(columns) <= 340
    assert max(c.high for c in whole) == 50.0 and min(c.low for c in whole) == -9.0
    assert sum(c.count for c in whole) == 99_000
    assert math.fsum(c.mean * c.count for c in whole) / 99_000 == pytest.approx(1 + 39 / 99_000)
    gaps = [place for place, column in enumerate(columns) if column is None]
    assert gaps == [68, 69, 70]  # updates 20 000 to 20 881
    spike = next(c for c in whole if c.high == 50)
    assert spike.first <= 54_321 <= spike.last and spike.low == 1.0


def test_a_short_curve_is_drawn_point_by_point() -> None:
    columns = columns_of([(1.0, 4.0), (2.0, math.nan), (9.0, 5.0)], 3)
    assert columns[1] is None
    assert [(c.x, c.mean, c.low, c.high) for c in columns if c] == [(1, 4, 4, 4), (9, 5, 5, 5)]


@pytest.mark.parametrize("log", [False, True])
def test_points_are_where_the_ticks_say(log: bool) -> None:
    values = [1.0, 10.0, 100.0] if log else [0.0, 50.0, 100.0]
    points = list(zip([0.0, 5.0, 10.0], values, strict=True))
    drawing = ElementTree.fromstring(line_chart("t", [Line("a", points, "c0")], log=log))
    (path,) = [one for one in drawing.iter("path") if one.get("class") == "line c0"]
    places = [tuple(map(float, pair.split())) for pair in (path.get("d") or "")[1:].split("L")]
    beside = {one.text: float(one.get("y") or "") for one in drawing.iter("text") if one.get("text-anchor") == "end"}
    below = {one.text: float(one.get("x") or "") for one in drawing.iter("text") if one.get("text-anchor") == "middle"}
    assert tick_text(0) in below and tick_text(10) in below and tick_text(100) in beside
    for (x, y), (place_x, place_y) in zip(points, places, strict=True):
        if tick_text(x) in below:
            assert place_x == pytest.approx(below[tick_text(x)], abs=0.06)
        if tick_text(y) in beside:
            assert place_y == pytest.approx(beside[tick_text(y)] - 4, abs=0.11)  # where the text's foot is
    assert places[0][1] > places[1][1] > places[2][1]
    assert places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.11)


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0, 0.0], [1e-30, 1e30], [-1e9, 1e-9], [1, math.nan, 2]])
def test_odd_curves_stay_inside(values: list[float]) -> None:
    points = [(float(place), value) for place, value in enumerate(values, start=7)]
    frame = Frame()
    for from_zero in (False, True):
        drawing = ElementTree.fromstring(line_chart("t", [Line("a", points, "c0")], from_zero=from_zero))
        drawn = " ".join(one.get("d") or "" for one in drawing.iter("path"))
        drawn += "".join(f" {one.get('cx')} {one.get('cy')}" for one in drawing.iter("circle"))
        found = list(map(float, re.findall(r"-?\d+\.\d", drawn)))
        assert found and all(0 <= place <= frame.width for place in found)
        assert all(place <= frame.height - frame.bottom for place in found[1::2])


@pytest.mark.parametrize("values", [[0.012345, 0.01236], [-0.028, -0.022], [123_456.7, 123_499.0], [1.25e-6, 2.5e-6]])
@pytest.mark.parametrize("frame", [Frame(), SMALL])
def test_no_number_of_an_axis_is_cut(values: list[float], frame: Frame) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    drawing = ElementTree.fromstring(line_chart("t", [Line("a", points, "c0")], frame=frame))
    numbers = [one for one in drawing.iter("text") if one.get("text-anchor") == "end"]
    assert numbers and all(float(one.get("x") or "") >= text_width(one.text or "") for one in numbers)


def test_hover_titles_tell_every_curve() -> None:
    lines = [Line("a", [(1.0, 0.5), (2.0, 0.25)], "c0"), Line("b", [(2.0, 4.0)], "c1")]
    drawing = ElementTree.fromstring(line_chart("t", lines, x_label="update"))
    titles = [one.findtext("title") for one in drawing.iter("rect")]
    assert titles == ["update 1\na: 0.5", "update 2\na: 0.25\nb: 4"]


def test_a_dot_chart_places_by_value() -> None:
    drawing = ElementTree.fromstring(
        dot_chart("t", [("x", [0.5, math.nan]), ("y", [2.0, 1.0])], [("policy", "c0"), ("last", "c1")], line_at=1.0)
    )
    dots = [(one.findtext("title"), float(one.get("cx") or "")) for one in drawing.iter("circle")]
    assert [title for title, _ in dots] == ["x, policy: 0.5", "y, policy: 2", "y, last: 1"]
    limit = next(float(one.get("x1") or "") for one in drawing.iter("line") if one.get("class") == "limit")
    assert dots[0][1] < limit == dots[2][1] < dots[1][1]


def test_long_names_of_dimensions_stay_apart() -> None:
    def shown(*names: str) -> list[str | None]:
        rows = [(name, [1.0]) for name in names]
        drawing = ElementTree.fromstring(dot_chart("t", rows, [("policy", "c0")], line_at=1.0))
        return [one.text for one in drawing.iter("text") if one.get("text-anchor") != "middle"]

    arms = "left_arm_gripper_opening.pos", "right_arm_gripper_opening.pos"
    assert shown(*arms) == list(arms) and shown("dx", "gripper") == ["dx", "gripper"]
    (short,) = shown("left_arm" + "_joint" * 20 + "_7")
    assert short is not None and short.startswith("left_arm_") and "…" in short and short.endswith("_7")


# ---------------------------------------------------------------- one run


def test_the_page_holds_every_section_and_its_numbers(one: Page) -> None:
    sections = {"training", "validation", "chunks", "numbers", "restarts", "hardware", "config"}
    assert sections <= set(one.texts)
    training = one.text("training")
    for title in ("Training loss", "Learning rate", "Throughput", "Waiting for data", "Peak memory"):
        assert title in training
    assert one.row("updates") == ["40 of 40"]
    assert one.row("lowest val/action_l1") == ["0.1"] and one.row("at update") == ["40"]
    assert one.row("val/ema_action_l1, last") == ["0.05"] and one.row("draws of noise and time of each") == ["4"]
    assert one.row("throughput, median, samples/s") == ["64"] and one.row("waiting for data, mean") == ["2.0 %"]
    assert one.row("dx") == ["0.1", "0.1", "0.09", "0.3", "0.35"]  # policy, averaged, last, mean, start
    assert one.row("0.1") == ["90.0 %", "90.0 %", "91.0 %", "70.0 %", "65.0 %"]
    assert "demo/metaworld, episode 7, frame 11" in one.text("chunks")
    assert '"n_updates": 40' in one.text("config")


def test_nothing_is_asked_for_from_elsewhere(one: Page) -> None:
    assert not {tag for tag, _ in one.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not [attrs for _, attrs in one.tags if {"src", "srcset", "onload", "onclick"} & set(attrs)]
    assert all((attrs["href"] or "").startswith("#") for tag, attrs in one.tags if tag == "a")
    assert not re.search(r"https?:|url\(|@import", one.source)
    policy = next(attrs["content"] for tag, attrs in one.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_screen_reader_has_something_to_say(one: Page) -> None:
    drawings = [attrs for tag, attrs in one.tags if tag == "svg" and attrs.get("aria-hidden") != "true"]
    assert len(drawings) > 12 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert "Training loss: 1.821 at update 2, 0.1996 at update 40, lowest 0.1996" in one.source
    tags = [tag for tag, _ in one.tags]
    assert tags.count("caption") == tags.count("table") >= 4
    assert one.tags[tags.index("html")][1]["lang"] == "en"
    assert tags.count("h1") == 1 and {"header", "main", "nav"} <= set(tags)
    targets = {attrs["href"] for tag, attrs in one.tags if tag == "a"}
    assert targets == {f"#{attrs['id']}" for tag, attrs in one.tags if tag == "section"}


def test_padded_steps_are_not_drawn(one: Page) -> None:
    small = [svg for svg in one.charts() if svg.get("viewBox") == "0 0 190 106"]
    assert len(small) == 2 * 3  # chunks × dimensions
    lengths = [len((path.get("d") or "").split("L")) for svg in small for path in svg.iter("path") if path.get("class")]
    assert lengths == [8, 8, 8] * 3 + [7, 7, 7] * 3  # recorded, predicted, averaged
    assert "predicted with the averaged weights" in one.text("chunks")


def test_restarts_and_their_cost(tmp_path: Path) -> None:
    attempts = [
        attempt(0, 20, 1000.0, state="running", ended=None),
        attempt(12, 30, 1500.0, state="preempted", reason="signal 10 (SIGUSR1)", host="node2"),
        {"host": "node2", "started": 1700.0, "state": "failed", "reason": "Traceback:\n  deep\nOSError: gone"},
        attempt(30, 40, 2000.0, environment={"gpus": "4 × NVIDIA H100", "nvidia_driver": "550.54"}),
    ]
    run = write_run(tmp_path / "run", RunFolderSpec(attempts=attempts))
    assert report(run) == 0
    page = Page(run / "report.html")
    table = {row[0]: row[1:] for row in page.rows if len(row) == 10}
    assert table["1"][3:] == ["0 to 20", "without a word: killed, or its node failed", "8", "–", "15 s", "1.5 s"]
    assert table["2"][3:7] == ["12 to 30", "preempted: signal 10 (SIGUSR1)", "0", "6 min 20 s"]
    assert table["3"][3] == "none" and table["3"][4].startswith("OSError: gone") and table["3"][7] == "–"
    assert table["4"][4] == "finished" and table["4"][6] == "5 min 00 s"
    assert "In all: 8 updates done again" in page.text("restarts")
    assert page.row("gpus") == ["–", "–", "4 × NVIDIA H100"] and page.row("nvidia driver") == ["–", "–", "550.54"]
    marks = [
        one.findtext("title") for svg in page.charts()[:1] for one in svg.iter("line") if one.get("class") == "mark"
    ]
    assert marks == ["attempt 2 begins after update 12", "attempt 4 begins after update 30"]


def test_a_run_is_called_running_only_while_a_process_holds_it(tmp_path: Path) -> None:
    attempts = [attempt(0, 40, 1.79e9, state="running", ended=None, host="node7")]
    run = write_run(tmp_path / "run", RunFolderSpec(attempts=attempts))

    def shown() -> tuple[str, str, str]:
        assert report(run) == 0
        page = Page(run / "report.html")
        (badge,) = [tag["class"] or "" for _, tag in page.tags if (tag.get("class") or "").startswith("badge ")]
        return (
            badge.removeprefix("badge "),
            page.text(""),
            next(row for row in page.rows if len(row) == 10 and row[0] == "1")[5],
        )

    badge, text, ended = shown()  # copied from another machine
    assert badge == "unknown" and "running on node7; whether it still does is not known" in text
    assert ended == "running, or killed since"
    (run / ".lock").write_text("")
    badge, text, ended = shown()
    assert badge == "interrupted" and "It was running on node7, but no process holds the run folder" in text
    assert ended == "without a word: killed, or its node failed"
    handle = lock(run / ".lock", "job", str)
    os.write(handle, b"host node7, process 4711")
    badge, text, ended = shown()
    assert badge == "running" and "It ran when this page was written: host node7, process 4711" in text
    assert ended == "running"
    os.close(handle)


def test_a_refused_start_is_told_and_is_no_restart(tmp_path: Path) -> None:
    refused = {"host": "node1", "started": 1500.0, "updated": 1501.0, "state": "failed", "error_kind": "config"}
    attempts = [
        attempt(0, 20, 1000.0, state="stopped", reason="Ctrl-C"),
        refused | {"reason": "seed: 42 → 7"},
        attempt(20, 40, 2000.0),
    ]
    run = write_run(tmp_path / "run", RunFolderSpec(attempts=attempts))
    assert report(run) == 0
    page = Page(run / "report.html")
    ended = [row[5] for row in page.rows if len(row) == 10][1:]
    assert ended == ["stopped: Ctrl-C", "refused: seed: 42 → 7", "finished"]
    assert page.row("restarts") == ["1"]


def test_before_the_first_validation_the_starting_weights_are_all_there_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec(evaluations=1, config={"eval_freq": 60}))
    (run / "validation" / "step_00000040.json").rename(run / "validation" / "step_00000000.json")
    started = json.loads((run / "validation" / "step_00000000.json").read_text()) | {"step": 0, "action_l1": 0.7}
    (run / "validation" / "step_00000000.json").write_text(json.dumps(started))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    without = [{key: value for key, value in line.items() if not key.startswith("val/")} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without))
    assert report(run) == 0
    page = Page(run / "report.html")
    assert "No validation" not in page.text() and "no validation" not in page.text()
    assert "0.7of the starting weights" in page.text("")
    assert "The curves begin with the first validation in training, at update 60" in page.text("validation")
    assert "Error by dimension at update 0" in page.text("validation")


def test_the_best_evaluation_stands_beside_the_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec(changed_lines={30: {"val/action_l1": 0.01}}))
    assert report(run) == 0
    page = Page(run / "report.html")
    heads = next(row for row in page.rows if row and row[0] == "dimension")
    assert heads[1:3] == ["policy", "best, update 30"]
    assert page.row("lowest val/action_l1") == ["0.01"] and page.row("at update") == ["30"]
    assert page.row("dx")[:2] == ["0.1", "0.175"]


def test_every_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    spec = RunFolderSpec(
        name=HOSTILE,
        names=[HOSTILE, "y", "\ud800 broken"],
        dataset=HOSTILE,
        reason=HOSTILE,
        attempts=[attempt(0, 40, 0.0, host=HOSTILE, reason=HOSTILE, environment={HOSTILE: HOSTILE})],
        config={HOSTILE: HOSTILE},
        changed_lines={20: {f"val/{HOSTILE}": 1.0}},
    )
    run = write_run(tmp_path / "run", spec)
    other = write_run(tmp_path / "other", RunFolderSpec())
    assert report(run) == 0 and report(run, other, "--out", tmp_path / "both.html") == 0
    for path in (run / "report.html", tmp_path / "both.html"):
        page = Page(path)
        assert not {tag for tag, _ in page.tags} & {"script", "img"}
        assert not [attrs for _, attrs in page.tags if "onerror" in attrs]
        assert page.text().count('<script>alert("x")</script>') >= 10
        page.charts()  # are well-formed XML


# ---------------------------------------------------------------- what is missing or damaged


def test_a_run_without_validation_or_status_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec(evaluations=0))
    (run / "status.json").unlink()
    (run / "config.yaml").write_text("name: [")
    assert report(run) == 0
    page = Page(run / "report.html")
    assert "No validation was logged" in page.text("validation")
    assert "No error by dimension" in page.text("validation")
    assert "None are in the run folder's validation/ yet" in page.text("chunks")
    assert "tells of no attempts" in page.text("restarts") and "tells of no attempts" in page.text("hardware")
    assert "status.json is not there" in page.text("") and "config.yaml is damaged" in page.text("")
    assert page.row("updates") == ["40"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("{", "cannot be read: "),
        ({"names": ["dx"]}, "per_dimension_l1 has 3 numbers for 1 names"),
        ({"per_step_l1": "many"}, "could not convert string to float"),
        ({"chunks": [{"dataset": "d", "episode": 0, "frame": 0, "recorded": [[1, 2, 3]], "predicted": [], "valid": [1]}]},
         "differ in their lengths"),
        ({"baselines": {"last": {}}}, "it has no 'action_l1' in a part of 'baselines'"),
        ({"baselines": {"last": {"action_l1": 0.5}}}, "it has no 'per_dimension_l1'"),
        ({"format": 2}, "its format is 2, this version reads 1"),
        ({"action_l1": 10**400}, "too large to convert"),
    ],
)  # fmt: skip
def test_a_damaged_evaluation_is_named(tmp_path: Path, change: str | dict, problem: str) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec())
    path = run / "validation" / "step_00000040.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    assert report(run) == 0
    said = Page(run / "report.html").text("")
    assert "validation/step_00000040.json cannot be read: " in said and problem in said


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"attempts": [3]}', '{"attempts": [{"host": "x"}]}', '{"restarts": 2}', '{"attempts": 3}',
        '{"attempts": [{"started": 1e30}]}', '{"attempts": [{"started": 1, "first_step": "a", "step": 2}]}',
        '{"attempts": [{"started": 1, "environment": "x"}]}', '{"attempts": [{"started": 1, "state": null}]}',
        '{"ettr": "high"}',
    ],
)  # fmt: skip
def test_a_damaged_status_is_said(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec())
    (run / "status.json").write_text(content)
    assert report(run) == 0
    page = Page(run / "report.html")
    assert ("status.json is damaged" in page.text("")) == ("restarts" not in content)
    assert "tells of no attempts" in page.text("restarts") and page.row("updates") == ["40 of 40"]


def test_torn_and_repeated_lines_are_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec(changed_lines={10: {"loss": None}, 12: {"loss": math.nan}}))
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '[1]\n{"step": 8, "loss": 99}\n{"loss": 1}\n{"step": 42, "lo')
    assert report(run) == 0
    page = Page(run / "report.html")
    said = page.text("")
    assert "left out line 21 is not a JSON object; line 22 tells of update 8, out of order behind 40; " in said
    assert "line 23 has no 'step'; line 24 is cut short; the next start mends it" in said
    assert page.row("updates") == ["40 of 40"] and "99" not in page.row("training loss, last logged")
    assert "2 logged updates have no finite number." in page.text("training")
    loss = page.charts()[0]
    assert len([path for path in loss.iter("path") if path.get("class") == "line c0"]) == 2


def test_a_curve_without_any_number_says_so(tmp_path: Path) -> None:
    nothing = {"loss": None, "val/action_l1": None, "val/loss": None}
    run = write_run(tmp_path / "run", RunFolderSpec(changed_lines={step: nothing for step in range(2, 41, 2)}))
    assert report(run) == 0
    page = Page(run / "report.html")
    assert page.text("training").count("20 logged updates have no finite number.") == 1
    assert "never finite" in page.text("") and "Not in metrics.jsonl" not in page.text()


def test_arrays_of_updates_that_a_crash_undid_do_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec())
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:17]))
    assert report(run) == 0
    assert "Action error by dimension at update 30" in Page(run / "report.html").text("validation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere; RUN is the folder of one run"),
        (["empty"], "empty has no metrics.jsonl: it is no run folder, or no update was logged yet"),
        (["failed"], "(status.json: failed at update 0: no such camera)"),
        (["torn"], "torn/metrics.jsonl holds no update yet"),
        (["good", "good/../good"], "is given twice"),
        (["good", "--out", "good"], "good is a folder; give a file, like --out good/report.html"),
        (["good", "--out", "no/where.html"], "there is no folder no; make it"),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("good"), RunFolderSpec())
    for name in ("empty", "failed", "torn"):
        Path(name).mkdir()
    status = {"state": "failed", "step": 0, "reason": "no such camera"}
    Path("failed", "status.json").write_text(json.dumps(status))
    Path("torn", "metrics.jsonl").write_text('{"step": 1, "lo')
    assert report(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "Traceback" not in said
    assert not list(tmp_path.rglob("*.html"))


def test_the_command_imports_nothing_heavy(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec())
    program = (
        "import sys, agent.report; code = agent.report.main(sys.argv[1:]);"
        "print([name for name in ('torch', 'lerobot', 'numpy', 'pandas', 'PIL') if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[] 0\n"), done.stdout
    done = subprocess.run([sys.executable, "-m", "agent.report", "--help"], capture_output=True, text=True, check=True)
    assert "RUN/report.html for one run" in done.stdout


# ---------------------------------------------------------------- large, and several


def test_a_hundred_thousand_lines_make_a_small_page(tmp_path: Path) -> None:
    spec = RunFolderSpec(
        updates=100_000,
        log_every=1,
        names=[f"left_arm_joint_{place}.position" for place in range(32)],
        horizon=50,
        chunks=8,
        evaluations=4,
        ema=True,
        attempts=[attempt(500 * n, 500 * n + 500, 2000.0 * n) for n in range(200)],
        changed_lines={51_234: {"loss": 60.0}},
    )
    run = write_run(tmp_path / "run", spec)
    assert report(run) == 0
    assert (run / "report.html").stat().st_size < 2e6
    page = Page(run / "report.html")
    assert "100,000 logged updates are drawn in 340 columns" in page.text("training")
    band = next(one for one in page.charts()[0].iter("path") if one.get("class") == "band c0")
    edge = [tuple(map(float, pair.split())) for pair in (band.get("d") or "")[1:-1].split("L")]
    spike = min(edge, key=lambda place: place[1])
    assert spike[1] < min(y for x, y in edge if abs(x - spike[0]) > 3) - 50  # pixels
    assert spike[0] == pytest.approx(50 + 334 * 0.51234, abs=2)
    assert "Of 200 attempts the last 150 are shown." in page.text("restarts")


def test_runs_are_compared(tmp_path: Path) -> None:
    first = write_run(
        tmp_path / "a" / "run", RunFolderSpec(name="slow", config={"lr": 1e-5, "cameras": ["left", "top"]})
    )
    second = write_run(
        tmp_path / "b" / "run",
        RunFolderSpec(
            name="fast", updates=80, ema=True, config={"lr": 5e-5, "cameras": ["left"], "new": {"key": True}}
        ),
    )
    assert report(first, second, "--out", tmp_path / "both.html") == 0
    page = Page(tmp_path / "both.html")
    assert "2 runs: slow, fast" in page.text("")
    differing = [row for row in page.rows[page.rows.index(["key", "slow", "fast"]) + 1 :] if len(row) == 3][:4]
    assert differing == [
        ["n_updates", "40", "80"],
        ["lr", "1e-05", "5e-05"],
        ["cameras.1", "top", "–"],
        ["new.key", "–", "true"],
    ]
    assert "Keys that are alike and not shown: 2." in page.text("config")  # seed, cameras.0
    assert page.row("updates") == ["40 of 40", "80 of 80"]
    assert page.row("val/ema_action_l1, last") == ["–", "0.05"]
    loss = page.charts()[0]
    assert [path.get("class") for path in loss.iter("path")] == ["line c0", "line c1"]
    # On the same frames the predictions of both lie over what was recorded.
    small = next(svg for svg in page.charts() if svg.get("viewBox") == "0 0 190 106")
    assert [path.get("class") for path in small.iter("path")] == ["line recorded", "line c0", "line c1"]
    heads = next(row for row in page.rows if row and row[0] == "dimension")
    assert heads[1:4] == ["slow", "fast", "fast, averaged weights"]


def test_a_baseline_is_as_long_as_the_longest_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{n}", RunFolderSpec(name=f"run {n}", updates=n)) for n in (40, 80)]
    assert report(*runs, "--out", tmp_path / "both.html") == 0
    page = Page(tmp_path / "both.html")
    chart = next(svg for svg in page.charts() if (svg.get("aria-label") or "").startswith("Action error."))
    ends = {path.get("class"): float(path.get("d", "").split("L")[-1].split()[0]) for path in chart.iter("path")}
    assert ends["line base-mean dashed"] == ends["line base-last dotted"] == ends["line c1"] > ends["line c0"]


def test_the_links_are_in_the_order_of_the_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, RunFolderSpec(name=name)) for name in "ab"]
    for some in (runs[:1], runs):
        assert report(*some, "--out", tmp_path / "out.html") == 0
        tags = Page(tmp_path / "out.html").tags
        sections = [attrs["id"] for tag, attrs in tags if tag == "section"]
        assert [attrs["href"] for tag, attrs in tags if tag == "a"] == [f"#{name}" for name in sections]


def test_each_data_set_stands_beside_its_own_baselines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec(ema=True))
    path = run / "validation" / "step_00000040.json"
    content = json.loads(path.read_text())

    def block(name: str, names: list[str], error: float, **more: object) -> dict:
        return {"name": name, "names": names, "action_l1": error, "per_dimension_l1": [error] * len(names),
                "per_step_l1": [error], **more}  # fmt: skip

    baselines = {"last": block("", ["lift"], 3.0), "mean": block("", ["lift"], 4.0), "start": None}
    own = block("lab/arm", ["lift"], 2.0, baselines=baselines, ema=block("", ["lift"], 1.0))
    content |= {"datasets": [own, block("lab/hand", ["x", "y"], 7.0)], "chunks": [], "ema": None}
    path.write_text(json.dumps(content))  # the second as an older version wrote it
    assert report(run) == 0
    rows = Page(run / "report.html").rows
    place = next(place for place, row in enumerate(rows) if row and row[0] == "data set")
    assert rows[place : place + 6] == [
        ["data set", "dimension", "policy", "averaged weights", "last action repeated", "mean training action"],
        ["lab/arm", "lift", "2", "1", "3", "4"],
        ["lab/arm", "all", "2", "1", "3", "4"],
        ["lab/hand", "x", "7", "–", "–", "–"],
        ["lab/hand", "y", "7", "–", "–", "–"],
        ["lab/hand", "all", "7", "–", "–", "–"],
    ]


def test_errors_are_held_against_the_mean_action_of_the_same_run(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", RunFolderSpec(name="metres"))
    second = write_run(tmp_path / "b", RunFolderSpec(name="millimetres"))
    for path in (second / "validation").iterdir():
        content = json.loads(path.read_text())
        for block in (content, content["baselines"]["mean"]):
            block["per_dimension_l1"] = [1000 * value for value in block["per_dimension_l1"]]
        path.write_text(json.dumps(content))
    assert report(first, second, "--out", tmp_path / "both.html") == 0
    page = Page(tmp_path / "both.html")
    assert re.findall(r"<title>gripper, (\w+): ([\d.]+)</title>", page.source) == [
        ("metres", "0.333"),
        ("millimetres", "0.333"),
    ]


def test_updates_that_are_planned_follow_from_epochs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunFolderSpec(config={"n_updates": None, "n_epochs": 0.7}))
    assert report(run) == 0
    assert Page(run / "report.html").row("updates") == ["40 of 70"]  # an epoch is 100 updates


def test_runs_of_one_name_and_of_other_robots_are_told_apart(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "run", RunFolderSpec())
    second = write_run(tmp_path / "b" / "run", RunFolderSpec(names=["j0", "j1"], dataset="other"))
    assert report(first, second, "--out", tmp_path / "both.html") == 0
    page = Page(tmp_path / "both.html")
    assert f"first ({first})" in page.text("") and f"first ({second})" in page.text("")
    assert [row[0] for row in page.rows if row].count("dimension") == 2
    assert "none in common" in page.text("chunks")


def test_many_runs_stay_small(tmp_path: Path) -> None:
    spec = RunFolderSpec(
        updates=1000, log_every=1, evaluations=1, names=[f"joint {n}" for n in range(32)], horizon=50, chunks=8
    )
    runs = [write_run(tmp_path / f"run{n}", spec) for n in range(10)]
    assert report(*runs, "--out", tmp_path / "all.html") == 0
    assert (tmp_path / "all.html").stat().st_size < 2e6


# ---------------------------------------------------------------- a run writes its own


def test_a_run_writes_its_report_and_survives_that_it_cannot(server: ForkServer, tmp_path: Path) -> None:
    place = Workplace.make(tmp_path)
    updates = ("--n_updates", "4", "--eval_freq", "2", "--eval_size", "2")
    page = tmp_path / "runs" / "mine" / "report.html"
    page.mkdir(parents=True)  # where the file belongs
    said = server.start(place, "mine", *updates).wait()
    assert place.status("mine")["state"] == "finished", said
    assert "E the report could not be written" in said and "report.html is a folder" in said
    assert "finished at update 4" in said
    page.rmdir()
    said = server.start(place, "mine", *updates).wait()  # which finds that all is done
    assert f"report: {page}" in said and "Traceback" not in said
    found = Page(page)
    assert found.row("updates") == ["4 of 4"] and found.row("at update")[0] in ("2", "4")
    assert found.row("torch")[0].startswith("2.") and found.row("gpus") == ["none"]
    assert found.row("processes") == ["1"] and found.row("lerobot") == ["0.6.1"]
    assert "validation" in found.texts and "No validation" not in found.text("validation")
    assert "test/data, episode" in found.text("chunks")
