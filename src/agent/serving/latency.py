"""Measures how long requests take, and tells it in a line of the log every so often."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Latencies:
    """The times of the requests since the last line."""

    total_ms: list[float] = field(default_factory=list)
    """Milliseconds from a request's arrival to its answer."""
    queue_ms: list[float] = field(default_factory=list)
    """Milliseconds from its arrival to the start of its batch."""
    batches: list[int] = field(default_factory=list)
    """Requests in each batch."""
    infer_ms: list[float] = field(default_factory=list)
    """Milliseconds of each batch in the policy."""
    refused: int = 0
    """Requests that did not fit."""
    failed: int = 0
    """Requests on which the policy failed."""
    since: float = field(default_factory=time.monotonic)

    def answered(self, total_ms: float, queue_ms: float) -> None:
        """Counts a request that was answered."""
        self.total_ms.append(total_ms)
        self.queue_ms.append(queue_ms)

    def inferred(self, size: int, infer_ms: float) -> None:
        """Counts a batch that went through the policy."""
        self.batches.append(size)
        self.infer_ms.append(infer_ms)

    def line(self) -> str | None:
        """Writes the line and begins to count anew; None if nothing happened since the last one."""
        seconds = time.monotonic() - self.since
        times = {"total ms": self.total_ms, "queue ms": self.queue_ms, "model ms": self.infer_ms}
        parts = [f"{len(self.total_ms)} requests in {seconds:.0f} s"]
        # Either can be there without the other: a batch is counted before its answers are sent, a line can fall between.
        parts += [f"{name} {_percentiles(some)}" for name, some in times.items() if some]
        if self.batches:
            parts += [f"batch mean {np.mean(self.batches):.2f} max {max(self.batches)}"]
        parts += [f"{count} {what}" for what, count in (("refused", self.refused), ("failed", self.failed)) if count]
        quiet = not (self.total_ms or self.refused or self.failed)
        for counts in (self.total_ms, self.queue_ms, self.infer_ms, self.batches):
            counts.clear()
        self.refused, self.failed, self.since = 0, 0, time.monotonic()
        return None if quiet else "; ".join(parts)


def _percentiles(times: list[float]) -> str:
    return " ".join(
        f"p{q} {value:.1f}" for q, value in zip((50, 90, 99), np.percentile(times, (50, 90, 99)), strict=True)
    )
