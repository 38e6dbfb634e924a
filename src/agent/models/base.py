"""Defines the base class of model JSONs: its ``"type"`` chooses a config class, which reads new and older files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import draccus


@dataclass
class Reading:
    """Holds the values of a model JSON, new or older, under today's keys."""

    values: dict[str, Any]
    """Maps today's key → value, ready to be checked and decoded."""
    notes: list[str] = field(default_factory=list)
    """Lines for the log; each begins with the key in the file that it is about."""
    mistakes: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of a key in the file, and why its value cannot be used and what to write instead."""


@dataclass
class ModelConfig(draccus.ChoiceRegistry):
    """Is the base of every model config; ``"type"`` chooses the subclass. Importing a subclass must not import torch."""

    older_names: ClassVar[dict[str, str]] = {}
    """Maps a key's name in older files → its name today."""

    # Lines for the log from reading an older file. The attribute has no annotation, so that it is no dataclass field: it is
    # neither a config key nor saved.
    notes = cast("tuple[str, ...]", ())

    @classmethod
    def read(cls, values: dict[str, Any]) -> Reading:
        """Returns a file's values under today's keys; a class that knows older keys overrides this."""
        return Reading(values)

    @property
    def type(self) -> str:
        """Returns the JSON's ``"type"``."""
        return self.get_choice_name(type(self))
