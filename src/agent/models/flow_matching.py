"""Flow matching from noise to action: the draws, the target, the loss, Euler integration. Pure functions.

Time runs as in openpi: 1 is pure noise, 0 is the action; the velocity points from the action to the noise.
See Lipman et al., "Flow Matching for Generative Modeling" (https://arxiv.org/abs/2210.02747) and π0
(https://arxiv.org/abs/2410.24164). Shape suffixes are explained in ``agent.batch``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
    pair: int = 0,
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
        pair: which of the sample's pairs of noise and time, when it has several.

    Returns:
        noise (T, A) float32, standard normal; time, rounded to float32.
    """
    suffix = f"/{pair}" if pair else ""
    noise = stream(seed, f"{purpose}/noise{suffix}", k).standard_normal((chunk_size, action_dim), dtype=np.float32)
    # A stream of its own: the times of a run do not change with the size of its chunks.
    time = stream(seed, f"{purpose}/time{suffix}", k).beta(alpha, beta) * scale + offset
    return noise, float(np.float32(time))


def draw_several(pairs: int, seed: int, k: int, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    """The first ``pairs`` pairs that :func:`draw` gives for sample ``k``: noise (K, T, A), times (K,) float32."""
    noises, times = zip(*(draw(seed, k, *args, **kwargs, pair=j) for j in range(pairs)), strict=True)
    return np.stack(noises), np.asarray(times, dtype=np.float32)


def interpolate(actions_BTA: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The point at ``time`` on the straight line from action to noise, and the line's velocity.

    Both have the shape of ``noise``: (B, T, A), or (B, K, T, A) for K draws per sample.
    """
    actions = actions_BTA if noise.dim() == 3 else actions_BTA[:, None]
    time = time[..., None, None]
    return time * noise + (1 - time) * actions, noise - actions


def per_sample_loss(squared_error: Tensor, is_pad_BT: Tensor, dim_mask_BA: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,), over its real dimensions, unpadded steps and draws.

    ``squared_error`` is (B, T, A), or (B, K, T, A) for K draws per sample.

    A chunk's first step is the frame itself and a robot has a dimension, so that nothing divides by zero. Should
    a broken batch come anyway, its loss is NaN and stops the run: looking for it here would make the CPU wait for
    the GPU in every step, and a loss of zero would hide it.
    """
    real = ~is_pad_BT[:, :, None] & dim_mask_BA[:, None, :]
    if squared_error.dim() == 3:
        return squared_error.masked_fill(~real, 0.0).sum((1, 2)) / real.sum((1, 2))
    real = real[:, None]
    return (squared_error.masked_fill(~real, 0.0).sum((2, 3)) / real.sum((2, 3))).mean(1)


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise_BTA: Tensor, num_steps: int) -> Tensor:
    """Actions (B, T, A): follows ``velocity(x_BTA, time_B)`` from the noise at time 1 down to time 0."""
    assert num_steps > 0, num_steps
    step = -1.0 / num_steps
    x_BTA = noise_BTA
    for i in range(num_steps):
        time_B = x_BTA.new_full((len(x_BTA),), 1.0 + i * step)
        x_BTA = x_BTA + step * velocity(x_BTA, time_B)
    return x_BTA
