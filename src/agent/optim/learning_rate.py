"""Computes the learning rate as a function of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DecayStart = Literal["after_warmup", "first_update"]


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to the peak, then cosine decay; the warm-up is the same in openpi and LeRobot.

    ``after_warmup``: the cosine begins at the peak, where the warm-up ends, as optax's ``warmup_cosine_decay_schedule``
    (openpi) has it. ``first_update``: it counts from the first update on, as in LeRobot's
    ``CosineDecayWithWarmupSchedulerConfig``, so that in the update after the warm-up the rate falls by what the cosine has
    fallen by then. Both reach ``final`` at ``decay_updates``.
    """

    peak: float
    final: float
    warmup_updates: int
    decay_updates: int
    decay_start: DecayStart = "after_warmup"

    @classmethod
    def plan(
        cls,
        peak: float,
        final: float,
        warmup: int,
        decay: int | None,
        n_updates: int,
        decay_start: DecayStart = "after_warmup",
    ) -> LearningRate:
        """Plans the schedule of a run of ``n_updates``.

        ``decay`` None ends the decay at the last update. A ``decay`` beyond the run is shortened to it, and the
        warm-up in proportion, as LeRobot does. A warm-up that would fill the whole run, or leave nothing to a decay that
        begins after it, is cut to a tenth of that.
        """
        if decay is not None and n_updates < decay:
            warmup = int(warmup * n_updates / decay)
        decay = min(decay or n_updates, n_updates)
        room = decay if decay_start == "after_warmup" else n_updates
        if warmup >= room:
            warmup = room // 10
        return cls(peak, final, warmup, decay, decay_start)

    def at(self, update: int) -> float:
        """Returns the rate of the update with this number, counted from 0."""
        if update < self.warmup_updates:
            start = 1 / (self.warmup_updates + 1)
            return self.peak * (start + (1 - start) * update / self.warmup_updates)
        begin = self.warmup_updates if self.decay_start == "after_warmup" else 0
        progress = (min(update, self.decay_updates) - begin) / (self.decay_updates - begin)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final + (self.peak - self.final) * cosine

    def describe(self) -> str:
        """Words a line for the log."""
        begin = "from there" if self.decay_start == "after_warmup" else "counted from the first update"
        return (
            f"learning rate: {self.warmup_updates} updates of warm-up to {self.peak:g}{self.fall()}, "
            f"cosine {begin} to {self.final:g} at update {self.decay_updates}"
        )

    def fall(self) -> str:
        """Words the step down where the warm-up ends; empty where it is too small to mention."""
        first = self.at(self.warmup_updates)
        if self.warmup_updates == 0 or first > 0.99 * self.peak:
            return ""
        return f", where it falls to {first:.3g} at once"
