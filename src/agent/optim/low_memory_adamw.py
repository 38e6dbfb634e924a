"""Updates by AdamW with moments of eight bits, weights of bfloat16, or both; the temporary memory is a few megabytes.

The arithmetic is in ``one_pass.py``, and the two quicker ways to the same bits are beside it.

torchao's and bitsandbytes' were tried first (0.18 and 0.50, on a CPU). torchao compiles its update: 31 s before the first
one of two tensors, and it does not run without a C++ compiler. Its stochastic rounding draws from torch's global
generator, so a continued run would round otherwise. bitsandbytes ran, without a compiler too, but rounds the new weight
to nearest in the weight's own type, which for bfloat16 loses small updates, and lets a small second moment become zero:
with gradients that spread over four decades within a block, its weights were after 30 updates off by 47% of the distance
that float32 AdamW had gone, these by 11%.
"""

from __future__ import annotations

import logging
import math
import subprocess
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from agent.optim.adamw8bit import scale_shape
from agent.optim.one_pass import Factors, OneUpdate, update_in_torch
from agent.optim.stochastic_rounding import rounding_key
from agent.parallel import sharding

log = logging.getLogger(__name__)

_SMALL = 4096  # tensors with fewer numbers keep float32 moments; they take no memory to speak of
_WORTH_COMPILING = 4_000_000  # trained numbers on a CPU; compiling takes a second


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101), computed in float32 whatever its weights and moments are held in.

    Weights of bfloat16 are rounded stochastically. No number depends on others than those of its block in its row, so
    with FSDP, which splits by rows, each process does for its rows what one process would do for all.
    """

    update = 0
    """Number of the coming update; together with the seed and the parameter's name it decides how weights are rounded."""
    gradient_scale: Tensor | None = None
    """One number on the device, by which the coming update multiplies gradients as it reads them; see :meth:`clip`."""

    def __init__(
        self,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        eight_bit: bool,
        seed: int,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([parameter for _, parameter in named_parameters], defaults)
        self._names = {parameter: name for name, parameter in named_parameters}
        self._eight_bit = eight_bit
        self._seed = seed
        self._first: dict[Tensor, int] = {}
        """Position of the first number that this process has of a parameter."""
        self._steps: dict[Tensor, tuple[int, int]] = {}
        """Counter of a parameter's steps → how often it had been written after the last update, and the number in it."""

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first update.

        ``step`` stays on the CPU, where it is read without a wait. ``exp_avg`` and ``exp_avg_sq`` are float32, or
        ``exp_avg`` and ``exp_avg_sq_root`` are codes with a ``_scale`` (rows, blocks) each.
        """
        state = {"step": torch.zeros(())}
        if not self._eight_bit or parameter.dim() < 2 or parameter.numel() < _SMALL:
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            return state
        for kind in ("exp_avg", "exp_avg_sq_root"):
            state[kind] = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
            state[f"{kind}_scale"] = _scales_like(parameter)
        return state

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Has the coming update take gradients of at most this norm; returns their norm, a float32 on the device.

        The norm is a sum in float32, and the gradients are scaled as they are read, in float32 too: where they are
        bfloat16, they are not rounded a second time. A collective if they are sharded.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [_local(parameter.grad) for parameter in parameters]
        square = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
        if sharding.is_sharded(parameters[0]):
            torch.distributed.all_reduce(square)
        norm = square.sqrt()
        self.gradient_scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        trained = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        way = self._way([parameter for parameter, _ in trained])
        factors: dict[tuple[int, int], Factors] = {}
        for (parameter, group), step in zip(trained, self._count([p for p, _ in trained]), strict=True):
            if (id(group), step) not in factors:
                factors[id(group), step] = Factors.of(group, step)
            update = self._update(parameter, factors[id(group), step])
            if update.weight.numel():  # there may be more processes than rows
                way(update)
        self.gradient_scale = None

    def _way(self, parameters: list[torch.nn.Parameter]) -> Callable[[OneUpdate], None]:
        """The quickest way to compute the updates; all give the same bits."""
        if not parameters:
            return update_in_torch
        if parameters[0].device.type == "cuda":
            return _in_triton() or update_in_torch
        worth = sum(parameter.numel() for parameter in parameters) >= _WORTH_COMPILING
        return worth and _in_c() or update_in_torch

    def _count(self, parameters: list[torch.nn.Parameter]) -> list[int]:
        """Counts one more step of each; a counter is read only if something else than this has written it."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= self.new_state(parameter)
        counters = [self.state[parameter]["step"] for parameter in parameters]
        steps = []
        for counter in counters:
            written, step = self._steps.get(counter, (-1, 0))
            steps.append((step if written == counter._version else int(counter)) + 1)
        if counters:
            torch._foreach_add_(counters, 1)
        self._steps = {counter: (counter._version, step) for counter, step in zip(counters, steps, strict=True)}
        return steps

    def _update(self, parameter: torch.nn.Parameter, factors: Factors) -> OneUpdate:
        """Gathers what an update of this parameter needs, in no more operators than a gradient's memory layout takes."""
        assert parameter.grad is not None
        if parameter not in self._first:
            row = math.prod(parameter.shape[1:])
            self._first[parameter] = sharding.rows(parameter).first * row
        weight, gradient = _local(parameter), _local(parameter.grad)
        assert weight.is_contiguous()
        moments = tuple(_local(tensor) for kind, tensor in self.state[parameter].items() if kind != "step")
        key = rounding_key(self._seed, self.update, self._names[parameter])
        gradient = gradient if gradient.is_contiguous() else gradient.contiguous()
        return OneUpdate(weight, gradient, moments, factors, key, self._first[parameter], self.gradient_scale)


def _local(tensor: Any) -> Tensor:
    """This process's part of a tensor, as :func:`agent.parallel.sharding.rows` has it, without an operator."""
    return tensor.to_local() if sharding.is_sharded(tensor) else tensor


@cache
def _in_triton() -> Callable[[OneUpdate], None] | None:
    try:
        from agent.optim.one_pass_triton import update_in_triton
    except ImportError as error:
        log.warning("the optimizer's updates take longer: their kernel needs triton, which is not there (%s)", error)
        return None
    return update_in_triton


@cache
def _in_c() -> Callable[[OneUpdate], None] | None:
    from agent.optim.one_pass_c import compile_update

    try:
        return compile_update()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.info("the optimizer's updates are not compiled, torch computes them (%s)", error)
        return None


def _scales_like(parameter: Any) -> Tensor:
    rows, blocks = scale_shape(tuple(parameter.shape))
    local = torch.zeros(len(sharding.rows(parameter).local), blocks, device=parameter.device)
    if not sharding.is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size((rows, blocks))
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=(blocks, 1)
    )
