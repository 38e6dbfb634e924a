"""Reads a run folder for the report: ``metrics.jsonl``, ``status.json``, ``config.yaml`` and the arrays of validations."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agent.lifecycle.records import read_metrics, read_status
from agent.lifecycle.run_folder import is_held
from agent.reporting.evaluations import Evaluation, read_evaluation


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
        """Finds (update, value) of the least value, the first of equal ones; None without a number."""
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
    state: str
    """What ``status.json`` says, but ``running`` only where a process holds the folder; else ``interrupted``, or
    ``unknown`` where that cannot be told."""
    about_state: str
    """What is known of it besides, a sentence or empty."""

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
    status = _read_status(path / "status.json", problems)
    config_text, config = _read_config(path / "config.yaml", problems)
    series, lines = _read_metrics(path, status, problems)
    last_step = max(numbers.steps[-1] for numbers in series.values())
    evaluations = _read_evaluations(path / "validation", series, last_step, problems)
    label = str(config.get("name") or path.resolve().name)
    state = _present_state(path, status)
    return RunRecord(path, label, series, lines, last_step, status, config, config_text, evaluations, problems, *state)


def _present_state(path: Path, status: dict[str, Any]) -> tuple[str, str]:
    said, reason = str(status.get("state", "unknown")), str(status.get("reason") or "").strip()
    if said != "running":
        return said, reason.splitlines()[-1] if reason else ""
    held, by = is_held(path)
    if held:
        return "running", f"It ran when this page was written: {by}."
    host = (status.get("attempts") or [{}])[-1].get("host", "an unknown host")
    if held is None:
        why = "there is no lock that could tell (a copy of the run folder, or a file system without locks)"
        return "unknown", f"It was running on {host}; whether it still does is not known: {why}."
    killed = "no process holds the run folder any more: it was killed, or its node failed"
    return "interrupted", f"It was running on {host}, but {killed}. The same command continues it."


def _read_status(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        problems.append(f"{path.name} is not there: nothing is known of the run's state and restarts")
        return {}
    status, damages = read_status(path)
    if damages:
        problems.append(f"{path.name} is damaged, and this is left out of it: {'; '.join(damages)}")
    return status


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
    found = read_metrics(path / "metrics.jsonl")
    if not found.there:
        raise ValueError(
            f"{path} has no metrics.jsonl: it is no run folder, or no update was logged yet{_state(status)}"
        )
    series: dict[str, Series] = {}
    for record in found.records:
        for key, value in record.items():
            if key != "step" and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
                numbers = series.setdefault(key, Series())
                numbers.steps.append(record["step"])
                # No float32 is as large, and sums of such numbers would not be finite.
                numbers.values.append(value if value is not None and abs(value) < 1e100 else math.nan)
    if not series:
        raise ValueError(f"{path}/metrics.jsonl holds no update yet{_state(status)}")
    told = [*found.problems(), *([f"line {found.torn.number} is cut short"] if found.torn is not None else [])]
    if told:
        problems.append(f"metrics.jsonl: left out {'; '.join(told)}; the next start mends it")
    return series, len(found.records)


def _state(status: dict[str, Any]) -> str:
    if "state" not in status:
        return ""
    reason = f": {status['reason']}" if status.get("reason") else ""
    return f" (status.json: {status['state']} at update {status.get('step', 0)}{reason})"


def _read_evaluations(folder: Path, series: dict[str, Series], last_step: int, problems: list[str]) -> list[Evaluation]:
    """Reads the best and the last evaluation, or the last alone if that is the best."""
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
