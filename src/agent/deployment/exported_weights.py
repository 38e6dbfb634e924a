"""Copies a checkpoint's weights into a new ``model.safetensors``, under other names and in another number type.

It copies piece by piece, so that a few megabytes are in memory at a time, whatever the model's size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from agent.checkpoints import tensor_file


def write(
    path: Path, names: Mapping[str, Callable[[], Tensor]], dtypes: Mapping[str, torch.dtype], cast: torch.dtype | None
) -> int:
    """Writes tensors to a safetensors file, opening one after the other.

    Args:
        path: the file, which must not exist.
        names: name in the file → function that opens the tensor, preferably mapped from a file. It is called twice.
        dtypes: name → the type to store it in, in spite of ``cast``.
        cast: the type of all others; None keeps each tensor's own.

    Returns:
        The size of the file in bytes.

    Raises:
        OSError: if writing or syncing fails.
    """
    forms = {}
    for name, opened in names.items():
        tensor = opened()
        dtype = dtypes.get(name, cast or tensor.dtype)
        forms[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
    with open(path, "xb") as file:
        file.write(tensor_file.header(forms))
        for name in tensor_file.in_file_order(forms):
            for piece in _pieces(names[name](), forms[name].dtype):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return tensor_file.file_size(forms)


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yields the bytes of a tensor in a type, some rows at a time."""
    if tensor.numel() == 0:
        return
    rows = tensor.unsqueeze(0) if tensor.ndim == 0 else tensor
    count = max(1, tensor_file.CHUNK // (rows[0].numel() * dtype.itemsize))
    for piece in rows.split(count):
        yield memoryview(piece.to(dtype).contiguous().view(-1).view(torch.uint8).numpy())


class Archives:
    """Opens tensors of safetensors files by name. They are memory-mapped, so they are read only when they are used."""

    def __init__(self, files: list[Path]) -> None:
        self._stack = ExitStack()
        self._by_file = {path: self._stack.enter_context(safe_open(path, framework="pt")) for path in files}

    def tensor(self, path: Path, name: str) -> Tensor:
        """Opens a tensor of one of the files."""
        return self._by_file[path].get_tensor(name)

    def __enter__(self) -> Archives:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
