"""Renders the page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from agent.reporting import conditions, curves, facts, validation
from agent.reporting.collect import RunRecord
from agent.reporting.markup import breakable, missing, paragraph
from agent.spelling import moment

# Nothing may be loaded and no script may run, whatever a run's texts hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_NAVIGATION = {
    "training": "Training",
    "validation": "Validation",
    "chunks": "Action chunks",
    "numbers": "Numbers",
    "restarts": "Restarts",
    "hardware": "Hardware",
    "config": "Config",
}


def render(runs: Sequence[RunRecord]) -> str:
    """Renders the report of one run, or the comparison of several.

    Args:
        runs: at least one; their labels are made different from each other.
    """
    assert runs
    _label_apart(runs)
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.label for run in runs)}"
    head = _about(runs[0]) + facts.tiles(runs[0]) if len(runs) == 1 else "".join(_about(run, run.label) for run in runs)
    sections = [
        curves.training(runs),
        validation.validation(runs),
        validation.chunks(runs),
        facts.numbers(runs),
        facts.restarts(runs),
        conditions.hardware(runs),
        conditions.settings(runs),
    ]
    if len(runs) > 1:  # what differs is what one looks for
        sections = [sections[3], sections[6], *sections[:3], *sections[4:6]]
    # In the order of the page.
    whole = "".join(sections)
    order = sorted(_NAVIGATION, key=lambda name: whole.index(f'<section id="{name}"'))
    links = "".join(f'<li><a href="#{name}">{_NAVIGATION[name]}</a></li>' for name in order)
    made = moment(time.time(), "%Y-%m-%d %H:%M:%S UTC")
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)} – report</title>'
        f"<style>{style}</style></head><body><header><h1>{breakable(title)}</h1>{head}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{"".join(sections)}</main>'
        f"<footer>{paragraph(f'Written {made} from {", ".join(str(run.path) for run in runs)}')}</footer></body></html>\n"
    )


def _label_apart(runs: Sequence[RunRecord]) -> None:
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = f"{run.label} ({run.path})"


def _about(run: RunRecord, label: str = "") -> str:
    state = run.state
    known = state if state in ("running", "stopped", "preempted", "interrupted", "finished", "failed") else "unknown"
    step = run.status.get("step", run.last_step)
    of = f" of {run.planned:,}" if run.planned else ""
    name = f"<b>{breakable(label)}</b> " if label else ""
    parts = [f'<p class="state">{name}<span class="badge {known}">{escape(state)}</span> at update {step:,}{of}']
    if "updated" in run.status and isinstance(run.status["updated"], int | float):
        when = moment(run.status["updated"], "%Y-%m-%d %H:%M UTC")
        parts.append(f", {when}")
    parts.append("</p>")
    if run.about_state:
        parts.append(paragraph(run.about_state[:300], "note"))
    return "".join(parts) + "".join(missing(problem) for problem in run.problems)
