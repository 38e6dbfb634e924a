"""Lets the processes of one run act as one: they add up and exchange values, and rank 0 acts or decides for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from agent.parallel.launch import Launch

T = TypeVar("T")


class Processes:
    """The process group. Collectives that carry decisions run on the CPU, so that they never wait for a GPU."""

    def __init__(self, launch: Launch, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.rank, self.world_size, self.device = launch.rank, launch.world_size, device
        self._control: dist.ProcessGroup | None = None
        if launch.under_torchrun:
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
        """Adds up elementwise over the processes, in float64."""
        if not self.distributed:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._control)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Returns every process's value, in the order of ranks, on every process."""
        if not self.distributed:
            return [value]
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
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def main_first(self, action: Callable[[], T]) -> T:
        """Runs ``action`` on rank 0, then on the others: for what fills a cache that the others read."""
        result = self.on_main(action)
        return cast(T, result) if self.is_main else action()

    def close(self) -> None:
        """Leaves the process group."""
        if self.distributed:
            dist.destroy_process_group()
            self._control = None
