"""What every validation of a run found, in ``<run>/validation``: ``step_00000100.json`` and the picture beside it.

``metrics.jsonl`` has the totals. These files have the errors by action dimension and by step of the chunk, the
baselines in the same detail, and a few chunks as they were recorded and predicted. That of update 0 is of the weights
that the run started from, the baseline of all later ones. Which checkpoint is the best follows from them too.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.lifecycle.records import free_name, read_object
from agent.safe_files import write_text

log = logging.getLogger(__name__)

FORMAT = 1
_DIGITS = 7  # of a float32
_CHECKSUM = "checksum"
_told: set[Path] = set()  # damaged files that the log has named
_ERRORS = ("action_l1", "per_dimension_l1", "per_step_l1", "acc")


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors over unpadded steps, in the data set's own units."""

    action_l1: float
    per_dimension_l1: list[float]
    """(a,)"""
    per_step_l1: list[float]
    """(T,); NaN for a step that is padded in every sample."""
    acc: dict[str, float] = field(default_factory=dict)
    """Threshold → fraction of action values within it."""


@dataclass(frozen=True)
class Chunk:
    """One validation sample as it was recorded and as it was predicted."""

    dataset: str
    episode: int
    frame: int
    recorded: Sequence[Sequence[float]]
    """(T, a), in the data set's own units."""
    predicted: Sequence[Sequence[float]]
    """(T, a)"""
    valid: Sequence[bool]
    """(T,), False past the episode's end."""


@dataclass(frozen=True)
class DatasetErrors:
    """The errors on one of several data sets."""

    name: str
    names: list[str]
    """(a,) of its own action dimensions."""
    errors: Errors
    baselines: dict[str, Errors] = field(default_factory=dict)
    """``last`` and ``mean``; read back from a file, also ``start``."""
    ema: Errors | None = None
    """Of the averaged weights; only where it is read back from a file."""


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the validation set gives, the same on every process."""

    loss: float
    errors: Errors
    last: Errors
    """Of the last recorded action, repeated."""
    mean: Errors
    """Of the training data's mean action."""
    names: list[str]
    """(a,) names of the action dimensions."""
    datasets: list[DatasetErrors]
    """The errors on each data set; empty when there is one."""
    chunks: list[Chunk]
    samples: int
    validation_set: str
    """Changes with the samples: errors on different sets are never compared."""

    def metrics(self, prefix: str = "val/") -> dict[str, float]:
        """The totals under the names of ``metrics.jsonl``, without the baselines, which are no policy's."""
        acc = {f"{prefix}acc_{threshold}": value for threshold, value in self.errors.acc.items()}
        return {f"{prefix}loss": self.loss, f"{prefix}action_l1": self.errors.action_l1, **acc}

    def baselines(self) -> dict[str, float]:
        """The two baselines' totals, under the names of ``metrics.jsonl``."""
        return {"val/baseline_mean_l1": self.mean.action_l1, "val/baseline_last_l1": self.last.action_l1}


def document(step: int, raw: Evaluation, ema: Evaluation | None, start: Mapping[str, Any] | None) -> dict[str, Any]:
    """The contents of a file.

    Args:
        step: updates done.
        raw: of the weights in training.
        ema: of their moving average, if the run has one.
        start: the file of update 0; None where there is none.
    """
    if start is not None and start.get("validation_set") != raw.validation_set:
        start = None
    starts = start.get("datasets", []) if start is not None else []
    if len(starts) != len(raw.datasets):
        starts = [None] * len(raw.datasets)
    return {
        "format": FORMAT,
        "step": step,
        "names": raw.names,
        "units": "data set's own",
        "samples": raw.samples,
        "validation_set": raw.validation_set,
        **_policy(raw),
        "baselines": {
            "last": _errors(raw.last),
            "mean": _errors(raw.mean),
            "start": _of_start(start),
        },
        # The samples are the same, and so are the data sets in their order.
        "datasets": [
            _dataset(one, ema.datasets[place].errors if ema else None, starts[place])
            for place, one in enumerate(raw.datasets)
        ],
        "ema": _policy(ema) if ema is not None else None,
    }


def totals(contents: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a file under the names of ``metrics.jsonl``; None for one that is not finite."""
    found = {"val/loss": contents["loss"], "val/action_l1": contents["action_l1"]}
    found |= {f"val/acc_{threshold}": value for threshold, value in contents["acc"].items()}
    baselines = {key: block for key, block in contents["baselines"].items() if block is not None}
    return found | {f"val/baseline_{key}_l1": block["action_l1"] for key, block in baselines.items()}


def _policy(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "loss": _number(evaluation.loss),
        **_errors(evaluation.errors),
        "chunks": [
            {
                "dataset": chunk.dataset,
                "episode": chunk.episode,
                "frame": chunk.frame,
                "recorded": [_rounded(row) for row in chunk.recorded],
                "predicted": [_rounded(row) for row in chunk.predicted],
                "valid": list(map(bool, chunk.valid)),
            }
            for chunk in evaluation.chunks
        ],
    }


def _dataset(one: DatasetErrors, ema: Errors | None, start: Mapping[str, Any] | None) -> dict[str, Any]:
    baselines = {key: _errors(errors) for key, errors in one.baselines.items()}
    return {
        "name": one.name,
        "names": one.names,
        **_errors(one.errors),
        "baselines": {**baselines, "start": _of_start(start)},
        "ema": _errors(ema) if ema is not None else None,
    }


def _errors(errors: Errors) -> dict[str, Any]:
    return {
        "action_l1": _number(errors.action_l1),
        "per_dimension_l1": list(map(_number, errors.per_dimension_l1)),
        "per_step_l1": list(map(_number, errors.per_step_l1)),
        "acc": errors.acc,
    }


def _of_start(block: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a block of update 0 is as a baseline."""
    return {key: block[key] for key in _ERRORS if key in block} if block is not None else None


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def _rounded(values: Iterable[float]) -> list[float | None]:
    """As short as a float32 can be written without loss that anybody sees."""
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values]


def read_record(path: Path) -> dict[str, Any]:
    """The contents of a file.

    Raises:
        ValueError: if they are not what a validation has written; says what is wrong.
        OSError: if there is no such file, or it cannot be read.
    """
    contents, problem = read_object(path)
    if contents is None:
        if not problem:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        raise ValueError(problem)
    if contents.get("format") != FORMAT:
        raise ValueError(
            f"its format is {contents.get('format')}, this version reads {FORMAT}: read it with the version that trained "
            "the run"
        )
    checksum = contents.pop(_CHECKSUM, None)  # older files have none
    if checksum is not None and checksum != _checksum(contents):
        raise ValueError("its checksum is another one")
    if missing := [key for key in ("step", "loss", "action_l1", "acc", "baselines") if key not in contents]:
        raise ValueError(f"it has no '{missing[0]}'")
    if _step_of(path) not in (None, contents["step"]):
        raise ValueError(f"its step is {contents['step']!r:.40}")
    for key in ("loss", "action_l1"):
        _check_number(key, contents[key])
    blocks = [*_mapping(contents, "baselines").values(), *_list(contents, "datasets")]
    for block in blocks:
        if block is not None and not (isinstance(block, dict) and "action_l1" in block):
            raise ValueError("it has no 'action_l1' in a part of 'baselines' or 'datasets'")
    for threshold, value in _mapping(contents, "acc").items():
        _check_number(f"acc {threshold}", value)
    return contents


def _mapping(contents: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(contents[key], dict):
        raise ValueError(f"its {key} is {contents[key]!r:.40}")
    return contents[key]


def _list(contents: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(contents.get(key, []), list):
        raise ValueError(f"its {key} is {contents[key]!r:.40}")
    return contents.get(key, [])


def _check_number(key: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"its {key} is {value!r:.40}")


def _checksum(contents: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(_dumps(contents).encode()):08x}"


def _dumps(contents: Mapping[str, Any]) -> str:
    return json.dumps(contents, separators=(",", ":"))


def _step_of(path: Path) -> int | None:
    found = re.fullmatch(r"step_(\d{8,})\.(json|png)", path.name)
    return int(found[1]) if found is not None else None


class ValidationRecords:
    """``<run>/validation``; rank 0 writes and reads it."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "validation"

    def path(self, step: int, suffix: str = ".json") -> Path:
        """Where the record of an update is, or its picture (``.png``)."""
        return self.folder / f"step_{step:08d}{suffix}"

    def write(self, contents: Mapping[str, Any]) -> None:
        """Writes the record of an update, whole or not at all; after a resume, over an equal one.

        Raises:
            OSError: if it cannot be written.
        """
        self.folder.mkdir(exist_ok=True)  # the run's folder is not begun anew when somebody has moved it
        checked = {**contents, _CHECKSUM: _checksum(contents)}
        write_text(self.path(contents["step"]), _dumps(checked) + "\n")

    def read(self, step: int) -> dict[str, Any] | None:
        """The record of an update; None if there is none, or none that can be read, which the log says once."""
        path = self.path(step)
        try:
            return read_record(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if path not in _told:
                log.warning("%s is damaged, update %d counts as not validated: %s", path, step, error)
            _told.add(path)
            return None

    def rewind(self, step: int) -> None:
        """Removes what is of later updates, which will be done again, and sets aside what is damaged."""
        for path in self.folder.glob("step_*"):
            found = _step_of(path)
            try:
                if found is not None and found > step:
                    path.unlink()
                elif found is not None and path.suffix == ".json" and self.read(found) is None:
                    path.rename(free_name(path))
            except OSError as error:
                log.warning("%s could not be put away, the run goes on: %s", path, error)

    def best(self, steps: Iterable[int]) -> int | None:
        """Of these updates the one with the lowest ``action_l1``, the earliest if several have it.

        Counted are those whose validation was on the same samples as that of the newest. None if none was validated.
        """
        found = [record for step in sorted(steps) if (record := self.read(step)) is not None]
        sets = [record.get("validation_set") for record in found]
        alike = [r for r, its in zip(found, sets, strict=True) if its == sets[-1] and r["action_l1"] is not None]
        return min(alike, key=lambda record: (record["action_l1"], record["step"]))["step"] if alike else None
