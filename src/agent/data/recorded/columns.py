"""Maps the low-dimensional columns of a data set into memory as arrays: one copy for all processes of a machine.

A large data set has tens of thousands of row groups, which take seconds to read and hundreds of megabytes to hold. They
are read once, and kept as plain arrays beside the data set, or in the user's cache where that cannot be written. The
arrays hold what the files hold, bit for bit, and are made anew when a file has another size or time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from agent.data import cache
from agent.data.recorded.arrow import to_numpy
from agent.data.recorded.files import files_of
from agent.data.recorded.metadata import Metadata

if TYPE_CHECKING:
    import pyarrow as pa

_VERSION = 1


@dataclass
class ColumnTable:
    """The columns of some episodes, read when first asked for; travels to workers as a path.

    Rows are in order of episode and frame. Episodes that are not wanted but share a file with one that is are there, too.
    """

    metadata: Metadata
    episodes: np.ndarray
    """The wanted ones, ascending."""
    names: tuple[str, ...]
    """Keys of the columns."""
    _arrays: dict[str, np.ndarray] | None = field(default=None, repr=False)
    _folder: Path | None = field(default=None, repr=False)
    _begins: np.ndarray | None = field(default=None, repr=False)

    def __getstate__(self) -> dict:
        state = dict(vars(self))
        if self._folder is not None:  # an array mapped into memory would travel as a copy
            state["_arrays"] = None
        return state

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a column, (rows, dims), read-only.

        Raises:
            ValueError: if a file does not hold the frames that the metadata count.
            KeyError: if the column is not one of ``names``.
        """
        return self.load()[name]

    def load(self) -> dict[str, np.ndarray]:
        """Maps all columns; see ``__getitem__``."""
        if self._arrays is None:
            if self._folder is None:
                self._arrays, self._folder = self._load()
            else:
                self._arrays = _mapped(self._folder, self.names)
        return self._arrays

    def release(self) -> None:
        """Forgets what is mapped, and with it the memory that it seems to take; the next access maps it again."""
        if self._folder is not None:
            self._arrays = None

    def begins(self, episodes: np.ndarray) -> np.ndarray:
        """Finds the row of the first frame of each of these episodes."""
        if self._begins is None:
            lengths = np.where(self._held(), self.metadata.episodes["length"], 0)
            self._begins = np.cumsum(lengths) - lengths
        return self._begins[episodes]

    def _held(self) -> np.ndarray:
        """Finds the episodes in the files of the wanted ones, (all episodes,) bool."""
        place = self.metadata.data_places()
        return np.isin(place, place[self.episodes])

    def _files(self) -> list[tuple[Path, np.ndarray]]:
        """Lists the data files, each with the episodes in it."""
        return files_of(self.metadata, np.flatnonzero(self._held()), "data")

    def _load(self) -> tuple[dict[str, np.ndarray], Path | None]:
        files, root = self._files(), self.metadata.root
        name = f"columns-{self._fingerprint([path for path, _ in files])}"
        place = cache.find(root, name, partial(_checked, names=self.names))
        if place is None:
            arrays = self._read(files)
            place = cache.keep(root, name, partial(_save, arrays=arrays))
            if place is None:
                return arrays, None
        return _mapped(place, self.names), place

    def _fingerprint(self, paths: Sequence[Path]) -> str:
        known = [_VERSION, *self._widths().items(), *cache.describe(self.metadata.root, paths)]
        digest = xxhash.xxh3_64(json.dumps(known).encode())
        digest.update(np.ascontiguousarray(self.metadata.episodes["length"]))
        digest.update(np.ascontiguousarray(self.metadata.data_places()))
        return digest.hexdigest()

    def _widths(self) -> dict[str, int]:
        """Reads from the metadata how many numbers a row of each column has."""
        features = self.metadata.features  # without LeRobot's own columns, one number each, in some data sets
        return {name: math.prod(features[name]["shape"]) if name in features else 1 for name in self.names}

    def _read(self, files: Sequence[tuple[Path, np.ndarray]]) -> dict[str, np.ndarray]:
        """Brings every row to its place, whatever the order of the rows in the files."""
        import pyarrow as pa

        rows = int(self.metadata.episodes["length"][self._held()].sum())
        arrays: dict[str, np.ndarray] = {}
        seen = np.zeros(rows, dtype=bool)
        widths = self._widths()

        def fill(path: Path, members: np.ndarray) -> None:
            owner, frame, values = _columns_of(path, widths)
            known = np.isin(owner, members) & (frame >= 0)
            known &= frame < self.metadata.episodes["length"][np.where(known, owner, 0)]
            place = self.begins(owner[known]) + frame[known]
            seen[place] = True
            for name, value in values.items():
                if name not in arrays:
                    arrays[name] = np.empty((rows, value.shape[1]), dtype=value.dtype)
                arrays[name][place] = value[known]

        fill(*files[0])  # alone, because it makes the arrays; the others write to rows of their own
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for done in [pool.submit(fill, *file) for file in files[1:]]:
                done.result()
        pa.default_memory_pool().release_unused()  # what the tables took would stay with this process
        if not seen.all():
            raise self._missing(seen)
        return arrays

    def _missing(self, seen: np.ndarray) -> ValueError:
        """Words the error where not every row has been seen."""
        row = int(np.flatnonzero(~seen)[0])
        held = np.flatnonzero(self._held())
        episode = int(held[np.searchsorted(self.begins(held), row, side="right") - 1])
        path, length = self.metadata.data_file(episode), int(self.metadata.episodes["length"][episode])
        owner, frame, _ = _columns_of(path, {})
        mine = np.sort(frame[owner == episode])
        if len(mine) == length and (np.diff(mine) == 1).all():
            return ValueError(
                f"data set {self.metadata.repo_id}: frame_index of episode {episode} in {path} runs from {mine[0]} to "
                f"{mine[-1]}, and LeRobot counts the {length} frames of each episode from 0: write it anew there, as what it is "
                "less the first of its episode, or leave the episode out with `episodes`."
            )
        return ValueError(
            f"data set {self.metadata.repo_id}: its files hold {int(seen.sum())} of the {len(seen)} frames of the metadata; "
            f"the first that is missing is frame {row - int(self.begins(np.array([episode]))[0])} of episode {episode} "
            f"in {path}. Copy the file again, or leave the episode out with `episodes`."
        )

    def unreadable(self) -> Iterator[tuple[np.ndarray, ValueError]]:
        """Yields the wanted episodes in each file that cannot be read or lacks some of their frames, and why; keeps nothing."""
        for _, members in files_of(self.metadata, self.episodes, "data"):
            part = ColumnTable(self.metadata, members, self.names)
            try:
                part._read(part._files())
            except ValueError as error:
                yield members, error


def _columns_of(path: Path, widths: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Reads episode and frame of each row of a parquet file, and columns as (rows, dims); ``widths`` has the dims of each.

    Raises:
        ValueError: if the file is damaged, or a column is missing or has other dims, naming the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = list(dict.fromkeys([*widths, "episode_index", "frame_index"]))
    # ParquetFile reads many small row groups several times faster than read_table, which goes through a scanner.
    with pq.ParquetFile(path, memory_map=True) as file:
        if missing := [name for name in wanted if name not in file.schema_arrow.names]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; copy the file again, or leave its episodes out with `episodes`. "
                f"It has {', '.join(file.schema_arrow.names)}"
            )
        try:
            table = file.read(columns=wanted, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's, not pyarrow's: another time it may be read
                raise
            raise ValueError(
                f"{path} is damaged ({str(error).splitlines()[0]}); copy the file again, or leave its episodes out with "
                "`episodes`"
            ) from error
    for name in ("episode_index", "frame_index"):
        column = table[name]
        if not pa.types.is_integer(column.type) or column.null_count:
            held = f"{column.null_count} rows without a number" if column.null_count else column.type
            raise ValueError(f"{path}: {name} holds {held} instead of whole numbers; convert the data set again")
    values = {}
    for name, width in widths.items():
        column = table[name].combine_chunks()
        if (kind := _not_numbers(column.type)) is not None:
            raise ValueError(
                f"{path}: {name} holds {kind} instead of numbers; convert the data set again, or leave this file's episodes "
                "out with `episodes`"
            )
        lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        uneven = lists and len(np.unique(np.diff(to_numpy(column.offsets)))) > 1
        if uneven or (column.null_count and pa.types.is_nested(column.type)):
            values[name] = _with_gaps(column.to_pylist(), width)
            continue
        while pa.types.is_nested(column.type):
            column = column.flatten()
        values[name] = to_numpy(column).reshape(len(table), -1)
        if values[name].shape[1] != width:
            raise ValueError(
                f"{path}: {name} has {values[name].shape[1]} dimensions, meta/info.json says {width}; copy the data set again, "
                "or correct its shape there"
            )
    return to_numpy(table["episode_index"]), to_numpy(table["frame_index"]), values


def _not_numbers(kind: pa.DataType) -> pa.DataType | None:
    """Tells what a column holds, or the lists in it, if that is neither numbers nor true and false."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):  # those of the package `datasets` for arrays
        kind = kind.storage_type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    fine = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return None if fine else kind


def _with_gaps(rows: list, width: int) -> np.ndarray:
    """(rows, width); a row without a value, or with more or fewer dimensions, is NaN: that is refused by frame if its
    episode is a wanted one."""
    gap = np.full(width, np.nan)
    return np.stack([gap if row is None or np.size(row) != width else np.ravel(row) for row in rows])


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    for number, array in enumerate(arrays.values()):
        np.save(folder / f"{number}.npy", array)
    (folder / "columns.json").write_text(json.dumps(list(arrays)))


def _checked(folder: Path, names: Sequence[str]) -> Path:
    _mapped(folder, names)
    return folder


def _mapped(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    numbers = {name: number for number, name in enumerate(json.loads((folder / "columns.json").read_text()))}
    # as plain arrays: a slice of a memmap costs ten times that of one
    return {name: np.asarray(np.load(folder / f"{numbers[name]}.npy", mmap_mode="r")) for name in names}
