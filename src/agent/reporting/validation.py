"""Writes the sections of the validation: errors by dimension and by step of the chunk, and chunks of held-out episodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from agent.reporting.charts import SMALL, Line, dot_chart, legend, line_chart
from agent.reporting.collect import RunRecord
from agent.reporting.curves import AVERAGED, BASELINES, as_number, averaged, style_of, validation_charts
from agent.reporting.evaluations import Chunk, Evaluation
from agent.reporting.markup import NOTHING, details, figure, missing, number, paragraph, percent, section, table
from agent.validation.record import Errors

_MOST_SMALL_CHARTS = 1200  # times curves: beyond it the page would take megabytes
_UNITS = "Errors are mean |predicted − recorded| over unpadded steps, in the units of the data set."

Shown = tuple[RunRecord, Evaluation, str]
"""A run, its last evaluation and the run's CSS classes."""


def validation(runs: Sequence[RunRecord]) -> str:
    """Draws the curves of the validation, then the last one in detail."""
    return section("validation", "Validation", validation_charts(runs), _detail(runs))


def _detail(runs: Sequence[RunRecord]) -> str:
    shown = [(run, run.evaluations[-1], style_of(place)) for place, run in enumerate(runs) if run.evaluations]
    absent = [run.label for run in runs if not run.evaluations]
    parts = []
    if absent:
        of = f" of {', '.join(absent)}" if len(runs) > 1 else ""
        parts.append(missing(f"No error by dimension{of}: there are no arrays in the run folder's validation/."))
    by_names: dict[tuple[str, ...], list[Shown]] = {}
    for one in shown:
        by_names.setdefault(tuple(one[1].names), []).append(one)
    for alike in by_names.values():
        charts = [_dimension_chart(alike, len(runs)), _step_chart(alike, len(runs))]
        parts += [f'<div class="charts uneven">{"".join(charts)}</div>', _dimension_table(alike, len(runs))]
        parts.append(_distance_table(alike, len(runs)))
    parts += [_by_dataset(one, len(runs)) for one in shown if one[1].datasets]
    return "".join(parts)


def _where(shown: Sequence[Shown]) -> str:
    steps = sorted({evaluation.step for _, evaluation, _ in shown})
    return f"at update {steps[0]:,}" if len(steps) == 1 else "at the last evaluation of each run"


class _Column(NamedTuple):
    """One error of a table or chart."""

    label: str
    style: str
    error: Errors
    mean: Errors | None
    """The error of the mean training action on the same validation set."""


def _columns(shown: Sequence[Shown], total: int) -> list[_Column]:
    """Lists the errors of the policies, then those of the baselines."""
    found = []
    for run, evaluation, style in shown:
        mean = evaluation.baselines.get("mean")
        found.append(_Column(run.label if total > 1 else "policy", style, evaluation.policy, mean))
        if evaluation.ema is not None:
            label = averaged(run, several=total > 1)
            found.append(_Column(label, f"{style} hollow" if total > 1 else AVERAGED, evaluation.ema, mean))
        if total == 1 and len(run.evaluations) > 1:
            best = run.evaluations[0]
            found.append(_Column(f"best, update {best.step:,}", "c0 hollow", best.policy, best.baselines.get("mean")))
    for key, (label, style) in BASELINES.items():
        blocks = [evaluation.baselines.get(key) for _, evaluation, _ in shown]
        first = blocks[0]
        # Thresholds may differ, and the errors be of the same samples.
        if first is not None and all(block and replace(block, acc=first.acc) == first for block in blocks):
            found.append(_Column(label, style, first, shown[0][1].baselines.get("mean")))
    return found


def _dimension_chart(shown: Sequence[Shown], total: int) -> str:
    # A run is held against the mean action of its own training data: that of another can have other units.
    columns = [column for column in _columns(shown, total) if column.mean not in (None, column.error)]
    if not columns:
        return ""
    series = [(column.label, column.style) for column in columns]
    values = [(name, [_ratio(column, place) for column in columns]) for place, name in enumerate(shown[0][1].names)]
    caption, unit = f"Error by dimension {_where(shown)}", "relative to the mean action's"
    drawing = dot_chart(f"{caption}, {unit}. The table has the numbers", values, series, line_at=1.0)
    note = "Left of the line at 1: better than always predicting the mean training action."
    return figure(caption, drawing, unit=unit, note=note, below=legend(series, "dot"))


def _dimension_table(shown: Sequence[Shown], total: int) -> str:
    columns = _columns(shown, total)
    rows = [
        [name, *(number(column.error.per_dimension_l1[place]) for column in columns)]
        for place, name in enumerate(shown[0][1].names)
    ]
    rows.append(["all", *(number(column.error.action_l1) for column in columns)])
    heads = ["dimension", *(column.label for column in columns)]
    return table(f"Action error by dimension {_where(shown)}", heads, rows) + paragraph(_UNITS, "note")


def _distance_table(shown: Sequence[Shown], total: int) -> str:
    columns = [column for column in _columns(shown, total) if column.error.acc]
    thresholds = sorted({key for column in columns for key in column.error.acc}, key=as_number)
    if not thresholds:
        return ""
    rows = [[key, *(percent(column.error.acc.get(key)) for column in columns)] for key in thresholds]
    heads = ["distance", *(column.label for column in columns)]
    return table(f"Action values within a distance {_where(shown)}", heads, rows)


def _ratio(column: _Column, place: int) -> float:
    assert column.mean is not None
    reference = column.mean.per_dimension_l1[place]
    return column.error.per_dimension_l1[place] / reference if reference > 0 else math.nan


def _step_chart(shown: Sequence[Shown], total: int) -> str:
    columns = [
        (label, style, error)
        for label, style, error, _ in _columns(shown, total)
        if any(not math.isnan(value) for value in error.per_step_l1)
    ]
    if not columns:
        return ""
    lines = [
        Line(
            label,
            [(float(step), l1) for step, l1 in enumerate(error.per_step_l1, 1)],
            style.replace("hollow", "dashed"),
        )
        for label, style, error in columns
    ]
    caption = f"Error by step of the chunk {_where(shown)}"
    length = max(len(error.per_step_l1) for _, _, error in columns)
    said = f"{caption}, steps 1 to {length}, mean over all dimensions"
    drawing = line_chart(said, lines, x_label="step of the chunk", from_zero=True)
    return figure(caption, drawing, below=legend([(line.label, line.style) for line in lines]))


def _by_dataset(shown: Shown, total: int) -> str:
    run, evaluation, _ = shown
    columns: dict[str, list[Errors | None]] = {"policy": [one.errors for one in evaluation.datasets]}
    columns["averaged weights"] = [one.ema for one in evaluation.datasets]
    for key, (label, _) in BASELINES.items():
        columns[label] = [one.baselines.get(key) for one in evaluation.datasets]
    columns = {label: errors for label, errors in columns.items() if any(errors)}
    rows = [
        [one.name, name, *(_cell(errors[place], dimension) for errors in columns.values())]
        for place, one in enumerate(evaluation.datasets)
        for dimension, name in enumerate([*one.names, "all"])
    ]
    of = f" of {run.label}" if total > 1 else ""
    return table(
        f"Action error{of} by data set at update {evaluation.step:,}",
        ["data set", "dimension", *columns],
        rows,
        text_columns=(1,),
    )


def _cell(errors: Errors | None, dimension: int) -> str:
    if errors is None:
        return NOTHING
    return number([*errors.per_dimension_l1, errors.action_l1][dimension])


def chunks(runs: Sequence[RunRecord]) -> str:
    """Draws predicted over recorded actions, a small chart for each dimension."""
    shown = [
        (run, {_key(chunk): chunk for chunk in run.evaluations[-1].chunks}, style_of(place))
        for place, run in enumerate(runs)
        if run.evaluations and run.evaluations[-1].chunks
    ]
    title = "Action chunks of held-out episodes"
    if not shown:
        return section("chunks", title, missing("None are in the run folder's validation/ yet."))
    everywhere = [key for key in shown[0][1] if all(key in found for _, found, _ in shown)]
    if not everywhere:
        return section("chunks", title, missing("The runs have none in common: they validated on different frames."))
    most = max(1, _MOST_SMALL_CHARTS // (len(shown) + 1) // max(len(shown[0][1][key].names) for key in everywhere))
    parts = [
        _overlay([(run, found[key], style) for run, found, style in shown], opened=place == 0, total=len(runs))
        for place, key in enumerate(everywhere[:most])
    ]
    steps = ", ".join(f"{run.label} at update {run.evaluations[-1].step:,}" for run, _, _ in shown)
    said = f"Recorded actions, and what the policy predicted from the chunk's first frame: {steps}."
    entries = [("recorded", "recorded")]
    entries += [("predicted" if len(runs) == 1 else run.label, style) for run, _, style in shown]
    if len(runs) == 1 and runs[0].evaluations[-1].chunks[0].averaged is not None:
        entries.append(("predicted with the averaged weights", AVERAGED))
    return section("chunks", title, paragraph(said, "note"), legend(entries), *parts)


def _key(chunk: Chunk) -> tuple[object, ...]:
    return chunk.dataset, chunk.episode, chunk.frame, str(chunk.recorded), str(chunk.names)


def _overlay(shown: Sequence[tuple[RunRecord, Chunk, str]], *, opened: bool, total: int) -> str:
    first = shown[0][1]
    figures = []
    for dimension, name in enumerate(first.names):
        lines = [Line("recorded", _dimension(first.recorded, first.valid, dimension), "recorded")]
        said = []
        for run, chunk, style in shown:
            lines.append(Line(run.label, _dimension(chunk.predicted, chunk.valid, dimension), style))
            said.append(f"mean |error|{'' if total == 1 else f' of {run.label}'} {number(_gap(lines[0], lines[-1]))}")
        if total == 1 and first.averaged is not None:
            lines.append(Line("averaged", _dimension(first.averaged, first.valid, dimension), AVERAGED))
            said.append(f"with the averaged weights {number(_gap(lines[0], lines[-1]))}")
        if any(not math.isnan(y) for line in lines for _, y in line.points):
            figures.append(figure(name, line_chart(f"{name}: {', '.join(said)}", lines, frame=SMALL)))
    inside = f'<div class="small-charts">{"".join(figures)}</div>'
    return details(f"{first.dataset}, episode {first.episode}, frame {first.frame}", inside, opened=opened)


def _gap(recorded: Line, predicted: Line) -> float:
    """Computes the mean distance of two curves where both have a number."""
    gaps = [abs(y - real) for (_, real), (_, y) in zip(recorded.points, predicted.points, strict=True)]
    numbers = [gap for gap in gaps if not math.isnan(gap)]
    return fmean(numbers) if numbers else math.nan


def _dimension(rows: Sequence[Sequence[float]], valid: Sequence[bool], dimension: int) -> list[tuple[float, float]]:
    """Picks one dimension of the chunk's steps before the episode's end."""
    return [
        (float(place), row[dimension])
        for place, (row, real) in enumerate(zip(rows, valid, strict=True), start=1)
        if real
    ]
