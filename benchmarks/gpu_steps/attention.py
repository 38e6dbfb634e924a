"""Which attention kernel is right, and fast, for π0's shapes: each one that torch has, and what it chooses by itself.

Shapes and layouts as `agent.models.common.modules` makes them: heads are views of (B, N, heads·dim); with ``expand`` keys and
values of one head are repeated by a view with stride 0, with ``gqa`` they stay one head. Errors are distances relative to
float64 over the same bfloat16 inputs, of the output and of the gradients of queries, keys and values.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_steps.place import Place, away

LARGEST_ERROR = 1e-2  # bfloat16 gives 1e-3 to 1e-2
BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CHOICES = {backend.value: backend.name.split("_")[0].lower() for backend in SDPBackend.__members__.values()}
SOME = 2  # samples of the batch that float64 computes


class Shape(NamedTuple):
    """Of one attention."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    queries: int
    keys: int


SHAPES = (
    Shape("vision", 96, 16, 16, 72, 256, 256),
    Shape("prefix, three cameras", 32, 8, 1, 256, 816, 816),
    Shape("prefix, one camera", 32, 8, 1, 256, 304, 304),
    Shape("suffix", 32, 8, 1, 256, 51, 867),
)


def run(place: Place) -> None:
    """Passes if what torch chooses is right; names the fastest right kernel of each shape, with and without a mask."""
    torch.manual_seed(0)
    for shape in SHAPES:
        if place.rehearsal:
            shape = shape._replace(batch=2, heads=min(shape.heads, 4), kv_heads=min(shape.kv_heads, 4), dim=16,
                                   queries=min(shape.queries, 24), keys=min(shape.keys, 24))  # fmt: skip
        for mask in ("none",) if shape.name == "vision" else ("none", "padded"):
            _shape(place, shape, mask)


def _shape(place: Place, shape: Shape, kind: str) -> None:
    queries, keys, values = (
        _heads(place, shape.batch, count, length, shape.dim)
        for count, length in ((shape.heads, shape.queries), (shape.kv_heads, shape.keys), (shape.kv_heads, shape.keys))
    )
    keys = keys.contiguous()  # as `rotate` gives them; values are a view
    gradient = _heads(place, shape.batch, shape.heads, shape.queries, shape.dim)
    mask = _mask(place, shape) if kind == "padded" else None
    few = (x[:SOME] for x in (queries, keys, values))
    with sdpa_kernel(SDPBackend.MATH):
        expected = _passes(*(x.double() for x in few), mask if mask is None else mask[:SOME], "expand",
                           gradient[:SOME].double())  # fmt: skip
    rows = []
    for how in ("expand", "gqa") if shape.kv_heads < shape.heads else ("plain",):
        for backend in BACKENDS if place.gpu else ("default",):
            row = _row(place, backend, (queries, keys, values, mask, how, gradient), expected)
            rows.append(row | {"how": how, "backend": backend})
            right = "error" not in row and max(row["errors"]) < LARGEST_ERROR
            passed = right if backend == "default" else None
            place.tell(f"{shape.name}, mask {kind}, {how}, {backend}", passed, **row)
    right_ones = [row for row in rows if "error" not in row and max(row["errors"]) < LARGEST_ERROR]
    fastest = min(right_ones, key=lambda row: row["both_s"], default=None)
    default = min((r for r in right_ones if r["backend"] == "default"), key=lambda row: row["both_s"], default={})
    place.tell(f"{shape.name}, mask {kind}", fastest is not None, fastest=fastest and _named(fastest),
               fastest_s=fastest and fastest["both_s"], chosen=default and _named(default),
               chosen_s=default.get("both_s"), errors=default.get("errors"))  # fmt: skip


def _named(row: dict[str, Any]) -> str:
    backend = row["backend"] if row["backend"] != "default" else row["chosen"]
    return backend if row["how"] == "plain" else f"{backend}, {row['how']}"


def _heads(place: Place, batch: int, count: int, length: int, dim: int) -> Tensor:
    flat = torch.randn(batch, length, count * dim, device=place.device).bfloat16()
    return flat.unflatten(-1, (count, dim)).transpose(1, 2)


def _mask(place: Place, shape: Shape) -> Tensor:
    """Up to 40 of the instruction's tokens are padding."""
    lengths = torch.randint(max(shape.keys - 40, 1), shape.keys + 1, (shape.batch, 1), device=place.device)
    mask = (torch.arange(shape.keys, device=place.device) < lengths)[:, None, None, :]
    return mask.expand(-1, -1, shape.queries, -1).contiguous() if shape.name == "suffix" else mask


def _expanded(queries: Tensor, *others: Tensor) -> list[Tensor]:
    groups = queries.shape[1] // others[0].shape[1]
    return [x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in others]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, how: str) -> Tensor:
    if how == "expand":
        keys, values = _expanded(queries, keys, values)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=how == "gqa")


def _passes(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, how: str, gradient: Tensor
) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (queries, keys, values)]
    out = _attend(*inputs, mask, how)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def _row(place: Place, backend: str, arguments: tuple[Any, ...], expected: list[Tensor]) -> dict[str, Any]:
    """Times, errors and whether two calls agree to the bit; or what was raised, which is asked here, too."""
    wanted = BACKENDS[backend]
    row: dict[str, Any] = {}
    try:
        with sdpa_kernel(wanted) if wanted is not None else contextlib.nullcontext():
            if backend == "default":
                row["chosen"] = _choice(*arguments[:5])
            row["first_s"] = place.timed(lambda: _passes(*arguments))  # cuDNN builds its plans here
            got = _passes(*arguments)
            row["errors"] = [away(a[:SOME], b) for a, b in zip(got, expected, strict=True)]
            again = _passes(*arguments)
            row["same_bits"] = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
            del got, again
            times = 5 if place.gpu else 1
            with torch.no_grad():
                row["forward_s"] = place.repeated(lambda: _attend(*arguments[:5]), times)
            row["both_s"] = place.repeated(lambda: _passes(*arguments), times)
    except Exception as error:  # no plan, no kernel, a wrong stride
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return row


def _choice(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, how: str) -> str:
    if how == "expand":
        keys, values = _expanded(queries, keys, values)
    queries = queries.detach().requires_grad_()  # else kernels without a backward pass count as well
    return CHOICES[torch._fused_sdp_choice(queries, keys, values, mask, enable_gqa=how == "gqa")]
