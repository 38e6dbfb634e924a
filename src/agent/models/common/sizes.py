"""Defines the sizes of the transformers in a policy, by name or as a table in a model JSON. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any


@dataclass
class GemmaVariant:
    """Sizes of a Gemma transformer."""

    width: int
    """Size of a token's vector."""
    depth: int
    """Layers."""
    mlp_dim: int
    """Hidden size of a layer's MLP."""
    heads: int
    """Query heads of the attention."""
    kv_heads: int
    """Key and value heads, each shared by ``heads`` / ``kv_heads`` query heads."""
    head_dim: int
    """Size of a head."""
    vocab_size: int = 257152
    """Rows of the token embedding."""


@dataclass
class VisionVariant:
    """Sizes of a SigLIP vision tower."""

    width: int = 1152
    """Size of a patch's vector."""
    depth: int = 27
    """Layers."""
    mlp_dim: int = 4304
    """Hidden size of a layer's MLP."""
    heads: int = 16
    """Heads of the attention."""
    patch_size: int = 14
    """Side of a patch in pixels."""


GEMMA = {
    "gemma_2b": GemmaVariant(width=2048, depth=18, mlp_dim=16384, heads=8, kv_heads=1, head_dim=256),
    "gemma_300m": GemmaVariant(width=1024, depth=18, mlp_dim=4096, heads=8, kv_heads=1, head_dim=256),
}
VISION = {"so400m": VisionVariant()}


def resolve(key: str, value: Any, known: dict[str, Any]) -> Any:
    """Returns the table of sizes behind a variant's name; a table is returned as it is.

    Raises:
        ValueError: if no variant has that name.
    """
    if not isinstance(value, str):
        return value
    if value not in known:
        keys = ", ".join(f.name for f in fields(next(iter(known.values()))))
        near = get_close_matches(value, known, n=1) or list(known)
        raise ValueError(f"{key}: no variant {value!r}; write {' or '.join(near)}, or a table of {keys}")
    return known[value]


def patches_per_camera(vision: VisionVariant, side: int) -> int:
    """Returns the number of tokens of a square image with ``side`` pixels on each side."""
    return (side // vision.patch_size) ** 2
