"""Reads what the launcher says about this process: its rank among the others, and the device that it computes on."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process; read from the environment, no device touched."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    under_torchrun: bool = False


def read_launch() -> Launch:
    """Reads this process's place among the others from torchrun's variables.

    Raises:
        ValueError: if only some of torchrun's variables are set.
    """
    # MASTER_ADDR and MASTER_PORT alone mean nothing: many cluster profiles export them.
    present = [name for name in _TORCHRUN_VARIABLES[:4] if name in os.environ]
    if not present:
        return Launch()
    missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(present)} set but {', '.join(missing)} not: that is half of a distributed environment. Start with "
            "`torchrun --standalone --nproc_per_node=N src/agent/run.py …`, or unset them to run one process"
        )
    rank, local_rank, world, local_world = (int(os.environ[name]) for name in _TORCHRUN_VARIABLES[:4])
    if world != local_world:
        raise ValueError(f"{world} processes on several nodes; one node is supported: --nnodes=1")
    return Launch(rank, local_rank, world, local_world, under_torchrun=True)


def choose_device(launch: Launch, wanted: str | None) -> torch.device:
    """Chooses the GPU of this process, or the CPU where there is none.

    Args:
        launch: this process's place.
        wanted: ``cpu``, ``cuda`` or None (a GPU if there is one), as in the model config's ``device``.

    Raises:
        ValueError: if a GPU is asked for and missing, or more processes than GPUs were started.
    """
    import torch

    if wanted not in (None, "cpu", "cuda"):
        raise ValueError(
            f"model_cfg.device: '{wanted}' is not supported; write cuda, cpu or null (the GPU if there is one)"
        )
    gpus = torch.cuda.device_count()
    if wanted is None and gpus == 0 and (given := _given_gpus()):
        log.warning(
            "CUDA_VISIBLE_DEVICES=%s gives this run GPUs, but PyTorch can use none of them, so it trains on the CPU: does "
            "`nvidia-smi` show them on this machine, with a driver that is not too old? Write model_cfg.device: cuda to "
            "have that refused, cpu if it is meant",
            given,
        )
    if wanted == "cpu" or (wanted is None and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise ValueError(
            "model_cfg.device is cuda, but no GPU is visible; write cpu or null, or check CUDA_VISIBLE_DEVICES"
        )
    if launch.local_world_size > gpus:
        raise ValueError(
            f"{launch.local_world_size} processes were started but {gpus} GPU{'s are' if gpus > 1 else ' is'} visible; "
            f"write --nproc_per_node={gpus}, or ask the cluster for more GPUs"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def _given_gpus() -> str:
    """Returns ``CUDA_VISIBLE_DEVICES`` if it names a GPU; as for CUDA, nothing counts behind an entry that names none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    return given if re.match(r"\d|GPU-|MIG-", given) else ""
