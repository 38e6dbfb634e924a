"""Updates by AdamW with moments of eight bits, weights of bfloat16, or both; the temporary memory is that of a few million
numbers.

torchao's and bitsandbytes' were tried first (0.18 and 0.50, on a CPU). torchao compiles its update: 31 s before the first
one of two tensors, and it does not run without a C++ compiler. Its stochastic rounding draws from torch's global
generator, so a continued run would round otherwise. bitsandbytes ran, without a compiler too, but rounds the new weight
to nearest in the weight's own type, which for bfloat16 loses small updates, and lets a small second moment become zero:
with gradients that spread over four decades within a block, its weights were after 30 updates off by 47% of the distance
that float32 AdamW had gone, these by 11%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agent.optim.adamw8bit import dequantise, quantise, scale_shape
from agent.optim.stochastic_rounding import RandomBits, round_to_bfloat16
from agent.parallel import sharding

_PIECE = 1 << 22  # numbers at a time; the temporary memory is some ten times that in float32
_SMALL = 4096  # tensors with fewer numbers keep float32 moments; they take no memory to speak of


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101), computed in float32 whatever its weights and moments are held in.

    Weights of bfloat16 are rounded stochastically. The optimizer takes a tensor in pieces of whole rows, so with FSDP,
    which splits by rows, each process does for its rows what one process would do for all.
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
        self._bits = RandomBits(seed)

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
        gradients = [sharding.rows(parameter.grad).local for parameter in parameters]
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
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        self.gradient_scale = None

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= self.new_state(parameter)
        state["step"] += 1
        factors = _Factors.of(group, int(state["step"]))
        weight, first_row = sharding.rows(parameter)
        assert weight.is_contiguous() and parameter.grad is not None
        gradient = sharding.rows(parameter.grad).local
        tensors = {kind: sharding.rows(tensor).local for kind, tensor in state.items() if kind != "step"}
        for piece in _pieces(tuple(parameter.shape), first_row, len(weight) if weight.dim() else 1):
            part = _rows(weight, piece)
            bits = None
            if weight.dtype == torch.bfloat16:
                key = (self.update, self._names[parameter], piece.number)
                bits = self._bits.draw(key, (piece.rows_of_all, part.shape[1]), weight.device)
                bits = bits[piece.offset : piece.offset + len(part)]
            moments = {kind: _rows(tensor, piece) for kind, tensor in tensors.items()}
            _update_rows(part, self._read(_rows(gradient, piece)), moments, factors, bits)

    def _read(self, gradient: Tensor) -> Tensor:
        gradient = gradient.float()
        return gradient if self.gradient_scale is None else gradient * self.gradient_scale


@dataclass(frozen=True)
class _Factors:
    """The numbers of one update."""

    first: float
    second: float
    decay: float
    rate: float
    correction: float
    eps: float

    @classmethod
    def of(cls, group: dict[str, Any], step: int) -> _Factors:
        lr, (first, second) = group["lr"], group["betas"]
        decay, rate = 1 - lr * group["weight_decay"], lr / (1 - first**step)
        return cls(first, second, decay, rate, math.sqrt(1 - second**step), group["eps"])


def _update_rows(
    weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], factors: _Factors, bits: Tensor | None
) -> None:
    """All arguments (rows, numbers); weight and moments are changed."""
    eight_bit = "exp_avg_scale" in moments
    if eight_bit:
        average = dequantise(moments["exp_avg"], moments["exp_avg_scale"], signed=True)
        square = dequantise(moments["exp_avg_sq_root"], moments["exp_avg_sq_root_scale"], signed=False).square_()
    else:
        average, square = moments["exp_avg"], moments["exp_avg_sq"]
    average.lerp_(gradient, 1 - factors.first)
    square.mul_(factors.second).addcmul_(gradient, gradient, value=1 - factors.second)
    root = square.sqrt()
    value = weight.float()  # the weight itself, if it is float32
    value.mul_(factors.decay).addcdiv_(average, (root / factors.correction).add_(factors.eps), value=-factors.rate)
    if bits is not None:
        weight.copy_(round_to_bfloat16(value, bits))
    if eight_bit:
        quantise(average, moments["exp_avg"], moments["exp_avg_scale"], signed=True)
        quantise(root, moments["exp_avg_sq_root"], moments["exp_avg_sq_root_scale"], signed=False)


@dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor, of which this process has all or a part."""

    number: int
    rows_of_all: int
    offset: int
    """The first row that this process has, counted from the piece's first."""
    begin: int
    end: int
    """The same rows, counted from the first that this process has of the tensor."""


def _pieces(shape: tuple[int, ...], first_row: int, rows: int) -> Iterator[_Piece]:
    """Cuts a tensor of this shape, of which rows from ``first_row`` on are here, at the same rows on every process."""
    total = shape[0] if shape else 1
    size = max(1, _PIECE // max(1, math.prod(shape[1:])))
    if rows == 0:  # more processes than rows
        return
    for number in range(first_row // size, math.ceil((first_row + rows) / size)):
        begin, end = max(first_row, number * size), min(first_row + rows, (number + 1) * size)
        of_all = min(size, total - number * size)
        yield _Piece(number, of_all, begin - number * size, begin - first_row, end - first_row)


def _rows(tensor: Tensor, piece: _Piece) -> Tensor:
    """Returns these rows of a tensor as (rows, numbers): a view, unless a gradient's memory layout is not its weight's."""
    if tensor.dim() == 0:
        return tensor.reshape(1, 1)
    return tensor[piece.begin : piece.end].flatten(1) if tensor.dim() > 1 else tensor[piece.begin : piece.end, None]


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
