"""Runs the processes that make batches ahead of their use.

The same workers make two kinds of batches. Those of training come without end and each worker makes them unasked, up to a
number that wait. Those of a validation are asked for by number, a few ahead, and come first: training pauses meanwhile, so
workers that would otherwise wait for it read for the validation, and fill up training's batches when nothing is asked. Each
kind has a pipe and memory of its own, a :class:`_Lane`, so that neither waits for room that the other takes up.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, reduction, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from agent.batch import Batch
from agent.data.loading.shared_batches import Description, create_memory, read, write

log = logging.getLogger(__name__)

_READY = 2  # batches that wait in the training process, besides those in the workers' slots
_FREE = b"."
_SERVER_GONE = 255  # multiprocessing's exit code of every worker when the fork server, which would know it, is gone


class Made(NamedTuple):
    """What a worker says of a batch that is in its next slot."""

    description: Description
    resident: int
    """Bytes of memory that the worker holds."""
    said: list[str]
    """What it would have written into the log meanwhile."""


class Failed(NamedTuple):
    """What a worker says of a batch that it could not make."""

    message: str
    trace: str


class WorkerTraceback(Exception):
    """Where in a worker an error occurred; the cause of the error that is raised here."""

    def __str__(self) -> str:
        return f'in a data worker\n"""\n{self.args[0]}"""'


@dataclass
class _Lane:
    """The way of one kind of batches from a worker."""

    pipe: Any
    memory: int | None = None
    """Descriptor of the file that its batches are in; the worker sends it first."""
    asked: int = 0
    received: int = 0


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    endless: _Lane
    on_demand: _Lane
    resident: int = 0


class WorkerPool:
    """Gives batches without end, made by processes that run ahead, and in between those that are asked for.

    Worker w of W makes the batches w, w + W, w + 2 W and so on, each into the next of its ``ahead`` slots, and waits
    when all are full. A thread of this process takes the batches out of the slots in their order, so that whoever wants
    the next one finds it ready. At most ``workers · ahead + 3`` batches exist at a time, besides those that were handed
    out, and during :meth:`asked` ``workers · ahead`` more. The memory is freed when the processes are gone, however they end.

    Args:
        make: batch number → batch; a pure function, which travels to the workers.
        askable: batches that can be asked for; travels to the workers too.
        workers: W.
        ahead: batches that each worker keeps ready.
        pin: whether batches are handed out in pinned memory.
        advice: what to lower when memory runs out, for messages.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        askable: Sequence[Any] = (),
        *,
        workers: int,
        ahead: int,
        pin: bool,
        advice: str,
    ) -> None:
        self._ahead, self._pin, self._advice = ahead, pin, advice
        self._gpu = _current_gpu() if pin else None
        self._kills_before = _kills_for_memory()
        self._told: set[str] = set()  # each worker may find the same
        self._closed = threading.Event()
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(_READY)
        self._workers: list[_Worker] = []
        self._askable = len(askable)
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._receive, name="data", daemon=True)
        # Also at the end of the process, before multiprocessing waits there for workers that heed no SIGTERM.
        self._finalizer = util.Finalize(None, self._end, exitpriority=100)
        context = get_context("forkserver")
        for number in range(workers):
            (ours, theirs), (our_side, their_side) = context.Pipe(), context.Pipe()
            arguments = (make, askable, number, workers, ahead, theirs, their_side)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            for end in (theirs, their_side):
                end.close()  # the worker alone has it: when it is gone, so is the connection
            self._workers.append(_Worker(number, process, _Lane(ours), _Lane(our_side)))
        self._thread.start()

    def next(self) -> Batch:
        """Returns the next batch.

        Raises:
            RuntimeError: if it could not be made, or a worker is gone; the workers are ended then.
        """
        assert not self._closed.is_set()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def asked(self) -> Iterator[Any]:
        """Gives all that can be asked for in its order, read ahead by the workers; it may be given up at any time.

        Raises:
            RuntimeError: if one could not be made, or a worker is gone; the workers are ended then.
        """
        assert not self._closed.is_set()
        lanes = [worker.on_demand for worker in self._workers]
        try:
            for worker in self._workers:
                while worker.on_demand.received < worker.on_demand.asked:
                    self._batch_of(worker, worker.on_demand)  # of an earlier call that was given up
            coming = 0
            for number in range(self._askable):
                while coming < min(number + len(lanes) * self._ahead, self._askable):
                    lane = lanes[coming % len(lanes)]
                    with suppress(ConnectionError):  # if it is gone, that is noticed when it is listened to
                        lane.pipe.send(coming)
                    lane.asked += 1
                    coming += 1
                worker = self._workers[number % len(lanes)]
                yield self._batch_of(worker, worker.on_demand)
            for lane in lanes:
                if lane.memory is not None:
                    os.ftruncate(lane.memory, 0)  # training needs the memory
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers at once: they hold nothing that would be lost."""
        self._finalizer()

    def _end(self) -> None:
        self._closed.set()
        for worker in self._workers:
            worker.process.kill()
        while self._thread.is_alive() and threading.current_thread() is not self._thread:
            with suppress(queue.Empty):
                self._ready.get(timeout=0.01)  # it may be waiting to put one in
        for worker in self._workers:
            worker.process.join()
            for lane in (worker.endless, worker.on_demand):
                lane.pipe.close()
                if lane.memory is not None:
                    os.close(lane.memory)

    # ---- the thread

    def _receive(self) -> None:
        try:
            if self._gpu is not None:
                import torch

                torch.cuda.set_device(self._gpu)  # of this thread; the default would be the first GPU
            for worker in itertools.cycle(self._workers):
                batch = self._batch_of(worker, worker.endless)
                with suppress(ConnectionError):  # if it is gone, that is noticed when it is listened to
                    worker.endless.pipe.send_bytes(_FREE)
                if self._closed.is_set():
                    return
                self._ready.put(batch)
        except BaseException as error:  # raised where the batch is asked for
            if not self._closed.is_set():
                self._ready.put(error)

    # ---- in the thread for training's, and in whichever asks for others

    def _batch_of(self, worker: _Worker, lane: _Lane) -> Any:
        """Waits for the next batch of a lane, and takes it out of its slot."""
        said = self._hear(worker, lane)
        if isinstance(said, Failed):
            raise RuntimeError(said.message) from WorkerTraceback(said.trace)
        assert lane.memory is not None
        batch = read(said.description, lane.memory, lane.received % self._ahead, self._pin)
        lane.received += 1
        worker.resident = said.resident
        for line in said.said:
            if line not in self._told:
                self._told.add(line)
                log.info(line)
        return batch

    def _hear(self, worker: _Worker, lane: _Lane) -> Made | Failed:
        """Waits for what a worker says next, and looks meanwhile whether all are alive."""
        sentinels = {other.process.sentinel: other for other in self._workers}
        while True:
            ready = connection.wait([lane.pipe, *sentinels])
            dead = [sentinels[key] for key in ready if isinstance(key, int)]
            if dead:
                raise RuntimeError(self._obituary(dead[0]))
            try:
                if lane.memory is not None:
                    return lane.pipe.recv()
                lane.memory = reduction.recv_handle(lane.pipe)
                os.set_inheritable(lane.memory, False)  # else programs that are started keep the memory
            except (EOFError, OSError):  # it has died just now
                raise RuntimeError(self._obituary(worker)) from None

    def _obituary(self, worker: _Worker) -> str:
        """Says why a worker is gone, and what to do."""
        who = f"number {worker.number} of {len(self._workers)}, process {worker.process.pid}"
        with self._looking:  # multiprocessing can be told an exit code once, and two threads may ask
            worker.process.join(timeout=10)
            code = worker.process.exitcode
        if code is None or (code >= 0 and code != _SERVER_GONE):
            return f"a data worker has ended ({who}, exit code {code}); what it printed before is in the log"
        how = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else ""
        if how and code != -signal.SIGKILL:
            return (
                f"a data worker has crashed ({who}, {how}): a fault of a library that it uses, or a file that was cut short "
                "while it was read; its stack is in the log"
            )
        kills = _kills_for_memory() - self._kills_before
        certain = f" ({kills} processes of this machine were, since the workers began)" if kills else ""
        sizes = [other.resident for other in self._workers]
        killed = f"a data worker was killed ({who}, {how})" if how else "the process that forks data workers was killed"
        return (
            f"{killed}, as the system does when the machine or the job runs out of memory{certain}. Worker {worker.number} "
            f"held {worker.resident / 1e9:.2f} GB, all of them {sum(sizes) / 1e9:.2f} GB, the training process "
            f"{_resident() / 1e9:.2f} GB. Ask for more memory (--mem), or lower {self._advice}"
        )


def _current_gpu() -> int:
    import torch

    return torch.cuda.current_device()


def _resident() -> int:
    """Returns the bytes of memory of this process, with what it shares."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _kills_for_memory() -> int:
    """Counts the processes that the kernel has killed for lack of memory since the machine was started, in all its groups."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


# ---- in a worker


def _work(
    make: Callable[[int], Batch], askable: Sequence[Any], number: int, workers: int, ahead: int, pipe: Any, orders: Any
) -> None:
    """Runs in a worker, from its first moment to its last."""
    from agent.data.loading import worker

    worker.settle()
    lines = _Lines()
    logging.getLogger("agent").addHandler(lines)
    logging.getLogger("agent").setLevel(logging.INFO)
    memory, others = create_memory(), create_memory()
    turn, answered, free = 0, 0, ahead
    try:
        for end, handle in ((pipe, memory), (orders, others)):
            reduction.send_handle(end, handle, 0)  # the receiver's process id, which only Windows needs
        while True:
            said = connection.wait([orders, pipe], timeout=0 if free else None)
            if orders in said:  # comes first, for training pauses until it is made
                wanted = orders.recv()
                orders.send(_made(askable.__getitem__, wanted, others, answered % ahead, lines))
                answered += 1
            elif pipe in said:
                pipe.recv_bytes()  # a slot is free
                free += 1
            else:
                pipe.send(_made(make, number + turn * workers, memory, turn % ahead, lines))
                turn, free = turn + 1, free - 1
    except (EOFError, ConnectionError):
        return  # the trainer has closed, or is gone


class _Lines(logging.Handler):
    """Keeps what is logged in a worker, whose log nobody reads, until the training process takes it."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(self.format(record))

    def taken(self) -> list[str]:
        kept, self._kept = self._kept, []
        return kept


def _made(make: Callable[[int], Any], number: int, memory: int, slot: int, lines: _Lines) -> Made | Failed:
    try:
        return Made(write(make(number), memory, slot), _resident(), lines.taken())
    except Exception as error:
        # Errors of the program have their type said; those that this program words itself need none.
        message = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
        return Failed(message, traceback.format_exc())
