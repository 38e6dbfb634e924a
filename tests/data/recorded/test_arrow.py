"""Arrow's columns as arrays. Run: pytest tests/data/recorded/test_arrow.py"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from agent.data.recorded.arrow import to_numpy


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.float32(), pa.float64(), pa.bool_()])
def test_the_values_are_those_of_arrows_own_conversion(kind: pa.DataType) -> None:
    pieces = [pa.array([1, 0, 3]).cast(kind), pa.array([], kind), pa.array([0, 5]).cast(kind)]
    for column in (pieces[0], pieces[1], pieces[0].slice(1), pa.chunked_array(pieces[:1]), pa.chunked_array(pieces)):
        found = to_numpy(column)
        expected = column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
        assert found.dtype == expected.dtype and np.array_equal(found, expected)


def test_what_is_missing_becomes_nan() -> None:
    assert np.array_equal(to_numpy(pa.array([1.0, None, 3.0])), [1, np.nan, 3], equal_nan=True)


def test_one_piece_is_not_copied() -> None:
    array = pa.array(np.arange(1000))
    assert to_numpy(pa.chunked_array([array])).ctypes.data == array.buffers()[1].address


def test_pandas_is_not_imported() -> None:
    code = (
        "import sys, pyarrow as pa; from agent.data.recorded.arrow import to_numpy; "
        "to_numpy(pa.Array.from_buffers(pa.int64(), 1, [None, pa.py_buffer(bytes(8))])); print('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
