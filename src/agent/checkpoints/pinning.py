"""Pins host memory that a GPU copies to, in pieces: registering all of it at once would hold up every launch meanwhile.

``cudaHostRegister`` of 34 GB takes 10 to 30 s, during which the driver lets no process launch anything. Between the pieces
launches get through, and a stop is heeded. What is registered in two pieces is two ranges for CUDA, even where one follows
the other: a copy may not cross from one to the next, so :func:`between` splits copies there.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PIECE = 1 << 29
"""Bytes that are registered at a time; a multiple of every page's size and of every number's."""
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context, whichever thread registers it


def whole_pages(size: int) -> Tensor:
    """Allocates memory that begins with a page, (``size``,) uint8; its last page is its own too."""
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.empty(pages + mmap.PAGESIZE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % mmap.PAGESIZE :][:size]


def between(copy: Tensor, tensor: Tensor, block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Splits the copy of a tensor into parts none of which crosses from one piece of the block to the next.

    Args:
        copy: the target, contiguous in ``block``.
        tensor: the source, of the same shape; where it is not contiguous its numbers are put in order on its device.
        block: what :func:`whole_pages` gave.
    """
    begin, each = copy.data_ptr() - block.data_ptr(), PIECE // copy.element_size()
    ends = range(-begin % PIECE // copy.element_size() or each, copy.numel(), each)
    targets, sources = (some.view(-1).tensor_split(list(ends)) for some in (copy, tensor.contiguous()))
    return zip(targets, sources, strict=True)


class Pinned:
    """Memory of :func:`whole_pages` that a GPU may copy to while the CPU goes on; any thread may release it."""

    def __init__(self, block: Tensor, device: torch.device) -> None:
        self._block, self._device = block, device
        self._registered: list[int] = []
        self._busy = threading.Lock()
        self._released = threading.Event()

    def pin(self) -> bool:
        """Registers the memory piece by piece, and says so once if that fails: what is not pinned is copied to more slowly.

        Returns:
            False if it was released before the end.
        """
        runtime: Any = torch.cuda.cudart()
        end = -(-self._block.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        for begin in range(0, end, PIECE):
            with self._busy, torch.cuda.device(self._device):  # the device is set per thread, and this one may be new
                if self._released.is_set():
                    return False
                address = self._block.data_ptr() + begin
                failure = runtime.cudaHostRegister(address, min(PIECE, end - begin), _PORTABLE)
                if failure != runtime.cudaError.success:
                    self._tell(failure, self._block.nbytes - begin)
                    return True
                self._registered.append(address)
        return True

    def release(self) -> None:
        """Registers nothing further, and takes back what was registered."""
        self._released.set()
        runtime: Any = torch.cuda.cudart()
        with self._busy, torch.cuda.device(self._device):
            while self._registered:
                runtime.cudaHostUnregister(self._registered.pop())

    def _tell(self, failure: Any, left: int) -> None:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)  # the runtime reports the failure once more, at the next kernel
        log.warning(
            "%.1f of %.1f GB of host memory for checkpoints cannot be pinned (%s), so saves will stall longer; try "
            "`ulimit -l unlimited`",
            left / 1e9,
            self._block.nbytes / 1e9,
            failure,
        )
