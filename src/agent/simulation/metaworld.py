"""Wraps LeRobot's Meta-World environment, so that it renders as the demonstrations do and follows from its seed.

Importing this module registers ``metaworld_plain`` with LeRobot's own tools, too::

    lerobot-eval --env.type=metaworld_plain --env.task=reach-v3 --env.discover_packages_path=agent.simulation …
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.configs import MetaworldEnv as MetaworldConfig
from lerobot.envs.metaworld import TASK_DESCRIPTIONS, MetaworldEnv

from agent.simulation.rendering import Camera, settle

__all__ = ["TASK_DESCRIPTIONS", "PlainMetaworldConfig", "PlainMetaworldEnv"]


class PlainMetaworldEnv(MetaworldEnv):
    """LeRobot's environment without shadows, at any size, once per step rendered.

    Args:
        task: Meta-World's name, such as ``reach-v3``.
        height, width: of the picture.
    """

    def __init__(self, task: str, height: int = 128, width: int = 128) -> None:
        super().__init__(task, obs_type="pixels_agent_pos", observation_height=height, observation_width=width)
        self._camera: Camera | None = None

    def _ensure_env(self) -> None:
        if self._env is None:
            super()._ensure_env()
            self._camera = Camera(self._env, self.observation_height, self.observation_width)

    def render(self) -> np.ndarray:
        """Renders the picture (H, W, 3) uint8."""
        self._ensure_env()
        assert self._camera is not None
        return self._camera.image()

    def _format_raw_obs(self, raw_obs: np.ndarray) -> dict[str, Any]:
        return {"pixels": self.render(), "agent_pos": np.asarray(raw_obs[:4])}

    def reset(self, seed: int | None = None, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begins an episode, which depends on the seed alone and not on what was simulated before.

        Meta-World first lets the arm come to rest, and only then moves goal and objects: the arm rests beside those of
        the draw before. The second reset finds those of its own seed.
        """
        _, info = super().reset(seed=seed, **kwargs)
        if seed is not None:
            super().reset(seed=seed, **kwargs)
        return self._format_raw_obs(settle(self._env)), info

    def close(self) -> None:
        """Frees the GL context and the simulation."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None
        self._env = None


@EnvConfig.register_subclass("metaworld_plain")
@dataclass
class PlainMetaworldConfig(MetaworldConfig):
    """Offers the environment to LeRobot's tools, one for each task of ``task``, which are separated by commas."""

    task: str = "reach-v3"
    height: int = 128
    width: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.features["pixels/top"] = PolicyFeature(type=FeatureType.VISUAL, shape=(self.height, self.width, 3))

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """Makes the environments: task → {0: vector environment}."""
        vector = gymnasium.vector.AsyncVectorEnv if use_async_envs and n_envs > 1 else gymnasium.vector.SyncVectorEnv
        tasks = [task.strip() for task in self.task.split(",")]

        def factory(task: str) -> Any:
            return lambda: PlainMetaworldEnv(task, self.height, self.width)

        return {task: {0: vector([factory(task) for _ in range(n_envs)])} for task in tasks}
