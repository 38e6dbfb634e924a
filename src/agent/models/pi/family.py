"""Describes π0 to the rest of the program, by implementing the ``Family`` interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from agent.batch import Draws, Prompt, SampleSpec
from agent.models.flow_matching import FlowSampling
from agent.models.pi.configuration import PI0Config
from agent.models.pi.prompt import prompt

if TYPE_CHECKING:
    from agent.models.common.memory import Memory, Training
    from agent.models.family import SavedForm, TensorNames
    from agent.models.policy import Policy


class PI0Family:
    """Implements ``agent.models.family.Family``, which documents the methods."""

    config = PI0Config

    def policy(self, config: PI0Config) -> Policy:
        from agent.models.pi.model import PI0

        return PI0(config)

    def sample_spec(self, config: PI0Config) -> SampleSpec:
        return SampleSpec(
            chunk_size=config.chunk_size,
            max_state_dim=config.max_state_dim,
            max_action_dim=config.max_action_dim,
            image_resolution=(config.image_resolution[0], config.image_resolution[1]),
            tokenizer_max_length=config.tokenizer_max_length,
            camera_slots=tuple(config.camera_slots),
            state_dim=config.state_dim,
            action_dim=config.action_dim,
        )

    def prompt(self, config: PI0Config) -> Prompt:
        return prompt(config)

    def draws(self, config: PI0Config, seed: int, purpose: str, per_sample: int = 1) -> Callable[[int], Draws]:
        return FlowSampling(
            seed=seed,
            purpose=purpose,
            shape=(config.chunk_size, config.max_action_dim),
            beta=(config.time_sampling_beta_alpha, config.time_sampling_beta_beta),
            scale=config.time_sampling_scale,
            offset=config.time_sampling_offset,
            pairs=per_sample,
        )

    def flop_per_sample(
        self, config: PI0Config, cameras_present: int, language_tokens: int | None = None, draws: int = 1
    ) -> float:
        from agent.models.pi.accounting import flop_per_sample

        return flop_per_sample(config, cameras_present, language_tokens, draws)

    def memory(self, config: PI0Config, training: Training) -> Memory:
        from agent.models.pi.memory import predict

        return predict(config, training)

    @property
    def names(self) -> TensorNames[PI0Config]:
        from agent.models.pi import adapter

        return adapter

    @property
    def saved(self) -> SavedForm[PI0Config]:
        from agent.models.pi.saved import PI0Saved

        return PI0Saved()
