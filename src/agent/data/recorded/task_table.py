"""Reads the table of instructions of a data set, ``meta/tasks.parquet``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agent.data.recorded.arrow import to_numpy


def read_tasks(name: str, path: Path) -> dict[int, str]:
    """``task_index`` → instruction; pandas stores the instructions as an index.

    Subsets and merges leave rows in any order, with gaps, or from 1 on. The key counts, not the place of the row, which is
    what LeRobot takes; a table without keys is numbered by its rows.

    Args:
        name: of the data set, for errors.
        path: of the table.

    Raises:
        ValueError: if the file is damaged, has no single column of instructions, or a key that is none or that two
            instructions have.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{name}: {path} is damaged ({error}); copy it again") from error
    kinds = {field.name: field.type for field in table.schema}
    texts = [key for key, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    if len(texts) != 1:
        raise ValueError(f"{name}: {path} needs one column of instructions, it has {texts}")
    instructions = [text or "" for text in table[texts[0]].to_pylist()]
    if "task_index" not in kinds:
        return dict(enumerate(instructions))
    kind, keys = kinds["task_index"], np.full(len(instructions), np.nan)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        keys[:] = to_numpy(table["task_index"])
    if not np.isfinite(keys).all() or (keys != np.round(keys)).any():
        raise ValueError(
            f"{name}: the column task_index of {path} must hold a whole number in each row, it is of type {kind} with "
            f"{str(table['task_index'].to_pylist()[:8])[:60]}; copy it again, or write the numbers that the data files use"
        )
    tasks: dict[int, str] = {}
    for key, instruction in zip(keys.astype(np.int64).tolist(), instructions, strict=True):
        if tasks.setdefault(key, instruction) != instruction:
            raise ValueError(
                f"{name}: task_index {key} of {path} is both {tasks[key]!r} and {instruction!r}: give each instruction a "
                "number of its own, there and in the data files"
            )
    return tasks
