"""Reads the table of episodes of a data set without its statistics, and without the memory that those cost.

LeRobot writes ten episodes to a row group, each with statistics of every feature. For fifty thousand episodes the description
of the row groups alone takes a second and half a gigabyte, so the numbers that are needed are kept apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agent.data import cache
from agent.data.recorded.arrow import to_numpy

_VERSION = 1
LARGE = 20 << 20  # bytes; a process to read it apart takes half a second
_DAMAGED = 2


def read_episodes(repo_id: str, root: Path, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Reads the numbers in the parquet files, statistics left out: column → (episodes,).

    Raises:
        ValueError: if a file is damaged.
    """
    name = f"episodes-{xxhash.xxh3_64(json.dumps([_VERSION, *cache.describe(root, paths)]).encode()).hexdigest()}.npz"
    if (kept := cache.find(root, name, _load)) is not None:
        return kept
    if sum(path.stat().st_size for path in paths) < LARGE:
        return _parsed(repo_id, paths)
    episodes = _parsed_apart(repo_id, paths)
    cache.keep(root, name, partial(_save, columns=episodes))
    return episodes


def _parsed_apart(repo_id: str, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Reads them in a process of its own, which gives the memory back when it ends."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "episodes.npz"
        command = [sys.executable, "-m", __spec__.name, repo_id, str(result), *map(str, paths)]
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if process.returncode == _DAMAGED:
            raise ValueError(process.stderr.strip())
        if process.returncode:
            raise RuntimeError(
                f"reading {paths[0].parent} failed with exit code {process.returncode}: {process.stderr}"
            )
        return _load(result)


def _parsed(repo_id: str, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[np.ndarray]] = {}
    for path in paths:
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                kinds = {field.name: field.type for field in file.schema_arrow}
                names = [
                    name for name, kind in kinds.items() if pa.types.is_integer(kind) or pa.types.is_floating(kind)
                ]
                table = file.read(columns=names, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"data set {repo_id}: {path} is damaged ({error}); copy it again") from error
        for name in names:
            columns.setdefault(name, []).append(to_numpy(table[name]))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _save(path: Path, columns: dict[str, Any]) -> None:
    with path.open("wb") as file:  # a name would be given another ending
        np.savez(file, **columns)


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as columns:
        return dict(columns)


def _main(repo_id: str, result: str, *paths: str) -> int:
    try:
        columns = _parsed(repo_id, [Path(path) for path in paths])
    except ValueError as error:
        print(error, file=sys.stderr)
        return _DAMAGED
    _save(Path(result), columns)
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
