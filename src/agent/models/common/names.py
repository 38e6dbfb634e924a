"""Maps the tensor names of published checkpoints to a model's own names, and records where each tensor goes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """Says how one kind of checkpoint names our tensors."""

    title: str
    parts: list[tuple[str, str]]
    """Pairs of prefixes, ours and theirs; the rest of a name is the same."""
    fresh: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of a pattern of our names that this kind of checkpoint does not contain, and the reason."""

    def theirs(self, name: str) -> str | None:
        """Returns their name of our tensor; None if they have no such tensor."""
        return next((theirs + name.removeprefix(ours) for ours, theirs in self.parts if name.startswith(ours)), None)

    def ours(self, name: str) -> str | None:
        """Returns our name of their tensor; None if we have no such tensor."""
        return next((ours + name.removeprefix(theirs) for ours, theirs in self.parts if name.startswith(theirs)), None)


@dataclass(frozen=True)
class Match:
    """Says where each tensor of a checkpoint goes.

    Every name in the checkpoint is in one of ``sources``, ``waived`` and ``extra``.
    """

    layout: Layout
    sources: dict[str, str]
    """Maps our name → theirs. A tensor of ours that is neither here nor in ``layout.fresh`` is missing."""
    waived: dict[str, str]
    """Maps each of their names that is not loaded → the reason."""
    extra: list[str]
    """Their names that no rule covers."""
