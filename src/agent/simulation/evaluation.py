"""Evaluates one checkpoint: plays the episodes that its results lack, and keeps how each of them ended."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.checkpoints.manifest import Folder
from agent.simulation.configuration import MOST_STEPS, check_episodes
from agent.simulation.results import ResultsFolder
from agent.simulation.rollout import Actor, PolicyActor, check_policy, play
from agent.simulation.video import write_video

log = logging.getLogger(__name__)
DEFAULT_SEED = 1000
"""The seed with which lerobot-eval begins, too."""


@dataclass(frozen=True)
class Request:
    """The episodes that are to be played."""

    tasks: tuple[str, ...]
    episodes: int = 20
    seed: int = DEFAULT_SEED
    max_steps: int = MOST_STEPS
    videos: int = 0

    def check(self, known: Sequence[str]) -> None:
        """Raises ValueError for what cannot be played; ``known`` are Meta-World's tasks."""
        if not self.tasks:
            raise ValueError("--tasks names no task; write for example --tasks reach-v3,push-v3")
        if self.episodes < 1 or self.videos < 0 or self.seed < 0:
            raise ValueError(
                f"--episodes must be at least 1 (is {self.episodes}), --videos and --seed at least 0 (are {self.videos} "
                f"and {self.seed})"
            )
        if not 1 <= self.max_steps <= MOST_STEPS:
            raise ValueError(f"--max_steps must be 1 to {MOST_STEPS}, where Meta-World ends, not {self.max_steps}")
        check_episodes("--", self.tasks, self.episodes, self.seed, known)

    def video(self, task: str, episode: int, out: Path) -> Path | None:
        """The film of an episode in a folder of results; None if none is wanted."""
        return out / "videos" / f"{task}_{episode:03d}.mp4" if episode < self.videos else None


def digest_of(pretrained: Path) -> str:
    """Computes a fingerprint of weights, config and processors of a ``pretrained_model``."""
    digest = hashlib.blake2b(digest_size=16)
    for path in Folder(pretrained).matching("*"):
        if path.suffix in (".safetensors", ".json") and path.name != "train_config.json":
            with open(path, "rb") as stream:
                digest.update(f"{path.name}:".encode() + hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def evaluate(
    checkpoint: str,
    request: Request,
    out: Callable[[Path], Path],
    *,
    device: str | None = None,
    tokenizer: str | None = None,
    statistics: str | None = None,
) -> dict[str, Any]:
    """Plays what is missing and returns the summary, which ``results.json`` holds as well.

    Args:
        checkpoint: see ``agent.inference.load_policy``.
        request: checked already.
        out: ``pretrained_model`` → folder of the results.
        device: ``cpu`` or ``cuda``; by default the GPU if there is one.
        tokenizer: another one than the checkpoint names.
        statistics: of a policy of several robots, the one that Meta-World's is.

    Raises:
        ValueError: if the checkpoint does not fit, or the folder holds other results.
        RuntimeError: if a picture is blank.
    """
    import torch

    from agent.inference import load_policy

    # The number of threads changes how sums are rounded, and a robot's path after some steps.
    torch.set_num_threads(1)
    policy = load_policy(checkpoint, device=device, tokenizer=tokenizer, statistics=statistics)
    height, width = check_policy(policy)
    settings = {
        "checkpoint": digest_of(policy.pretrained),
        "seed": request.seed,
        "max_steps": request.max_steps,
        "action_steps": policy.action_steps,
        "resolution": [height, width],
        "device": policy.device.type,
        **({} if policy.robot is None else {"statistics": policy.robot}),
    }
    results = ResultsFolder(out(policy.pretrained), settings)
    try:
        play_missing(request, results, PolicyActor(policy, request.seed, policy.action_steps), height, width)
        return results.summarize(request.tasks, request.episodes)
    finally:
        results.close()


def play_missing(request: Request, results: ResultsFolder, actor: Actor, height: int, width: int) -> None:
    """Plays the episodes that the results lack, and those whose video is asked for and not there."""
    from agent.simulation.metaworld import PlainMetaworldEnv

    def video_of(task: str, episode: int) -> Path | None:
        path = request.video(task, episode, results.path)
        return None if path is None or (path.is_file() and (task, episode) in results.done) else path

    for task in request.tasks:
        plan = [(episode, video_of(task, episode)) for episode in range(request.episodes)]
        missing = [(e, video) for e, video in plan if video is not None or (task, e) not in results.done]
        log.info("%s: %d of %d episodes to play", task, len(missing), request.episodes)
        if not missing:
            continue
        environment = PlainMetaworldEnv(task, height, width)
        try:
            for episode, video in missing:
                played = play(
                    environment,
                    actor,
                    task,
                    episode,
                    seed=request.seed,
                    max_steps=request.max_steps,
                    keep_images=video is not None,
                )
                if video is not None:
                    write_video(video, played.images, environment.metadata["render_fps"])
                results.add(played.result)
                outcome = "success" if played.result.success else "no success"
                log.info("%s episode %d: %s after %d steps", task, episode, outcome, played.result.steps)
        finally:
            environment.close()
