"""The update of ``one_pass.c``, built with the machine's C compiler and held against the one in torch before it is used.

torch.compile would need no source of its own. Tried on one piece of 131,072 numbers, in one thread of a machine that was
busy, it compiled for 154 s where this takes 1.5 s, needed 36 ns a number (without the random bits) where this needs 10 and
torch's operators 29, and gave other bits.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from agent.optim.adamw8bit import BLOCK, tables
from agent.optim.one_pass import Factors, OneUpdate
from agent.optim.one_pass_check import differences, examples

_OPTIONS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
)
_POINTERS = ("weight", "gradient", "average", "average_scale", "root", "root_scale")
_TABLES = ("signed_numbers", "signed_nearest", "unsigned_numbers", "unsigned_nearest")
_FLAGS = ("weight_is_bfloat16", "gradient_is_bfloat16", "eight_bit")
_BLOCKS_OF_A_THREAD = 4096


class _Update(ctypes.Structure):
    """The struct of the same name in ``one_pass.c``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_TABLES)),
        *((name, ctypes.c_int64) for name in ("width", "first")),
        *((name, ctypes.c_float) for name in ("gradient_scale", *Factors._fields)),
        *((name, ctypes.c_uint32) for name in ("before", "within")),
        *((name, ctypes.c_int32) for name in _FLAGS),
    ]


def compile_update() -> Callable[[OneUpdate], None]:
    """Builds the function that computes an update of tensors on the CPU, with as many threads as torch has.

    Raises:
        OSError: if there is no compiler, or what it built cannot be loaded.
        subprocess.SubprocessError: if the compiler fails.
        ValueError: if the result differs from :func:`agent.optim.one_pass.update_in_torch` in a bit.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("there is no C compiler; CC is unset, and cc, gcc and clang are not in PATH")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "one_pass.so"
        source = Path(__file__).with_name("one_pass.c")
        command = [compiler, *_OPTIONS, "-shared", "-fPIC", "-o", str(built), str(source), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        blocks = ctypes.CDLL(str(built)).update
    blocks.argtypes, blocks.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), None

    def update_in_c(update: OneUpdate) -> None:
        rows, width = update.shape
        values, count = _arguments(update, width), rows * -(-width // BLOCK)
        threads = min(torch.get_num_threads(), -(-count // _BLOCKS_OF_A_THREAD))
        if threads == 1:
            blocks(ctypes.byref(values), 0, count)
            return
        ends = [count * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(blocks, [ctypes.addressof(values)] * threads, ends, ends[1:]))

    for example in examples(torch.device("cpu")):
        if found := differences(update_in_c, example, updates=2):
            raise ValueError(f"what the compiler built differs from torch in {found}")
    return update_in_c


def _arguments(update: OneUpdate, width: int) -> _Update:
    average, *others = update.moments
    average_scale, root, root_scale = others if update.eight_bit else (None, others[0], None)
    pointers = (update.weight, update.gradient, average, average_scale, root, root_scale)
    cpu = torch.device("cpu")
    return _Update(
        *(
            None if tensor is None else tensor.data_ptr()
            for tensor in (*pointers, *tables(True, cpu), *tables(False, cpu))
        ),
        *(width, update.first),
        *(1.0 if update.gradient_scale is None else float(update.gradient_scale), *update.factors),
        *update.key,
        *(update.weight.dtype == torch.bfloat16, update.gradient.dtype == torch.bfloat16, update.eight_bit),
    )
