"""From a policy to what the trainer calls: activation checkpointing, compilation, data parallelism."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from agent.parallel.processes import Processes

log = logging.getLogger(__name__)

# CUDA graphs reuse the memory of a block's outputs at its next call. The prefix's keys and values, outputs of one
# block that another reads in the backward pass, would be overwritten, so the modes that use them lose them.
_WITHOUT_CUDA_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}


def parallelize(policy: Any, processes: Processes, *, activation_checkpointing: str, compile_mode: str | None) -> Any:
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
        compile_units(units, bodies, _WITHOUT_CUDA_GRAPHS.get(compile_mode, compile_mode))
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


def is_sharded_module(policy: Any) -> bool:
    """Whether ``agent.parallel.sharding.shard`` has split the parameters of this policy."""
    return hasattr(policy, "set_is_last_backward")


def accumulating(model: Any, last: bool) -> contextlib.AbstractContextManager:
    """Around forward and backward of a micro-batch; ``last`` is true for the last one of an update.

    DDP adds the processes' gradients up once, after the last. With sharded parameters that would keep whole gradients
    on every process, which is what sharding is to avoid: there they are added up after each, and only shards are kept.
    """
    if is_sharded_module(model):
        model.set_is_last_backward(last)
    elif hasattr(model, "no_sync") and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def forget_gradients(model: Any, optimizer: Any) -> None:
    """After an update or a pass whose gradients nobody wants.

    DDP holds buckets for all gradients, and those stay where they are, in there, as zeros. Given back, the gradients of an
    update's first micro-batches would have memory of their own until the last one: a second time the whole.
    """
    optimizer.zero_grad(set_to_none=not hasattr(model, "no_sync"))


# ---- activation checkpointing


def recompute(units: list[nn.Module], how: str) -> None:
    """Has each unit compute activations again in the backward pass instead of keeping them. Never nested.

    Args:
        units: modules whose ``forward`` is a function of its arguments and parameters alone.
        how: ``none``; ``full``, which keeps a unit's inputs alone; or ``blocks``, which also keeps what matrix products
            and attention gave, and computes again what is elementwise: norms, rotations, activation functions, casts.

    Of a Gemma layer of 2048 × 16384 under bfloat16 autocast, autograd keeps 180 KiB a token, and the weights in bfloat16.
    Most of it are four tensors of the MLP's width. Two of them are matrix products, the others follow from these by an
    activation function and a multiplication. So ``blocks`` keeps 85 KiB and computes hardly anything twice; ``full`` keeps
    8 KiB and computes all but the last product twice. To recompute the MLP alone would save little of that work.
    """
    assert how in ("none", "blocks", "full"), how
    if how == "none":
        return
    for unit in units:
        unit.forward = _recomputed(unit, unit.forward, selective=how == "blocks")  # type: ignore[method-assign]


def _recomputed(unit: nn.Module, forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    import torch
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        again["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_operations())

    def run(*arguments: Any) -> Any:
        if not (unit.training and torch.is_grad_enabled()):
            return forward(*arguments)
        return checkpoint(forward, *arguments, **again)

    return run


def _kept_operations() -> list[Any]:
    """Matrix products with parameters, and attention in every kernel but the one that writes out all scores."""
    import torch

    names = (
        "mm addmm _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    )
    return [getattr(torch.ops.aten, name).default for name in names.split()]


# ---- compilation


class _Compilation:
    """What the compiled units of a policy share."""

    def __init__(self) -> None:
        self.failure: str | None = None
        """Why the first one that failed did, on this process."""
        self.given_up = False
        """All units run eagerly."""
        self.agreed = False
        """The processes have compared how their first pass went."""


class _Compiled:
    """A unit's forward, compiled; where that fails, eager.

    Within one pass a unit does not change from compiled to eager: what it computes again in the backward pass would
    not be what it did in the forward pass. So the failure of one stops only those that have not run yet, until all
    processes agree between two passes.
    """

    def __init__(self, eager: Callable[..., Any], body: Callable[..., Any], mode: str, shared: _Compilation) -> None:
        import torch

        self.shared = shared
        self._eager, self._compiled = eager, torch.compile(body, mode=mode)
        self._has_run = self._failed = False

    def __call__(self, *arguments: Any) -> Any:
        import torch

        shared = self.shared
        if shared.given_up or self._failed or (shared.failure is not None and not self._has_run):
            return self._eager(*arguments)
        try:
            result = self._compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler can raise; a mistake in the unit itself is raised again below
            result = self._eager(*arguments)
            self._failed = True
            if shared.failure is None:
                shared.failure = _cause(error)
                if shared.agreed:
                    log.warning("some blocks cannot be compiled anew and run uncompiled here: %s", shared.failure)
            return result
        self._has_run = True
        return result


def compile_units(units: list[nn.Module], bodies: list[Callable[..., Any]], mode: str) -> None:
    """Compiles each unit at its first call.

    Args:
        units: their ``forward`` is replaced, and called where compiling fails.
        bodies: for each unit the function that is compiled.
        mode: torch.compile's.
    """
    import torch._dynamo.config
    import torch._functorch.config

    log.info("compiling %d blocks, mode %s", len(units), mode)
    # All layers of a kind share their code, and each length of a batch's instructions and each kind of pass (with
    # and without gradient) is a variant of it; beyond the limit of 8 layers would silently run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    # A compiler that fails does so in the forward pass, where a unit can still run eagerly.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    # Else a block under DDP is cut where a bucket is full, which beside large layers is at each matrix: nothing would be
    # fused across, nor recomputed. Block by block, gradients come early enough to be added up meanwhile.
    torch._dynamo.config.optimize_ddp = False
    shared = _Compilation()
    for unit, body in zip(units, bodies, strict=True):
        unit.forward = _Compiled(unit.forward, body, mode, shared)  # type: ignore[method-assign, assignment]


def agree_on_compilation(policy: Any, processes: Processes) -> None:
    """Once all processes have done a pass: if a unit could not be compiled on one, all run eagerly on all. A collective.

    One line of the log says why. A unit that fails later, for a new shape, runs eagerly on its process alone, which says
    so once; the numbers are the same to rounding.
    """
    compiled = [unit.forward for unit in policy.wrap_units() if isinstance(unit.forward, _Compiled)]
    if not compiled:
        return
    shared = compiled[0].shared
    shared.agreed = True
    failures = {rank: text for rank, text in enumerate(processes.gather(shared.failure)) if text is not None}
    if failures:
        shared.given_up = True
        if processes.is_main:
            rank, text = next(iter(failures.items()))
            where = f" on rank {rank}" if processes.world_size > 1 else ""
            log.warning("the model cannot be compiled%s and runs uncompiled: %s", where, text)


def _cause(error: BaseException) -> str:
    """The first sentence of the error that began it all."""
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = before
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0] if lines else 'no message'}"
