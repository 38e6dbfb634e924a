"""A copy of tensors in host memory, taken while training waits, written while it goes on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agent import sharding, tensor_file

log = logging.getLogger(__name__)

TensorFiles = dict[str, dict[str, Tensor]]
"""Relative path of a file → its tensors by name."""

_PIECE = 1 << 25
_ALIGNMENT = 4096
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context, whichever thread registers it


class _Place(NamedTuple):
    """Where a tensor lies in the block."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    one_number: bool
    begin: int
    end: int


class HostSnapshot:
    """One block of host memory that is allocated once and filled again at every save.

    Each file's tensors lie in it one after the other as they do in the file, so that writing is a few large system
    calls. Memory that two tensors share is copied once. Where the tensors are on a GPU the block is pinned, which lets
    the copy run at the speed of the bus.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or max(1, min(8, len(os.sched_getaffinity(0))))
        self._block: Tensor | None = None
        self._pinned = False
        self._device = torch.device("cpu")
        self._layout: dict[str, list[_Place]] | None = None
        self._copies: TensorFiles = {}

    def prepare(self, files: TensorFiles) -> None:
        """Allocates and touches the memory for these tensors; does nothing if it has it."""
        layout, size = _plan(files)
        if layout == self._layout:
            return
        self.release()
        pin = any(tensor.is_cuda for tensors in files.values() for tensor in tensors.values())
        self._block = torch.empty(size, dtype=torch.uint8)
        self._run([(piece, None) for piece in self._block.split(_PIECE)])
        if pin and size:
            self._device = next(t.device for tensors in files.values() for t in tensors.values() if t.is_cuda)
            with torch.cuda.device(self._device):  # per thread, and this one may be new
                self._pin(self._block)
        self._layout = layout
        self._copies = {path: {place.name: self._view(place) for place in places} for path, places in layout.items()}

    def take(self, files: TensorFiles, everyones: Sequence[TensorFiles] = ()) -> TensorFiles:
        """Copies the tensors; the copies are valid until the next call. A collective if some are sharded.

        Args:
            files: the tensors, which may be changed as soon as this returns.
            everyones: what each process copies, for those that are gathered for it; not needed where none is sharded.
        """
        self.prepare(files)
        seen: set[int] = set()
        pieces: list[tuple[Tensor, Tensor | None]] = []
        device = None
        with torch.no_grad():
            for path, copies in self._copies.items():
                for name, copy in copies.items():
                    tensor = files[path][name]
                    if tensor.numel() == 0 or copy.data_ptr() in seen or sharding.is_sharded(tensor):
                        continue
                    seen.add(copy.data_ptr())
                    if tensor_file.is_one_number(tensor):
                        tensor, copy = _one(tensor), _one(copy)
                    if tensor.is_cuda:
                        copy.copy_(tensor, non_blocking=True)
                        device = tensor.device
                    elif tensor.is_contiguous():
                        size = _PIECE // tensor.element_size()
                        pieces += zip(copy.view(-1).split(size), tensor.view(-1).split(size), strict=True)
                    else:
                        pieces.append((copy, tensor))
            self._run(pieces)
            device = self._gather(files, everyones) or device
            if device is not None:
                torch.cuda.current_stream(device).synchronize()
        return self._copies

    def _gather(self, mine: TensorFiles, everyones: Sequence[TensorFiles]) -> torch.device | None:
        """Gathers one sharded tensor after the other, for the process that copies it; the GPU that is still at it."""
        device = None
        for files in everyones:
            seen: set[int] = set()
            for path, tensors in files.items():
                for name, tensor in tensors.items():
                    if id(tensor) in seen or not sharding.is_sharded(tensor):
                        continue
                    seen.add(id(tensor))
                    whole = sharding.whole(tensor)
                    if files is mine:
                        self._copies[path][name].copy_(whole, non_blocking=True)
                        device = whole.device if whole.is_cuda else None
        return device

    def release(self) -> None:
        """Gives the memory back."""
        if self._pinned and self._block is not None:
            runtime: Any = torch.cuda.cudart()
            with torch.cuda.device(self._device):
                runtime.cudaHostUnregister(self._block.data_ptr())
        self._block, self._pinned, self._layout, self._copies = None, False, None, {}

    def _pin(self, block: Tensor) -> None:
        # Not torch's pinned allocator, which rounds up to a power of two.
        runtime: Any = torch.cuda.cudart()
        failure = runtime.cudaHostRegister(block.data_ptr(), block.nbytes, _PORTABLE)
        self._pinned = failure == runtime.cudaError.success
        if self._pinned:
            return
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)  # the runtime reports the failure once more, at the next kernel
        log.warning(
            "%.1f GB of host memory for checkpoints cannot be pinned (%s), so saves will stall longer; try `ulimit -l "
            "unlimited`",
            block.nbytes / 1e9,
            failure,
        )

    def _view(self, place: _Place) -> Tensor:
        assert self._block is not None
        flat = self._block[place.begin : place.end].view(place.dtype)
        return flat.expand(place.shape) if place.one_number else flat.view(place.shape)

    def _run(self, pieces: list[tuple[Tensor, Tensor | None]]) -> None:
        """Copies each pair, or fills with zeros where there is no source; by all threads, the largest first."""
        pieces.sort(key=lambda pair: -pair[0].nbytes)
        queue: Iterator[tuple[Tensor, Tensor | None]] = iter(pieces)

        def work() -> None:
            with torch.no_grad():
                for target, source in queue:  # a list's iterator hands each item to one thread only
                    if source is None:
                        target.zero_()
                    else:
                        target.copy_(source)

        if self._threads == 1 or sum(target.nbytes for target, _ in pieces) < _PIECE:
            work()
            return
        with ThreadPoolExecutor(self._threads - 1) as pool:
            others = [pool.submit(work) for _ in range(self._threads - 1)]
            work()
            for other in others:
                other.result()


def _plan(files: TensorFiles) -> tuple[dict[str, list[_Place]], int]:
    """Where each tensor of each file goes, and the bytes of all."""
    known: dict[Any, tuple[int, int]] = {}
    plan: dict[str, list[_Place]] = {}
    used = 0
    for path, tensors in files.items():
        plan[path] = []
        used += -used % _ALIGNMENT
        for name in tensor_file.in_file_order(tensors):
            tensor = tensors[name]
            one_number = tensor_file.is_one_number(tensor)
            # Two tensors are the same memory only if they also read it in the same way.
            memory = (_address(tensor), tensor.dtype, tensor.shape, tensor.stride())
            if memory not in known:
                begin = used + -used % tensor.element_size()
                used = begin + (tensor.element_size() if one_number else tensor.nbytes)
                known[memory] = (begin, used)
            plan[path].append(_Place(name, tensor.dtype, tensor.shape, one_number, *known[memory]))
    return plan, used


def _address(tensor: Tensor) -> tuple[str, int]:
    """What two tensors have in common that share memory; of sharded ones, which may have none here, the object."""
    return ("sharded", id(tensor)) if sharding.is_sharded(tensor) else ("at", tensor.data_ptr())


def _one(tensor: Tensor) -> Tensor:
    return tensor.as_strided((1,), (1,))
