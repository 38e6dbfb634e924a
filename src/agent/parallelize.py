"""From a policy to what the trainer calls: activation checkpointing, compilation, data parallelism."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

log = logging.getLogger(__name__)

# CUDA graphs reuse the memory of a block's outputs at its next call. The prefix's keys and values, outputs of one
# block that another reads in the backward pass, would be overwritten, so the modes that use them lose them.
_WITHOUT_CUDA_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}

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
        mode = _WITHOUT_CUDA_GRAPHS.get(compile_mode, compile_mode)
        log.info("compiling %d blocks, mode %s", len(policy.wrap_units()), mode)
        import torch._dynamo.config

        # All layers of a kind share their code, and each length of a batch's instructions and each kind of pass (with
        # and without gradient) is a variant of it; beyond the limit of 8 layers would silently run uncompiled.
        torch._dynamo.config.recompile_limit = 64
        for unit in policy.wrap_units():
            unit.compile(mode=mode)
    if processes.world_size == 1:
        return policy
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        policy,
        device_ids=[processes.device] if processes.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
