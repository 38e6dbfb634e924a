"""Random draws as a function of (seed, purpose, k), and the seeds of the process.

A counter-based generator (Philox; Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) needs
no state to be carried from draw to draw: the k-th sample's noise is the same whichever process, worker, rank or
restart asks for it.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1024)
def key_of(seed: int, purpose: str) -> int:
    """A 64-bit key for one purpose of one run."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _Key(np.random.bit_generator.ISeedSequence):
    """Gives Philox its key as it is. ``Philox(key=…)`` is the same generator, but first asks the system for entropy."""

    def __init__(self, key: np.ndarray) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        """The key: two words of 64 bits."""
        assert n_words == 2 and np.dtype(dtype) == np.uint64  # type: ignore[call-overload]
        return self._key


def stream(seed: int, purpose: str, k: int) -> np.random.Generator:
    """The random generator of sample ``k`` for ``purpose`` (``"noise"``, ``"augmentation"``, …).

    Args:
        seed: the run's seed.
        purpose: what the numbers are for; two purposes give independent streams.
        k: the sample's number in the run, ``0 <= k < 2**53``; beyond, neighbours would share a stream.
    """
    # As Philox(key=[…]) reads its list: by way of float64 where the key needs all 64 bits, of which 53 count then. That two
    # of a run's few purposes agree in those is out of the question; and other bits would make every run another one.
    key = np.asarray([key_of(seed, purpose), k]).astype(np.uint64)
    return np.random.Generator(np.random.Philox(_Key(key)))  # type: ignore[arg-type]


def make_deterministic() -> None:
    """Only deterministic kernels from here on; call it before a GPU is touched. A CPU needs none of this."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
