"""Plays episodes: a policy acts in a simulated environment, with the same outcome in any order of the episodes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from agent.simulation.results import EpisodeResult

if TYPE_CHECKING:
    from agent.inference import LoadedPolicy
    from agent.simulation.metaworld import PlainMetaworldEnv

CAMERA, STATE = "observation.image", "observation.state"
STATE_DIM, ACTION_DIM = 4, 4


class Actor(Protocol):
    """Anything that acts in an episode: a policy of this project, or another one for comparison."""

    def begin(self, task: str, episode: int) -> None:
        """Called when a new episode begins."""

    def act(self, observation: Mapping[str, Any], step: int) -> np.ndarray:
        """Chooses the action (4,) for an observation with ``observation.image``, ``observation.state`` and ``task``."""


class PolicyActor:
    """An actor with a saved policy; the noise of a prediction is a function of (seed, task, episode, step) alone.

    Args:
        policy: of ``agent.inference.load_policy``.
        seed: of the evaluation.
        action_steps: actions of a chunk to execute before the next prediction.
    """

    def __init__(self, policy: LoadedPolicy, seed: int, action_steps: int) -> None:
        self._policy, self._seed, self._action_steps = policy, seed, action_steps
        self.begin("", 0)

    def begin(self, task: str, episode: int) -> None:
        self._purpose = f"simulation/{task}/{episode}"
        self._chunk: list[np.ndarray] = []

    def act(self, observation: Mapping[str, Any], step: int) -> np.ndarray:
        if not self._chunk:
            # One observation at a time: in a batch rounding would depend on the others, and episodes on their number.
            (actions,) = self._policy.act([observation], [self._policy.draws(self._seed, self._purpose, step)])
            self._chunk = list(actions[: self._action_steps])
        return self._chunk.pop(0)


def check_policy(policy: LoadedPolicy) -> tuple[int, int]:
    """Refuses a policy that cannot act in Meta-World; returns height and width of the pictures that it was trained on.

    Raises:
        ValueError: says what the environment has and what the policy wants.
    """
    problems = []
    if list(policy.cameras) != [CAMERA]:
        problems.append(
            f"cameras: the environment has {CAMERA}, the policy wants {', '.join(policy.cameras) or 'none'}"
        )
    for key, has, wants in ((STATE, STATE_DIM, policy.state_dim), ("action", ACTION_DIM, policy.action_dim)):
        if has != wants:
            problems.append(f"{key}: the environment's has {has} dimensions, the policy's {wants}")
    if problems:
        raise ValueError(
            f"--checkpoint: {policy.pretrained} does not fit Meta-World: {'; '.join(problems)}. Train on data recorded there "
            f"(docs/simulation.md), with `cameras: {{{CAMERA}: KEY}}` in the data set's entry if its camera has another key"
        )
    _, height, width = policy.cameras[CAMERA]
    return height, width


@dataclass
class Episode:
    """An episode that was played."""

    result: EpisodeResult
    images: list[np.ndarray]
    """What the policy saw, (H, W, 3) uint8 each; empty unless asked for."""


def play(
    environment: PlainMetaworldEnv,
    actor: Actor,
    task: str,
    episode: int,
    *,
    seed: int,
    max_steps: int,
    keep_images: bool,
) -> Episode:
    """Plays one episode until it succeeds or ``max_steps`` are over.

    Args:
        environment: of the task.
        actor: chooses the actions, which are clipped to [-1, 1].
        task: Meta-World's name of it.
        episode: its number; the environment's seed is ``seed + episode``.
        seed: of the evaluation.
        max_steps: at most 500.
        keep_images: for a video.

    Raises:
        RuntimeError: if a picture is blank.
    """
    begin = time.monotonic()
    environment_seed = seed + episode
    observation, _ = environment.reset(seed=environment_seed)
    actor.begin(task, episode)
    images, reward_sum, success, step = [], 0.0, False, 0
    for step in range(max_steps):
        if keep_images:
            images.append(observation["pixels"])
        seen = {
            CAMERA: observation["pixels"],
            STATE: observation["agent_pos"].astype(np.float32),
            "task": environment.task_description,
        }
        action = np.clip(actor.act(seen, step), -1.0, 1.0).astype(np.float32)
        observation, reward, _, _, info = environment.step(action)
        reward_sum += float(reward)
        success = bool(info["is_success"])
        if success:
            break
    if keep_images:
        images.append(observation["pixels"])
    result = EpisodeResult(
        task, episode, environment_seed, success, step + 1, reward_sum, round(time.monotonic() - begin, 2)
    )
    return Episode(result, images)
