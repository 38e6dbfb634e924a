"""Runs ``--check true`` and reads what it left."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.forked import ForkServer
from support.launching import Workplace


@dataclass
class Checked:
    """What a check left."""

    output: str
    state: dict[str, Any]
    """What it told the script that launched it."""
    report: dict[str, Any]

    def rows(self, name: str, result: str | None = None) -> list[dict[str, Any]]:
        """The rows whose name begins so."""
        return [r for r in self.report["rows"] if r["name"].startswith(name) and result in (None, r["result"])]

    def row(self, name: str) -> dict[str, Any]:
        """The only one."""
        (row,) = self.rows(name)
        return row


def check(
    server: ForkServer, place: Workplace, name: str, *overrides: str, hook: str | None = None, **environment: str
) -> Checked:
    """A check in a process that has torch imported already."""
    status = place.folder / f"{name}-{time.monotonic_ns()}.json"
    told = {"VLA_STATUS_FILE": str(status), "VLA_ATTEMPT": "1"}
    output = server.start(place, name, "--check", "true", *overrides, hook=hook, **told, **environment).wait()
    report = place.folder / "runs" / name / "check" / "report.json"
    assert report.is_file(), output
    return Checked(output, json.loads(status.read_text()), json.loads(report.read_text()))


def rewrite(dataset: Path, change: Any) -> None:
    """Changes the columns of a data set's only data file: ``change`` gets name → array and edits in place."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (path,) = (dataset / "data").rglob("*.parquet")
    table = pq.read_table(path)
    names = ["observation.state", "action", "timestamp", "task_index", "episode_index", "frame_index"]
    columns = {name: np.array(table[name].to_pylist()) for name in names}
    change(columns)
    for name, values in columns.items():
        kind = table.schema.field(name).type
        table = table.set_column(
            table.column_names.index(name), table.schema.field(name), pa.array(values.tolist(), kind)
        )
    pq.write_table(table, path)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }
