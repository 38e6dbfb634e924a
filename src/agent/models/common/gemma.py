"""Implements Gemma's transformer (https://arxiv.org/abs/2403.08295), used as language model and as action expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from agent.models.common.attention import Attention, AttentionShape, Packing, attend
from agent.models.common.modules import Embedding, KeysValues, Linear, RMSNorm, Rope, rotate
from agent.models.common.sizes import GemmaVariant


class GemmaAttention(Attention):
    """Computes grouped-query attention: several query heads share a key-value head."""

    def __init__(self, table: GemmaVariant) -> None:
        super().__init__(AttentionShape(table.heads, table.kv_heads, table.head_dim))
        self.q_proj = Linear(table.width, table.heads * table.head_dim, bias=False)
        self.k_proj = Linear(table.width, table.kv_heads * table.head_dim, bias=False)
        self.v_proj = Linear(table.width, table.kv_heads * table.head_dim, bias=False)
        self.o_proj = Linear(table.heads * table.head_dim, table.width, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

    def keys_values(self, hidden: Tensor, rope: Rope) -> KeysValues:
        return rotate(self.split_heads(self.k_proj(hidden)), rope), self.split_heads(self.v_proj(hidden))

    def forward(
        self, hidden: Tensor, rope: Rope, seen: Tensor | Packing | None, keys: Tensor, values: Tensor
    ) -> Tensor:
        queries = rotate(self.split_heads(self.q_proj(hidden)), rope)
        return self.o_proj(attend(queries, keys, values, seen))


class GemmaMLP(nn.Module):
    """Applies a gated linear unit, (B, N, D) → (B, N, D)."""

    def __init__(self, table: GemmaVariant) -> None:
        super().__init__()
        self.gate_proj = Linear(table.width, table.mlp_dim, bias=False)
        self.up_proj = Linear(table.width, table.mlp_dim, bias=False)
        self.down_proj = Linear(table.mlp_dim, table.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(hidden), approximate="tanh") * self.up_proj(hidden))


class GemmaLayer(nn.Module):
    """Is one layer of the language model or of the expert."""

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
        seen: Tensor | Packing | None,
        past: KeysValues | None = None,
        keys_values_only: bool = False,
    ) -> tuple[Tensor, KeysValues]:
        """Returns the hidden states (B, N, D) after the layer, and the layer's own keys and values.

        ``past`` holds keys and values that are attended to before the layer's own. With ``keys_values_only`` the hidden
        states are returned unchanged.
        """
        normed = self.input_layernorm(hidden)
        own = self.self_attn.keys_values(normed, rope)
        if keys_values_only:
            return hidden, own
        keys, values = own if past is None else (torch.cat(pair, dim=2) for pair in zip(past, own, strict=True))
        hidden = hidden + self.self_attn(normed, rope, seen, keys, values)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), own


class Gemma(nn.Module):
    """Holds the layers and the final norm, and the token embedding of the language model; the expert has none."""

    def __init__(self, table: GemmaVariant, embedding: bool) -> None:
        super().__init__()
        if embedding:
            self.embedding = Embedding(table.vocab_size, table.width)
        self.layers = nn.ModuleList(GemmaLayer(table) for _ in range(table.depth))
        self.norm = RMSNorm(table.width)
