"""Wraps a policy into what the training loop calls: with activation checkpointing, compilation and data parallelism."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from agent.parallel.compilation import compile_units
from agent.parallel.processes import Processes
from agent.parallel.recompute import recompute

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    from agent.models.policy import Policy


def parallelize(
    policy: Policy, processes: Processes, *, activation_checkpointing: str, compile_mode: str | None
) -> nn.Module:
    """Wraps a policy that is on its device, in the one order that works: checkpoint, compile, DDP.

    Args:
        policy: the policy; its ``wrap_units`` are compiled one by one, so that the first step starts soon. One whose
            parameters ``agent.parallel.sharding`` has split needs no DDP.
        processes: the process group.
        activation_checkpointing: see :func:`recompute`.
        compile_mode: torch.compile's mode, or None for eager.

    Returns:
        The policy itself, or DDP around it when there are several processes with a copy each. Its first backward pass
        must be one that is synchronised.
    """
    units = policy.wrap_units()
    plain = [unit.forward for unit in units]
    recompute(units, activation_checkpointing)
    if compile_mode is not None:
        # The compiler chooses by itself which elementwise operations the backward pass computes again.
        bodies = plain if activation_checkpointing == "blocks" else [unit.forward for unit in units]
        compile_units(units, bodies, compile_mode)
    if processes.world_size == 1 or is_sharded_module(policy):
        return policy
    from torch.nn.parallel import DistributedDataParallel

    # The graph is static: `Policy.frozen_parameters` names all that gets no gradient, so none is searched for.
    return DistributedDataParallel(
        policy,
        device_ids=[processes.device] if processes.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=True,
    )


def is_sharded_module(policy: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether ``agent.parallel.sharding.shard`` has split the parameters of this policy."""
    return hasattr(policy, "set_is_last_backward")


def _is_replicated(model: nn.Module) -> TypeGuard[DistributedDataParallel]:
    """Whether this is DDP around a policy."""
    return hasattr(model, "no_sync")


def accumulating(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Returns the context of a micro-batch's forward and backward pass; ``last`` is true for the last one of an update.

    DDP adds the processes' gradients up once, after the last. With sharded parameters that would keep whole gradients
    on every process, which is what sharding is to avoid: there they are added up after each, and only shards are kept.
    """
    if is_sharded_module(model):
        model.set_is_last_backward(last)
    elif _is_replicated(model) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def forget_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = False) -> None:
    """Clears the gradients after an update, or after a pass whose gradients nobody wants; ``keep`` leaves them their memory.

    DDP holds buckets for all gradients: there they stay, as zeros. Were they given back, the gradients of an update's
    first micro-batches would have memory of their own until the last one, which is twice the memory.
    """
    optimizer.zero_grad(set_to_none=not (keep or _is_replicated(model)))
