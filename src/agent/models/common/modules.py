"""The small modules that every transformer here is built of: linear layers, norms, attention, rotary positions.

Building one computes no weights: a policy's ``init_weights`` draws them, or a file has them. Matrix products are in
autocast's type where that is on; norms and rotations are computed in float32. ``agent.batch`` explains shape suffixes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Rope = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """A policy's ``init_weights`` does it, as for the next three classes: building a model computes no weights."""


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
        """In float32, whatever the weights are held in."""
        normed = F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(product_dtype(x))


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products of ``x`` are computed: autocast's, where it is on.

    Norms give this type, so that the products after them share one rounded copy. Autocast itself would make, and keep
    for the backward pass, one for each of them.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Float32Linear(Linear):
    """Computes in float32, whatever the weights are held in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class RMSNorm(nn.Module):
    """Gemma's: the weight is an offset from one, and the arithmetic is float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden.float(), self.weight.shape, 1.0 + self.weight.float(), eps=1e-6)
        return normed.to(product_dtype(hidden))


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention: queries (B, heads, N, head_dim), keys and values (B, kv_heads, M, head_dim) → (B, N, heads·head_dim).

    ``mask`` is broadcastable to (B, heads, N, M), True where a query may look; None lets all look everywhere.
    """
    groups = queries.shape[1] // keys.shape[1]
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        return _attend_with_products(queries, keys, values, mask)
    if groups > 1 and (mask is not None or (queries.dtype == torch.float32 and queries.device.type == "cuda")):
        # On a GPU, enable_gqa is for flash attention alone, which takes neither a mask nor float32: there it leaves only
        # the kernel that writes out all scores. A view that repeats the heads keeps the others; of a single key-value
        # head it copies nothing.
        keys, values = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (keys, values))
        groups = 1
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=groups > 1)
    return out.transpose(1, 2).flatten(2)


def _attend_with_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """``attend`` as plain matrix products, for bfloat16 on a CPU, whose fused kernel is several times slower there."""
    groups, length = queries.shape[1] // keys.shape[1], queries.shape[2]
    # The heads that share keys and values are one longer sequence of queries.
    grouped = (queries * queries.shape[-1] ** -0.5).unflatten(1, (-1, groups)).flatten(2, 3)
    scores = (grouped @ keys.transpose(2, 3)).unflatten(2, (groups, length))
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf).unsqueeze(2)
    out = scores.softmax(dim=-1).to(values.dtype).flatten(2, 3) @ values
    return out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4).flatten(2)


def rotary(positions_BN: Tensor, head_dim: int) -> Rope:
    """Cosine and sine (B, 1, N, head_dim / 2) of rotary position embedding (https://arxiv.org/abs/2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BN.device, dtype=torch.float32) / head_dim
    angles = positions_BN[:, None, :, None].float() * (1.0 / 10_000.0**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Queries or keys (B, heads, N, head_dim) turned by their positions, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rope
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)
