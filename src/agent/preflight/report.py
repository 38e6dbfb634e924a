"""What a preflight found: its rows, the table for people and the file for programs."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Result = Literal["pass", "warn", "fail"]

_WIDTH = 120
_NAME = 26  # characters of a name, in the table


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    name: str
    result: Result
    text: str
    """What was found."""
    change: str = ""
    """What to change; never empty for a fail."""
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers for ``report.json``."""

    def __post_init__(self) -> None:
        assert self.result == "pass" or self.change, f"{self.name}: {self.text}: what is to be changed?"


class NotChecked(Exception):
    """Something could not be looked at, because of what another row reports as wrong."""


# What to write stands behind a semicolon, the end of a sentence (no "3. " or "… "), a line, or a colon and an order.
_ADVICE = re.compile(r"; |(?<=[^.\d])\. |\.?\n|: (?=(?:write|set|give|choose|name) )")


def failed(name: str, error: Exception | str, otherwise: str = "correct that, and check again") -> Row:
    """A fail from a message of this program, whose first sentence says what is wrong and the others what to write.

    Args:
        name: of the row.
        error: the message.
        otherwise: what to change where the message does not say it.
    """
    message = str(error).strip()
    text, *change = _ADVICE.split(message, maxsplit=1)
    return Row(name, "fail", text, change[0].strip() if change else otherwise)


def worst(rows: Sequence[Row]) -> Result:
    """``fail`` if one row is that, else ``warn`` if one is, else ``pass``."""
    results = {row.result for row in rows}
    return "fail" if "fail" in results else "warn" if "warn" in results else "pass"


def table(rows: Sequence[Row]) -> str:
    """A line for each row, and under it what to change."""
    width = min(max(len(row.name) for row in rows), _NAME)
    lines = []
    for row in rows:
        head = f"{row.result:<4}  {row.name:<{width}}  "
        if len(row.name) > width:  # on a line of its own, so that one long name does not narrow all
            lines.append(head.rstrip())
            head = " " * (width + 8)
        lines += _wrapped(head, row.text)
        if row.change:
            lines += _wrapped(" " * (width + 6) + "→ ", row.change)
    return "\n".join(lines)


def _wrapped(head: str, text: str) -> list[str]:
    """The text beside its head; the lines of a text that has several stay lines, and those of a table stay whole."""
    lines: list[str] = []
    for part in text.splitlines():
        if part.startswith("  "):
            lines.append(part)
            continue
        lines += textwrap.wrap(part, max(_WIDTH - len(head), 40), break_long_words=False, break_on_hyphens=False)
    return [head + "".join(lines[:1]), *(" " * len(head) + line for line in lines[1:])]


def write(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """``report.json``: the result, the facts that the predictions rest on, and every row."""
    content = {"result": worst(rows), **facts, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
