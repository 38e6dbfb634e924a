"""Keeps the exponential moving average of the trained weights, which often act better than those of any one update.

A copy in float32 whatever the weights are held in, on their device, and split over the processes as they are. Frozen
weights are their own average and are not copied. After update n (from 0, skipped ones not counted)::

    average += (1 - d) * (weights - average),    d = min(decay, (1 + n) / (10 + n))

It begins at the weights that the run starts from. The growing d lets the average leave these soon, where ``decay`` alone
would remember them for thousands of updates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from agent.parallel import sharding


def decay_at(decay: float, applied: int) -> float:
    """The decay of an update, given how many were applied before it."""
    return min(decay, (1 + applied) / (10 + applied))


class Ema:
    """The average of a policy's trained parameters.

    Args:
        policy: with ``requires_grad`` as it shall be, on its device.
        decay: in (0, 1).
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        assert 0 < decay < 1, "checked with the configuration"
        self.decay = decay
        self._parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.tensors: dict[str, Tensor] = {
            name: sharding.empty_like(p, torch.float32) for name, p in self._parameters.items()
        }
        """Name of a trained parameter → its average, float32, sharded as it is. Uninitialised until :meth:`begin`."""

    def begin(self) -> None:
        """Sets the average to the present weights."""
        with torch.no_grad():
            for average, weight in zip(*self._local(), strict=True):
                average.copy_(weight)

    def update(self, applied: int) -> None:
        """Takes in the weights after an update; no collective, and nothing waits for the device.

        Args:
            applied: updates applied before this one, skipped ones not counted.
        """
        share = 1 - decay_at(self.decay, applied)
        with torch.no_grad():
            averages, weights = self._local()
            if all(weight.dtype == torch.float32 for weight in weights):
                torch._foreach_lerp_(averages, weights, share)
                return
            # Mixed types: each number of the weights is widened on its way, no copy is made.
            torch._foreach_mul_(averages, 1 - share)
            torch._foreach_add_(averages, weights, alpha=share)

    def state(self, of_policy: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the policy's ``state_dict`` with the average in place of the trained weights, without a copy."""
        assert set(self.tensors) <= set(of_policy)
        return {**of_policy, **self.tensors}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the policy the average for weights while the block lasts, and afterwards its own again, bit for bit.

        Not within an update: gradients must be gone, whose memory the copies of weights that are not float32 take.
        """
        averages, weights = self._local()
        kept = [
            None if weight.dtype == average.dtype else weight.clone()
            for average, weight in zip(averages, weights, strict=True)
        ]
        _exchange(averages, weights, kept, back=False)
        try:
            yield
        finally:
            _exchange(averages, weights, kept, back=True)

    def _local(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns what this process holds of averages and weights. It is looked up every time, as FSDP moves its memory once."""
        averages = [sharding.rows(tensor).local for tensor in self.tensors.values()]
        return averages, [sharding.rows(parameter).local for parameter in self._parameters.values()]


def _exchange(averages: list[Tensor], weights: list[Tensor], kept: list[Tensor | None], back: bool) -> None:
    with torch.no_grad():
        for average, weight, own in zip(averages, weights, kept, strict=True):
            if own is not None:
                weight.copy_(own if back else average)
            else:  # one tensor in hand at a time
                aside = weight.clone()
                weight.copy_(average)
                average.copy_(aside)
