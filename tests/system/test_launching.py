"""The tests' own reader of a run that is still going."""

from __future__ import annotations

from pathlib import Path

from support.launching import Workplace


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    assert place.metrics("run") == []
    path = tmp_path / "runs" / "run" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert place.metrics("run") == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert place.metrics("run") == [{"step": 1}, {"step": 2}]
