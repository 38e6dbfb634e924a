"""Makes random numbers a function of (seed, purpose, k), and makes kernels deterministic.

A counter-based generator (Philox; Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) carries no state
from draw to draw, so the k-th sample's noise is the same in every process, worker and restart.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1024)
def key_of(seed: int, purpose: str) -> int:
    """Returns a 64-bit key for one purpose of one run."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _Key(np.random.bit_generator.ISeedSequence):
    """Passes Philox its key unchanged. ``Philox(key=…)`` gives the same generator, but first reads the system's entropy."""

    def __init__(self, key: np.ndarray) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        """Returns the key: two words of 64 bits."""
        assert n_words == 2 and np.dtype(dtype) == np.uint64  # type: ignore[call-overload]
        return self._key


def stream(seed: int, purpose: str, k: int) -> np.random.Generator:
    """Returns the random generator of sample ``k`` for ``purpose`` (``"noise"``, ``"augmentation"``, …).

    Args:
        seed: the run's seed.
        purpose: what the numbers are for; different purposes give independent streams.
        k: the sample's number in the run, ``0 <= k < 2**53``; from 2**53 on, neighbours would share a stream.
    """
    # Philox(key=[…]) converts its list through float64 if a number needs all 64 bits, so that only 53 of them count; this
    # line does the same, because other bits would change every existing run. That two of a run's few purposes agree in 53
    # bits is practically impossible.
    key = np.asarray([key_of(seed, purpose), k]).astype(np.uint64)
    return np.random.Generator(np.random.Philox(_Key(key)))  # type: ignore[arg-type]


def make_deterministic() -> None:
    """Allows only deterministic kernels from now on. Call it before a GPU is used; on a CPU it is not needed."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    # It would write NaN into all new memory, which nothing reads before it has written there.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
