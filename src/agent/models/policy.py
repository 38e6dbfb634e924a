"""Defines the base class of every policy's network: the methods that the trainer, the server and the checks call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from agent.batch import Batch, Draws, Observation


class Policy(nn.Module, ABC):
    """Is the base class of networks that map observations to action chunks.

    ``policy(batch)`` returns named losses with one number per sample, (B,) float32, each the mean over the sample's real
    action dimensions and unpadded time steps. The trainer averages them over the samples of an update. Adapters,
    activation checkpointing, compilation and sharding are applied to the modules from outside, so that a network contains
    no code for them. The shape letters are explained in ``agent.batch``.
    """

    loss_weights: ClassVar[Mapping[str, float]]
    """Maps the name of each loss → its weight in the sum that is trained on."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the losses of a batch: the name of each loss → (B,) float32, unweighted."""

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss that is trained on, (B,) float32: the sum of the named losses times their weights."""
        weighted = [
            losses[name] * weight if weight != 1 else losses[name] for name, weight in self.loss_weights.items()
        ]
        return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(0)

    @abstractmethod
    def sample_actions(self, observation: Observation, draws: Draws) -> Tensor:
        """Predicts normalised actions (B, T, A).

        The result is a function of the arguments alone: all randomness comes from ``draws``. Dimensions of A beyond the
        robot's own are padding; the caller cuts them off and converts the rest to physical units.
        """

    @abstractmethod
    def frozen_parameters(self) -> dict[str, str]:
        """Lists the parameters that must not be trained: name → the reason, as a short phrase.

        The list has both the parameters that the config freezes and those that the loss does not reach. DDP runs without
        searching for unused parameters, so every parameter that is not listed must receive a gradient in every step.
        """

    @abstractmethod
    def wrap_units(self) -> list[nn.Module]:
        """Lists the repeated blocks in order of execution: the units of checkpointing, compilation and sharding.

        Each block must be called with positional arguments only, and its output must depend on these and on the block's
        parameters alone, because activation checkpointing calls it a second time.
        """

    def shard_units(self) -> list[nn.Module]:
        """Lists the modules whose parameters FSDP gathers as one unit.

        FSDP gathers a unit when its ``forward`` runs, so each must be a module that is called, and none may contain another.
        """
        return self.wrap_units()

    def fp8_layers(self) -> list[nn.Module]:
        """Lists the linear layers, without bias, whose products ``fp8: mlp`` computes in 8 bits; empty if there are none."""
        return []

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialises every parameter and buffer in place; the result depends on the generator's seed alone."""
