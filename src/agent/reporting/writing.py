"""Writes ``report.html``: on request, and by a run itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from agent.reporting.collect import RunRecord, collect
from agent.reporting.page import render
from agent.safe_files import write_text

log = logging.getLogger(__name__)

_SHARE = 0.01


def write_page(runs: Sequence[RunRecord], out: Path) -> None:
    """Writes the report of these runs.

    Raises:
        ValueError: if there is no such place to write to.
        OSError: if it cannot be written.
    """
    if out.is_dir():
        raise ValueError(
            f"the report cannot be written: {out} is a folder; give a file, like --out {out / 'report.html'}"
        )
    if not out.parent.is_dir():
        raise ValueError(
            f"the report cannot be written: for {out} there is no folder {out.parent}; make it, or give another --out"
        )
    # A broken character in somebody's text must not cost the page.
    write_text(out, render(runs).encode("utf-8", "replace").decode("utf-8"))


class RunReport:
    """The report that a run keeps in its own folder. A failure is logged and stops nothing."""

    def __init__(self, run_dir: Path) -> None:
        self._out, self._lines = run_dir / "report.html", run_dir / "metrics.jsonl"
        self._ended, self._took = time.monotonic(), 0.0

    def refresh(self) -> None:
        """Writes it again, unless that would take more than a hundredth of the time."""
        if self._took <= _SHARE * (time.monotonic() - self._ended):
            self._write()

    def write(self) -> None:
        """Writes it at the end of the run, if anything was logged."""
        if self._write():
            log.info("report: %s", self._out)

    def _write(self) -> bool:
        begin, written = time.monotonic(), False
        try:
            if self._lines.exists() and self._lines.stat().st_size:
                write_page([collect(self._out.parent)], self._out)
                written = True
        except Exception:  # whatever a file may hold: the training is worth more than its report
            log.exception("the report could not be written; later: python -m agent.report %s", self._out.parent)
        self._ended = time.monotonic()
        self._took = self._ended - begin
        return written
