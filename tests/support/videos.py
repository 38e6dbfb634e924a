"""What tests read of videos in other processes, which find no test module by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from agent.data.recorded.video import Moment, decode_frame


def moment(number: int, fps: int = 10, frames: int = 81) -> Moment:
    return Moment(number / fps, 1e-4, 1 / fps, 0.0, frames / fps)


@dataclass
class Picture:
    image: torch.Tensor


class Read:
    """Reads pictures in the workers of a pool."""

    def __init__(self, path: Path) -> None:
        self.order, self.path = np.random.default_rng(0).permutation(81), path

    def __call__(self, number: int) -> Picture:
        return Picture(decode_frame(self.path, moment(int(self.order[number])), "torchcodec"))
