"""What the GPUs that people train on can do, from their makers' data sheets."""

from __future__ import annotations

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
    marks: tuple[str, ...]
    """What its device name or a cluster's word for it contains, in lower case."""


def _gpu(name: str, gib: float, bfloat16: float, float32: float, *marks: str) -> Gpu:
    return Gpu(name, int(gib * (1 << 30)), bfloat16 * 1e12, float32 * 1e12, marks or (name,))


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", 39.4, 312, 19.5, "a100-40", "a100-sxm4-40", "a100-pcie-40"),
        _gpu("a100-80g", 79.1, 312, 19.5, "a100-80", "a100-sxm4-80", "a100 80"),
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


def recognised(text: str) -> list[Gpu]:
    """The GPUs that a device's name or a cluster's word may mean; several where it leaves the memory open."""
    text = text.lower()
    found = [gpu for gpu in GPUS.values() if any(mark in text for mark in gpu.marks)]
    if not found and "a100" in text:
        return [GPUS["a100-40g"], GPUS["a100-80g"]]
    return found
