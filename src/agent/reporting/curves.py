"""Writes the section of training curves: a chart for each number, with a line for each run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from agent.reporting.charts import Frame, Line, legend, line_chart, wants_log
from agent.reporting.collect import RunRecord, Series
from agent.reporting.markup import figure, missing, number, paragraph, section


@dataclass(frozen=True)
class Kind:
    """One chart."""

    key: str
    title: str
    unit: str
    from_zero: bool = False
    may_log: bool = False
    factor: float = 1.0


TRAINING = [
    Kind("loss", "Training loss", "", may_log=True),
    Kind("lr", "Learning rate", "", from_zero=True),
    Kind("grad_norm", "Gradient norm before clipping", "", may_log=True),
    Kind("samples_per_s", "Throughput", "samples/s", from_zero=True),
    Kind("data_wait", "Waiting for data", "% of an update's time", from_zero=True, factor=100.0),
    Kind("memory_gb", "Peak memory of a process", "GB", from_zero=True),
]
BASELINES = {
    "last": ("last action repeated", "base-last dotted"),
    "mean": ("mean training action", "base-mean dashed"),
    "start": ("starting checkpoint", "base-start dashed"),
}
AVERAGED = "c2"
"""The style of the averaged weights where there is one run."""


def style_of(place: int) -> str:
    """The CSS classes of the run at a place: eight colours, then the same dashed and dotted."""
    return f"c{place % 8}" + ("", " dashed", " dotted")[place // 8 % 3]


def training(runs: Sequence[RunRecord]) -> str:
    """Draws loss, learning rate, gradient norm, throughput, data wait and memory."""
    charts = [_chart(kind, runs) for kind in TRAINING]
    long = [run for run in runs if run.lines > frame_for(runs).columns]
    notes = [
        f"{run.label}: {number(run.lines)} logged updates are drawn in {frame_for(runs).columns} columns: "
        "the line is their mean, the shade goes from their least to their greatest value."
        for run in long
    ]
    if len(runs) == 1 and runs[0].attempts[1:]:
        notes.append("A dotted vertical line stands where an attempt began after a restart.")
    return section("training", "Training", _grid(charts), *(paragraph(note, "note") for note in notes))


def frame_for(runs: Sequence[RunRecord]) -> Frame:
    """Gives the curves of many runs fewer columns each, so that the page stays small."""
    return Frame(columns=max(60, min(340, 1500 // len(runs))))


def validation_charts(runs: Sequence[RunRecord]) -> str:
    """Draws loss, action error beside the baselines, and fractions within thresholds, over the updates."""
    if not any(key.startswith("val/") for run in runs for key in run.series):
        if any(run.evaluations for run in runs):
            due = runs[0].config.get("eval_freq")
            first = f", at update {due}" if len(runs) == 1 and isinstance(due, int) and due else ""
            return missing(
                "Until now only the starting weights were validated; their errors stand below. The curves begin with the "
                f"first validation in training{first}."
            )
        return missing(
            "No validation was logged: eval_freq is 0, nothing was held out (data.val), or no evaluation came yet."
        )
    charts = [_validation_loss(runs), _action_error(runs)]
    keys = sorted(
        {key for run in runs for key in run.series if key.startswith("val/acc_")}, key=lambda key: as_number(key[8:])
    )
    if len(runs) == 1:
        lines = [
            Line(f"within {key[8:]}", _times(runs[0].series[key], 100), style_of(place))
            for place, key in enumerate(keys)
        ]
        charts.append(_figure("Action values within a distance", "%", lines, runs, from_zero=True))
    else:
        charts += [_chart(Kind(key, f"Action values within {key[8:]}", "%", True, factor=100.0), runs) for key in keys]
    return _grid([chart for chart in charts if chart])


def as_number(threshold: str) -> float:
    """Gives the number by which thresholds are sorted."""
    try:
        return float(threshold)
    except ValueError:
        return math.inf


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _times(series: Series, factor: float) -> list[tuple[float, float]]:
    return [(step, value * factor) for step, value in series.points]


def _chart(kind: Kind, runs: Sequence[RunRecord]) -> str:
    lines = [
        Line(run.label, _times(run.series[kind.key], kind.factor), style_of(place))
        for place, run in enumerate(runs)
        if kind.key in run.series
    ]
    if len(runs) == 1:
        lines = [Line(kind.title, line.points, line.style) for line in lines]
    return _figure(kind.title, kind.unit, lines, runs, from_zero=kind.from_zero, log=kind.may_log and wants_log(lines))


def _figure(
    title: str, unit: str, lines: list[Line], runs: Sequence[RunRecord], *, from_zero: bool = False, log: bool = False
) -> str:
    kept = [line for line in lines if any(not math.isnan(y) for _, y in line.points)]
    gaps = len({x for line in lines for x, y in line.points if math.isnan(y)})
    note = "" if not gaps else f"{gaps} logged update{'s have' if gaps > 1 else ' has'} no finite number."
    unit = ", ".join(filter(None, [unit, "logarithmic" if log else ""]))
    if not kept:
        return figure(title, missing(note or "Not in metrics.jsonl."), unit=unit)
    drawing = line_chart(
        _in_words(title, kept),
        kept,
        x_label="update",
        from_zero=from_zero,
        log=log,
        marks=_restarts(runs[0]) if len(runs) == 1 else (),
        frame=frame_for(runs),
    )
    entries = [(line.label, line.style) for line in kept]
    return figure(
        title, drawing, unit=unit, note=note, below=legend(entries) if len(entries) > 1 or len(runs) > 1 else ""
    )


def _in_words(title: str, lines: Sequence[Line]) -> str:
    """Says in words what the chart shows, for a screen reader."""
    said = []
    for line in lines[:8]:
        numbers = [(x, y) for x, y in line.points if not math.isnan(y)]
        (first, begin), (last, end) = numbers[0], numbers[-1]
        low = min(y for _, y in numbers)
        said.append(f"{line.label}: {begin:.4g} at update {first:g}, {end:.4g} at update {last:g}, lowest {low:.4g}")
    return f"{title}. " + "; ".join(said)


def _restarts(run: RunRecord) -> list[tuple[float, str]]:
    return [
        (float(attempt["first_step"]), f"attempt {place} begins after update {attempt['first_step']}")
        for place, attempt in enumerate(run.attempts, start=1)
        if place > 1 and "first_step" in attempt
    ]


def _validation_loss(runs: Sequence[RunRecord]) -> str:
    lines, series = _policy_lines(runs, "loss", "validation"), runs[0].series
    if len(runs) == 1 and "loss" in series and "val/loss" in series:
        means = _means_between(series["loss"], series["val/loss"])
        lines.append(Line("training, mean since the evaluation before", means, "base-mean dashed"))
    return _figure("Validation loss", "", lines, runs, log=wants_log(lines))


def _policy_lines(runs: Sequence[RunRecord], key: str, alone: str) -> list[Line]:
    """Gives a curve for the weights of each run, and one for their average; ``alone`` is the label of a single run."""
    several, lines = len(runs) > 1, []
    for place, run in enumerate(runs):
        label, style = averaged(run, several), f"c{place % 8} dotted" if several else AVERAGED
        shown = ((f"val/{key}", run.label if several else alone, style_of(place)), (f"val/ema_{key}", label, style))
        lines += [Line(said, run.series[name].points, look) for name, said, look in shown if name in run.series]
    return lines


def averaged(run: RunRecord, several: bool) -> str:
    """Labels the averaged weights of a run."""
    return f"{run.label}, averaged weights" if several else "averaged weights"


def _means_between(loss: Series, evaluations: Series) -> list[tuple[float, float]]:
    found, begin = [], 0
    for step in evaluations.steps:
        end = bisect_left(loss.steps, step + 1)
        numbers = [value for value in loss.values[begin:end] if not math.isnan(value)]
        found.append((float(step), fmean(numbers) if numbers else math.nan))
        begin = end
    return found


def _action_error(runs: Sequence[RunRecord]) -> str:
    lines = _policy_lines(runs, "action_l1", "policy")
    for key, (label, style) in BASELINES.items():
        # Equal in runs on the same validation set; where they differ, the tables tell them apart.
        found = [run.series[f"val/baseline_{key}_l1"] for run in runs if f"val/baseline_{key}_l1" in run.series]
        finals = [series.numbers[-1] for series in found if series.numbers]
        if finals and len(found) == len(runs) and max(finals) - min(finals) <= 1e-6 * max(finals):
            longest = max(found, key=lambda series: series.steps[-1])
            lines.append(Line(label, longest.points, style))
    return _figure("Action error", "mean |error|, data set's units", lines, runs, from_zero=True)
