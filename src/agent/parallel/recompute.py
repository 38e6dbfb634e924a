"""Chooses which results of the forward pass are kept for the backward pass, and which are computed again there
(activation checkpointing)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def recompute(units: list[nn.Module], how: str) -> None:
    """Has each unit compute activations again in the backward pass instead of keeping them. Never nested.

    Args:
        units: modules whose ``forward`` is a function of its arguments and parameters alone.
        how: ``none``; ``full``, which keeps a unit's inputs alone; or ``blocks``, which also keeps what matrix products
            and attention gave, and computes again what is elementwise: norms, rotations, activation functions, casts.

    Of a Gemma layer of 2048 × 16384 under bfloat16 autocast, autograd keeps 180 KiB a token, and the weights in bfloat16.
    Most of it are four tensors of the MLP's width. Two of them are matrix products, the others follow from these by an
    activation function and a multiplication. So ``blocks`` keeps 85 KiB and computes hardly anything twice; ``full`` keeps
    8 KiB and computes all but the last product twice. To recompute the MLP alone would save little of that work.
    """
    assert how in ("none", "blocks", "full"), how
    if how == "none":
        return
    for unit in units:
        unit.forward = _recomputed(unit, unit.forward, selective=how == "blocks")  # type: ignore[method-assign]


def _recomputed(unit: nn.Module, forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        again["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_operations())

    def run(*arguments: Any) -> Any:
        if not (unit.training and torch.is_grad_enabled()):
            return forward(*arguments)
        return checkpoint(forward, *arguments, **again)

    return run


def _kept_operations() -> list[Any]:
    """Lists matrix products with parameters, and attention in every kernel but the one that writes out all scores."""
    names = (
        "mm addmm _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_mm _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    )
    operations = [getattr(torch.ops.aten, name).default for name in names.split()]
    if torch.cuda.is_available():
        import_module("torch.nn.attention.varlen")  # registers the operator that attends in packed batches
        operations.append(torch.ops.torch_attn._varlen_attn.default)
    return operations
