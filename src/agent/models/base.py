"""The contract between a policy and everything around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import draccus

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from agent.batch import Observation


@dataclass
class Reading:
    """A model JSON of any vintage, in today's keys."""

    values: dict[str, Any]
    """Today's key → value, ready to be checked and decoded."""
    notes: list[str] = field(default_factory=list)
    """Lines for the log, each beginning with the key of the file that it is about."""
    mistakes: list[tuple[str, str]] = field(default_factory=list)
    """Key of the file → why its value cannot be used, and what to write instead."""


@dataclass
class ModelConfig(draccus.ChoiceRegistry):
    """Base of every model JSON; ``"type"`` chooses the subclass. Importing one must not import torch."""

    older_names: ClassVar[dict[str, str]] = {}
    """Name of a key in older files → its name today."""

    # Of an older file's reading, for the log. Without an annotation it is no field: no key, and never saved.
    notes = cast("tuple[str, ...]", ())

    @classmethod
    def read(cls, values: dict[str, Any]) -> Reading:
        """The values of a file of any vintage under today's keys; a class that knows older ones overrides this."""
        return Reading(values)

    @property
    def type(self) -> str:
        """The JSON's ``"type"``."""
        return self.get_choice_name(type(self))


class Policy(ABC):
    """What the trainer asks of a policy. A policy is an ``nn.Module`` that also inherits from this class.

    Call ``policy(batch)``: it returns the loss of every sample, (B,) float32, the mean over the sample's real
    action dimensions and unpadded time steps. The mean over the update's samples is the trainer's business.
    """

    config: Any

    @abstractmethod
    def sample_actions(self, observation: Observation, noise: Tensor) -> Tensor:
        """Actions (B, T, A), normalised, for an observation, from initial noise (B, T, A)."""

    @abstractmethod
    def frozen_parameters(self) -> dict[str, str]:
        """Name of each parameter that must not be trained → the reason, one short phrase.

        Covers both what the config freezes and what the loss never reaches: DDP runs without a search for
        unused parameters, so everything that this method leaves out must receive a gradient in every step.
        """

    @abstractmethod
    def wrap_units(self) -> list[nn.Module]:
        """The repeated blocks, in order of execution: units of activation checkpointing, compile and sharding.

        Each is called with positional arguments, and what it returns depends on these and its parameters alone.
        """

    def shard_units(self) -> list[nn.Module]:
        """The modules whose parameters FSDP gathers together; only such as are called, none within another."""
        return self.wrap_units()

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Fills every parameter and buffer in place; the result depends on the generator's seed alone."""
