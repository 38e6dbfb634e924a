"""Reads the arrays of one validation from ``validation/step_….json``, which ``agent.validation.record`` writes.

The file can be of any age and from anywhere, so everything about it is checked; null is read as NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.validation.record import DatasetErrors, Errors, read_record


@dataclass(frozen=True)
class Chunk:
    """What was recorded after one frame of a held-out episode, and what the policy predicted there."""

    dataset: str
    episode: int
    frame: int
    names: list[str]
    """[a] of the dimensions, which are those of its data set."""
    recorded: list[list[float]]
    """[T][a]."""
    predicted: list[list[float]]
    """[T][a]."""
    averaged: list[list[float]] | None
    """[T][a] predicted with the averaged weights, where there are any."""
    valid: list[bool]
    """[T]; False where the episode was over."""


@dataclass(frozen=True)
class Evaluation:
    """One validation."""

    step: int
    names: list[str]
    """[a] of the action's dimensions."""
    policy: Errors
    baselines: dict[str, Errors]
    """``last`` action repeated, ``mean`` training action, ``start``: the checkpoint that the run began from."""
    chunks: list[Chunk]
    ema: Errors | None
    """Of the averaged weights."""
    datasets: list[DatasetErrors]
    """Each data set's own, beside its own baselines; empty where there is one."""


def read_evaluation(path: Path) -> Evaluation:
    """Reads and checks one file.

    Raises:
        ValueError: if it is not what a validation writes; names the file and the key.
    """
    try:
        content = read_record(path)
        names = _names(content)
        ema = content.get("ema")
        chunks = content.get("chunks") or []
        averaged = (ema or {}).get("chunks") or [None] * len(chunks)
        datasets = [_dataset(block) for block in content.get("datasets") or []]
        own_names = {one.name: one.names for one in datasets}
        return Evaluation(
            step=int(content["step"]),
            names=names,
            policy=_error(content, len(names)),
            baselines=_baselines(content, len(names)),
            chunks=[
                _chunk(block, mean, own_names.get(str(block["dataset"]), names))
                for block, mean in zip(chunks, averaged, strict=True)
            ],
            ema=None if ema is None else _error(ema, len(names)),
            datasets=datasets,
        )
    except KeyError as error:
        raise ValueError(f"{path.parent.name}/{path.name} cannot be read: it has no {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} cannot be read: {error}") from None


def _error(block: dict[str, Any], width: int) -> Errors:
    per_dimension = _numbers(block["per_dimension_l1"])
    if len(per_dimension) != width:
        raise ValueError(f"per_dimension_l1 has {len(per_dimension)} numbers for {width} names")
    acc = {str(key): _number(value) for key, value in (block.get("acc") or {}).items()}
    return Errors(_number(block["action_l1"]), per_dimension, _numbers(block["per_step_l1"]), acc)


def _baselines(block: dict[str, Any], width: int) -> dict[str, Errors]:
    found = block.get("baselines") or {}
    return {str(key): _error(errors, width) for key, errors in found.items() if errors is not None}


def _dataset(block: dict[str, Any]) -> DatasetErrors:
    names, ema = _names(block), block.get("ema")
    own = None if ema is None else _error(ema, len(names))
    return DatasetErrors(str(block["name"]), names, _error(block, len(names)), _baselines(block, len(names)), own)


def _names(block: dict[str, Any]) -> list[str]:
    return [str(name) for name in block["names"]]


def _chunk(block: dict[str, Any], mean: dict[str, Any] | None, names: list[str]) -> Chunk:
    recorded, predicted = (_matrix(block[key]) for key in ("recorded", "predicted"))
    averaged = None if mean is None else _matrix(mean["predicted"])
    valid = [bool(flag) for flag in block["valid"]]
    drawn = [recorded, predicted, *([] if averaged is None else [averaged])]
    if any(len(rows) != len(valid) or {len(row) for row in rows} != {len(names)} for rows in drawn):
        raise ValueError("recorded, predicted and valid of a chunk differ in their lengths, or from names")
    where = str(block["dataset"]), int(block["episode"]), int(block["frame"])
    return Chunk(*where, names, recorded, predicted, averaged, valid)


def _matrix(rows: list[Any]) -> list[list[float]]:
    return [_numbers(row) for row in rows]


def _numbers(values: list[Any]) -> list[float]:
    return [_number(value) for value in values]


def _number(value: Any) -> float:
    number = math.nan if value is None else float(value)
    return number if abs(number) < 1e100 else math.nan
