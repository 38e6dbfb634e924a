"""The processes of one run: who am I, agreeing with the others, and stopping together."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

log = logging.getLogger(__name__)

BY_HAND = "Ctrl-C"
"""What a person's stop says, as the answer to SIGINT and in the stop file of slurms/common.sh; see :func:`by_hand`."""

_WRITTEN_WITHIN_S = 0.2
_ONE_PRESS_S = 0.5
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def by_hand(reason: str) -> bool:
    """Whether a person has stopped the run, which then waits for that person, and no queue takes it back."""
    return BY_HAND in reason


def lost_a_peer(error: Exception) -> bool:
    """Whether this is a collective's error because another process is gone, which then knows the reason."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process; read from the environment, no device touched."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    under_torchrun: bool = False


def read_launch() -> Launch:
    """This process's place among the others.

    Raises:
        ValueError: if only some of torchrun's variables are set.
    """
    # MASTER_ADDR and MASTER_PORT alone mean nothing: many cluster profiles export them.
    present = [name for name in _TORCHRUN_VARIABLES[:4] if name in os.environ]
    if not present:
        return Launch()
    missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(present)} set but {', '.join(missing)} not: that is half of a distributed environment. Start with "
            "`torchrun --standalone --nproc_per_node=N src/agent/run.py …`, or unset them to run one process"
        )
    rank, local_rank, world, local_world = (int(os.environ[name]) for name in _TORCHRUN_VARIABLES[:4])
    if world != local_world:
        raise ValueError(f"{world} processes on several nodes; one node is supported: --nnodes=1")
    return Launch(rank, local_rank, world, local_world, under_torchrun=True)


class Processes:
    """The process group. Collectives that carry decisions run on the CPU, so that they never wait for a GPU."""

    def __init__(self, launch: Launch, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.rank, self.world_size, self.device = launch.rank, launch.world_size, device
        self._control: Any = None
        if launch.under_torchrun:
            import torch.distributed as dist

            # Where torchrun keeps the store, it was there before its ranks: one that does not answer never will.
            kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            meeting = dist.rendezvous("env://", timeout=min(timeout, timedelta(minutes=1)) if kept else timeout)
            store, rank, world_size = next(meeting)
            store.set_timeout(timeout)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
            self._control = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """True when there is a process group, be it of one process."""
        return self._control is not None

    def any(self, flag: bool) -> bool:
        """True on every process if the flag is on any."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sums over the processes, in float64."""
        if not self.distributed:
            return values
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._control)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, on every process."""
        if not self.distributed:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Runs ``action`` on rank 0 alone and keeps the result there; its error reaches every process.

        So a failure on rank 0 ends all processes with the same message instead of leaving the others waiting.
        """
        result: T | None = None
        failure: Exception | None = None
        told: tuple[bool, str] | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as error:
                failure = error
                # The text travels, not the object: not every exception can be pickled.
                told = (isinstance(error, ValueError), str(error))
        told = self._from_main(told)
        if failure is not None:
            raise failure
        if told is not None:
            is_user_error, text = told
            raise ValueError(text) if is_user_error else RuntimeError(f"rank 0 failed: {text}")
        return result

    def main_decides(self, action: Callable[[], T]) -> T:
        """Runs ``action`` on rank 0 alone; its result, or its error, reaches every process."""
        return self._from_main(cast(T, self.on_main(action)))

    def _from_main(self, value: T) -> T:
        if not self.distributed:
            return value
        import torch.distributed as dist

        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def main_first(self, action: Callable[[], T]) -> T:
        """``action`` on rank 0, then on the others: for what fills a cache that the others read."""
        result = self.on_main(action)
        return cast(T, result) if self.is_main else action()

    def close(self) -> None:
        """Leaves the process group."""
        if self.distributed:
            import torch.distributed as dist

            dist.destroy_process_group()
            self._control = None


def choose_device(launch: Launch, wanted: str | None) -> torch.device:
    """The GPU of this process, or the CPU where there is none.

    Args:
        launch: this process's place.
        wanted: ``cpu``, ``cuda`` or None (a GPU if there is one), as in the model config's ``device``.

    Raises:
        ValueError: if a GPU is asked for and missing, or more processes than GPUs were started.
    """
    import torch

    if wanted not in (None, "cpu", "cuda"):
        raise ValueError(
            f"model_cfg.device: '{wanted}' is not supported; write cuda, cpu or null (the GPU if there is one)"
        )
    gpus = torch.cuda.device_count()
    if wanted is None and gpus == 0 and (given := _given_gpus()):
        log.warning(
            "CUDA_VISIBLE_DEVICES=%s gives this run GPUs, but PyTorch can use none of them, so it trains on the CPU: does "
            "`nvidia-smi` show them on this machine, with a driver that is not too old? Write model_cfg.device: cuda to "
            "have that refused, cpu if it is meant",
            given,
        )
    if wanted == "cpu" or (wanted is None and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise ValueError(
            "model_cfg.device is cuda, but no GPU is visible; write cpu or null, or check CUDA_VISIBLE_DEVICES"
        )
    if launch.local_world_size > gpus:
        raise ValueError(
            f"{launch.local_world_size} processes were started but {gpus} GPU{'s are' if gpus > 1 else ' is'} visible; "
            f"write --nproc_per_node={gpus}, or ask the cluster for more GPUs"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def _given_gpus() -> str:
    """What ``CUDA_VISIBLE_DEVICES`` says if it names a GPU; like CUDA we look at nothing behind an entry that is none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    return given if re.match(r"\d|GPU-|MIG-", given) else ""


def _text_of(stop_file: Path) -> str:
    """What it says; nothing where whoever made it has left it unreadable for this process."""
    try:
        text = stop_file.read_text(encoding="utf-8", errors="replace").strip()
        if not text:  # made with `touch`, or not yet written by who has just opened it
            time.sleep(_WRITTEN_WITHIN_S)
            text = stop_file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return text


def _say(line: str) -> None:
    # Not a print and no log line: a signal's handler may have interrupted one.
    begin = "\n" if os.isatty(2) else ""  # below the bar, or the ^C that the terminal shows
    os.write(2, f"{begin}{line}\n".encode())


def _leave(reason: str) -> None:
    _say(f"{reason}: nothing was started")
    os._exit(1)


class StopRequest:
    """Remembers that somebody asked this process to stop; the training loop looks at every update boundary.

    Somebody is a signal to this process, or a file: ``$VLA_STOP_FILE``, which the launching script writes, or ``stop``
    in the run folder, which anybody may. A file reaches a run through torchrun, containers and nodes, where a signal
    to torchrun would end it or never arrive.

    Args:
        speaks: whether this process answers Ctrl-C with a line; rank 0 does.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.reason = ""
        self.can_save = False
        """Whether the loop has begun. Before, there is nothing to save, and Ctrl-C ends the start at once."""
        self.leave: Callable[[str], None] = _leave
        """Ends this process at once, without saving; called with the reason, from a signal's handler or a thread."""
        self._speaks, self._pressed = speaks, 0.0
        self._files: list[Path] = []

    def watch_files(self, run_dir: Path) -> None:
        """Looks for stop files from now on; rank 0 does. One left in the run folder by an earlier attempt is removed."""
        own = run_dir / "stop"
        own.unlink(missing_ok=True)
        self._files = [own, *(Path(name) for name in [os.environ.get("VLA_STOP_FILE")] if name)]

    def pending(self) -> bool:
        """True once this process has been asked to stop."""
        for path in self._files:
            if not self.reason and os.path.exists(
                path
            ):  # not Path.exists, which raises what a bad moment of NFS brings
                self.reason = _text_of(path) or f"asked to by the file {path}"
        return bool(self.reason)

    def abandoned(self, reason: str) -> None:
        """Nobody waits for this process any more: it saves and stops, or leaves where there is nothing to save."""
        if self.can_save and not self._pressed:
            self.reason = self.reason or reason
            _say(f"{reason}: saving at the next update, and stopping")
        else:
            self.leave(reason)

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            self._on_interrupt()
        self.reason = self.reason or f"received {signal.Signals(number).name}"

    def _on_interrupt(self) -> None:
        now, first = time.monotonic(), not self._pressed
        if not first and now - self._pressed < _ONE_PRESS_S:
            return  # the terminal's and the launcher's, of one press
        self._pressed = self._pressed or now
        if not first or not self.can_save:
            self.leave(BY_HAND if first else f"{BY_HAND} twice")
        self.reason = BY_HAND
        if self._speaks:
            _say(f"{BY_HAND}: saving at the end of this update, and stopping; once more leaves at once")

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catches SIGTERM, SIGUSR1, SIGINT and SIGHUP while the context lasts; not what `nohup` has turned off."""
        wanted = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in wanted}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def reasons(self, processes: Processes) -> str:
        """Why, as all processes know it together; a collective, for when one of them is known to be asked."""
        return ", ".join(sorted({reason for reason in processes.gather(self.reason) if reason}))
