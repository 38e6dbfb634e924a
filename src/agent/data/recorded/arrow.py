"""Turns columns of Arrow into arrays of numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def to_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Returns the values of a column of numbers, (rows,), without a copy where they lie in one piece.

    Arrow's own ``to_numpy`` imports pandas first, half a second of each start; it serves where values are missing.
    """
    import pyarrow as pa

    array = column
    if isinstance(column, pa.ChunkedArray):
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        return array.to_numpy(zero_copy_only=False)
    return np.from_dlpack(array)
