"""Compiles a policy block by block, and runs it uncompiled where that fails, on all processes alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from agent.parallel.processes import Processes

if TYPE_CHECKING:
    from agent.models.policy import Policy

log = logging.getLogger(__name__)


# CUDA graphs reuse the memory of a block's outputs at its next call. The prefix's keys and values, outputs of one
# block that another reads in the backward pass, would be overwritten, so the modes that use them lose them.
_WITHOUT_CUDA_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}


def choose_mode(wanted: bool | None, mode: str, device: torch.device) -> str | None:
    """Returns torch.compile's mode for a run, or None if it runs uncompiled.

    Args:
        wanted: ``use_torch_compile`` of the config; None where neither YAML nor model JSON asks for it.
        mode: the model JSON's ``compile_mode``.
        device: where the run trains. A GPU gains by compiling, so there it happens by default, in the mode ``default``, which
            is the quickest to compile. On a CPU the gain is small and the compiler is often missing.
    """
    if wanted is None:
        return "default" if device.type == "cuda" else None
    return mode if wanted else None


def is_compiled(policy: Policy) -> bool:
    """Whether :func:`compile_units` has prepared the policy's units."""
    return any(isinstance(unit.forward, _Compiled) for unit in policy.wrap_units())


def compile_units(units: list[nn.Module], bodies: list[Callable[..., Any]], mode: str) -> None:
    """Compiles each unit at its first call.

    Args:
        units: their ``forward`` is replaced, and called where compiling fails.
        bodies: for each unit the function that is compiled.
        mode: of torch.compile.
    """
    import torch._dynamo.config
    import torch._functorch.config

    mode = _WITHOUT_CUDA_GRAPHS.get(mode, mode)
    log.info("compiling %d blocks, mode %s", len(units), mode)
    # All layers of a kind share their code. Dense and packed batches, passes with and without gradient, and the first shape
    # that is met before sizes are taken as variable, are variants of it; beyond the limit of 8 a layer would silently run
    # uncompiled.
    torch._dynamo.config.recompile_limit = 64
    # A compiler that fails does so in the forward pass, where a unit can still run eagerly.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    # Else a block under DDP is cut where a bucket is full, which beside large layers is at each matrix: nothing would be
    # fused across, nor recomputed. Block by block, gradients come early enough to be added up meanwhile.
    torch._dynamo.config.optimize_ddp = False
    shared = _Compilation()
    for unit, body in zip(units, bodies, strict=True):
        unit.forward = _Compiled(unit.forward, body, mode, shared)  # type: ignore[method-assign, assignment]


def agree_on_compilation(policy: Policy, processes: Processes) -> None:
    """Has all units run eagerly on all processes if one of them could not be compiled on one. A collective, after a pass.

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


@dataclass
class _Compilation:
    """What the compiled units of a policy share."""

    failure: str | None = None
    """Why the first one that failed did, on this process."""
    given_up: bool = False
    """Whether all units run eagerly."""
    agreed: bool = False
    """Whether the processes have compared how their first pass went."""


class _Compiled:
    """A unit's forward, compiled; where that fails, eager.

    Within one pass a unit does not change from compiled to eager: what it computes again in the backward pass would
    not be what it did in the forward pass. So the failure of one stops only those that have not run yet, until all
    processes agree between two passes.
    """

    def __init__(self, eager: Callable[..., Any], body: Callable[..., Any], mode: str, shared: _Compilation) -> None:
        self.shared = shared
        self._eager, self._compiled = eager, torch.compile(body, mode=mode)
        self._has_run = self._failed = False

    def __call__(self, *arguments: Any) -> Any:
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


def _cause(error: BaseException) -> str:
    """Returns the first line of the error that caused all others."""
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = before
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0] if lines else 'no message'}"
