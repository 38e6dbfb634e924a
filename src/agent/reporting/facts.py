"""Writes the sections of numbers: how a run ended, and what its restarts cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from operator import itemgetter
from statistics import fmean, median
from typing import Any

from agent.lifecycle import history
from agent.reporting.collect import RunRecord, Series
from agent.reporting.markup import (
    NOTHING,
    duration,
    missing,
    number,
    paragraph,
    percent,
    section,
    table,
)
from agent.spelling import moment

_MOST_ATTEMPTS = 150
_DRAWS = "flow_samples_per_observation"
_LAST = itemgetter(-1)


def tiles(run: RunRecord) -> str:
    """Writes the few numbers that a reader looks for first."""
    best, mean = _series(run, "val/action_l1").lowest(), _series(run, "val/baseline_mean_l1").numbers
    lowest = "never finite" if "val/action_l1" in run.series else "no validation"
    error = best[1] if best else None
    lowest = f"the lowest, at update {best[0]:,}" if best else lowest
    if best and mean and mean[-1]:
        lowest += f"; {best[1] / mean[-1]:.2g} × the mean action's"
    elif "val/action_l1" not in run.series and run.evaluations:
        error = run.evaluations[-1].policy.action_l1
        lowest = "of the starting weights; in training none was validated yet"
    of = f"of {run.planned:,}" if run.planned else ""
    shown = [
        ("Updates", number(run.last_step), of),
        ("Training loss", number(_of(run, "loss", _LAST)), "at the last logged update"),
        ("Action error", number(error), lowest),
        ("Throughput", number(_of(run, "samples_per_s", median)), "samples/s, median"),
        ("Waiting for data", percent(_of(run, "data_wait", fmean)), "of the updates' time, mean"),
        ("Peak memory", number(_of(run, "memory_gb", max), "GB"), "of a process"),
        ("Effective time", percent(run.status.get("ettr")), "on updates that count, of all since the start"),
        (
            "Restarts",
            number(run.status.get("restarts")),
            f"{number(run.status.get('updates_redone'))} updates done again",
        ),
    ]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in shown
    )
    return f'<dl class="tiles">{items}</dl>'


def numbers(runs: Sequence[RunRecord]) -> str:
    """Writes the final numbers, in a column for each run."""
    rows: list[tuple[str, list[str]]] = [
        ("state", [run.state for run in runs]),
        ("updates", [f"{run.last_step:,}" + (f" of {run.planned:,}" if run.planned else "") for run in runs]),
        ("training loss, last logged", [number(_of(run, "loss", _LAST)) for run in runs]),
        ("training loss, mean of the last tenth", [number(_of(run, "loss", _last_tenth)) for run in runs]),
        ("lowest val/action_l1", [number(_best(run)[1]) for run in runs]),
        ("at update", [number(_best(run)[0]) for run in runs]),
    ]
    keys = list(dict.fromkeys(key for run in runs for key in run.series if key.startswith("val/")))
    rows += [(f"{key}, last", [number(_of(run, key, _LAST)) for run in runs]) for key in keys]
    rows += [
        ("throughput, median, samples/s", [number(_of(run, "samples_per_s", median)) for run in runs]),
        ("seconds of an update, median", [number(_of(run, "step_s", median)) for run in runs]),
        ("waiting for data, mean", [percent(_of(run, "data_wait", fmean)) for run in runs]),
        ("peak memory, GB", [number(_of(run, "memory_gb", max)) for run in runs]),
        ("samples seen", [number(_of(run, "samples_seen", _LAST)) for run in runs]),
        ("draws of noise and time of each", [str(run.config.get(_DRAWS, NOTHING)) for run in runs]),
        ("epochs", [number(_of(run, "epoch", _LAST)) for run in runs]),
        ("from first start to last sign", [duration(_lifetime(run)) for run in runs]),
        ("effective-training-time ratio (ETTR)", [percent(run.status.get("ettr")) for run in runs]),
        ("restarts", [number(run.status.get("restarts")) for run in runs]),
    ]
    caption = "Final numbers" if len(runs) == 1 else "Final numbers of the runs"
    heads = ["", *(run.label if len(runs) > 1 else "value" for run in runs)]
    return section("numbers", "Numbers", table(caption, heads, [[name, *cells] for name, cells in rows]))


def restarts(runs: Sequence[RunRecord]) -> str:
    """Writes the attempts of each run, why each ended and what it cost."""
    return section("restarts", "Restarts and what they cost", *(_attempts(run, len(runs)) for run in runs))


def _attempts(run: RunRecord, total: int) -> str:
    if not run.attempts:
        return missing(f"{run.label}: status.json tells of no attempts.")
    heads = [
        "attempt", "host, job", "started (UTC)", "lasted", "updates", "how it ended", "updates lost",
        "wait before it", "start to first update", "waited for checkpoints",
    ]  # fmt: skip
    rows = []
    for place, (attempt, cost) in enumerate(zip(run.attempts, history.costs(run.attempts), strict=True), start=1):
        did = _span(attempt)
        job = f", job {attempt['job']}" if attempt.get("job") else ""
        rows.append(
            [
                str(place), f"{attempt.get('host', '?')}{job}", moment(attempt["started"]),
                duration(attempt.get("updated", attempt["started"]) - attempt["started"]), did,
                _end(attempt, run.state if place == len(run.attempts) else "interrupted"), number(cost["redone"]),
                duration(cost["waited_s"]) if place > 1 else NOTHING,
                duration(attempt.get("first_update_s")), duration(attempt.get("checkpoint_stall_s")),
            ]
        )  # fmt: skip
    left_out = len(rows) - _MOST_ATTEMPTS
    notes = [f"Of {len(rows)} attempts the last {_MOST_ATTEMPTS} are shown."] if left_out > 0 else []
    status = run.status
    notes.append(
        f"In all: {status.get('updates_redone', 0)} updates done again, {duration(status.get('waited_s'))} between "
        f"attempts (in a queue, for the most part), {duration(status.get('checkpoint_stall_s'))} of training waited for "
        f"checkpoints, {percent(status.get('ettr'))} of the time spent on updates that count."
    )
    caption = "Attempts" if total == 1 else f"Attempts of {run.label}"
    shown = table(caption, heads, rows[max(0, left_out) :], text_columns=(1, 2, 5))
    return shown + "".join(paragraph(note, "note") for note in notes)


def _span(attempt: dict[str, Any]) -> str:
    if attempt.get("first_step", attempt.get("step")) == attempt.get("step"):
        return "none"
    return f"{attempt['first_step']:,} to {attempt['step']:,}"


def _end(attempt: dict[str, Any], state_of_run: str) -> str:
    if attempt.get("state", "running") == "running":
        found = {"running": "running", "interrupted": "without a word: killed, or its node failed"}
        return found.get(state_of_run, "running, or killed since")
    ended = "refused" if history.refused(attempt) else attempt["state"]
    reason = attempt.get("reason")
    return f"{ended}: {reason}" if reason else ended


def _of(run: RunRecord, key: str, what: Callable[[list[float]], float]) -> float | None:
    """Computes a value such as the mean of a series; None if the series has no numbers."""
    found = _series(run, key).numbers
    return what(found) if found else None


def _series(run: RunRecord, key: str) -> Series:
    return run.series.get(key, Series())


def _last_tenth(numbers: list[float]) -> float:
    return fmean(numbers[-max(1, len(numbers) // 10) :])


def _best(run: RunRecord) -> tuple[int | None, float | None]:
    return _series(run, "val/action_l1").lowest() or (None, None)


def _lifetime(run: RunRecord) -> float | None:
    if not run.attempts:
        return None
    last = run.attempts[-1]
    return last.get("updated", last["started"]) - run.attempts[0]["started"]
