"""Defines the modules that the transformers are built from: linear layers, norms, attention, rotary positions.

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


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Computes attention.

    Args:
        queries: (B, heads, N, head_dim).
        keys: (B, kv_heads, M, head_dim).
        values: (B, kv_heads, M, head_dim).
        mask: bool, broadcastable to (B, heads, N, M), True where a query attends to a key; None if all attend to all.

    Returns:
        (B, N, heads·head_dim).
    """
    groups = queries.shape[1] // keys.shape[1]
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        return _attend_with_products(queries, keys, values, mask)
    if groups > 1 and (mask is not None or (queries.dtype == torch.float32 and queries.device.type == "cuda")):
        # On a GPU only flash attention supports enable_gqa, and it takes neither a mask nor float32; otherwise torch falls
        # back to the kernel that writes out all scores. With the heads repeated as a view the other fused kernels apply;
        # for a single key-value head the view copies nothing.
        keys, values = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (keys, values))
        groups = 1
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=groups > 1)
    return out.transpose(1, 2).flatten(2)


def _attend_with_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Computes ``attend`` with plain matrix products, because the fused bfloat16 kernel for CPUs is several times slower."""
    groups, length = queries.shape[1] // keys.shape[1], queries.shape[2]
    # The heads that share keys and values are treated as one longer sequence of queries.
    grouped = (queries * queries.shape[-1] ** -0.5).unflatten(1, (-1, groups)).flatten(2, 3)
    scores = (grouped @ keys.transpose(2, 3)).unflatten(2, (groups, length))
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf).unsqueeze(2)
    out = scores.softmax(dim=-1).to(values.dtype).flatten(2, 3) @ values
    return out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4).flatten(2)


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
