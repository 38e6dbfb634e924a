"""What a run folder tells: ``metrics.jsonl``, ``status.json``, ``config.yaml`` and the validation's arrays."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agent.reporting.evaluations import Evaluation, read_evaluation

_OF_STATUS = ("step", "restarts", "updated", "updates_redone", "waited_s", "checkpoint_stall_s", "ettr")
_OF_ATTEMPT = ("started", "updated", "first_step", "step", "busy_s", "first_update_s", "checkpoint_stall_s")
_LARGEST = 1e11  # seconds of a date, and updates


@dataclass
class Series:
    """One number over the updates; NaN where a line has null."""

    steps: array = field(default_factory=lambda: array("q"))
    values: array = field(default_factory=lambda: array("d"))

    @property
    def points(self) -> list[tuple[float, float]]:
        """(update, value) in order."""
        return list(zip(self.steps, self.values, strict=True))

    @property
    def numbers(self) -> list[float]:
        """The values without the gaps."""
        return [value for value in self.values if not math.isnan(value)]

    def lowest(self) -> tuple[int, float] | None:
        """(update, value) of the least value; the first of equal ones."""
        found = [(value, step) for step, value in zip(self.steps, self.values, strict=True) if not math.isnan(value)]
        return (min(found)[1], min(found)[0]) if found else None


@dataclass
class RunRecord:
    """All that the report knows of one run."""

    path: Path
    label: str
    series: dict[str, Series]
    """Key of ``metrics.jsonl`` → its numbers."""
    lines: int
    last_step: int
    status: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    evaluations: list[Evaluation]
    """The validation's arrays at the last evaluation, and before it at the best one where that is another."""
    problems: list[str]
    """What could not be read, for the reader of the page."""

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The starts, oldest first; empty where ``status.json`` tells of none."""
        return self.status.get("attempts") or []

    @property
    def planned(self) -> int | None:
        """Updates that the run is to make, as far as the config says; from ``n_epochs`` as the trainer counts them."""
        given, epochs, epoch = self.config.get("n_updates"), self.config.get("n_epochs"), self.series.get("epoch")
        if isinstance(given, int):
            return given
        if not isinstance(epochs, int | float) or epoch is None or not epoch.values[-1] > 0:
            return None
        # The division's last digit must not make one more update of it.
        return max(1, math.ceil(epochs * epoch.steps[-1] / epoch.values[-1] - 1e-6))


def collect(path: Path) -> RunRecord:
    """Reads a run folder, also while the run is going on.

    Raises:
        ValueError: if it is no run folder, or nothing was logged yet.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; RUN is the folder of one run, like runs/pi0_demo")
    problems: list[str] = []
    status = _read_mapping(path / "status.json", problems)
    config_text, config = _read_config(path / "config.yaml", problems)
    series, lines = _read_metrics(path, status, problems)
    last_step = max(numbers.steps[-1] for numbers in series.values())
    evaluations = _read_evaluations(path / "validation", series, last_step, problems)
    label = str(config.get("name") or path.resolve().name)
    return RunRecord(path, label, series, lines, last_step, status, config, config_text, evaluations, problems)


def _read_mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is not there: nothing is known of the run's state and restarts")
        return {}
    except ValueError as error:
        content = error
    if isinstance(content, dict) and _is_status(content):
        return content
    problems.append(f"{path.name} is damaged ({content!s:.100}): nothing is known of the run's state and restarts")
    return {}


def _is_status(content: dict[str, Any]) -> bool:
    attempts = content.get("attempts") or []
    return (
        _has_numbers(content, _OF_STATUS) and isinstance(attempts, list) and all(_is_attempt(one) for one in attempts)
    )


def _is_attempt(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and "started" in value
        and ("first_step" not in value or "step" in value)
        and _has_numbers(value, _OF_ATTEMPT)
        and isinstance(value.get("state", ""), str)
        and isinstance(value.get("environment", {}), dict)
    )


def _has_numbers(content: dict[str, Any], keys: Sequence[str]) -> bool:
    """Whether what there is of these keys can be reckoned with and shown as a date."""
    values = [content[key] for key in keys if key in content]
    return all(isinstance(value, int | float) and abs(value) < _LARGEST for value in values)


def _read_config(path: Path, problems: list[str]) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        problems.append(f"{path.name} is not there: the run's settings are unknown")
        return "", {}
    except yaml.YAMLError as error:
        problems.append(f"{path.name} is damaged: {' '.join(str(error).split())}")
        return text, {}
    if isinstance(content, dict):
        return text, content
    problems.append(f"{path.name} holds no settings")
    return text, {}


def _read_metrics(path: Path, status: dict[str, Any], problems: list[str]) -> tuple[dict[str, Series], int]:
    series: dict[str, Series] = {}
    lines, before, bad = 0, -1, []
    for number, record in _records(path, status):
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int or not before < step < _LARGEST:
            bad.append(number)
            continue
        lines, before = lines + 1, step
        for key, value in record.items():
            if key != "step" and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
                found = series.setdefault(key, Series())
                found.steps.append(step)
                # No float32 is as large, and sums of such numbers would not be finite.
                found.values.append(value if value is not None and abs(value) < 1e100 else math.nan)
    if not series:
        raise ValueError(f"{path}/metrics.jsonl holds no update yet{_state(status)}")
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        problems.append(f"metrics.jsonl: left out {len(bad)} torn or repeated lines ({shown}); the next start mends it")
    return series, lines


def _records(path: Path, status: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Line number and contents; None for what is not JSON."""
    try:
        stream = open(path / "metrics.jsonl", encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ValueError(
            f"{path} has no metrics.jsonl: it is no run folder, or no update was logged yet{_state(status)}"
        ) from None
    with stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, json.loads(line)
            except ValueError:  # the process died in the middle of this line
                yield number, None


def _state(status: dict[str, Any]) -> str:
    if "state" not in status:
        return ""
    reason = f": {status['reason']}" if status.get("reason") else ""
    return f" (status.json: {status['state']} at update {status.get('step', 0)}{reason})"


def _read_evaluations(folder: Path, series: dict[str, Series], last_step: int, problems: list[str]) -> list[Evaluation]:
    """The best and the last, or the last alone."""
    # A later file is of updates that a crash undid.
    files = {int(path.stem[5:]): path for path in folder.glob("step_*.json") if path.stem[5:].isdecimal()}
    steps = sorted(step for step in files if step <= last_step)
    if not steps:
        return []
    best = series["val/action_l1"].lowest() if "val/action_l1" in series else None
    wanted = {steps[-1], *([best[0]] if best and best[0] in steps else [])}
    found = []
    for step in sorted(wanted):
        try:
            found.append(read_evaluation(files[step]))
        except ValueError as error:
            problems.append(str(error))
    return found
