"""From sample numbers to batches: the config, worker processes, the validation set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from agent.batch import ActionChunk, Batch, Observation, ValidationBatch
from agent.data.mixture import Mixture
from agent.data.reader import Sample, SampleReader, collate
from agent.data.source import DatasetConfig
from agent.data.transforms import SampleSpec, pad_vector


@dataclass
class TrainDataConfig:
    """The training data and how it is read."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    """The data sets to train on."""
    balance: Literal["frames", "equal", "given"] | None = None
    """Which share of the samples a data set gives: `frames`, that of its frames, each of which then comes once an epoch;
    `equal`, the same for all; `given`, its `weight`. When not given, `given` if there are weights and else `frames`."""
    normalization: Literal["merged", "per_dataset"] | None = None
    """Statistics of states and actions: `merged`, one set over all data sets; `per_dataset`, one for each, or for all of
    one `robot`, which may then have dimensions of its own. When not given, `merged` unless the robots differ, which is
    refused."""
    deploy: str | None = None
    """Under `per_dataset`: the data set or `robot` that a checkpoint's own processors are made for; the first one when
    not given. `agent.export --statistics` takes another later."""
    num_workers: int = 4
    """Processes that read samples, per GPU; 0 reads in the training process. Changes speed, never the samples."""
    prefetch_factor: int = 2
    """Micro-batches that each worker keeps ready."""
    frame_store: Literal["auto", "none", "jpeg", "lossless", "raw"] = "auto"
    """Where pictures come from: a store that `python -m agent.data.prepare` made of this kind; `auto` for whichever is
    there, and the videos themselves when there is none; `none` for the videos."""
    frame_quality: int = 95
    """Quality of the JPEGs in a store, 1 to 100."""
    video_backend: str | None = None
    """``torchcodec`` or ``pyav``; when not given, torchcodec where it loads and otherwise pyav."""
    tolerance_s: float = 1e-4
    """How far a video frame's time stamp may be from the one asked for, in seconds."""

    def __post_init__(self) -> None:
        self.weights()
        if self.deploy is not None and self.normalization != "per_dataset":
            raise ValueError(
                f"data.train.deploy is {self.deploy}, but there is one set of statistics: leave it out, or write "
                "data.train.normalization: per_dataset"
            )
        if not 1 <= self.frame_quality <= 100:
            raise ValueError(f"data.train.frame_quality must be 1 to 100, got {self.frame_quality}")
        if self.num_workers < 0 or self.prefetch_factor < 1 or self.tolerance_s <= 0:
            raise ValueError(
                f"data.train: num_workers must be at least 0 (is {self.num_workers}), prefetch_factor at least 1 "
                f"(is {self.prefetch_factor}), tolerance_s above 0 (is {self.tolerance_s})"
            )

    def weights(self) -> list[float | None] | None:
        """The share of each data set's samples, relative to the others; None for one pool of all frames.

        Raises:
            ValueError: if `balance` and the weights contradict each other.
        """
        weights = [dataset.weight for dataset in self.datasets]
        weighted = [dataset.repo_id for dataset in self.datasets if dataset.weight is not None]
        if self.balance in ("frames", "equal") and weighted:
            raise ValueError(
                f"data.train.balance is {self.balance}, but {', '.join(weighted)} has a weight: leave `weight` out, or "
                "write data.train.balance: given"
            )
        if self.balance == "given" and len(weighted) < len(weights):
            without = ", ".join(dataset.repo_id for dataset in self.datasets if dataset.weight is None)
            raise ValueError(
                f"data.train.balance is given, but {without} has no weight: write `weight: NUMBER` in its entry, or "
                "data.train.balance: equal or frames"
            )
        return [1.0] * len(weights) if self.balance == "equal" else weights


@dataclass
class ValDataConfig:
    """The validation data."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    """Data sets of their own for validation. When empty, `fraction` is held out of the training data."""
    fraction: float = 0.05
    """Fraction of each training data set's episodes that is held out for validation, evenly spaced, at least one
    episode; 0 trains on everything. Ignored when `datasets` is given."""


@dataclass
class DataConfig:
    """Training and validation data."""

    train: TrainDataConfig = field(default_factory=TrainDataConfig)
    """The training data."""
    val: ValDataConfig = field(default_factory=ValDataConfig)
    """The validation data."""
    statistics: Literal["dataset", "checkpoint"] = "dataset"
    """What states and actions are normalised with: statistics of the training data, or those that the weights of
    `load_from_checkpoint` were trained with, for a robot that they know."""

    def __post_init__(self) -> None:
        if self.statistics == "checkpoint" and self.train.normalization == "per_dataset":
            raise ValueError(
                "data.statistics: checkpoint is one set of statistics, and data.train.normalization: per_dataset wants "
                "one for each data set: write data.statistics: dataset, or data.train.normalization: merged"
            )


@dataclass
class _Stream:
    """The samples of the run by number, for torch's DataLoader."""

    reader: SampleReader
    mixture: Mixture

    def __getitem__(self, k: int) -> Sample:
        return self.reader.sample(k, *self.mixture[k])


@dataclass
class _Numbers:
    """The sample numbers of one rank's micro-batches, from an update on, for ever."""

    global_batch: int
    batch: int
    rank: int
    world: int
    first_update: int

    def __iter__(self) -> Iterator[list[int]]:
        # Updates are whole multiples of what all ranks take together, so this counts through u and m at once.
        start = self.first_update * self.global_batch + self.rank * self.batch
        while True:
            yield list(range(start, start + self.batch))
            start += self.batch * self.world


def _as_tree(samples: Sequence[Sample], spec: SampleSpec, pad_token_id: int) -> dict[str, Any]:
    """A batch as nested dictionaries, which is what torch knows how to pin."""
    batch = collate(samples, spec, pad_token_id)
    return {**vars(batch), "observation": dict(vars(batch.observation)), "actions": dict(vars(batch.actions))}


def _as_batch(tree: dict[str, Any]) -> Batch:
    observation, actions = Observation(**tree["observation"]), ActionChunk(**tree["actions"])
    return Batch(**{**tree, "observation": observation, "actions": actions})


def _start_worker(_number: int) -> None:
    """Runs first in a new worker."""
    from agent.data import worker

    worker.ignore_cluster_signals()  # once more: torch has given it a handler of its own
    worker.end_with_trainer()


def start_fork_server() -> None:
    """Begins to import in the background what workers need, some seconds ahead of the first loader."""
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(["agent.data.worker"])
    forkserver.ensure_running()


class TrainLoader(Iterator[Batch]):
    """An endless iterator over one rank's micro-batches.

    Micro-batch m of update u holds on rank r the samples k = u·G + m·B·W + r·B + j, j in range(B), for a global
    batch G, B samples per device and W ranks. So an update's samples do not depend on ranks, accumulation or
    workers, and starting at any update costs nothing.

    Args:
        reader: reads a sample.
        mixture: which frame each sample is.
        global_batch: G.
        per_device_batch: B.
        rank: r.
        world: W.
        first_update: the update whose first micro-batch comes first.
        num_workers: processes that read ahead; 0 reads in this one.
        prefetch_factor: micro-batches that each worker keeps ready.
        pin: whether batches are put into pinned memory, for copies to a GPU that overlap with computing.
    """

    def __init__(
        self,
        reader: SampleReader,
        mixture: Mixture,
        *,
        global_batch: int,
        per_device_batch: int,
        rank: int = 0,
        world: int = 1,
        first_update: int = 0,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin: bool = False,
    ) -> None:
        import torch
        from torch.utils.data import DataLoader

        assert global_batch % (per_device_batch * world) == 0, "checked with the configuration"
        if num_workers:
            start_fork_server()
            for source in reader.sources:
                source.open()  # once here; workers take it over
        self._workers = num_workers
        self._batches: Iterator[dict[str, Any]] | None = iter(
            DataLoader(
                _Stream(reader, mixture),  # type: ignore[arg-type]
                batch_sampler=_Numbers(global_batch, per_device_batch, rank, world, first_update),  # type: ignore[arg-type]
                collate_fn=partial(_as_tree, spec=reader.spec, pad_token_id=reader.tokens.pad_token_id),
                num_workers=num_workers,
                prefetch_factor=prefetch_factor if num_workers else None,
                multiprocessing_context="forkserver" if num_workers else None,
                worker_init_fn=_start_worker,
                pin_memory=pin,
                # A generator of its own: DataLoader would otherwise draw from the process's.
                generator=torch.Generator().manual_seed(0),
            )
        )

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            RuntimeError: if a sample cannot be read, or a worker was killed.
        """
        if self._batches is None:
            raise StopIteration
        try:
            return _as_batch(next(self._batches))
        except (RuntimeError, EOFError, ConnectionError) as error:
            # The last two are what taking over a dead worker's memory looks like before its death is noticed.
            if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
                raise
            raise RuntimeError(
                "a data worker was killed, most often by the system when memory runs out "
                f"({type(error).__name__}: {error}). Ask for more memory (--mem), or lower data.train.num_workers "
                f"(now {self._workers}), data.train.prefetch_factor or per_device_batch_size."
            ) from error

    def close(self) -> None:
        """Ends the workers; further batches are not to be had."""
        self._batches = None  # torch ends them when its iterator is released


def validation_batches(
    reader: SampleReader, size: int, batch: int, rank: int = 0, world: int = 1, in_step: bool = False
) -> Iterator[ValidationBatch]:
    """One rank's part of a fixed set of validation samples: every ``world``-th, so that all together are the set.

    The set is evenly spaced over all validation frames and thus over their episodes; its ``sample_index`` counts
    from 0, and with it the draws. Ranks may get different numbers of batches, or none.

    Args:
        reader: of sources opened with the previous action.
        size: samples of the set over all ranks; all frames when there are fewer, or when 0.
        batch: samples per batch; the last may be smaller.
        in_step: give all ranks the same number of batches, because their passes are collectives. One that is left
            with nothing gets the first sample, with the index -1: it does not count.
    """
    lengths = [len(source) for source in reader.sources]
    frames, starts = sum(lengths), np.cumsum([0, *lengths])
    size = min(size, frames) if size > 0 else frames
    mine = range(rank, size, world)
    for begin in range(0, -(-size // world) if in_step else len(mine), batch):
        samples = []
        for index in mine[begin : begin + batch] or [0]:
            pooled = (2 * index + 1) * frames // (2 * size)
            dataset = int(np.searchsorted(starts, pooled, side="right")) - 1
            samples.append(reader.sample(index, dataset, pooled - int(starts[dataset])))
        previous = [sample.previous_action for sample in samples if sample.previous_action is not None]
        assert len(previous) == len(samples), "validation sources are opened with the previous action"
        yield ValidationBatch(
            batch=collate(samples, reader.spec, reader.tokens.pad_token_id),
            index=np.asarray([sample.k if begin < len(mine) else -1 for sample in samples]),
            state=_padded([sample.raw_state for sample in samples]),
            actions=_padded([sample.raw_actions for sample in samples]),
            previous_action=_padded(previous),
            has_previous=np.asarray([not sample.previous_is_pad for sample in samples]),
        )


def _padded(values: Sequence[np.ndarray]) -> np.ndarray:
    """Stacked, with zeros behind where the last dimension is smaller."""
    widest = max(value.shape[-1] for value in values)
    return np.stack([pad_vector(value, widest) for value in values])
