"""From a policy to what the trainer calls: activation checkpointing, compilation, data parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.distributed import Processes


def parallelize(policy: Any, processes: Processes, *, activation_checkpointing: bool, compile_mode: str | None) -> Any:
    """Wraps a policy that is on its device, in the one order that works: checkpoint, compile, DDP.

    Args:
        policy: the policy; its ``wrap_units`` are compiled one by one, so that the first step starts soon.
        processes: the process group.
        activation_checkpointing: recompute each unit's activations in the backward pass.
        compile_mode: torch.compile's mode, or None for eager.

    Returns:
        The policy itself, or DDP around it when there are several processes.
    """
    policy.checkpoint_blocks = activation_checkpointing
    if compile_mode is not None:
        for unit in policy.wrap_units():
            unit.compile(mode=compile_mode)
    if processes.world_size == 1:
        return policy
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        policy,
        device_ids=[processes.device] if processes.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
