"""Makes the HTML of the page: paragraphs, figures, tables. Everything that a run wrote is escaped here."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from agent import spelling

NOTHING = "–"
"""Stands where a table has no value."""


def number(value: float | None, unit: str = "") -> str:
    """Writes a number with four significant digits and its thousands apart."""
    if value is None or math.isnan(value):
        return NOTHING
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def percent(part: float | None) -> str:
    """Writes a fraction in percent: 0.125 → ``12.5 %``."""
    return NOTHING if part is None or math.isnan(part) else f"{100 * part:.1f} %"


def duration(seconds: float | None) -> str:
    """Writes a measured time in two units."""
    return NOTHING if seconds is None else spelling.duration(seconds)


def breakable(text: str) -> str:
    """Escapes a text and lets its long names break after their parts, not within a word."""
    return re.sub(r"([/._])", r"\1<wbr>", escape(text))


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def missing(text: str) -> str:
    """Says in place of a figure why there is nothing to show."""
    return paragraph(text, "missing")


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page, which ``#name`` leads to."""
    heading = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}{"".join(parts)}</section>'


def figure(caption: str, drawing: str, *, unit: str = "", note: str = "", below: str = "") -> str:
    """A chart with its heading above, its legend and a remark below."""
    of = f" <small>{escape(unit)}</small>" if unit else ""
    remark = paragraph(note, "note") if note else ""
    return f"<figure><figcaption>{breakable(caption)}{of}</figcaption>{drawing}{below}{remark}</figure>"


def details(title: str, inside: str, *, opened: bool = False) -> str:
    """A part that the reader folds out."""
    return f"<details{' open' if opened else ''}><summary>{breakable(title)}</summary>{inside}</details>"


def table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[int] = ()
) -> str:
    """A table of plain text, whose first column names the rows.

    It scrolls sideways in itself where the page is narrow.

    Args:
        caption: what it shows.
        heads: of all columns.
        rows: as long as ``heads``.
        text_columns: columns of words, set flush left; all others but the first are numbers.
    """

    def cell(place: int, text: str, kind: str) -> str:
        style = ' class="text"' if place in text_columns or place == 0 else ""
        scope = {"head": ' scope="col"', "row": ' scope="row"'}.get(kind, "")
        tag = "td" if kind == "cell" else "th"
        inside = _folded(text) if kind == "cell" else breakable(text)
        return f"<{tag}{scope}{style}>{inside}</{tag}>"

    head = "".join(cell(place, text, "head") for place, text in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(cell(place, text, 'cell' if place else 'row') for place, text in enumerate(row))}</tr>"
        for row in rows
    )
    label = escape(caption)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _folded(text: str) -> str:
    """Escapes a text; a long one, such as a traceback, shows its last line and folds out."""
    lines = text.strip().splitlines() or [""]
    if len(lines) == 1 and len(text) <= 300:
        return escape(text)
    return f"<details><summary>{escape(lines[-1][:200])}</summary><pre>{escape(text[:20_000])}</pre></details>"
