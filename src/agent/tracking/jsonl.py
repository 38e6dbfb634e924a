"""Writes ``metrics.jsonl``, one JSON object a line for every logged update; ``agent.lifecycle.records`` reads it."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from agent.lifecycle.records import MetricsLines, read_metrics
from agent.safe_files import write_text

log = logging.getLogger(__name__)


class JsonLines:
    """``metrics.jsonl``: one object per logged update, steps strictly increasing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._size = 0
        self._pending = b""  # lines that a full disk did not take; they go first once there is room

    def rewind(self, step: int, every: int = 0) -> list[dict[str, Any]]:
        """Opens the file for the updates after ``step``; lines beyond it, and a torn last line, are dropped.

        Damaged lines are set aside. They and lines that should be there and are not, one every ``every`` updates, are
        said in the log.

        Returns:
            The lines that stay.
        """
        found = read_metrics(self.path)
        kept = [record for record in found.records if record["step"] <= step]  # others will be done again
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if found.damaged:
            self._set_aside(found)
        last = kept[-1]["step"] if kept else 0
        if (step and not found.there) or (every and last + every <= step):
            what = f"ends at update {last}" if found.there else "is not there"
            log.warning(
                "%s %s, but the run continues after update %d: the lines between are lost, training loses nothing",
                self.path, what, step,
            )  # fmt: skip
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._handle).st_size
        return kept

    def _set_aside(self, found: MetricsLines) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged")
        try:
            with open(aside, "ab") as stream:
                stream.write(b"".join(line.raw + b"\n" for line in found.damaged))
        except OSError as error:
            log.warning("%s cannot be written, what is damaged is lost: %s", aside, error)
        log.warning(
            "%s is damaged and its bad lines were moved to %s, training loses nothing: %s",
            self.path, aside.name, "; ".join(found.problems()),
        )  # fmt: skip

    def has(self, step: int) -> bool:
        """Whether there is a line of this update."""
        return any(record["step"] == step for record in read_metrics(self.path).records)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line, whole. What a full disk does not take is kept and written later."""
        waiting = bool(self._pending)
        self._pending += (json.dumps(record) + "\n").encode()
        error = self._flush()
        if error is not None and not waiting:
            log.warning("%s cannot be written (%s); its lines wait until there is room", self.path, error.strerror)

    def _flush(self) -> OSError | None:
        assert self._handle is not None
        try:
            written = os.write(self._handle, self._pending)
            if written < len(self._pending):
                os.ftruncate(self._handle, self._size)  # no half lines
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            return error
        self._size += len(self._pending)
        self._pending = b""
        return None

    def sync(self) -> None:
        """Brings the lines to the disk: a checkpoint must not outlive the lines of its updates."""
        if self._handle is None:
            return
        self._flush()
        try:
            os.fsync(self._handle)
        except OSError as error:  # NFS says so late that the disk is full
            log.warning("%s could not be brought to the disk: %s", self.path, error.strerror)

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            self._flush()
            if self._pending:
                log.error("%d lines of %s are lost, the disk was full", self._pending.count(b"\n"), self.path)
            os.close(self._handle)
            self._handle = None
