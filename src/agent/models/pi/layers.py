"""The layers of π0: of SigLIP's vision tower, and of Gemma, which is language model and action expert.

Building one computes no weights: ``PI0.init_weights`` draws them, or a file has them. Matrix products are in autocast's
type where that is on; norms and rotations are computed in float32. Shape suffixes are explained in ``agent.batch``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from agent.models.pi.configuration import GemmaVariant, VisionVariant

Rope = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Left to ``PI0.init_weights``, as in the next three classes: building a model computes no weights."""


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


class VisionAttention(nn.Module):
    """Tokens (B, P, D) of an image attend to each other."""

    def __init__(self, table: VisionVariant) -> None:
        super().__init__()
        self.heads = table.heads
        self.q_proj = Linear(table.width, table.width)
        self.k_proj = Linear(table.width, table.width)
        self.v_proj = Linear(table.width, table.width)
        self.out_proj = Linear(table.width, table.width)

    def forward(self, hidden: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        queries, keys, values = (p(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        return self.out_proj(attend(queries, keys, values, None))


class VisionMLP(nn.Module):
    """Two linear layers, (B, P, D) → (B, P, D)."""

    def __init__(self, table: VisionVariant) -> None:
        super().__init__()
        self.fc1 = Linear(table.width, table.mlp_dim)
        self.fc2 = Linear(table.mlp_dim, table.width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


class VisionLayer(nn.Module):
    """A layer of the vision tower, (B, P, D) → (B, P, D)."""

    def __init__(self, table: VisionVariant) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(table.width, eps=1e-6)
        self.self_attn = VisionAttention(table)
        self.layer_norm2 = LayerNorm(table.width, eps=1e-6)
        self.mlp = VisionMLP(table)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class Vision(nn.Module):
    """SigLIP's vision tower (https://arxiv.org/abs/2303.15343) without its pooling head."""

    def __init__(self, table: VisionVariant, image_size: int) -> None:
        super().__init__()
        self.patch_embedding = Conv2d(3, table.width, kernel_size=table.patch_size, stride=table.patch_size)
        self.position_embedding = Embedding((image_size // table.patch_size) ** 2, table.width)
        self.layers = nn.ModuleList(VisionLayer(table) for _ in range(table.depth))
        self.post_layernorm = LayerNorm(table.width, eps=1e-6)


class GemmaAttention(nn.Module):
    """Attention with grouped queries: several heads share a key-value head."""

    def __init__(self, table: GemmaVariant) -> None:
        super().__init__()
        self.head_dim = table.head_dim
        self.q_proj = Linear(table.width, table.heads * table.head_dim, bias=False)
        self.k_proj = Linear(table.width, table.kv_heads * table.head_dim, bias=False)
        self.v_proj = Linear(table.width, table.kv_heads * table.head_dim, bias=False)
        self.o_proj = Linear(table.heads * table.head_dim, table.width, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, hidden: Tensor, rope: Rope) -> KeysValues:
        return rotate(self.split_heads(self.k_proj(hidden)), rope), self.split_heads(self.v_proj(hidden))

    def forward(self, hidden: Tensor, rope: Rope, mask: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        queries = rotate(self.split_heads(self.q_proj(hidden)), rope)
        return self.o_proj(attend(queries, keys, values, mask))


class GemmaMLP(nn.Module):
    """Gated linear unit, (B, N, D) → (B, N, D)."""

    def __init__(self, table: GemmaVariant) -> None:
        super().__init__()
        self.gate_proj = Linear(table.width, table.mlp_dim, bias=False)
        self.up_proj = Linear(table.width, table.mlp_dim, bias=False)
        self.down_proj = Linear(table.mlp_dim, table.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(hidden), approximate="tanh") * self.up_proj(hidden))


class GemmaLayer(nn.Module):
    """A layer of the language model or of the expert."""

    def __init__(self, table: GemmaVariant) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(table.width)
        self.self_attn = GemmaAttention(table)
        self.post_attention_layernorm = RMSNorm(table.width)
        self.mlp = GemmaMLP(table)

    def forward(
        self,
        hidden: Tensor,
        rope: Rope,
        mask: Tensor | None,
        past: KeysValues | None = None,
        keys_values_only: bool = False,
    ) -> tuple[Tensor, KeysValues]:
        """Hidden states (B, N, D) after the layer, and the layer's own keys and values.

        ``past`` are keys and values to attend to before the layer's own. With ``keys_values_only`` the hidden
        states come back as they went in.
        """
        normed = self.input_layernorm(hidden)
        own = self.self_attn.keys_values(normed, rope)
        if keys_values_only:
            return hidden, own
        keys, values = own if past is None else (torch.cat(pair, dim=2) for pair in zip(past, own, strict=True))
        hidden = hidden + self.self_attn(normed, rope, mask, keys, values)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), own


class Gemma(nn.Module):
    """Layers and final norm; the language model also has the token embedding, the expert has none."""

    def __init__(self, table: GemmaVariant, embedding: bool) -> None:
        super().__init__()
        if embedding:
            self.embedding = Embedding(table.vocab_size, table.width)
        self.layers = nn.ModuleList(GemmaLayer(table) for _ in range(table.depth))
        self.norm = RMSNorm(table.width)
