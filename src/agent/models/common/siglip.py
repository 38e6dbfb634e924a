"""Implements SigLIP's vision tower (https://arxiv.org/abs/2303.15343), which turns an image into one token per patch."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from agent.models.common.attention import Attention, AttentionShape, attend
from agent.models.common.modules import Conv2d, Embedding, LayerNorm, Linear
from agent.models.common.sizes import VisionVariant


class VisionAttention(Attention):
    """Lets the tokens (B, P, D) of an image attend to each other."""

    def __init__(self, table: VisionVariant) -> None:
        super().__init__(AttentionShape(table.heads, table.heads, table.width // table.heads))
        self.q_proj = Linear(table.width, table.width)
        self.k_proj = Linear(table.width, table.width)
        self.v_proj = Linear(table.width, table.width)
        self.out_proj = Linear(table.width, table.width)

    def forward(self, hidden: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        queries, keys, values = (p(hidden).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2) for p in projections)
        return self.out_proj(attend(queries, keys, values, None))


class VisionMLP(nn.Module):
    """Applies two linear layers, (B, P, D) → (B, P, D)."""

    def __init__(self, table: VisionVariant) -> None:
        super().__init__()
        self.fc1 = Linear(table.width, table.mlp_dim)
        self.fc2 = Linear(table.mlp_dim, table.width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


class VisionLayer(nn.Module):
    """Is one layer of the vision tower, (B, P, D) → (B, P, D)."""

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
    """Holds the parts of SigLIP's vision tower, without its pooling head."""

    def __init__(self, table: VisionVariant, image_size: int) -> None:
        super().__init__()
        self.patch_embedding = Conv2d(3, table.width, kernel_size=table.patch_size, stride=table.patch_size)
        self.position_embedding = Embedding((image_size // table.patch_size) ** 2, table.width)
        self.layers = nn.ModuleList(VisionLayer(table) for _ in range(table.depth))
        self.post_layernorm = LayerNorm(table.width, eps=1e-6)
