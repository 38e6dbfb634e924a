"""How published checkpoints name a model's tensors, and where each of their tensors goes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint names our tensors."""

    title: str
    parts: list[tuple[str, str]]
    """Beginning of our names → beginning of theirs; the rest of a name is the same."""
    fresh: list[tuple[str, str]] = field(default_factory=list)
    """Patterns of our names that this kind of checkpoint does not hold → the reason."""

    def theirs(self, name: str) -> str | None:
        """Their name of our tensor; None if they have none."""
        return next((theirs + name.removeprefix(ours) for ours, theirs in self.parts if name.startswith(ours)), None)

    def ours(self, name: str) -> str | None:
        """Our name of their tensor; None if we have none."""
        return next((ours + name.removeprefix(theirs) for ours, theirs in self.parts if name.startswith(theirs)), None)


@dataclass(frozen=True)
class Match:
    """Where each tensor of a checkpoint goes; together the three hold every name of the checkpoint."""

    layout: Layout
    sources: dict[str, str]
    """Our name → theirs. What of ours is neither here nor in ``layout.fresh`` is missing."""
    waived: dict[str, str]
    """Their names that are left behind → the reason."""
    extra: list[str]
    """Their names that nobody knows."""
