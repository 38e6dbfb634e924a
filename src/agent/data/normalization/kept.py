"""Computes statistics once: they are kept beside the data set under a fingerprint of the values that they are of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agent.data import cache
from agent.data.normalization.normalizer import NARROW_RULE, STATISTIC_NAMES, FeatureStatistics, merge_statistics
from agent.data.normalization.relative import Chunks, chunk_statistics


def cached_statistics(
    columns: Sequence[Sequence[np.ndarray]], shares: Sequence[float], root: Path, rule: int = NARROW_RULE
) -> FeatureStatistics:
    """Calls ``merge_statistics``, or reads the same numbers from an earlier start.

    Args:
        columns: for each data set its pieces.
        shares: each data set's fraction of the samples.
        root: of the data set beside which they are kept.
        rule: what is narrow, see ``made_safe``; each has statistics of its own.
    """
    fingerprint = _fingerprint([rule, list(shares)], columns)
    return _kept(f"statistics-{fingerprint}.json", root, lambda: merge_statistics(columns, shares, rule))


def cached_chunk_statistics(
    parts: Sequence[Chunks], shares: Sequence[float], root: Path, rule: int = NARROW_RULE
) -> FeatureStatistics:
    """Calls ``chunk_statistics``, or reads the same numbers from an earlier start; see ``cached_statistics``."""
    settings = [[part.chunk_size, part.relative.tolist()] for part in parts]
    columns = [blocks for part in parts for blocks in (part.states, part.actions, [part.lengths[:, None]])]
    fingerprint = _fingerprint([rule, list(shares), settings], columns)
    return _kept(f"relative-statistics-{fingerprint}.json", root, lambda: chunk_statistics(parts, shares, rule))


def _kept(name: str, root: Path, compute: Callable[[], FeatureStatistics]) -> FeatureStatistics:
    statistics = cache.find(root, name, _read)
    if statistics is None:
        statistics = compute()
        place = cache.keep(root, name, partial(_write, statistics=statistics))
        statistics = replace(statistics, kept_in=place)
    return statistics


def _fingerprint(settings: list[Any], columns: Sequence[Sequence[np.ndarray]]) -> str:
    """Hashes every value, so that no change of a file can be missed."""
    digest = xxhash.xxh3_128(json.dumps(settings).encode())
    for blocks in columns:
        rows = sum(len(block) for block in blocks)
        digest.update(f"{rows}x{blocks[0].shape[1]} {blocks[0].dtype.str}".encode())
        for block in blocks:
            digest.update(np.ascontiguousarray(block))
    return digest.hexdigest()


def _write(path: Path, statistics: FeatureStatistics) -> None:
    values = {name: getattr(statistics, name).tolist() for name in STATISTIC_NAMES}
    path.write_text(json.dumps({**values, "clamped": statistics.clamped, "constant": statistics.constant}))


def _read(path: Path) -> FeatureStatistics:
    values = json.loads(path.read_text())
    # float32 → float64 → decimal and back is exact
    stored: dict[str, Any] = {name: np.asarray(values[name], dtype=np.float32) for name in STATISTIC_NAMES}
    clamped = tuple(values["clamped"])
    constant = tuple(values.get("constant", clamped))
    return FeatureStatistics(**stored, clamped=clamped, constant=constant, kept_in=path)
