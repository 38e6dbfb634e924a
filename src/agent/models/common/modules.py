"""Defines the modules that the transformers are built from: linear layers, norms, rotary positions.

Constructing a module initialises no weights: a policy's ``init_weights`` draws them, or a checkpoint provides them. Matrix
products use autocast's type where autocast is on; norms and rotations are computed in float32. ``agent.batch`` explains
the shape suffixes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Rope = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Does nothing, as in the next three classes: a policy's ``init_weights`` draws the weights."""


class Conv2d(nn.Conv2d):
    def reset_parameters(self) -> None:
        """See ``Linear``."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """See ``Linear``."""


class LayerNorm(nn.LayerNorm):
    def reset_parameters(self) -> None:
        """See ``Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises in float32, whatever the type of the weights."""
        normed = F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(product_dtype(x))


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the type in which matrix products of ``x`` are computed: autocast's, where autocast is on.

    Norms return this type, so that the products after them share one rounded copy. Autocast would make one copy for each
    product and keep it for the backward pass.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Float32Linear(Linear):
    """Computes in float32, whatever the type of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class RMSNorm(nn.Module):
    """Is Gemma's norm: the weight is an offset from one, and the arithmetic is in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden.float(), self.weight.shape, 1.0 + self.weight.float(), eps=1e-6)
        return normed.to(product_dtype(hidden))


def rotary(positions_BN: Tensor, head_dim: int) -> Rope:
    """Returns cosine and sine (B, 1, N, head_dim / 2) of rotary position embedding (https://arxiv.org/abs/2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BN.device, dtype=torch.float32) / head_dim
    angles = positions_BN[:, None, :, None].float() * (1.0 / 10_000.0**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates queries or keys (B, heads, N, head_dim) by their positions, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rope
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)
