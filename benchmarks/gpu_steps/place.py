"""Where a step runs and whom it tells what it found: the device, the sizes of a rehearsal, the file of results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """What a step is given."""

    step: str
    """Its number in the table and its name."""
    results: Path
    """Gets a JSON object a line."""
    work: Path
    """A folder that is empty at the beginning and removed at the end."""
    rehearsal: bool
    """Whether everything is tiny and on the CPU."""
    carried: Path
    """The folder of what travelled beside the repository; see scripts/gpu_wheels.sh."""

    @property
    def device(self) -> torch.device:
        """The one GPU, or the CPU of a rehearsal."""
        import torch

        return torch.device("cpu") if self.rehearsal else torch.device("cuda", 0)

    @property
    def gpu(self) -> bool:
        return not self.rehearsal

    def size(self, real: str) -> str:
        """Name of the model's size, which in a rehearsal is the smallest."""
        return "tiny" if self.rehearsal else real

    def tell(self, check: str, passed: bool | None, **values: Any) -> None:
        """Writes a line that is on the disk when this returns.

        Args:
            check: what was looked at.
            passed: whether it is as it should be; None for what is only measured.
            values: the numbers, as JSON has them.
        """
        line = {"step": self.step, "check": check, "passed": passed, **values}
        with open(self.results, "a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(f"{'FAILED' if passed is False else 'ok' if passed else '--'}  {check}  {values}", flush=True)

    def wait(self) -> None:
        """Until the device has done what was asked of it."""
        import torch

        if self.gpu:
            torch.cuda.synchronize()

    def timed(self, action: Callable[[], object]) -> float:
        """Seconds from here to the end of what the action starts."""
        self.wait()
        begin = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - begin

    def repeated(self, action: Callable[[], object], times: int) -> float:
        """Seconds of one of so many calls in a row, after two that warm up."""
        for _ in range(2):
            action()
        return self.timed(lambda: [action() for _ in range(times)]) / times


def away(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The distance of two tensors relative to the second, in float64 on the CPU."""
    a, b = (x.detach().cpu().double() for x in (ours, theirs))
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
