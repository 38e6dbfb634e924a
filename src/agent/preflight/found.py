"""Something that a training needs: where it is, and how it is had."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import hub

log = logging.getLogger("agent.prepare")


@dataclass
class Found:
    """Something that a training needs, on this machine."""

    folder: Path
    files: list[Path]
    note: str

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.files)


@dataclass
class Item:
    """Something that a training needs."""

    kind: str
    key: str
    """The config key that asks for it."""
    name: str
    look: Callable[[], Found]
    """Finds and checks it; raises ValueError if it is not here or does not fit."""
    fetch: Callable[[], Any] | None
    """Gets it from the hub; None if it is to be a local folder."""

    def obtain(self, away: bool) -> Found:
        """What is here, or can be had from the hub.

        Args:
            away: the hub was asked before and does not answer.

        Raises:
            ValueError: if it cannot be had, or does not fit.
            HubTrouble: if it can perhaps be had later.
        """
        try:
            with hub.offline():
                return self.look()
        except ValueError as error:
            if self.fetch is None:
                raise
            if away:  # one wait for a hub that does not answer is enough
                reason = "not here either" if isinstance(error, hub.Unreachable) else str(error).splitlines()[0]
                raise hub.Unreachable(f"{self.key}: '{self.name}': {reason}") from None
        log.info("fetching %s %s", self.kind, self.name)
        self.fetch()
        with hub.offline():
            return self.look()
