"""Computes the products of linear layers in 8 bits, on GPUs that do so at twice the rate.

Each row of both operands has a scale of its own (``e4m3``, largest magnitude 448), as in torchao's rowwise recipe, and the sum
is made in float32. The layer's output and the gradient of its input are computed so; the gradient of the weight, to which every
token of a batch adds, stays in bfloat16. Weights, gradients and checkpoints are those of the layer without it. A layer is changed
from outside, and its model does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agent.models.common.modules import Linear

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_MULTIPLE = 16  # of both dimensions of a weight, which the kernels want


def use_fp8(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Has linear layers compute in 8 bits.

    Args:
        layers: of class ``Linear``, without bias.
        device: on a CPU the rounding is the same and the products are computed in float32, which is slow and meant for tests.

    Raises:
        ValueError: if a layer's sizes or the GPU do not allow it.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"fp8: mlp needs a GPU that multiplies in 8 bits, such as an H100 or H200; this one is a "
            f"{torch.cuda.get_device_name(device)}; write fp8: none"
        )
    for layer in layers:
        assert type(layer) is Linear and layer.bias is None
        if any(size % _MULTIPLE for size in layer.weight.shape):
            raise ValueError(
                f"fp8: mlp needs layers whose sizes are multiples of {_MULTIPLE}, and one is "
                f"{layer.in_features} → {layer.out_features}; write fp8: none"
            )
        layer.__class__ = Fp8Linear


class Fp8Linear(Linear):
    """Is a linear layer that computes in 8 bits under autocast, (…, in_features) → (…, out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):  # computed in float32, for a comparison
            return super().forward(x)
        dtype = torch.get_autocast_dtype(kind)
        product: Tensor = _Product.apply(x.to(dtype).flatten(0, -2), self.weight.to(dtype))
        return product.unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """Multiplies x (M, K) by the transpose of a weight (N, K)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = _multiply(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = gradient.t() @ x if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Returns ``a @ b.t()`` for a (M, K) and b (N, K), with the rows of both rounded to 8 bits."""
    (codes_a, scale_a), (codes_b, scale_b) = _rounded(a), _rounded(b)
    if a.is_cuda:
        return torch._scaled_mm(codes_a, codes_b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=a.dtype)
    return ((codes_a.float() * scale_a) @ (codes_b.float() * scale_b).t()).to(a.dtype)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to 8 bits: codes (rows, K), contiguous, and scales (rows, 1) float32."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / _LARGEST
    return (rows / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3).contiguous(), scale
