"""Splits parameters so that every process holds some rows (FSDP2), and reads, fills and gathers them a tensor at a time.

A sharded tensor is a ``DTensor``, split along its first dimension as ``torch.chunk`` splits: the processes hold
successive rows, the last ones perhaps fewer or none. Outside of a forward and backward pass all parameters are in this
state, and so are their gradients and the optimizer's state. Nothing here ever holds more than one tensor as a whole.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from agent.parallel.processes import Processes

if TYPE_CHECKING:
    from agent.models.policy import Policy

log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """What this process holds of a tensor."""

    local: Tensor
    """Successive rows, contiguous; the memory is the tensor's own. All rows of one that is not sharded."""
    first: int
    """Number of the first of them."""


def shard(policy: Policy, processes: Processes, reduced: torch.dtype | None) -> None:
    """Splits a policy's parameters over the processes, in place, before they have memory.

    Each of ``policy.shard_units()`` is gathered when it is called and given back after. What is in none of them is the
    root's, and so are their parameters of one dimension, norms and biases: these are gathered once a pass, in their own
    type, with what the root gathers anyway. The policy stays the object it was, but ``forward`` and ``sample_actions`` are
    collectives from now on.

    Args:
        policy: on the ``meta`` device, with ``requires_grad`` as it shall be.
        processes: more than one.
        reduced: the type to which the matrices in ``policy.wrap_units()`` are gathered, None for the parameters' own.
            Autocast rounds these before their products under DDP too, but not the norms' weights, which compute in
            float32. What is outside of the blocks is small, or computes in float32 itself, and is gathered as it is.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    # Inputs stay as they are: the residual stream is float32, and autocast chooses each operation's type as under DDP.
    as_it_is = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    lowered = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = set(policy.wrap_units())
    units = policy.shard_units()
    # The root is split before its units, or it would find nothing in them; what is theirs it has to leave.
    theirs = {p for unit in units for p in unit.parameters() if p.ndim > 1}
    # The root too gives back what it gathered, so that nobody ever meets a whole parameter between two passes.
    fully_shard(policy, mesh=mesh, mp_policy=as_it_is, reshard_after_forward=True, ignored_params=theirs)
    for unit in units:
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=lowered if unit in blocks else as_it_is,
            reshard_after_forward=True,
            ignored_params={p for p in unit.parameters() if p.ndim == 1},
        )
    register_fsdp_forward_method(policy, "sample_actions")
    log.info("parameters split over %d processes (FSDP2), gathered in %d units", processes.world_size, len(units) + 1)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the processes hold parts of this tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # as long as nobody has imported it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def rows(tensor: Tensor) -> Rows:
    """Returns this process's part of a tensor."""
    if not is_sharded(tensor):
        return Rows(tensor.detach(), 0)
    sharded: Any = tensor.detach()
    mesh, placements = sharded.device_mesh, sharded.placements
    assert len(placements) == 1 and placements[0].is_shard(0), f"split in an unforeseen way: {placements}"
    each = -(-sharded.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * each, sharded.shape[0])
    local = sharded.to_local()
    assert local.shape[0] == min(each, sharded.shape[0] - first)
    return Rows(local, first)


def whole(tensor: Tensor) -> Tensor:
    """Gathers the rows of all processes on the tensor's device; a collective if it is sharded."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def fill(tensor: Tensor, source: Tensor) -> None:
    """Copies the rows of ``source``, which has the whole tensor's shape, that this process holds; no collective."""
    local, first = rows(tensor)
    local.copy_(source[first : first + len(local)] if is_sharded(tensor) else source)


def fill_from_main(tensor: Tensor, source: Tensor | None) -> None:
    """Fills a tensor with what rank 0 has, which passes through the memory of its device; a collective.

    Args:
        tensor: sharded.
        source: the whole tensor, on any device; None on the other ranks.
    """
    on_device = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if source is not None:
        on_device.copy_(source)
    dist.broadcast(on_device, src=0)
    fill(tensor, on_device)


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Makes an uninitialised tensor of the same shape, split in the same way."""
    return torch.empty_like(tensor, dtype=dtype, requires_grad=False)


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clips as ``torch.nn.utils.clip_grad_norm_`` does, also for sharded parameters: the norm is that of all rows.

    One number is summed over the processes, instead of one per parameter. All parameters are sharded, or none is.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if not parameters or not is_sharded(parameters[0]):
        return clip_grad_norm_(parameters, max_norm)
    gradients = [rows(p.grad).local for p in parameters if p.grad is not None]
    square = get_total_norm(gradients).double().square()
    dist.all_reduce(square)
    norm = square.sqrt().float()
    torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm
