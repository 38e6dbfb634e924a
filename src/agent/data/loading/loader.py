"""Puts samples together into batches: an endless iterator for training, and the validation set in a fixed order.

Both come through the same worker processes. They are idle while training pauses for a validation, so a second set of them
would cost memory and the time to begin, and gain nothing; how they share their time is in ``worker_pool.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from agent.batch import Batch, ValidationBatch, map_tensors
from agent.data.loading.worker_pool import WorkerPool
from agent.data.samples.mixture import Mixture
from agent.data.samples.reader import Sample, SampleReader, collate
from agent.data.samples.transforms import pad_vector
from agent.data.source import Source


@dataclass(frozen=True)
class Share:
    """Which part of the stream of samples one process trains on."""

    rank: int = 0
    """r, the process's number."""
    world: int = 1
    """W, the number of processes."""
    first_sample: int = 0
    """k of the first sample of all processes: as many as were trained on before."""


_EVERYTHING = Share()


@dataclass
class _MicroBatches:
    """Makes one rank's micro-batches by number, for ever."""

    reader: SampleReader
    mixture: Mixture
    batch: int
    share: Share

    def __call__(self, number: int) -> Batch:
        """Makes micro-batch ``number``.

        Raises:
            RuntimeError: if a sample cannot be read, naming data set, episode and frame.
        """
        # Updates are whole multiples of what all ranks take together, so this counts through u and m at once.
        start = self.share.first_sample + (number * self.share.world + self.share.rank) * self.batch
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


@dataclass(frozen=True)
class ValidationBatches(Sequence[ValidationBatch]):
    """One rank's part of a fixed set of validation samples: every ``world``-th batch, so that all ranks have the set.

    The set is evenly spaced over all validation frames and thus over their episodes; its ``sample_index`` counts
    from 0, and with it the draws. Which samples share a batch does not depend on the ranks: its size and padding show in
    the last digits of what is computed. All ranks have the same number of batches, because their passes can be
    collectives. One that is left with nothing gets the first sample, with the index -1: it does not count. A batch is made
    when it is asked for by its number, and depends on nothing else.
    """

    reader: SampleReader
    """Of sources opened with the previous action."""
    samples: int
    """Of the set over all ranks; all frames when there are fewer, or when 0."""
    batch: int
    """Samples per batch; the last may be smaller."""
    rank: int = 0
    world: int = 1

    @property
    def size(self) -> int:
        """Samples of the set over all ranks, as many as there are."""
        frames = sum(len(source) for source in self.reader.sources)
        return min(self.samples, frames) if self.samples > 0 else frames

    def __len__(self) -> int:
        return -(-self.size // (self.batch * self.world))

    def __getitem__(self, turn: int) -> ValidationBatch:  # type: ignore[override]
        """Makes a batch.

        Raises:
            IndexError: if there are not so many.
            RuntimeError: if a sample cannot be read, naming data set, episode and frame.
        """
        if not 0 <= turn < len(self):
            raise IndexError(f"{len(self)} validation batches, asked for {turn}")
        reader, size = self.reader, self.size
        starts = np.cumsum([0, *(len(source) for source in reader.sources)])
        begin = (turn * self.world + self.rank) * self.batch
        counts, samples = begin < size, []
        for index in range(begin, min(begin + self.batch, size)) if counts else [0]:
            pooled = (2 * index + 1) * int(starts[-1]) // (2 * size)
            dataset = int(np.searchsorted(starts, pooled, side="right")) - 1
            samples.append(reader.sample(index, dataset, pooled - int(starts[dataset])))
        previous = [sample.previous_action for sample in samples if sample.previous_action is not None]
        assert len(previous) == len(samples), "validation sources are opened with the previous action"
        return ValidationBatch(
            batch=collate(samples, reader.spec, reader.tokens.pad_token_id),
            index=np.asarray([sample.k if counts else -1 for sample in samples]),
            state=_padded([sample.raw_state for sample in samples]),
            actions=_padded([sample.raw_actions for sample in samples]),
            previous_action=_padded(previous),
            has_previous=np.asarray([not sample.previous_is_pad for sample in samples]),
        )


def _padded(values: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks arrays, with zeros behind where the last dimension is smaller."""
    widest = max(value.shape[-1] for value in values)
    return np.stack([pad_vector(value, widest) for value in values])


class TrainLoader(Iterator[Batch]):
    """Iterates over one rank's micro-batches without end.

    Micro-batch m of update u holds on rank r the samples k = u·G + m·B·W + r·B + j, j in range(B), for a global
    batch G, B samples per device and W ranks. So an update's samples do not depend on ranks, accumulation or
    workers, and starting at any update costs nothing. A run whose G was changed goes on with the sample after its last.

    Args:
        reader: reads a sample.
        mixture: which frame each sample is.
        per_device_batch: B.
        share: of which process, and from which sample on.
        validation: what :meth:`validation_batches` gives.
        num_workers: processes that read ahead; 0 reads in this one.
        prefetch_factor: micro-batches that each worker keeps ready.
        pin: whether batches are put into pinned memory, for copies to a GPU that overlap with computing.
    """

    def __init__(
        self,
        reader: SampleReader,
        mixture: Mixture,
        *,
        per_device_batch: int,
        share: Share = _EVERYTHING,
        validation: ValidationBatches | None = None,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin: bool = False,
    ) -> None:
        self._made = 0
        self._pin = pin
        self._validation: Sequence[ValidationBatch] = validation or ()
        self._make: _MicroBatches | None = _MicroBatches(reader, mixture, per_device_batch, share)
        self._pool: WorkerPool | None = None
        if num_workers:
            sources = [*reader.sources, *(validation.reader.sources if validation is not None else [])]
            start_fork_server(sources)
            for source in sources:
                source.open()  # once here; workers take it over
            advice = (
                f"data.train.num_workers (now {num_workers}), data.train.prefetch_factor (now {prefetch_factor}) or "
                f"per_device_batch_size (now {per_device_batch})"
            )
            self._pool = WorkerPool(
                self._make, self._validation, workers=num_workers, ahead=prefetch_factor, pin=pin, advice=advice
            )
            weakref.finalize(self, self._pool.close)

    def __next__(self) -> Batch:
        """Returns the next micro-batch, in memory of its own.

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

    def validation_batches(self) -> Iterator[ValidationBatch]:
        """Gives this rank's validation batches, the same ones at every call; training's batches stay where they are.

        Raises:
            RuntimeError: if a sample cannot be read, naming data set, episode and frame, or a worker was killed.
        """
        return iter(self._validation) if self._pool is None else self._pool.asked()

    def close(self) -> None:
        """Ends the workers; there are no further batches."""
        self._make = None
        if self._pool is not None:
            self._pool.close()
