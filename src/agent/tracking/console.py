"""Sets up the log of a training: rank 0 says what it does, the others only what goes wrong."""

from __future__ import annotations

import logging
import sys

from agent.tracking.progress import LinesAboveBars


def setup_logging(rank: int, debug: bool) -> None:
    """Rank 0 says what it does; the others only what goes wrong."""
    level = logging.DEBUG if debug else logging.INFO
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        level=level if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[LinesAboveBars(sys.stdout)],
        force=True,
    )
    for noisy in ("httpx", "httpcore", "urllib3", "fsspec", "datasets", "filelock", "asyncio", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
