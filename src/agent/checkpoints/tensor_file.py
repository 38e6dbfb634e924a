"""Writes files of tensors in the safetensors format, with their checksum in one pass.

The library's writer needs the whole file in memory or maps it, returns before the bytes are on the disk, reports a
full disk in an exception of its own, and the file would have to be read again for its checksum. The format is simple
enough (https://github.com/huggingface/safetensors#format): eight bytes of header length, the header in JSON, the raw
bytes. What is written here is byte for byte what the library writes.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

CHUNK = 1 << 24  # large enough for the disk, small enough to be interrupted; system calls and hash release the GIL

# In the library's order: the tensors of a file are sorted by type, the last of these first, then by name. The sizes
# ascend here, so every tensor of a file is aligned to its type.
TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_RANK = {dtype: -rank for rank, dtype in enumerate(TYPES)}
_METADATA = {"format": "pt"}  # transformers insists on it


class Cancelled(Exception):
    """The file was given up because the checkpoint it belongs to is."""


@dataclass(frozen=True)
class Written:
    """A file that is on the disk."""

    size: int
    xxh3_128: str


def in_file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names as they follow each other in a file."""
    return sorted(tensors, key=lambda name: (_RANK[tensors[name].dtype], name.encode()))


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON at the beginning of the file of these tensors."""
    entries: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for name in in_file_order(tensors):
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_size(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes of the file of these tensors, see :func:`write`."""
    stored = _as_stored(tensors, dtype)
    return len(header(stored)) + sum(tensor.nbytes for tensor in stored.values())


def _as_stored(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    """The tensors in the number types of the file; those that change are without memory."""
    if dtype is None:
        return tensors
    return {
        name: torch.empty(tensor.shape, dtype=dtype, device="meta") if _changes(tensor, dtype) else tensor
        for name, tensor in tensors.items()
    }


def _changes(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    return dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    cancel: threading.Event | None = None,
    dtype: torch.dtype | None = None,
) -> Written:
    """Writes tensors and returns when they are on the disk.

    Args:
        path: the file, replaced if it exists.
        tensors: on the CPU, each contiguous or one number expanded; they may share memory.
        cancel: gives the file up once it is set.
        dtype: rounds floating-point numbers to this type on their way, block by block.

    Raises:
        OSError: from writing, syncing or closing; NFS reports a full disk in any of them.
        Cancelled: if ``cancel`` was set in the middle.
    """
    digest, size = xxhash.xxh3_128(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for block in _blocks(tensors, dtype):
            if cancel is not None and cancel.is_set():
                raise Cancelled
            digest.update(block)
            size += len(block)
            while block:
                block = block[os.write(handle, block) :]
        os.fsync(handle)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(handle)
    return Written(size, digest.hexdigest())


def _blocks(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[memoryview]:
    """The bytes of the file in blocks of at most a chunk."""
    stored = _as_stored(tensors, dtype)
    yield memoryview(header(stored))
    for memory in _runs([tensors[name] for name in in_file_order(stored)], dtype):
        for begin in range(0, len(memory), CHUNK):
            yield memory[begin : begin + CHUNK]


def _runs(tensors: list[Tensor], dtype: torch.dtype | None = None) -> Iterator[memoryview]:
    """The tensors' memory; neighbours in one storage are joined, as those of a snapshot are."""
    storage: torch.UntypedStorage | None = None
    begin = end = 0
    for tensor in tensors:
        size = tensor.nbytes
        if size == 0:
            continue
        one = is_one_number(tensor)
        if one or _changes(tensor, dtype):
            if storage is not None:
                yield _bytes(storage, begin, end)
                storage = None
            if one:
                kept = tensor.to(dtype) if _changes(tensor, dtype) else tensor  # still one number, expanded
                yield from _repeated(kept, kept.nbytes)
            else:
                for piece in tensor.view(-1).split(CHUNK // tensor.element_size()):
                    yield memoryview(piece.to(dtype).view(torch.uint8).numpy())
            continue
        assert tensor.device.type == "cpu" and tensor.is_contiguous()
        here, offset = tensor.untyped_storage(), int(tensor.storage_offset()) * tensor.element_size()
        if storage is not None and here.data_ptr() == storage.data_ptr() and offset == end:
            end += size
            continue
        if storage is not None:
            yield _bytes(storage, begin, end)
        storage, begin, end = here, offset, offset + size
    if storage is not None:
        yield _bytes(storage, begin, end)


def is_one_number(tensor: Tensor) -> bool:
    """True for one number expanded to many: it takes no memory but its bytes are in the file all the same."""
    return tensor.numel() > 1 and not any(
        stride for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1
    )


def _repeated(tensor: Tensor, size: int) -> Iterator[memoryview]:
    one = tensor.as_strided((1,), (1,)).contiguous()
    block = memoryview(one.expand(min(size, CHUNK) // one.element_size()).contiguous().view(torch.uint8).numpy())
    for begin in range(0, size, len(block)):
        yield block[: size - begin]


def _bytes(storage: torch.UntypedStorage, begin: int, end: int) -> memoryview:
    memory = torch.empty(0, dtype=torch.uint8).set_(storage, begin, (end - begin,))  # type: ignore[call-overload]
    return memoryview(memory.numpy())
