"""How numbers, times and values are written for people.

Run: uv run pytest tests/test_spelling.py      (a second)
"""

from __future__ import annotations

from typing import Any

import pytest

from agent.spelling import amount, duration, gib, literal, moment, nearest, ranges, span


@pytest.mark.parametrize(
    "size, said",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_340_000, "12.3 MB"), (3.25e9, "3.2 GB"), (4.2e12, "4200.0 GB")],
)
def test_bytes_have_the_unit_in_which_they_are_short(size: float, said: str) -> None:
    assert amount(size) == said


def test_memory_is_counted_as_the_makers_of_gpus_do() -> None:
    assert gib(79.6 * 2**30) == "79.6 GiB"


@pytest.mark.parametrize(
    "seconds, estimated, measured",
    [
        (0.312, "0.31 s", "0.312 s"),
        (59.99, "60 s", "60 s"),
        (119, "119 s", "1 min 59 s"),
        (200, "3 min", "3 min 20 s"),
        (7199.9, "120 min", "2 h 00 min"),
        (18_200, "5.1 h", "5 h 03 min"),
        (200_000, "55.6 h", "2 d 7 h"),
        (270_000, "3.1 days", "3 d 3 h"),
    ],
)
def test_an_estimate_has_one_unit_and_a_measurement_two(seconds: float, estimated: str, measured: str) -> None:
    assert (span(seconds), duration(seconds)) == (estimated, measured)


def test_a_moment_is_told_in_utc() -> None:
    assert moment(86_399) == "1970-01-01 23:59:59"
    assert moment(0, "%H:%M UTC") == "00:00 UTC"


def test_numbers_in_a_row_are_drawn_together() -> None:
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 3, 7]) == "0-3, 7"
    assert ranges([1, 2, 4], "–") == "1–2, 4"
    assert ranges([1, 3, 5], most=3) == "1, 3, 5"
    assert ranges([1, 3, 5], most=2) == "1, 3, …"


@pytest.mark.parametrize(
    "value, said", [(None, "null"), (True, "true"), (False, "false"), (1, "1"), (0.5, "0.5"), ("None", "None")]
)
def test_a_value_is_written_as_in_the_file_that_it_came_from(value: Any, said: str) -> None:
    assert literal(value) == said


def test_a_slip_of_the_pen_is_recognised() -> None:
    assert nearest("chunk_sise", iter(["name", "chunk_size"])) == "chunk_size"
    assert nearest("chunk_sise", ["name"]) is None
    assert nearest("reach", ["reach-v3"], cutoff=0.9) is None
