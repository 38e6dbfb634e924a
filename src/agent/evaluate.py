"""Validation on held-out episodes: the flow-matching loss, and the error of sampled actions beside two baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.batch import ValidationBatch, to_device

if TYPE_CHECKING:
    from torch import Tensor

    from agent.distributed import Processes


def evaluate(
    policy: Any,
    batches: Iterable[ValidationBatch],
    processes: Processes,
    *,
    unnormalize: Callable[[Tensor, ValidationBatch], np.ndarray],
    mean_actions: np.ndarray,
    thresholds: list[float],
    precision: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """Metrics of one validation, the same on every process and for any number of them.

    Args:
        policy: the policy, not wrapped by DDP.
        batches: this process's share of the validation set.
        processes: the process group.
        unnormalize: normalised actions (B, T, A) of a batch → (B, T, a) in the units of each sample's data set.
        mean_actions: (data sets, a) mean of the training actions, the first baseline.
        thresholds: distances for ``val/acc_<threshold>``.
        precision: makes the autocast context.

    Returns:
        ``val/loss`` (flow matching, fixed noise and times), ``val/action_l1``, ``val/baseline_mean_l1``,
        ``val/baseline_last_l1`` and ``val/acc_*``; the errors are means over every unpadded step and dimension.
        On an episode's first frame nothing was recorded before; there the last-action baseline is the mean action.
    """
    import torch

    was_training = policy.training
    policy.eval()
    rows: list[tuple[int, list[float]]] = []
    with torch.no_grad():
        for item in batches:
            batch = to_device(item.batch, processes.device)
            with precision():
                losses = policy(batch)
                sampled = policy.sample_actions(batch.observation, batch.noise)
            predicted = unnormalize(sampled.float().cpu(), item)
            means = mean_actions[item.batch.provenance[:, 0].numpy(), : item.actions.shape[-1]]
            last = np.where(item.has_previous[:, None], item.previous_action, means)
            own = item.batch.actions.dim_mask.numpy()[:, : item.actions.shape[-1]]
            real = ~item.batch.actions.is_pad.numpy()[:, :, None] & own[:, None, :]
            for place, index in enumerate(item.index.tolist()):
                if index < 0:
                    continue
                truth = item.actions[place]
                error = np.abs(predicted[place] - truth)[real[place]].astype(np.float64)
                row = [float(losses[place]), float(error.size), float(error.sum())]
                row += [float(np.abs(b - truth)[real[place]].sum()) for b in (means[place], last[place])]
                row += [float((error <= threshold).sum()) for threshold in thresholds]
                rows.append((index, row))
    policy.train(was_training)
    # Added up in the order of the samples, so that the number of processes cannot change the last digit.
    everything = sorted(row for share in processes.gather(rows) for row in share)
    totals = np.array([row for _, row in everything], dtype=np.float64).sum(axis=0)
    values = totals[1]
    names = ["val/action_l1", "val/baseline_mean_l1", "val/baseline_last_l1", *(f"val/acc_{t:g}" for t in thresholds)]
    metrics = {name: float(total / values) for name, total in zip(names, totals[2:], strict=True)}
    return {"val/loss": float(totals[0] / len(everything)), **metrics}
