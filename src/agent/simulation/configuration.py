"""Defines the training config's ``eval_cfg``: which checkpoints are evaluated in simulation, and who starts that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from agent.spelling import nearest

MOST_STEPS = 500  # where Meta-World ends an episode
DEMONSTRATION_SEEDS = 100_000
"""The demonstrations were recorded with environment seeds from here on; evaluation uses lower ones."""


@cache
def known_tasks() -> list[str]:
    """Lists Meta-World's tasks from a file of LeRobot, because its module would import the simulator."""
    lerobot = find_spec("lerobot")
    assert lerobot is not None and lerobot.origin is not None
    file = Path(lerobot.origin).parent / "envs" / "metaworld_config.json"
    return list(json.loads(file.read_text(encoding="utf-8"))["TASK_DESCRIPTIONS"])


def check_episodes(option: str, tasks: Sequence[str], episodes: int, seed: int, known: Sequence[str]) -> None:
    """Refuses episodes that cannot be played.

    Args:
        option: what comes before the name of a setting in a message.
        tasks, episodes, seed: what is asked for.
        known: Meta-World's tasks.

    Raises:
        ValueError: if not, with what to write instead.
    """
    for task in tasks:
        if task not in known:
            near = nearest(task, known, cutoff=0.3)
            hint = f"; the nearest name is {near}" if near else ""
            raise ValueError(f"{option}tasks: Meta-World has no task {task!r}{hint}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"{option}tasks names a task twice; raise {option}episodes instead")
    if seed + episodes > DEMONSTRATION_SEEDS:
        raise ValueError(
            f"{option}seed {seed} with {episodes} episodes reaches {DEMONSTRATION_SEEDS}, from where on the "
            "demonstrations were recorded; write a lower one"
        )


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
    max_steps: int = MOST_STEPS
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
        if not 1 <= self.max_steps <= MOST_STEPS:
            raise ValueError(
                f"eval_cfg.max_steps must be 1 to {MOST_STEPS}, where Meta-World ends, got {self.max_steps}"
            )
        check_episodes("eval_cfg.", self.tasks, self.episodes, self.seed, known_tasks())

    def check(self, save_model_freq: int) -> None:
        """Raises ValueError if there will be no checkpoint to evaluate."""
        if self.every % save_model_freq:
            below = self.every // save_model_freq * save_model_freq
            nearest = " or ".join(str(n) for n in (below, below + save_model_freq) if n)
            raise ValueError(
                f"eval_cfg.every: {self.every} is not a multiple of save_model_freq ({save_model_freq}), so that there is "
                f"no checkpoint; write {nearest}"
            )
