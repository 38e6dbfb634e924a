"""Computes attention, on dense batches and on sequences of different lengths that lie behind one another.

The sequences of a batch differ in length where robots have different cameras or instructions. Padded to one length they would
cost what the longest costs, and a mask, which excludes the fastest kernels of a GPU. Packed, they cost what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

packed_kernel = True
"""Whether flash attention takes packed sequences in 16 bits on this GPU; ``attention_kernels`` finds out."""


class AttentionShape(NamedTuple):
    """States the sizes of an attention module."""

    heads: int
    kv_heads: int
    """Key-value heads, each shared by ``heads / kv_heads`` query heads."""
    head_dim: int


class Attention(nn.Module):
    """Is the base class of modules that call :func:`attend`, so that the kernels for their shapes can be tried."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape


class Packing(NamedTuple):
    """States where the sequences of a batch begin and end in a tensor in which they lie behind one another, N tokens in all."""

    boundaries: Tensor
    """(B + 1,) int32, on the device of the tokens: 0, and where each sequence ends."""
    lengths: Tensor
    """(B,) int64, on the CPU: the tokens of each sequence; sequences of equal length must be neighbours to share a call."""
    longest: int
    """No sequence of any batch is longer. A kernel gets this bound, because it is the same for all batches."""


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | Packing | None) -> Tensor:
    """Computes attention.

    Args:
        queries: (B, heads, N, head_dim).
        keys: (B, kv_heads, M, head_dim).
        values: (B, kv_heads, M, head_dim).
        seen: bool, broadcastable to (B, heads, N, M), True where a query attends to a key; None if all attend to all; or
            a ``Packing`` of N = M tokens with B = 1, of which those of one sequence attend to each other.

    Returns:
        (B, N, heads·head_dim).
    """
    if isinstance(seen, Packing):
        return _attend_packed(queries, keys, values, seen)
    groups = queries.shape[1] // keys.shape[1]
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        return _attend_with_products(queries, keys, values, seen)
    if groups > 1 and (seen is not None or (queries.dtype == torch.float32 and queries.device.type == "cuda")):
        # On a GPU only flash attention supports enable_gqa, and it takes neither a mask nor float32; otherwise torch falls
        # back to the kernel that writes out all scores. With the heads repeated as a view the other fused kernels apply;
        # for a single key-value head the view copies nothing.
        keys, values = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (keys, values))
        groups = 1
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, enable_gqa=groups > 1)
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


def _attend_packed(queries: Tensor, keys: Tensor, values: Tensor, packing: Packing) -> Tensor:
    """Computes ``attend`` for packed sequences.

    On a GPU flash attention takes them as they are, in 16 bits. Elsewhere the sequences of one length share a call.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (queries, keys, values))
    if q.is_cuda and q.dtype != torch.float32 and packed_kernel:
        from torch.nn.attention.varlen import varlen_attn

        heads = q.shape[1] // k.shape[1]
        k, v = (x.unsqueeze(2).expand(-1, -1, heads, -1).flatten(1, 2) for x in (k, v))
        ends, longest = packing.boundaries, packing.longest
        out = varlen_attn(q, k, v, ends, ends, longest, longest)
        assert isinstance(out, Tensor)
        return out.flatten(1)[None]
    if torch.compiler.is_compiling():  # the lengths are not known to the compiler, so that it makes no variant for each
        return attend_by_length(q, k, v, packing.lengths)[None]
    return _by_length(q, k, v, packing.lengths)[None]


def _by_length(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Has each sequence attend to itself: queries (N, heads, head_dim), keys and values (N, kv_heads, head_dim).

    Returns:
        (N, heads·head_dim).
    """
    parts = []
    for begin, end, length in _groups(lengths):
        q, k, v = (x[begin:end].unflatten(0, (-1, length)).transpose(1, 2) for x in (queries, keys, values))
        parts.append(attend(q, k, v, None).flatten(0, 1))
    return torch.cat(parts)


def _groups(lengths: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields begin and end of neighbouring sequences of one length, and this length."""
    begin = 0
    for length, sequences in groupby(lengths.tolist()):
        end = begin + length * len(list(sequences))
        yield begin, end, length
        begin = end


@torch.library.custom_op("agent::attend_by_length", mutates_args=())
def attend_by_length(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Is ``_by_length`` as one operator, into which a compiler does not look."""
    return _by_length(queries, keys, values, lengths)


@attend_by_length.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    return queries.new_empty(queries.shape[0], queries.shape[1] * queries.shape[2])


@torch.library.custom_op("agent::attend_by_length_backward", mutates_args=())
def _attend_by_length_backward(
    gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of queries, keys and values; the scores are computed again for it."""
    heads, shared = queries.shape[1], queries.shape[1] // keys.shape[1]
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (queries, keys, values)]
    for begin, end, length in _groups(lengths):
        q, k, v, g = (
            x[begin:end].unflatten(0, (-1, length)).transpose(1, 2)
            for x in (
                queries,
                keys.repeat_interleave(shared, 1),
                values.repeat_interleave(shared, 1),
                gradient.unflatten(1, (heads, -1)),
            )
        )
        scale = q.shape[-1] ** -0.5
        weights = (q @ k.transpose(2, 3) * scale).softmax(dim=-1)
        inner = g @ v.transpose(2, 3)
        scores = weights * (inner - (inner * weights).sum(dim=-1, keepdim=True)) * scale
        whole = (scores @ k, scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ g)
        for out, part in zip(found, whole, strict=True):  # heads that share keys and values add up their gradients
            out[begin:end] = part.unflatten(1, (out.shape[1], -1)).sum(2).transpose(1, 2).flatten(0, 1)
    return found[0], found[1], found[2]


@_attend_by_length_backward.register_fake
def _(
    gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape),
        keys.new_empty(keys.shape),
        values.new_empty(values.shape),
    )


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_by_length_backward(gradient, *ctx.saved_tensors), None  # type: ignore[attr-defined]


attend_by_length.register_autograd(_backward, setup_context=_keep)
