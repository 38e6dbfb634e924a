"""Reads what a run tells of itself: ``metrics.jsonl`` and ``status.json``.

They only report, so nothing in them may stop a run: a bit flips, a kill cuts a line short, an older version wrote it. All
readers come here. What has the right form is returned, what has not is named by file and line, and the process that
holds the run folder sets it aside. Only the standard library: ``agent.requeue`` reads with it.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LARGEST = 1e11  # seconds of a date, and updates
_COUNTS = "step restarts updates_redone checkpoint_step first_step checkpoint_step_at_start restart_count".split()
_NUMBERS = "started updated ended waited_s checkpoint_stall_s first_update_s ettr busy_s".split()
_TEXTS = "state reason host attempt job error_kind".split()
_FORM: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_COUNTS, (int,)),
    **dict.fromkeys(_NUMBERS, (int, float)),
    **dict.fromkeys(_TEXTS, (str,)),
    "environment": (dict,),
}
_MAY_BE_NULL = ("ended", "restart_count", "job", "error_kind", "checkpoint_step", "checkpoint_step_at_start")


def set_aside(path: Path) -> Path:
    """Copies a damaged file to a sibling, ``….damaged``, so that it can be replaced and nothing of it is lost.

    Raises:
        OSError: if the copy cannot be written.
    """
    aside = free_name(path)
    shutil.copyfile(path, aside)
    return aside


def free_name(path: Path) -> Path:
    """A sibling's name for what is damaged that nothing has yet: ``….damaged``, ``….damaged_2``, …"""
    endings = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    names = (path.with_name(f"{path.name}.damaged{ending}") for ending in endings)
    return next(name for name in names if not name.exists())


def read_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The JSON object in a file, or None and what is wrong with it; None and no word where there is no file.

    Raises:
        OSError: if the file is there and cannot be read for the moment.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, ""
    except (ValueError, RecursionError) as error:
        return None, f"it is not JSON ({error!s:.100})"
    return (content, "") if isinstance(content, dict) else (None, "it is not a JSON object")


# ── status.json ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_status(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What ``status.json`` says as far as it has the right form, and what of it has not.

    Keys that this version does not know stay. Of an attempt that lost its begin, or holds anything odd, nothing stays.

    Raises:
        OSError: if the file is there and cannot be read for the moment.
    """
    content, problem = read_object(path)
    if content is None:
        return {}, [problem] if problem else []
    attempts = content.pop("attempts", [])
    problems = _misfits(content)
    status = {key: value for key, value in content.items() if key not in problems}
    told = list(problems.values())
    if not isinstance(attempts, list):
        return status, [*told, f"attempts is {attempts!r:.40}"]
    sound = []
    for number, attempt in enumerate(attempts, start=1):
        if wrong := _wrong_with(attempt):
            told.append(f"attempt {number}: {wrong}")
        else:
            sound.append(attempt)
    return status | ({"attempts": sound} if sound else {}), told


def _wrong_with(attempt: Any) -> str:
    if not isinstance(attempt, dict):
        return f"it is {attempt!r:.40}"
    if "started" not in attempt:
        return "it has no 'started'"
    if "first_step" in attempt and attempt.get("step") is None:
        return "it has no 'step'"
    return ", ".join(problem for key, problem in _misfits(attempt).items() if (key, attempt[key]) != ("step", None))


def _misfits(content: Mapping[str, Any]) -> dict[str, str]:
    """Key → what is wrong with its value."""
    return {key: f"{key} is {content[key]!r:.40}" for key in _FORM if key in content and not _fits(key, content[key])}


def _fits(key: str, value: Any) -> bool:
    if value is None:
        return key in _MAY_BE_NULL
    if not isinstance(value, _FORM[key]) or isinstance(value, bool):
        return False
    return not isinstance(value, int | float) or (math.isfinite(value) and abs(value) < _LARGEST)


# ── metrics.jsonl ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class DamagedLine:
    """A line of ``metrics.jsonl`` that counts for nothing."""

    number: int
    """From 1."""
    problem: str
    raw: bytes


@dataclass(frozen=True)
class MetricsLines:
    """The contents of ``metrics.jsonl``."""

    there: bool
    """Whether there is a file."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Steps strictly increase."""
    damaged: list[DamagedLine] = field(default_factory=list)
    torn: DamagedLine | None = None
    """The last line where a kill has cut it short, which is no damage."""

    def problems(self) -> list[str]:
        """What is damaged, at most five of it, for a person."""
        told = [f"line {line.number} {line.problem}" for line in self.damaged[:5]]
        return told + ([f"and {len(self.damaged) - 5} more"] if len(self.damaged) > 5 else [])


def read_metrics(path: Path) -> MetricsLines:
    """Reads the whole file. A last line without an end counts if it is whole JSON, and else for nothing, without a word.

    Raises:
        OSError: if the file is there and cannot be read for the moment.
    """
    try:
        return parse_metrics(path.read_bytes())
    except FileNotFoundError:
        return MetricsLines(there=False)


def follow_metrics(path: Path, ended: Callable[[float], bool]) -> Iterator[dict[str, Any]]:
    """Reads the lines that are there, and those that are added, until there are no more after the end.

    Args:
        path: opened once: a later start of the run makes another file.
        ended: waits so many seconds at most for the run's end, and tells whether it has come.
    """
    with open(path, "rb") as stream:
        rest, last = b"", False
        while True:
            new = stream.read()
            whole, newline, rest = (rest + new).rpartition(b"\n")
            yield from parse_metrics(whole + newline).records
            if last and not new:
                yield from parse_metrics(rest).records
                return
            last = ended(0.0 if new else 1.0)


def parse_metrics(content: bytes) -> MetricsLines:
    """The lines of a file, or of the end of one."""
    found: list[tuple[DamagedLine, dict[str, Any]]] = []  # every sound line, as it stands there
    damaged: list[DamagedLine] = []
    torn = None
    lines = content.split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw:
            continue
        try:
            found.append((DamagedLine(number, "", raw), _record(raw)))
        except ValueError as error:
            damaged.append(DamagedLine(number, str(error), raw))
            if number == len(lines) and not _is_json(raw):
                torn = damaged.pop()
    in_order = _in_order([record for _, record in found])
    before = 0
    for place, (line, record) in enumerate(found):
        if place in in_order:
            before = record["step"]
        else:
            problem = f"tells of update {record['step']}, out of order behind {before}"
            damaged.append(DamagedLine(line.number, problem, line.raw))
    damaged.sort(key=lambda line: line.number)
    return MetricsLines(True, [record for place, (_, record) in enumerate(found) if place in in_order], damaged, torn)


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _record(raw: bytes) -> dict[str, Any]:
    """Raises:
    ValueError: saying what is wrong with the line.
    """
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):  # not ASCII either, perhaps
        raise ValueError("is not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    if "step" not in record:
        raise ValueError("has no 'step'")
    step = record["step"]
    if type(step) is not int or not 0 <= step < _LARGEST:
        raise ValueError(f"has the step {step!r:.40}")
    return record


def _in_order(records: Sequence[Mapping[str, Any]]) -> set[int] | range:
    """The places of as many records as can be kept so that steps increase: where a digit has flipped, all but that one."""
    steps = [record["step"] for record in records]
    if all(before < after for before, after in itertools.pairwise(steps)):
        return range(len(records))
    ratios = [seen / step for step, record in zip(steps, records, strict=True) if step and (seen := _samples(record))]
    usual = statistics.median(ratios) if ratios else 0.0

    def misfit(place: int) -> float:
        return abs(_samples(records[place]) / max(steps[place], 1) - usual)

    # The longest increasing subsequence. Ends of those of each length, and what each place follows there:
    ends: list[int] = []
    follows: list[int | None] = []
    for place, step in enumerate(steps):
        length = bisect.bisect_left(ends, step, key=lambda end: steps[end])
        follows.append(ends[length - 1] if length else None)
        if length == len(ends):
            ends.append(place)
        elif steps[ends[length]] > step or misfit(place) < misfit(ends[length]):
            ends[length] = place  # of two that tell of one update, the one whose count of samples fits it
    kept: set[int] = set()
    place_kept = ends[-1] if ends else None
    while place_kept is not None:
        kept.add(place_kept)
        place_kept = follows[place_kept]
    return kept


def _samples(record: Mapping[str, Any]) -> float:
    seen = record.get("samples_seen")
    return float(seen) if isinstance(seen, int | float) and abs(seen) < 1e18 else 0.0
