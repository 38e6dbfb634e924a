"""Copies tensors to host memory between two updates, so that they can be written while training goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agent.checkpoints import pinning, tensor_file
from agent.parallel import sharding

TensorFiles = dict[str, dict[str, Tensor]]
"""Relative path of a file → its tensors by name."""

_PIECE = 1 << 25
_ALIGNMENT = 4096


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

    The forward and backward passes of the next update change no weight and no state of the optimizer, so they need not
    wait for the copy: :meth:`begin` starts it, and :meth:`settle` comes right before the optimizer's step. On a GPU the
    copy runs on a stream of its own, and not even the step's launch waits.

    Each file's tensors lie in it one after the other as they do in the file, so that writing is a few large system
    calls. Memory that two tensors share is copied once. Where the tensors are on a GPU the block is pinned, which lets
    the copy run at the speed of the bus, in the pieces of ``pinning.py``.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or max(1, min(8, len(os.sched_getaffinity(0))))
        self._block: Tensor | None = None
        self._pinned: pinning.Pinned | None = None
        self._device = torch.device("cpu")
        self._stream: Any = None
        self._event: Any = None
        self._work = _Work([])
        self._sources: TensorFiles = {}
        self._layout: dict[str, list[_Place]] | None = None
        self._copies: TensorFiles = {}

    def prepare(self, files: TensorFiles) -> None:
        """Allocates and touches the memory for these tensors; does nothing if it has it."""
        layout, size = _plan(files)
        if layout == self._layout:
            return
        self.release()
        pin = any(tensor.is_cuda for tensors in files.values() for tensor in tensors.values())
        self._block = block = pinning.whole_pages(size)
        if pin and size:
            self._device = next(t.device for tensors in files.values() for t in tensors.values() if t.is_cuda)
            self._pinned = pinning.Pinned(block, self._device)
        self._touch(block)
        if self._pinned is not None and not self._pinned.pin():
            return  # released meanwhile: nobody wants it any more
        self._layout = layout
        self._copies = {path: {place.name: self._view(place) for place in places} for path, places in layout.items()}

    def begin(self, files: TensorFiles, everyones: Sequence[TensorFiles] = ()) -> TensorFiles:
        """Starts to copy the tensors. A collective if some are sharded.

        Args:
            files: the tensors, which must not change before :meth:`settle`.
            everyones: what each process copies, for those that are gathered for it; not needed where none is sharded.

        Returns:
            The copies, which may be read after :meth:`finish` and until the next call.
        """
        self.prepare(files)
        seen: set[int] = set()
        pieces: list[tuple[Tensor, Tensor]] = []
        on_device: list[tuple[Tensor, Tensor]] = []
        for path, copies in self._copies.items():
            for name, copy in copies.items():
                tensor = files[path][name]
                if tensor.numel() == 0 or copy.data_ptr() in seen or sharding.is_sharded(tensor):
                    continue
                seen.add(copy.data_ptr())
                if tensor_file.is_one_number(tensor):
                    tensor, copy = _one(tensor), _one(copy)
                if tensor.is_cuda:
                    on_device.append((copy, tensor))
                elif tensor.is_contiguous():
                    size = _PIECE // tensor.element_size()
                    pieces += zip(copy.view(-1).split(size), tensor.view(-1).split(size), strict=True)
                else:
                    pieces.append((copy, tensor))
        self._work = _Work(pieces)
        if on_device:
            self._sources = files  # memory that is given back would be used again while it is read
            self._copy_on_a_stream(on_device)
            self._work.help()  # the optimizer's counters
        device = self._gather(files, everyones)
        if device is not None:
            torch.cuda.current_stream(device).synchronize()
        return self._copies

    def settle(self) -> None:
        """Call it before the tensors change: waits for the copy on a CPU, on a GPU makes the present stream wait."""
        self._work.help()
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def finish(self) -> None:
        """Returns when the copies can be read. Any thread may call it, and does a part of the work."""
        self._work.help()
        if self._event is not None:
            # The device is set per thread: without this the wait would open a context on the first GPU.
            with torch.cuda.device(self._device):
                self._event.synchronize()
        self._sources = {}

    def _copy_on_a_stream(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        device = pairs[0][1].device
        if self._stream is None:
            self._stream, self._event = torch.cuda.Stream(device), torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(device))  # the last update is still being computed
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for copy, tensor in pairs:
                self._fill(copy, tensor)
        self._event.record(self._stream)

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
                        self._fill(self._copies[path][name], whole)
                        device = whole.device if whole.is_cuda else None
        return device

    def release(self) -> None:
        """Gives the memory back."""
        if self._pinned is not None:
            self._pinned.release()
        self._block, self._pinned, self._layout, self._copies = None, None, None, {}

    def _fill(self, copy: Tensor, tensor: Tensor) -> None:
        """Copies a tensor to its place, beside what the CPU does next."""
        assert self._block is not None
        for target, source in pinning.between(copy, tensor, self._block):
            target.copy_(source, non_blocking=True)

    def _view(self, place: _Place) -> Tensor:
        assert self._block is not None
        flat = self._block[place.begin : place.end].view(place.dtype)
        return flat.expand(place.shape) if place.one_number else flat.view(place.shape)

    def _touch(self, block: Tensor) -> None:
        """Fills the memory with zeros, by all threads, so that the first copy finds it there."""
        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(Tensor.zero_, block.split(_PIECE)):
                pass


class _Work:
    """Pairs of a target and a source, copied by all threads that :meth:`help`."""

    def __init__(self, pieces: list[tuple[Tensor, Tensor]]) -> None:
        self._left = len(pieces)
        self._queue = iter(sorted(pieces, key=lambda pair: -pair[0].nbytes))
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def help(self) -> None:
        """Copies what no other thread has begun, then waits for the others; raises what any of them met."""
        with torch.no_grad():
            for target, source in self._queue:  # a list's iterator hands each item to one thread only
                try:
                    target.copy_(source)
                except BaseException as error:
                    self._error = error
                with self._changed:
                    self._left -= 1
                    self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: self._left == 0)
        if self._error is not None:
            raise self._error


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
