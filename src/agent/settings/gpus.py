"""Knows what the GPUs that people train on can do, from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory: int
    """Bytes that CUDA reports as its total, which is a little less than what it is sold with."""
    bfloat16: float
    """FLOP per second of dense matrix products in bfloat16 that add up in float32."""
    float32: float
    """The same in float32, without TF32, which this program does not use."""
    fp8: bool
    """Whether it multiplies numbers of 8 bits."""
    marks: tuple[str, ...]
    """What its device name or a cluster's word for it contains, in lower case."""


_WITHOUT_FP8 = ("a100", "a6000", "3090")


def _gpu(name: str, gib: float, bfloat16: float, float32: float, *marks: str) -> Gpu:
    fp8 = name.partition("-")[0] not in _WITHOUT_FP8
    return Gpu(name, int(gib * (1 << 30)), bfloat16 * 1e12, float32 * 1e12, fp8, marks or (name,))


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", 39.4, 312, 19.5, "a100"),
        _gpu("a100-80g", 79.1, 312, 19.5, "a100"),
        _gpu("h100", 79.1, 989, 67),
        _gpu("h200", 139.7, 989, 67),
        _gpu("b200", 178.0, 2250, 80),
        _gpu("a6000", 47.4, 155, 38.7),
        _gpu("l40s", 44.4, 362, 91.6),
        _gpu("3090", 23.6, 71, 35.6),
        _gpu("4090", 23.5, 165, 82.6),
        _gpu("5090", 31.3, 209, 104.8),
    )
}


def check_name(name: str) -> None:
    """Refuses a GPU that is not in the table.

    Raises:
        ValueError: with the names that are.
    """
    if name not in GPUS:
        raise ValueError(f"check_gpu: '{name}' is not known; write one of {', '.join(GPUS)}")


_SLICE = re.compile(r"([1-7])g\.(\d+)gb")
_SLICES = 7  # into which NVIDIA divides the arithmetic of a GPU
_OF_ITS_NAME = 0.9  # GiB of a slice by the number in its name, at least: 9.5 of 1g.10gb, 16 of 1g.18gb


def recognised(text: str) -> list[Gpu]:
    """Finds the GPUs that a device's name or a cluster's word may mean; several where it leaves the memory open.

    A slice of one, such as ``a100_3g.20gb``, has its share of memory and arithmetic.
    """
    text = text.lower()
    if "gh200" in text:  # sold with the memory of an H100 or of an H200
        return []
    part, text = _SLICE.search(text), _SLICE.sub("", text)
    found = [gpu for gpu in GPUS.values() if any(mark in text for mark in gpu.marks)]
    found = [gpu for gpu in found if gpu.name.partition("-")[2] in text] or found
    if part is None or not found:
        return found
    gpu, share, gib = found[0], int(part[1]) / _SLICES, _OF_ITS_NAME * int(part[2])
    name, arithmetic = f"{gpu.name} {part[0]}", (share * gpu.bfloat16, share * gpu.float32)
    return [Gpu(name, int(gib * (1 << 30)), *arithmetic, gpu.fp8, gpu.marks)]
