"""Describes the hardware and software that a run uses, for its record of each start and for the report."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agent.spelling import gib

_PACKAGES = ("torch", "lerobot", "transformers", "agent")
_DRIVER = Path("/proc/driver/nvidia/version")
_PROCESSOR = Path("/proc/cpuinfo")
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # of x86-64 and of ARM, as PyTorch calls them


def describe(world_size: int, device_type: str) -> dict[str, Any]:
    """Collects processor, GPUs, driver and versions, as JSON.

    Args:
        world_size: processes of the run, one a GPU.
        device_type: ``cuda`` or ``cpu``, where it computes.
    """
    facts: dict[str, Any] = {
        "processes": world_size,
        "gpus": _gpus(world_size) if device_type == "cuda" else "none",
        "nvidia_driver": _driver(),
        "cpu": _processor(),
        "cpu_cores": len(os.sched_getaffinity(0)),  # those of the job, not of the node
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    facts |= {package: _version(package) for package in _PACKAGES}
    if device_type == "cuda":
        import torch

        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def slow_bfloat16(device_type: str) -> str | None:
    """Warns of products in bfloat16 where nothing computes them natively; None where the hardware does.

    PyTorch then converts back and forth: a π0 of 5 M parameters took 4.4 s an update in bfloat16 and 0.9 s in float32 on
    a Xeon without AVX512-BF16 and AMX (one thread, beside other work, torch 2.11.0, 29 November 2026).

    Args:
        device_type: ``cuda`` or ``cpu``, where it computes.
    """
    import torch

    if device_type == "cuda":
        native, what = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    else:
        known = torch.cpu.get_capabilities()
        native, what = any(known.get(name) for name in _BFLOAT16), _processor()
    if native:
        return None
    return f"use_bf16 is true, and this processor ({what}) has no instructions for bfloat16: float32 is faster here"


def _gpus(world_size: int) -> str:
    """Names of the GPUs in use, equal ones counted: ``4 × NVIDIA H100 80GB HBM3 (79.6 GiB)``."""
    import torch

    count = min(world_size, torch.cuda.device_count())
    seen = [torch.cuda.get_device_properties(place) for place in range(count)]
    names = [f"{one.name} ({gib(one.total_memory)})" for one in seen]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _driver() -> str | None:
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _read(_DRIVER))
    return found[1] if found else None


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read(_PROCESSOR), flags=re.MULTILINE)
    return found[1] if found else platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no such driver, or not a Linux
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
