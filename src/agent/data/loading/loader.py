"""From sample numbers to batches: the config, worker processes, the validation set."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from agent.batch import Batch, ValidationBatch, map_tensors
from agent.data.loading.worker_pool import WorkerPool
from agent.data.samples.mixture import Mixture
from agent.data.samples.reader import Sample, SampleReader, collate
from agent.data.samples.transforms import pad_vector
from agent.data.source import DatasetConfig, Source


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
    video_backend: Literal["torchcodec", "pyav"] | None = None
    """What decodes videos; when not given, torchcodec where it loads and otherwise pyav."""
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
        for key, least in (("num_workers", 0), ("prefetch_factor", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"data.train.{key} must be at least {least}, got {getattr(self, key)}")
        if self.tolerance_s <= 0:
            raise ValueError(f"data.train.tolerance_s must be above 0, got {self.tolerance_s}")

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

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"data.val.fraction must be at least 0 and below 1, got {self.fraction}")


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
class _MicroBatches:
    """One rank's micro-batches by number, from the one with sample ``first`` on, for ever."""

    reader: SampleReader
    mixture: Mixture
    batch: int
    rank: int
    world: int
    first: int

    def __call__(self, number: int) -> Batch:
        """Micro-batch ``number``.

        Raises:
            RuntimeError: if a sample cannot be read, naming data set, episode and frame.
        """
        # Updates are whole multiples of what all ranks take together, so this counts through u and m at once.
        start = self.first + (number * self.world + self.rank) * self.batch
        samples = [self._sample(k) for k in range(start, start + self.batch)]
        return collate(samples, self.reader.spec, self.reader.tokens.pad_token_id)

    def _sample(self, k: int) -> Sample:
        dataset, position = self.mixture[k]
        try:
            return self.reader.sample(k, dataset, position)
        except Exception as error:
            source = self.reader.sources[dataset]
            name = "{}, episode {}, frame {}".format(source, *source.frame(position))
            if name in str(error):  # a file that cannot be read has said it
                raise
            raise RuntimeError(
                f"{name}, sample {k} of the run, cannot be prepared ({type(error).__name__}: {error})"
            ) from error


def start_fork_server(sources: Sequence[Source]) -> None:
    """Begins to import in the background what workers need, some seconds ahead of the first loader."""
    from multiprocessing import forkserver

    modules = {"agent.data.loading.worker"}
    for source in sources:
        if source.store is None and source.metadata.video_keys:
            modules.add("torchcodec.decoders" if source.video_backend == "torchcodec" else "av")
        if source.store is None and set(source.metadata.camera_keys) - set(source.metadata.video_keys):
            modules.add("lerobot.datasets.io_utils")
    forkserver.set_forkserver_preload(sorted(modules))
    forkserver.ensure_running()


class TrainLoader(Iterator[Batch]):
    """An endless iterator over one rank's micro-batches.

    Micro-batch m of update u holds on rank r the samples k = u·G + m·B·W + r·B + j, j in range(B), for a global
    batch G, B samples per device and W ranks. So an update's samples do not depend on ranks, accumulation or
    workers, and starting at any update costs nothing. A run whose G was changed goes on with the sample after its last.

    Args:
        reader: reads a sample.
        mixture: which frame each sample is.
        global_batch: G.
        per_device_batch: B.
        rank: r.
        world: W.
        first_sample: k of the first sample of all ranks: as many as were trained on before.
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
        first_sample: int = 0,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin: bool = False,
    ) -> None:
        assert global_batch % (per_device_batch * world) == 0, "checked with the configuration"
        self._made = 0
        self._pin = pin
        self._make: _MicroBatches | None = _MicroBatches(reader, mixture, per_device_batch, rank, world, first_sample)
        self._pool: WorkerPool | None = None
        if num_workers:
            start_fork_server(reader.sources)
            for source in reader.sources:
                source.open()  # once here; workers take it over
            advice = (
                f"data.train.num_workers (now {num_workers}), data.train.prefetch_factor (now {prefetch_factor}) or "
                f"per_device_batch_size (now {per_device_batch})"
            )
            self._pool = WorkerPool(self._make, workers=num_workers, ahead=prefetch_factor, pin=pin, advice=advice)
            weakref.finalize(self, self._pool.close)

    def __next__(self) -> Batch:
        """The next micro-batch, in memory of its own.

        Raises:
            RuntimeError: if a sample cannot be read, naming data set, episode and frame, or a worker was killed.
        """
        if self._make is None:
            raise StopIteration
        if self._pool is not None:
            return self._pool.next()
        batch = self._make(self._made)
        self._made += 1
        return map_tensors(batch, lambda tensor: tensor.pin_memory()) if self._pin else batch

    def close(self) -> None:
        """Ends the workers; further batches are not to be had."""
        self._make = None
        if self._pool is not None:
            self._pool.close()


def validation_batches(
    reader: SampleReader, size: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator[ValidationBatch]:
    """One rank's part of a fixed set of validation samples: every ``world``-th batch, so that all together are the set.

    The set is evenly spaced over all validation frames and thus over their episodes; its ``sample_index`` counts
    from 0, and with it the draws. Which samples share a batch does not depend on the ranks: its size and padding show in
    the last digits of what is computed. All ranks get the same number of batches, because their passes can be collectives.
    One that is left with nothing gets the first sample, with the index -1: it does not count.

    Args:
        reader: of sources opened with the previous action.
        size: samples of the set over all ranks; all frames when there are fewer, or when 0.
        batch: samples per batch; the last may be smaller.
    """
    lengths = [len(source) for source in reader.sources]
    frames, starts = sum(lengths), np.cumsum([0, *lengths])
    size = min(size, frames) if size > 0 else frames
    begins = range(0, size, batch)
    mine = begins[rank::world]
    for turn in range(-(-len(begins) // world)):
        counts, samples = turn < len(mine), []
        for index in range(mine[turn], min(mine[turn] + batch, size)) if counts else [0]:
            pooled = (2 * index + 1) * frames // (2 * size)
            dataset = int(np.searchsorted(starts, pooled, side="right")) - 1
            samples.append(reader.sample(index, dataset, pooled - int(starts[dataset])))
        previous = [sample.previous_action for sample in samples if sample.previous_action is not None]
        assert len(previous) == len(samples), "validation sources are opened with the previous action"
        yield ValidationBatch(
            batch=collate(samples, reader.spec, reader.tokens.pad_token_id),
            index=np.asarray([sample.k if counts else -1 for sample in samples]),
            state=_padded([sample.raw_state for sample in samples]),
            actions=_padded([sample.raw_actions for sample in samples]),
            previous_action=_padded(previous),
            has_previous=np.asarray([not sample.previous_is_pad for sample in samples]),
        )


def _padded(values: Sequence[np.ndarray]) -> np.ndarray:
    """Stacked, with zeros behind where the last dimension is smaller."""
    widest = max(value.shape[-1] for value in values)
    return np.stack([pad_vector(value, widest) for value in values])
