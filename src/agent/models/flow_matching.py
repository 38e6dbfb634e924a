"""Flow matching from noise to action: the draws, the target, the loss, Euler integration. Pure functions.

Time runs as in openpi: 1 is pure noise, 0 is the action; the velocity points from the action to the noise.
See Lipman et al., "Flow Matching for Generative Modeling" (https://arxiv.org/abs/2210.02747) and π0
(https://arxiv.org/abs/2410.24164). Shape suffixes are explained in ``agent.batch``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from agent.reproducibility import stream

if TYPE_CHECKING:
    from torch import Tensor


def draw(
    seed: int,
    k: int,
    chunk_size: int,
    action_dim: int,
    *,
    alpha: float,
    beta: float,
    scale: float,
    offset: float,
    purpose: str = "train",
) -> tuple[np.ndarray, float]:
    """Noise and time of the run's ``k``-th sample, a function of the arguments alone.

    Args:
        seed: the run's seed.
        k: the sample's number in the run.
        chunk_size: T.
        action_dim: A, padding included.
        alpha, beta: parameters of the Beta distribution.
        scale, offset: time is ``Beta(alpha, beta) * scale + offset``.
        purpose: separates training from evaluation.

    Returns:
        noise (T, A) float32, standard normal; time, rounded to float32.
    """
    noise = stream(seed, f"{purpose}/noise", k).standard_normal((chunk_size, action_dim), dtype=np.float32)
    # A stream of its own: the times of a run do not change with the size of its chunks.
    time = stream(seed, f"{purpose}/time", k).beta(alpha, beta) * scale + offset
    return noise, float(np.float32(time))


def interpolate(actions_BTA: Tensor, noise_BTA: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
    """The point at ``time`` on the straight line from action to noise, and the line's velocity, both (B, T, A)."""
    time_B11 = time_B[:, None, None]
    return time_B11 * noise_BTA + (1 - time_B11) * actions_BTA, noise_BTA - actions_BTA


def per_sample_loss(squared_error_BTA: Tensor, is_pad_BT: Tensor, dim_mask_BA: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,), over its real dimensions and unpadded steps.

    A chunk's first step is the frame itself and a robot has a dimension, so that nothing divides by zero. Should
    a broken batch come anyway, its loss is NaN and stops the run: looking for it here would make the CPU wait for
    the GPU in every step, and a loss of zero would hide it.
    """
    real_BTA = ~is_pad_BT[:, :, None] & dim_mask_BA[:, None, :]
    return squared_error_BTA.masked_fill(~real_BTA, 0.0).sum((1, 2)) / real_BTA.sum((1, 2))


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise_BTA: Tensor, num_steps: int) -> Tensor:
    """Actions (B, T, A): follows ``velocity(x_BTA, time_B)`` from the noise at time 1 down to time 0."""
    assert num_steps > 0, num_steps
    step = -1.0 / num_steps
    x_BTA = noise_BTA
    for i in range(num_steps):
        time_B = x_BTA.new_full((len(x_BTA),), 1.0 + i * step)
        x_BTA = x_BTA + step * velocity(x_BTA, time_B)
    return x_BTA
