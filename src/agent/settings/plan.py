"""Batch arithmetic: how a global batch is split over processes, and how many updates a run makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from agent.settings.files import ConfigError


class Batches(Protocol):
    """What a training config says about batches and updates."""

    global_batch_size: int
    per_device_batch_size: int
    n_updates: int | None
    n_epochs: float


@dataclass(frozen=True)
class Plan:
    """All numbers that follow from the config, the number of processes and the number of training frames."""

    world_size: int
    accumulation_steps: int
    train_frames: int
    updates_per_epoch: float
    n_updates: int

    def describe(self, config: Batches) -> str:
        """One line for the log."""
        return (
            f"global batch {config.global_batch_size} = {config.per_device_batch_size} per device × "
            f"{self.world_size} processes × {self.accumulation_steps} accumulation steps; {self.train_frames} training "
            f"frames = {self.updates_per_epoch:.1f} updates per epoch; {self.n_updates} updates = "
            f"{self.n_updates / self.updates_per_epoch:.2f} epochs"
        )


def accumulation_steps(config: Batches, world_size: int) -> int:
    """Micro-batches per update.

    Raises:
        ConfigError: if the global batch is not a multiple of what all devices hold; names batches that are.
    """
    together = config.per_device_batch_size * world_size
    steps, rest = divmod(config.global_batch_size, together)
    if rest == 0 and steps > 0:
        return steps
    nearest = sorted({max(steps, 1) * together, (steps + 1) * together})
    per_device = [b for b in range(1, config.per_device_batch_size) if config.global_batch_size % (b * world_size) == 0]
    alternative = f", or per_device_batch_size: {per_device[-1]}" if per_device else ""
    raise ConfigError(
        f"global_batch_size {config.global_batch_size} is not a multiple of per_device_batch_size × processes = "
        f"{config.per_device_batch_size} × {world_size} = {together}; write global_batch_size: "
        f"{' or '.join(map(str, nearest))}{alternative}"
    )


def make_plan(config: Batches, world_size: int, train_frames: int) -> Plan:
    """The one place where derived numbers are computed."""
    updates_per_epoch = train_frames / config.global_batch_size
    # Rounded first: 15 epochs of 800 frames in batches of 96 are 125 updates, and not one more for 125.00000000000001.
    n_updates = config.n_updates or max(1, math.ceil(round(config.n_epochs * updates_per_epoch, 6)))
    return Plan(world_size, accumulation_steps(config, world_size), train_frames, updates_per_epoch, n_updates)
