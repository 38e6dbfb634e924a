"""Draws charts as inline SVG: axes with ticks, lines, dots, hover titles; no script, no request, colours by CSS class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

from agent.reporting.axes import Axis, text_width, tick_text, value_range, widened
from agent.reporting.markup import breakable
from agent.reporting.sampling import Column, columns_of

Points = Sequence[tuple[float, float]]
"""(x, y) with increasing x; y is NaN where there is no number."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Points
    style: str
    """CSS classes: a colour ``c0`` … ``c7``, or ``base-…`` for a baseline, and ``dashed`` or ``dotted``."""


@dataclass(frozen=True)
class Frame:
    """Size of a chart in CSS pixels, with the room for tick labels."""

    width: int = 400
    height: int = 230
    left: float = 50
    """At least; longer numbers get more."""
    right: int = 16
    top: int = 8
    bottom: int = 40
    columns: int = 340
    """Most points of a curve; what has more is drawn as its mean within the band from its least to its greatest."""
    strips: int = 50
    """Most places with a hover title."""


_FEW_MARKS = 8

SMALL = Frame(width=190, height=106, left=42, right=10, top=8, bottom=20, columns=120, strips=0)


def wants_log(lines: Sequence[Line]) -> bool:
    """Whether the values are positive and span more than a factor of thirty."""
    values = [y for line in lines for _, y in line.points if not math.isnan(y)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 30


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "",
    from_zero: bool = False,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    frame: Frame | None = None,
) -> str:
    """Curves over a common axis, as an ``<svg>``.

    Args:
        title: what a screen reader says, plain text.
        lines: at least one with a number in it.
        x_label: under the axis; a hover title begins with it.
        from_zero: the axis of values begins at zero.
        log: a logarithmic axis; every value must be positive.
        marks: places on the x axis with a vertical line, and what the line says.
        frame: the size.
    """
    frame = frame or Frame()
    drawn = [(line, columns_of(line.points, frame.columns)) for line in lines]
    pieces = [column for _, columns in drawn for column in columns if column is not None]
    assert pieces, f"nothing to draw in {title}"
    low, high = min(c.low for c in pieces), max(c.high for c in pieces)
    y_axis = Axis(*value_range(low, high, from_zero, log), frame.height - frame.bottom, frame.top, log=log)
    # A label takes some 24 pixels down with the space around it.
    y_ticks = y_axis.ticks(max(2, int((frame.height - frame.bottom - frame.top) / 26)))
    frame = replace(frame, left=max(frame.left, *(text_width(tick_text(tick)) + 8 for tick in y_ticks)))
    first, last = min(c.first for c in pieces), max(c.last for c in pieces)
    x_axis = Axis(*widened(first, last, 0.0), frame.left, frame.width - frame.right)
    parts = [f"<title>{escape(title)}</title>", _grid(x_axis, y_axis, y_ticks, frame, x_label)]
    parts += _marks(marks, x_axis, frame)
    parts += [_curve(line, columns, x_axis, y_axis) for line, columns in drawn]
    if frame.strips:
        parts.append(_hover_strips(drawn, x_axis, frame, x_label))
    return _svg(frame.width, frame.height, title, "".join(parts))


def dot_chart(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], series: Sequence[tuple[str, str]], *, line_at: float
) -> str:
    """A row of dots for each name, as an ``<svg>``. Where a name is long, all stand above their rows.

    Args:
        title: what a screen reader says.
        rows: a name and one value ≥ 0 for each of the series, NaN for none.
        series: label and CSS class of each.
        line_at: where a vertical line stands.
    """
    width, left, right, row_height, top = 400, 118, 16, 20, 6
    above = any(text_width(name) > left - 8 for name, _ in rows)
    if above:
        left, row_height = right, 34
    values = [value for _, row in rows for value in row if not math.isnan(value)]
    bottom = top + row_height * len(rows)
    axis = Axis(0.0, max([line_at, *values]) * 1.05, left, width - right)
    parts = [f"<title>{escape(title)}</title>"]
    for tick in axis.ticks(6):
        x = f"{axis.at(tick):.1f}"
        parts += [_straight("grid", x, x, top, bottom), _label(x, bottom + 15, tick_text(tick))]
    x = f"{axis.at(line_at):.1f}"
    parts.append(_straight("limit", x, x, top, bottom))
    for number, (name, row) in enumerate(rows):
        y = top + row_height * number + (24 if above else 10)
        place = f'class="over" x="0" y="{y - 12}"' if above else f'x="{left - 8}" y="{y + 4}" text-anchor="end"'
        parts.append(f"<text {place}>{escape(_fitted(name, width))}</text>")
        for (label, style), value in zip(series, row, strict=True):
            if not math.isnan(value):
                said = escape(f"{name}, {label}: {value:.3g}")
                place = f'cx="{axis.at(value):.1f}" cy="{y}" r="5"'
                parts.append(f'<circle class="dot {style}" {place}><title>{said}</title></circle>')
    return _svg(width, bottom + 22, title, "".join(parts))


def _fitted(name: str, width: float) -> str:
    """The name, without its middle where it is too long: arms are told apart at the beginning, joints at the end."""
    kept = len(name)
    while kept and text_width(name[: kept - kept // 2] + "…" + name[len(name) - kept // 2 :]) > width:
        kept -= 1
    return name if text_width(name) <= width else f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"


def legend(entries: Sequence[tuple[str, str]], kind: str = "line") -> str:
    """An HTML list of (label, CSS class), which wraps where the page is narrow."""
    shape = '<line class="{}" x1="1" x2="21" y1="5" y2="5"/>'
    if kind == "dot":
        shape = '<circle class="dot {}" cx="11" cy="5" r="4.5"/>'
    key = '<svg class="key" viewBox="0 0 22 10" aria-hidden="true">{}</svg>'
    items = (f"<li>{key.format(shape.format(style))}<span>{breakable(label)}</span></li>" for label, style in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(width: int, height: int, title: str, inside: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{inside}</svg>'


def _straight(style: str, x1: object, x2: object, y1: object, y2: object) -> str:
    return f'<line class="{style}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'


def _label(x: str, y: object, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _grid(x_axis: Axis, y_axis: Axis, y_ticks: Sequence[float], frame: Frame, x_label: str) -> str:
    left, floor, wall = f"{frame.left:g}", frame.height - frame.bottom, frame.width - frame.right
    # A label takes some 34 pixels across with the space around it.
    x_ticks = x_axis.ticks(max(2, int((wall - frame.left) / 50)))
    parts = []
    for tick in y_ticks:
        y = y_axis.at(tick)
        parts.append(_straight("grid", left, wall, f"{y:.1f}", f"{y:.1f}"))
        parts.append(_label(f"{frame.left - 6:g}", f"{y + 4:.1f}", tick_text(tick), "end"))
    parts.append(_straight("axis", left, wall, floor, floor))
    whole = [tick for tick in x_ticks if tick.is_integer()]  # there is no update 1.5
    parts += [_label(f"{x_axis.at(tick):.1f}", floor + 17, tick_text(tick)) for tick in whole]
    if x_label:
        parts.append(_label(f"{(frame.left + wall) / 2:g}", frame.height - 4, escape(x_label)))
    return "".join(parts)


def _marks(marks: Sequence[tuple[float, str]], axis: Axis, frame: Frame) -> list[str]:
    """Lines from top to bottom, or short ones where many would hide the curves; at most one for each pixel."""
    floor = frame.height - frame.bottom
    top = frame.top if len(marks) <= _FEW_MARKS else floor - 9
    places = {f"{axis.at(x):.0f}": text for x, text in marks if axis.low <= x <= axis.high}
    return [
        f'<line class="mark" x1="{x}" x2="{x}" y1="{top}" y2="{floor}"><title>{escape(text)}</title></line>'
        for x, text in places.items()
    ]


def _curve(line: Line, columns: list[Column | None], x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for run in _unbroken(columns):
        middle = [f"{x_axis.at(c.x):.1f} {y_axis.at(c.mean):.1f}" for c in run]
        if any(c.low < c.high for c in run):
            above = [f"{x_axis.at(c.x):.1f} {y_axis.at(c.high):.1f}" for c in run]
            below = [f"{x_axis.at(c.x):.1f} {y_axis.at(c.low):.1f}" for c in reversed(run)]
            parts.append(f'<path class="band {line.style}" d="M{"L".join([*above, *below])}Z"/>')
        if len(run) == 1:
            x, y = middle[0].split()
            parts.append(f'<circle class="point {line.style}" cx="{x}" cy="{y}" r="3"/>')
        else:
            parts.append(f'<path class="line {line.style}" d="M{"L".join(middle)}"/>')
    return "".join(parts)


def _unbroken(columns: Sequence[Column | None]) -> list[list[Column]]:
    """The stretches between gaps."""
    stretches: list[list[Column]] = [[]]
    for column in columns:
        if column is not None:
            stretches[-1].append(column)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _hover_strips(drawn: list[tuple[Line, list[Column | None]]], x_axis: Axis, frame: Frame, x_label: str) -> str:
    """Invisible strips whose titles tell every curve's values there."""
    places = sorted({column.x for _, columns in drawn for column in columns if column is not None})
    count = min(frame.strips, len(places))
    texts: list[list[str]] = [[] for _ in range(count)]
    ranges: list[list[float]] = [[] for _ in range(count)]
    for line, columns in drawn:
        inside: list[list[Column]] = [[] for _ in range(count)]
        for column in columns:
            if column is not None:
                part = (column.x - x_axis.low) / (x_axis.high - x_axis.low)
                inside[min(count - 1, int(part * count))].append(column)
        for number, found in enumerate(inside):
            if found:
                texts[number].append(f"{line.label}: {_summary(found)}")
                ranges[number] += [found[0].first, found[-1].last]
    edges = [x_axis.start + (x_axis.end - x_axis.start) * number / count for number in range(count + 1)]
    parts = []
    for (begin, end), text, covered in zip(pairwise(edges), texts, ranges, strict=True):
        if text:
            first, last = min(covered), max(covered)
            where = f"{first:g}" if first == last else f"{first:g} to {last:g}"
            said = escape("\n".join([f"{x_label} {where}".strip(), *text]))
            place = f'x="{begin:.1f}" width="{end - begin:.1f}" y="{frame.top}"'
            parts.append(
                f'<rect class="strip" {place} height="{frame.height - frame.bottom - frame.top}">'
                f"<title>{said}</title></rect>"
            )
    return "".join(parts)


def _summary(columns: Sequence[Column]) -> str:
    low, high = min(c.low for c in columns), max(c.high for c in columns)
    total = sum(c.count for c in columns)
    mean = sum(c.mean * c.count for c in columns) / total
    return f"{mean:.4g}" if total == 1 or low == high else f"{mean:.4g} ({low:.4g} to {high:.4g})"
