"""The training config's ``eval_cfg``: which checkpoints are evaluated in simulation, and who starts that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SimulationConfig:
    """Evaluation of a run's checkpoints in Meta-World, by a process of its own."""

    tasks: list[str] = field(default_factory=list)
    """Meta-World's names of the tasks, such as `reach-v3`."""
    episodes: int = 20
    """Episodes per task."""
    every: int = 1000
    """Updates between the checkpoints that are evaluated, a multiple of `save_model_freq`; the last one always is."""
    seed: int = 1000
    """Of the noise; episode e starts from seed + e."""
    max_steps: int = 500
    """Steps of an episode that does not succeed."""
    videos: int = 0
    """Episodes per task that are filmed."""
    start: Literal["by_hand", "process", "sbatch"] = "by_hand"
    """Who starts it: you, with `script`; the training, beside itself on the same machine, without a GPU and with the
    lowest priority; or the training as a SLURM job of its own. Training goes on whatever becomes of it."""
    script: str = "slurms/eval_scripts/pi0_metaworld.sh"
    """What is started, with the run folder as its argument."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("eval_cfg.tasks is empty; write for example [reach-v3], or leave eval_cfg out")
        for key, least in (("episodes", 1), ("every", 1), ("seed", 0), ("videos", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"eval_cfg.{key} must be at least {least}, got {getattr(self, key)}")
        if not 1 <= self.max_steps <= 500:
            raise ValueError(f"eval_cfg.max_steps must be 1 to 500, where Meta-World ends, got {self.max_steps}")

    def check(self, save_model_freq: int) -> None:
        """Raises ValueError if there will be no checkpoint to evaluate."""
        if self.every % save_model_freq:
            below = self.every // save_model_freq * save_model_freq
            nearest = " or ".join(str(n) for n in (below, below + save_model_freq) if n)
            raise ValueError(
                f"eval_cfg.every: {self.every} is not a multiple of save_model_freq ({save_model_freq}), so that there is "
                f"no checkpoint; write {nearest}"
            )
