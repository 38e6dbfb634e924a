"""Carries a batch from one process to another: one block of memory, and a description of some kilobytes.

The memory is a file without a name (``memfd_create``): it is gone when the processes that have it open are, however
they ended, and a small ``/dev/shm`` does not limit it. A slot of the file holds one batch. Its tensors are written one
after the other, read back with one call, and become views of the block that was read. So the slot is free again as soon
as it has been read, and the batch lives like any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agent.batch import map_tensors

if TYPE_CHECKING:
    import torch

_SLOT = 1 << 40  # bytes from slot to slot; the file has holes, which take no memory
_ALIGNMENT = 64


class Place(NamedTuple):
    """Where a tensor is in its block."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_array: bool
    """Whether it is one of NumPy."""


class Description(NamedTuple):
    """Describes a batch in a slot; small, to be pickled."""

    places: Any
    """The batch with a :class:`Place` for each tensor."""
    size: int
    """Of the block, in bytes."""


def create_memory() -> int:
    """Makes an empty file without a name, which grows with what is written; returns its descriptor."""
    return os.memfd_create("agent-batches")


def write(batch: Any, memory: int, slot: int) -> Description:
    """Writes a batch, a dataclass of tensors and arrays, into a slot, over what was there.

    Raises:
        OSError: if the system has no memory left.
    """
    import torch

    begin, end = slot * _SLOT, 0

    def place(value: torch.Tensor | np.ndarray) -> Place:
        nonlocal end
        is_array = isinstance(value, np.ndarray)
        tensor: Any = torch.from_numpy(value) if is_array else value
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()  # bytes: NumPy knows no bfloat16
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        _transfer(lambda part, at: os.pwrite(memory, part, at), data, begin + offset)
        end = offset + data.size
        return Place(offset, tensor.dtype, tuple(tensor.shape), is_array)

    return Description(map_tensors(batch, place), end)


def read(description: Description, memory: int, slot: int, pin: bool) -> Any:
    """Copies the batch in a slot into one block.

    Args:
        description: what ``write`` gave for it.
        memory: descriptor of the file.
        slot: its number.
        pin: whether the block is pinned, for copies to a GPU that overlap with computing. It comes from torch's cache
            of pinned memory, which does not give it away again before such a copy is done.
    """
    import torch

    block = torch.empty(description.size, dtype=torch.uint8, pin_memory=pin)
    _transfer(lambda part, at: os.preadv(memory, [part], at), block.numpy(), slot * _SLOT)

    def view(place: Any) -> Any:
        size = place.dtype.itemsize * int(np.prod(place.shape, dtype=np.int64))
        tensor = block[place.offset : place.offset + size].view(place.dtype).view(place.shape)
        return tensor.numpy() if place.is_array else tensor

    return map_tensors(description.places, view)


def _transfer(call: Callable[[np.ndarray, int], int], data: np.ndarray, offset: int) -> None:
    """Reads or writes (n,) uint8 as a whole; one call of the system moves two gigabytes at most."""
    done = 0
    while done < data.size:
        moved = call(data[done:], offset + done)
        if not moved:
            raise OSError("the memory of a batch is cut short")
        done += moved
