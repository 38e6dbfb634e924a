"""Shows what a preflight has found: rows with problem and advice, as a table for people and a file for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from agent.preflight.refusal import parted
from agent.safe_files import write_text

Result = Literal["pass", "warn", "fail"]

_WIDTH = 120
_NAME = 26  # characters of a name, in the table


@dataclass(frozen=True)
class Row:
    """One finding of the preflight."""

    name: str
    result: Result
    text: str
    """What was found."""
    change: str = ""
    """What to change; empty for a pass only."""
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers for ``report.json``."""

    def __post_init__(self) -> None:
        assert self.result == "pass" or self.change, f"{self.name}: {self.text}: what is to be changed?"


class NotChecked(Exception):
    """Something could not be looked at, because of what another row reports as wrong."""


def failed(name: str, error: Exception | str, otherwise: str = "correct that, and check again") -> Row:
    """Makes a fail of an error or a message of this program.

    Args:
        name: of the row.
        error: what was raised or said.
        otherwise: what to change where the error does not say it.
    """
    problem, advice = parted(error)
    return Row(name, "fail", problem, advice or otherwise)


def unchecked(name: str, error: NotChecked, where: str = " above") -> Row:
    """Warns that something was not looked at; ``where`` says in which rows the cause stands, as seen from this one."""
    return Row(name, "warn", f"not checked, because {error}", f"put right what fails{where}, and check again")


def worst(rows: Sequence[Row]) -> Result:
    """Gives ``fail`` if a row fails, else ``warn`` if a row warns, else ``pass``."""
    results = {row.result for row in rows}
    return "fail" if "fail" in results else "warn" if "warn" in results else "pass"


def table(rows: Sequence[Row]) -> str:
    """Writes a line for each row, and under it what to change."""
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
    """Wraps a text beside its head. Its own lines stay lines; an indented line, which is of a table, stays whole."""
    lines: list[str] = []
    for part in text.splitlines():
        if part.startswith("  "):
            lines.append(part)
            continue
        lines += textwrap.wrap(part, max(_WIDTH - len(head), 40), break_long_words=False, break_on_hyphens=False)
    return [head + "".join(lines[:1]), *(" " * len(head) + line for line in lines[1:])]


def write(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Writes ``report.json``: the result, the facts that the predictions rest on, and every row."""
    content = {"result": worst(rows), **facts, "rows": [asdict(row) for row in rows]}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
