"""Whether a way to compute updates gives the bits that torch gives on a CPU.

``differences(update_in_triton, example, 3)`` for every one of ``examples(torch.device("cuda"))`` checks the kernel on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from agent.optim.adamw8bit import scale_shape
from agent.optim.one_pass import Factors, OneUpdate, update_in_torch
from agent.optim.stochastic_rounding import rounding_key

_HYPERPARAMETERS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
_TYPES = (torch.float32, torch.bfloat16)
# Short last blocks, rows shorter than a block, and none but whole ones.
_SHAPES = ((3, 700), (20, 2, 9), (3, 512))


def examples(device: torch.device) -> list[OneUpdate]:
    """Updates of every kind: types of weights, gradients and moments; numbers in 12 orders of magnitude, and none at all.

    Some lie where the position's upper word changes.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[OneUpdate] = []
    for shape, weights, gradients, eight_bit in product(_SHAPES, _TYPES, _TYPES, (False, True)):
        wide = torch.logspace(-9, 3, shape[-1])
        weight, gradient = (torch.randn(shape, generator=generator) * wide for _ in range(2))
        weight[0], gradient[0] = 0.0, -0.0
        moments = [torch.randn(shape, generator=generator) * wide, torch.rand(shape, generator=generator) * wide]
        moments[0][0], moments[1][0] = -0.0, 0.0
        if eight_bit:
            codes = torch.randint(256, (2, *shape), dtype=torch.uint8, generator=generator)
            scales = torch.rand((2, *scale_shape(shape)), generator=generator)
            codes[0, 0], scales[:, 0] = 0, 0.0  # the first code is negative, so these are -0.0 too
            moments = [codes[0], scales[0], codes[1], scales[1]]
        first = 0 if shape[-1] == 512 else 2 * 2**32 - 901
        scale = None if gradients == torch.float32 else torch.tensor(0.37, device=device)
        tensors = [tensor.to(device) for tensor in (weight.to(weights), gradient.to(gradients), *moments)]
        factors, key = Factors.of(_HYPERPARAMETERS, 3), rounding_key(0, len(found), "example")
        found.append(OneUpdate(tensors[0], tensors[1], tuple(tensors[2:]), factors, key, first, scale))
    return found


def differences(way: Callable[[OneUpdate], None], update: OneUpdate, updates: int = 1) -> dict[str, int]:
    """Compares a way to compute updates with :func:`update_in_torch` on the CPU; both work on copies.

    Args:
        way: computes an update on the device of the tensors in ``update``.
        update: the first update; its key changes from one to the next.
        updates: how many to make, one after the other.

    Returns:
        ``weight`` or the number of a moment → how many of its bytes differ in the end; empty if none does.
    """
    ours, theirs = _copied(update, update.weight.device), _copied(update, torch.device("cpu"))
    for number in range(updates):
        key = (update.key[0] ^ number, update.key[1])
        way(ours._replace(key=key))
        update_in_torch(theirs._replace(key=key))
    pairs = zip((ours.weight, *ours.moments), (theirs.weight, *theirs.moments), strict=True)
    found = [int((a.cpu().view(-1).view(torch.uint8) != b.view(-1).view(torch.uint8)).sum()) for a, b in pairs]
    return {"weight" if i == 0 else f"moments[{i - 1}]": count for i, count in enumerate(found) if count}


def _copied(update: OneUpdate, device: torch.device) -> OneUpdate:
    scale = update.gradient_scale
    return update._replace(
        weight=update.weight.detach().to(device, copy=True),
        gradient=update.gradient.to(device),
        moments=tuple(moment.to(device, copy=True) for moment in update.moments),
        gradient_scale=None if scale is None else scale.to(device),
    )
