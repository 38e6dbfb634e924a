"""Implements flow matching from noise to actions as pure functions: draws, target, loss and Euler integration.

Time runs as in openpi: 1 is pure noise and 0 is the action; the velocity points from the action to the noise.
See Lipman et al., "Flow Matching for Generative Modeling" (https://arxiv.org/abs/2210.02747) and π0
(https://arxiv.org/abs/2410.24164). Shape suffixes are explained in ``agent.batch``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.batch import Draws
from agent.reproducibility import stream

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FlowDraws(Draws):
    """Holds noise and time: numpy values for one sample, tensors (B, …) for a batch."""

    noise: Any
    """Standard normal noise, (T, A) float32; (K, T, A) for K > 1 pairs of noise and time per sample."""
    time: Any
    """The flow-matching time, a float32 in (0, 1], or (K,) for K > 1 pairs; 1 is pure noise and 0 is the action."""


@dataclass(frozen=True)
class FlowSampling:
    """Draws noise and time for a sample's number; every call with the same number gives the same draws."""

    seed: int
    """The run's seed."""
    purpose: str
    """What the numbers are for; training, validation and acting have independent streams."""
    shape: tuple[int, int]
    """(T, A), including padding."""
    beta: tuple[float, float]
    """The two parameters of time's Beta distribution."""
    scale: float
    offset: float
    """Time is ``Beta(*beta) * scale + offset``."""
    pairs: int = 1
    """K, pairs of noise and time per sample."""

    def __call__(self, k: int) -> FlowDraws:
        """Returns noise and time of the ``k``-th sample."""
        if self.pairs == 1:
            return FlowDraws(*self._pair(k, 0))
        noises, times = zip(*(self._pair(k, number) for number in range(self.pairs)), strict=True)
        return FlowDraws(np.stack(noises), np.stack(times))

    def _pair(self, k: int, number: int) -> tuple[np.ndarray, np.float32]:
        suffix = f"/{number}" if number else ""
        noise = stream(self.seed, f"{self.purpose}/noise{suffix}", k).standard_normal(self.shape, dtype=np.float32)
        # Time has a stream of its own, so that a run's times do not depend on the chunk size.
        time = stream(self.seed, f"{self.purpose}/time{suffix}", k).beta(*self.beta) * self.scale + self.offset
        return noise, np.float32(time)


def interpolate(actions_BTA: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the point at ``time`` on the straight line from action to noise, and the line's velocity.

    Both have the shape of ``noise``: (B, T, A), or (B, K, T, A) for K draws per sample.
    """
    actions = actions_BTA if noise.dim() == 3 else actions_BTA[:, None]
    time = time[..., None, None]
    return time * noise + (1 - time) * actions, noise - actions


def per_sample_loss(squared_error: Tensor, is_pad_BT: Tensor, dim_mask_BA: Tensor) -> Tensor:
    """Returns each sample's mean squared error, (B,), over its real dimensions, unpadded steps and draws.

    ``squared_error`` is (B, T, A), or (B, K, T, A) for K draws per sample.

    Nothing divides by zero, because a chunk's first step is the observed frame itself and every robot has at least one
    dimension. If a batch is broken nevertheless, its loss is NaN and stops the run: checking here would make the CPU wait
    for the GPU in every step, and a loss of zero would hide the mistake.
    """
    real = ~is_pad_BT[:, :, None] & dim_mask_BA[:, None, :]
    if squared_error.dim() == 3:
        return squared_error.masked_fill(~real, 0.0).sum((1, 2)) / real.sum((1, 2))
    real = real[:, None]
    return (squared_error.masked_fill(~real, 0.0).sum((2, 3)) / real.sum((2, 3))).mean(1)


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise_BTA: Tensor, num_steps: int) -> Tensor:
    """Integrates ``velocity(x_BTA, time_B)`` from the noise at time 1 to the actions (B, T, A) at time 0."""
    assert num_steps > 0, num_steps
    step = -1.0 / num_steps
    x_BTA = noise_BTA
    for i in range(num_steps):
        time_B = x_BTA.new_full((len(x_BTA),), 1.0 + i * step)
        x_BTA = x_BTA + step * velocity(x_BTA, time_B)
    return x_BTA
