"""Writes the sections about what a run ran on and with: hardware, versions, config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from agent.reporting.collect import RunRecord
from agent.reporting.markup import NOTHING, details, missing, paragraph, section, table
from agent.spelling import literal, ranges

_CONFIG_CHARACTERS = 200_000


def hardware(runs: Sequence[RunRecord]) -> str:
    """Writes machine and versions of every attempt, with equal ones together."""
    heads, columns = [""], []
    for run in runs:
        groups: list[tuple[dict[str, Any], list[int]]] = []
        for place, attempt in enumerate(run.attempts, start=1):
            facts = {"host": attempt.get("host"), **(attempt.get("environment") or {})}
            alike = next((places for other, places in groups if other == facts), None)
            groups.append((facts, [place])) if alike is None else alike.append(place)
        for facts, places in groups[-12:]:
            name = [run.label] if len(runs) > 1 else []
            which = [f"attempts {ranges(places, '–')}"] if len(groups) > 1 else []
            heads.append(", ".join(name + which) or "value")
            columns.append(facts)
    if not columns:
        return section("hardware", "Hardware", missing("status.json tells of no attempts, and so of no machine."))
    keys = list(dict.fromkeys(key for facts in columns for key in facts))
    rows = [[key.replace("_", " "), *(_plain(facts.get(key)) for facts in columns)] for key in keys]
    words = range(1, len(heads))
    parts = [table("Machines and versions", heads, rows, text_columns=words)]
    if any(set(facts) == {"host"} for facts in columns):
        parts.append(missing("Of attempts without more than a host, the machine was not recorded."))
    return section("hardware", "Hardware", *parts)


def settings(runs: Sequence[RunRecord]) -> str:
    """Writes where the configs differ, and each config in full."""
    parts = []
    if len(runs) > 1:
        flat = [dict(flattened(run.config)) for run in runs]
        keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "name"]
        differing = [key for key in keys if len({one.get(key, NOTHING) for one in flat}) > 1]
        rows = [[key, *(one.get(key, NOTHING) for one in flat)] for key in differing]
        heads = ["key", *(run.label for run in runs)]
        alike = f"Keys that are alike and not shown: {len(keys) - len(differing)}."
        parts += (
            [table("Where the configs differ", heads, rows, text_columns=range(1, len(heads)))]
            if rows
            else [paragraph("The configs do not differ.")]
        )
        parts.append(paragraph(alike, "note"))
    for run in runs:
        title = "config.yaml" if len(runs) == 1 else f"config.yaml of {run.label}"
        text = run.config_text[:_CONFIG_CHARACTERS]
        # A block that scrolls must be within the keyboard's reach.
        block = f'<pre tabindex="0">{escape(text)}</pre>'
        parts.append(details(title, block) if text else missing(f"{run.label} has no config.yaml."))
    return section("config", "Config", *parts)


def flattened(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields a nested config as (dotted key, value) pairs; the items of a list have numbers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    empty = True
    for key, item in items:
        empty = False
        yield from flattened(item, f"{path}.{key}" if path else str(key))
    if empty:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return NOTHING
    return ", ".join(map(_plain, value)) if isinstance(value, list) else literal(value)
