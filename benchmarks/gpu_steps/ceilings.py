"""What is installed, and what the card can do at most: bytes copied and bfloat16 products, per second."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from gpu_steps.place import Place

# Of an H200, as seen: a card that gives less than nine tenths of it is not alone, or not one.
COPY_BYTES_PER_S, PRODUCT_FLOPS = 4.3e12, 790e12
PACKAGES = "torch triton transformers tokenizers numpy safetensors pyarrow huggingface_hub draccus simplejpeg".split()


def run(place: Place) -> None:
    """The line ``machine`` is what tables in the documentation say of where their numbers come from."""
    place.tell("machine", True, **_machine(place))
    side, numbers = (8192, 1 << 30) if place.gpu else (256, 1 << 20)
    source, target = torch.ones(2, numbers, dtype=torch.float32, device=place.device)
    rate = 2 * source.nbytes / place.repeated(lambda: target.copy_(source), 10)
    place.tell("copy", rate > 0.9 * COPY_BYTES_PER_S if place.gpu else None, bytes_per_s=rate)
    # Random numbers: zeros take less power, and are faster.
    a, b = (torch.randn(side, side, device=place.device).bfloat16() for _ in range(2))
    rate = 2 * side**3 / place.repeated(lambda: torch.mm(a, b), 20)
    place.tell("product", rate > 0.9 * PRODUCT_FLOPS if place.gpu else None, flops=rate)


def _machine(place: Place) -> dict[str, object]:
    found: dict[str, object] = {
        "device": place.device.type,
        "name": torch.cuda.get_device_name() if place.gpu else platform.processor() or platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if place.gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
