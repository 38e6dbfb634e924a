"""Statistics are computed once: kept beside the data set under the fingerprint of the very values that they are of."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from agent.data.normalization import STATISTIC_NAMES, FeatureStatistics, merge_statistics

logger = logging.getLogger(__name__)

_VERSION = 1


def cached_statistics(
    columns: Sequence[Sequence[np.ndarray]], shares: Sequence[float], folders: Sequence[Path]
) -> FeatureStatistics:
    """``merge_statistics``, or the same numbers from an earlier start.

    Args:
        columns: for each data set its pieces.
        shares: each data set's fraction of the samples.
        folders: where they may be kept; the first that can be written is.
    """
    name = f"statistics-{_fingerprint(columns, shares)}.json"
    for folder in folders:
        if (found := _read(folder / name)) is not None:
            return found
    statistics = merge_statistics(columns, shares)
    for folder in folders:
        try:
            _write(folder / name, statistics)
        except OSError as error:
            logger.info("statistics are not kept in %s (%s)", folder, error)
            continue
        break
    return statistics


def _fingerprint(columns: Sequence[Sequence[np.ndarray]], shares: Sequence[float]) -> str:
    """Of every value, so that no change of a file can be missed."""
    digest = xxhash.xxh3_128(json.dumps([_VERSION, list(shares)]).encode())
    for blocks in columns:
        rows = sum(len(block) for block in blocks)
        digest.update(f"{rows}x{blocks[0].shape[1]} {blocks[0].dtype.str}".encode())
        for block in blocks:
            digest.update(np.ascontiguousarray(block))
    return digest.hexdigest()


def _write(path: Path, statistics: FeatureStatistics) -> None:
    values = {name: getattr(statistics, name).tolist() for name in STATISTIC_NAMES}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({**values, "clamped": statistics.clamped}))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> FeatureStatistics | None:
    """None if the file is not there, or not whole: the machine may have stopped before it was on the disk."""
    try:
        values = json.loads(path.read_text())
        # float32 → float64 → decimal and back is exact
        stored = {name: np.asarray(values[name], dtype=np.float32) for name in STATISTIC_NAMES}
        return FeatureStatistics(**stored, clamped=tuple(values["clamped"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        logger.info("statistics in %s cannot be read (%s)", path, error)
        return None
