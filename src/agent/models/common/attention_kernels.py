"""Tries the attention kernels of a GPU before a run uses them, and turns off those that fail or compute something else.

Which kernel torch takes for a shape depends on the GPU, on torch and on cuDNN. Most have been wrong for some shape in some
version, by an error or silently. A try takes less than a second, and a wrong gradient a training. What is right is chosen by
torch's own fixed order, not by a time that is measured here, because then two starts of one run could compute differently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agent.models.common import attention
from agent.models.common.attention import AttentionShape, Packing, attend

log = logging.getLogger(__name__)

TOLERANCE = 2e-2  # relative error of output and gradients in 16 bits; a wrong kernel is off by far more
FLOAT32_TOLERANCE = 1e-3  # in float32, products in TF32 included
_LENGTHS = (72, 200, 96)  # of the sequences of a probe
_SWITCHES: dict[SDPBackend, Callable[[bool], None]] = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.enable_flash_sdp,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.enable_mem_efficient_sdp,
}


def choose_attention(policy: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Tries every kernel on every shape of the policy, forward and backward, and turns off the wrong ones in this process.

    Args:
        policy: a policy whose attention modules have a ``shape``.
        device: the GPU.
        dtype: the type of the policy's products.
    """
    shapes = sorted({module.shape for module in policy.modules() if isinstance(module, attention.Attention)})
    # torch prefers cuDNN on recent GPUs, and has since excluded our head width of 256 from it for some versions: its plans are
    # made for each shape anew, so that a try says little about the next length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    wrong: list[str] = []
    for backend, switch in _SWITCHES.items():
        faults = [
            fault
            for shape in shapes
            for masked in (False, True)
            if (fault := _try(shape, masked, device, dtype, backend))
        ]
        switch(not faults)
        wrong += faults[:1]
    attention.packed_kernel = dtype != torch.float32
    if attention.packed_kernel and (
        fault := next(filter(None, (_try_packed(shape, device, dtype) for shape in shapes)), None)
    ):
        attention.packed_kernel = False
        wrong.append(fault)
    for fault in wrong:
        log.warning("attention: %s; this run does without it", fault)
    log.info(
        "attention: %d shapes tried in %s, %s",
        len(shapes),
        dtype,
        "all kernels right" if not wrong else "others are right",
    )


def _try(
    shape: AttentionShape, masked: bool, device: torch.device, dtype: torch.dtype, backend: SDPBackend
) -> str | None:
    """Returns what is wrong with a kernel for dense batches, or None if it is right or does not take the shape."""
    queries, keys, values = _inputs(shape, len(_LENGTHS), max(_LENGTHS), device)
    mask = None
    if masked:
        lengths = torch.tensor(_LENGTHS, device=device)
        mask = (torch.arange(max(_LENGTHS), device=device) < lengths[:, None])[:, None, None]
    with sdpa_kernel(backend):
        return _compare(
            f"{backend.name.lower()} kernel, {shape}{', masked' if masked else ''}",
            [queries, keys, values],
            lambda q, k, v: attend(q, k, v, mask),
            lambda q, k, v: _exact(q, k, v, mask),
            dtype,
        )


def _try_packed(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns what is wrong with the kernel for packed sequences, or None."""
    lengths = torch.tensor(sorted(_LENGTHS))
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths.tolist())).bool().to(device)
    packing = Packing(ends.to(device), lengths, max(_LENGTHS))
    return _compare(
        f"kernel for packed sequences, {shape}",
        _inputs(shape, 1, sum(_LENGTHS), device),
        lambda q, k, v: attend(q, k, v, packing),
        lambda q, k, v: _exact(q, k, v, mask),
        dtype,
    )


def _inputs(shape: AttentionShape, batch: int, length: int, device: torch.device) -> list[Tensor]:
    """Draws queries, keys and values as the modules lay them out: (B, N, heads, head_dim) with two dimensions exchanged."""
    random = torch.Generator(device).manual_seed(0)
    counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [
        torch.randn(batch, length, count, shape.head_dim, generator=random, device=device).transpose(1, 2)
        for count in counts
    ]


def _exact(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Computes attention from its definition."""
    keys, values = (x.repeat_interleave(queries.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    scores = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)


def _compare(
    what: str,
    inputs: list[Tensor],
    kernel: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    dtype: torch.dtype,
) -> str | None:
    """Compares output and gradients of a kernel with those of the definition in float64; see :func:`_try`."""
    rounded = [x.to(dtype).requires_grad_() for x in inputs]
    precise = [x.detach().double().requires_grad_() for x in rounded]
    try:
        out = kernel(*rounded)
        gradient = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=dtype).view_as(out)
        found = [out, *torch.autograd.grad(out, rounded, gradient)]
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
    except RuntimeError as error:
        if any(words in str(error) for words in ("No available kernel", "No viable backend")):
            return None
        return f"{what}: {str(error).splitlines()[0]}"
    expected = exact(*precise)
    wanted = [expected, *torch.autograd.grad(expected, precise, gradient.double())]
    worst = max(float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in zip(found, wanted, strict=True))
    bound = FLOAT32_TOLERANCE if dtype == torch.float32 else TOLERANCE
    return None if worst <= bound else f"{what}: off by {worst:.2g} of the exact result"
