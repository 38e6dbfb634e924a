"""Writes checkpoints in the background: threads copy the tensors to memory and bring the copy to the disk.

A save has two parts. In the first a thread of every process copies that process's share, which must be done before the
next step of the optimizer, writes it and syncs it. When all have ended, which the processes find out together at an
update boundary, rank 0 seals the checkpoint in a thread of its own: manifest, rename, ``last``, pruning. At the boundary
after that all of them learn the outcome. Threads touch files only: whatever the processes tell each other is told in the
main thread, so a process that dies is noticed there, as in every other collective.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent.checkpoints import tensor_file
from agent.checkpoints.host_snapshot import HostSnapshot, TensorFiles
from agent.checkpoints.store import CheckpointStore
from agent.parallel.processes import Processes

log = logging.getLogger(__name__)

_HEARTBEAT_S = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the same on every process."""

    step: int
    path: Path | None
    """The checkpoint; None if it was given up."""
    error: str | None
    """Why it was given up."""
    background_s: float
    """Seconds from the end of the stall to the end of the last thing done for it."""
    bytes: int


class CheckpointWriter:
    """Saves of all processes together; every method that is not private is called by all of them, in the same order."""

    def __init__(self, store: CheckpointStore, processes: Processes) -> None:
        self._store, self._processes = store, processes
        self._snapshot = HostSnapshot()
        self._flight: _Flight | None = None
        self._ended: deque[Outcome] = deque()

    def prepare(self, tensor_files: TensorFiles, shardable: set[str]) -> None:
        """Allocates the memory for saves of these tensors, which takes longer than a save; no collective."""
        self._snapshot.prepare(share(tensor_files, shardable, self._processes.world_size)[self._processes.rank])

    def save(
        self,
        step: int,
        tensor_files: TensorFiles,
        shardable: set[str],
        write_small: Callable[[Path], None],
        stored: Mapping[str, torch.dtype] | None = None,
    ) -> float:
        """Copies the tensors and starts to write them. How that ends, :meth:`poll` and :meth:`wait` tell.

        Args:
            step: optimizer updates done.
            tensor_files: path in the checkpoint → tensors, the same on every process. They must not change before
                :meth:`settle`.
            shardable: those of the files that may be split over the processes.
            write_small: called on rank 0, in the background, with the checkpoint's folder, for everything that is not
                tensors. It must hold values, not objects that training changes.
            stored: path of a file that is not split → the number type that its floating-point numbers are rounded to
                when they are written.

        Returns:
            The seconds that training waited, for the previous save too if it had not ended.
        """
        begin = time.perf_counter()
        while self._flight is not None:  # its outcome is for the next poll
            self._beat()
        shares = share(tensor_files, shardable, self._processes.world_size)
        stored = stored or {}
        assert not set(stored) & shardable
        needed = sum(tensor_file.file_size(some, stored.get(path)) for files in shares for path, some in files.items())
        begun: tuple[Path | None, str | None] = self._processes.main_decides(partial(self._begin, step, needed))
        folder, problem = begun
        if folder is None:
            self._ended.append(Outcome(step, None, problem, 0.0, 0))
        else:
            copies = self._snapshot.begin(shares[self._processes.rank], shares)
            small = write_small if self._processes.is_main else None
            cancel = threading.Event()
            job = _Job(partial(self._write_share, folder, copies, small, cancel, stored))
            self._flight = _Flight(step, time.perf_counter(), cancel, job)
        return time.perf_counter() - begin

    def settle(self) -> None:
        """Call it before the tensors of the last save change; no collective, and free when nothing was saved."""
        self._snapshot.settle()

    def poll(self) -> Outcome | None:
        """At every update boundary: how a save ended, once. Cheap while one is in flight, free when none is."""
        if not self._ended and self._flight is not None:
            self._advance(self._flight)
        return self._ended.popleft() if self._ended else None

    def wait(self) -> Outcome | None:
        """Like :meth:`poll`, and waits for the save that is in flight."""
        while not self._ended and self._flight is not None:
            self._beat()
        return self._ended.popleft() if self._ended else None

    def close(self) -> None:
        """Gives up what is in flight and frees the memory; no collective, so that it also works after a failure."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.cancel.set()
            if flight.job is not None:
                # A disk that hangs must not keep the process: the thread ends with it.
                flight.job.join(timeout=10)
                if flight.job.is_alive():
                    return
        self._snapshot.release()

    def _begin(self, step: int, needed: int) -> tuple[Path | None, str | None]:
        try:
            return self._store.begin(step, needed), None
        except OSError as error:
            return None, _describe(error)

    def _beat(self) -> None:
        # A collective every now and then, rather than one that waits until another process's disk is done: a process
        # that died, or one whose write failed, is noticed at once.
        assert self._flight is not None
        if self._flight.job is not None:
            self._flight.job.join(timeout=_HEARTBEAT_S)
        self._advance(self._flight)

    def _advance(self, flight: _Flight) -> None:
        ended = flight.job is not None and not flight.job.is_alive()
        failed = ended and flight.job is not None and flight.job.error is not None
        n_ended, n_failed = self._processes.sum([float(ended), float(failed)])
        if flight.sealing:
            if n_ended:
                self._ended.append(self._processes.main_decides(partial(self._outcome, flight)))
                self._flight = None
            return
        if n_failed:
            flight.cancel.set()  # what the others write is of no use
        if n_ended < self._processes.world_size:
            return
        assert flight.job is not None
        reports = self._processes.gather((flight.job.error, flight.job.cancelled, flight.job.result))
        flight.sealing = True
        flight.job = None
        if self._processes.is_main:
            flight.job = _Job(partial(self._seal, flight.step, reports))

    def _write_share(
        self,
        folder: Path,
        copies: TensorFiles,
        write_small: Callable[[Path], None] | None,
        cancel: threading.Event,
        stored: Mapping[str, torch.dtype],
    ) -> dict[str, tensor_file.Written]:
        self._snapshot.finish()
        if write_small is not None:
            write_small(folder)
        return {
            name: tensor_file.write(folder / name, tensors, cancel, stored.get(name))
            for name, tensors in copies.items()
        }

    def _seal(self, step: int, reports: list[tuple[str | None, bool, Any]]) -> tuple[Path, int]:
        errors = [
            f"rank {rank}: {error}" for rank, (error, cancelled, _) in enumerate(reports) if error and not cancelled
        ]
        if errors:
            self._store.abandon(step)
            raise _GivenUp("; ".join(errors))
        return self._store.finish(step, {name: file for _, _, written in reports for name, file in written.items()})

    def _outcome(self, flight: _Flight) -> Outcome:
        assert flight.job is not None
        path, size = flight.job.result or (None, 0)
        return Outcome(flight.step, path, flight.job.error, flight.job.ended_at - flight.begun_at, size)


@dataclass
class _Flight:
    """A save that has not ended."""

    step: int
    begun_at: float
    cancel: threading.Event
    job: _Job | None
    sealing: bool = False


class _GivenUp(Exception):
    """A checkpoint was given up for the reasons in the text."""


class _Job(threading.Thread):
    """Runs a function in the background and keeps its result, or its error as a text."""

    def __init__(self, action: Callable[[], Any]) -> None:
        # A daemon: a process that fails elsewhere ends without waiting for its checkpoint.
        super().__init__(name="checkpoint", daemon=True)
        self._action = action
        self.result: Any = None
        self.error: str | None = None
        self.cancelled = False
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        try:
            self.result = self._action()
        except tensor_file.Cancelled:
            self.error, self.cancelled = "given up", True
        except Exception as error:  # becomes the outcome, which the main thread gets
            self.error = _describe(error)
            if not isinstance(error, (OSError, _GivenUp)):
                log.exception("writing a checkpoint failed in a way that is not the disk's")
        self.ended_at = time.perf_counter()


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or repr(error)


def share(tensor_files: TensorFiles, shardable: set[str], world_size: int) -> list[TensorFiles]:
    """Which process writes what, so that all write about as many bytes.

    Files that may not be split are rank 0's. The others are split by tensors, the largest first, each to the process
    that has least so far, into ``<name>-00000-of-00002.safetensors`` …, or stay one file if one process gets it all.
    """
    assert shardable <= set(tensor_files)
    whole = {path: tensors for path, tensors in tensor_files.items() if path not in shardable}
    shares: list[TensorFiles] = [dict(whole), *({} for _ in range(world_size - 1))]
    load = [sum(tensor.nbytes for tensors in whole.values() for tensor in tensors.values()), *[0] * (world_size - 1)]
    for path in sorted(shardable):
        parts: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
        for name, tensor in sorted(tensor_files[path].items(), key=lambda item: (-item[1].nbytes, item[0])):
            rank = min(range(world_size), key=lambda rank: load[rank])
            parts[rank][name] = tensor
            load[rank] += tensor.nbytes
        writers = [rank for rank in range(world_size) if parts[rank]] or [0]
        for number, rank in enumerate(writers):
            stem = path.removesuffix(".safetensors")
            part = path if len(writers) == 1 else f"{stem}-{number:05d}-of-{len(writers):05d}.safetensors"
            shares[rank][part] = parts[rank]
    return shares
