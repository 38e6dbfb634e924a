"""The settings of the policy server: how much it takes from its clients, and how often it logs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How the server treats its clients."""

    max_batch: int
    """Most requests that are answered by one call of the policy."""
    window_ms: float
    """The longest wait for other clients' requests."""
    max_message_mb: float
    """The largest request, in units of 2**20 bytes."""
    log_every_s: float
    """Seconds between the lines that tell how long requests took."""
