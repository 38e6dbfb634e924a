"""Reads safetensors files straight to where their tensors belong, each byte once.

Files are not mapped, as the library does it: a disk that cannot read a page would kill the process, and a mapped file is
read a second time for its checksum. Here a file is read from front to back in blocks. A block goes right into the
memory of its tensor where that is possible, and by way of a small buffer where it is not: to a GPU, or to another
number type. While the next block is read, a thread computes the checksum of this one.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from agent.checkpoints.manifest import Folder
from agent.checkpoints.tensor_file import TYPES
from agent.parallel.sharding import rows

_BLOCK = 1 << 22  # stays in the processor's cache until it is hashed; a multiple of every element's size
_BUFFERS = 3


class Digest(Protocol):
    """A checksum under way."""

    def update(self, block: memoryview) -> None:
        """Takes the next bytes of the file."""
        ...


Checksums = Callable[[Path], Digest | None]
"""The checksum to feed with a file while it is read; None: nobody wants one."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    """First byte, and the one behind the last, after the header."""


def entries(path: Path) -> list[Entry]:
    """The tensors of a file in their order, from its header alone.

    Raises:
        ValueError: if it is no such file, or truncated.
        OSError: if the disk cannot read it.
    """
    with io.FileIO(path) as file:
        return _header(file, path)[0]


def stream(path: Path, targets: Mapping[str, Tensor], digest: Digest | None = None) -> None:
    """Fills tensors from a file.

    Args:
        path: a safetensors file.
        targets: name in the file → the tensor to fill, contiguous, on any device, of any number type, in the shape of
            the file's or with fewer rows: the first ones are taken then. Of a sharded tensor this process's rows are
            read. What is not named is not read.
        digest: fed with the whole file, with what is not named too.

    Raises:
        ValueError: if it is no such file, or truncated.
        OSError: if the disk cannot read it.
    """
    with io.FileIO(path) as file:
        listed, start = _header(file, path)
        file.seek(0)
        pin = any(tensor.is_cuda for tensor in targets.values())
        with _Feed(file, path, digest, pin) as feed, torch.no_grad():
            feed.skip(start)
            for entry in listed:
                used = 0
                if (target := targets.get(entry.name)) is not None:
                    assert target.shape[1:] == entry.shape[1:] and target.shape[:1] <= entry.shape[:1]
                    local, first = rows(target)
                    assert local.is_contiguous()
                    before = first * ((entry.end - entry.begin) // entry.shape[0]) if first else 0
                    feed.skip(before)
                    feed.fill(local, entry.dtype)
                    used = before + local.numel() * entry.dtype.itemsize
                feed.skip(entry.end - entry.begin - used)


def read(path: Path, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, or those of these names, in memory of their own. Errors as of :func:`stream`."""
    wanted = [entry for entry in entries(path) if only is None or entry.name in only]
    tensors = {entry.name: torch.empty(entry.shape, dtype=entry.dtype) for entry in wanted}
    stream(path, tensors)
    return tensors


def parts(folder: Path, name: str) -> list[Path]:
    """``<name>.safetensors``, or all ``<name>-00000-of-00002.safetensors`` …

    Args:
        folder: a checkpoint.
        name: path in there without the ending.

    Raises:
        ValueError: if there is no such file, or one of several is absent.
    """
    there = Folder(folder)
    if (single := there.file(f"{name}.safetensors")) is not None:
        return [single]
    found = there.matching(f"{name}-*-of-*.safetensors")
    counts = {int(number[1]) for path in found if (number := re.search(r"-of-(\d+)\.safetensors$", path.name))}
    if not found or counts != {len(found)}:
        raise ValueError(
            f"{folder / name}.safetensors is not there, nor all of its parts: {[path.name for path in found]}"
        )
    return found


def _header(file: io.FileIO, path: Path) -> tuple[list[Entry], int]:
    """The tensors in the order of their bytes, which fill the file, and where these begin."""
    damaged = ValueError(f"{path} cannot be read as safetensors, it is truncated or damaged")
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > size - 8:
        raise damaged
    try:
        described = json.loads(_exactly(file, length))
        described.pop("__metadata__", None)
        listed = [_entry(name, content) for name, content in described.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged from None
    listed.sort(key=lambda entry: (entry.begin, entry.end))
    position = 0
    for entry in listed:
        if entry.begin != position or entry.end - entry.begin != _bytes_of(entry):
            raise damaged
        position = entry.end
    if position != size - 8 - length:
        raise damaged
    return listed, 8 + length


def _exactly(file: io.FileIO, length: int) -> bytes:
    content = bytearray()
    while len(content) < length and (more := file.read(length - len(content))):
        content += more
    return bytes(content)


def _entry(name: str, content: dict[str, Any]) -> Entry:
    begin, end = content["data_offsets"]
    return Entry(name, _BY_NAME[content["dtype"]], tuple(int(n) for n in content["shape"]), int(begin), int(end))


def _bytes_of(entry: Entry) -> int:
    size = entry.dtype.itemsize
    for length in entry.shape:
        size *= length
    return size


_BY_NAME = {name: dtype for dtype, name in TYPES.items()}


class _Buffer:
    """Holds a block on its way to a GPU or another number type."""

    def __init__(self, pin: bool) -> None:
        self.memory = torch.empty(_BLOCK, dtype=torch.uint8, pin_memory=pin)
        self.hashed: Future[None] | None = None
        self.copied = torch.cuda.Event() if pin else None

    def wait(self) -> None:
        """Until nobody reads it any more."""
        if self.hashed is not None:
            self.hashed.result()
        if self.copied is not None:
            self.copied.synchronize()


class _Feed:
    """A file that is read from front to back, with every byte on its way to the checksum."""

    def __init__(self, file: io.FileIO, path: Path, digest: Digest | None, pin: bool) -> None:
        self._file, self._path, self._digest, self._pin = file, path, digest, pin
        self._hasher = ThreadPoolExecutor(1) if digest is not None else None
        self._hashed: list[Future[None]] = []
        self._buffers: list[_Buffer] = []
        self._turn = -1

    def __enter__(self) -> _Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hasher is not None:
            self._hasher.shutdown(wait=True)
        if kind is None:
            for block in self._hashed:
                block.result()
            for buffer in self._buffers:  # the copies to a GPU are still reading them
                buffer.wait()

    def fill(self, target: Tensor, dtype: torch.dtype) -> None:
        """The next bytes, which are numbers of this type, into a tensor."""
        flat = target.detach().view(-1)
        if flat.numel() == 0:
            return
        if target.device.type == "cpu" and target.dtype == dtype:
            memory = memoryview(flat.view(torch.uint8).numpy())
            for begin in range(0, len(memory), _BLOCK):
                self._read(memory[begin : begin + _BLOCK])
            return
        for piece in flat.split(_BLOCK // dtype.itemsize):
            buffer = self._next_buffer()
            block = buffer.memory[: piece.numel() * dtype.itemsize]
            buffer.hashed = self._read(memoryview(block.numpy()))
            piece.copy_(block.view(dtype), non_blocking=True)
            if buffer.copied is not None and target.is_cuda:  # some of a file may go to the host
                buffer.copied.record(torch.cuda.current_stream(target.device))

    def skip(self, size: int) -> None:
        """Passes over bytes, which the checksum gets all the same."""
        if self._digest is None:
            self._file.seek(size, os.SEEK_CUR)
            return
        for begin in range(0, size, _BLOCK):
            buffer = self._next_buffer()
            buffer.hashed = self._read(memoryview(buffer.memory[: min(_BLOCK, size - begin)].numpy()))

    def _next_buffer(self) -> _Buffer:
        if len(self._buffers) < _BUFFERS:
            self._buffers.append(_Buffer(self._pin))
            return self._buffers[-1]
        self._turn = (self._turn + 1) % _BUFFERS
        self._buffers[self._turn].wait()
        return self._buffers[self._turn]

    def _read(self, block: memoryview) -> Future[None] | None:
        done = 0
        while done < len(block):
            size = self._file.readinto(block[done:])
            if not size:
                raise ValueError(f"{self._path} cannot be read as safetensors, it became shorter while it was read")
            done += size
        if self._hasher is None or self._digest is None:
            return None
        self._hashed.append(self._hasher.submit(self._digest.update, block))
        return self._hashed[-1]
