"""Compares the weights of all processes bit for bit: data parallelism assumes that they are equal, and never looks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from agent.optim.optimizer import optimizer_tensors
from agent.parallel.processes import Processes

_PIECE = 1 << 22


def fingerprints(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """A number for every tensor of weights and optimizer that changes with any single bit of it."""
    return fingerprints_of({**dict(policy.named_parameters()), **optimizer_tensors(optimizer, policy)})


def fingerprints_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The same for any tensors by their names.

    The sum of a tensor's words as integers, computed where the tensor is: a pass over the memory, no copy of it.
    """
    sums = [_sum(_words(tensor.detach().contiguous())) for tensor in tensors.values()]
    by_device: dict[torch.device, list[int]] = {}
    for place, value in enumerate(sums):
        by_device.setdefault(value.device, []).append(place)
    numbers: dict[int, int] = {}
    for places in by_device.values():  # one transfer per device, not one per tensor
        numbers |= dict(zip(places, torch.stack([sums[place] for place in places]).tolist(), strict=True))
    return {name: numbers[place] for place, name in enumerate(tensors)}


def _sum(words: Tensor) -> Tensor:
    """In 64 bits. By pieces, because torch widens what it sums: of π0's largest tensor that would be 4 GB at once."""
    # Sums wrap around alike everywhere; what matters is that one flipped bit changes one summand.
    return torch.stack([piece.sum(dtype=torch.int64) for piece in words.view(-1).split(_PIECE)]).sum()


def _words(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def check_replicas(policy: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Compares weights and optimizer state of all processes; a collective.

    Raises:
        RuntimeError: on every process if one differs; names the processes and tensors. Nothing may be saved then.
    """
    if processes.world_size == 1:
        return
    everyone = processes.gather(fingerprints(policy, optimizer))
    reference = everyone[0]
    different = {
        rank: [name for name in reference if theirs.get(name) != reference[name]]
        for rank, theirs in enumerate(everyone)
        if theirs != reference
    }
    if different:
        named = "; ".join(
            f"rank {rank}: {', '.join(names[:3])} ({len(names)} tensors)" for rank, names in different.items()
        )
        raise RuntimeError(
            f"the processes' weights have drifted apart from rank 0's ({named}): a memory error, or an operation that is "
            "not deterministic across the GPUs. Nothing was saved; the run continues from its last checkpoint"
        )
