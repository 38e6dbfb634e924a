"""Registers the policies: maps the ``"type"`` of a model JSON to the ``Family`` object that describes the policy.

Importing this module registers the config classes and imports nothing heavy. A new policy is registered here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from agent.models.base import ModelConfig, Reading
from agent.models.family import Family
from agent.models.lerobot_config import TrainableConfig
from agent.models.pi.family import PI0Family

_FAMILIES: dict[str, Family[Any]] = {}


def register(kind: str, family: Family[Any]) -> None:
    """Registers a policy and its config class under a ``"type"``."""
    ModelConfig.register_subclass(kind)(family.config)
    _FAMILIES[kind] = family


register("pi0", PI0Family())


def family(config: TrainableConfig) -> Family[Any]:
    """Returns the family that a policy's config belongs to."""
    return _FAMILIES[config.type]


def families() -> dict[str, Family[Any]]:
    """Maps every type that can be trained → its family."""
    return dict(_FAMILIES)


def trainable() -> str:
    """Lists the types that can be trained, for messages."""
    return ", ".join(_FAMILIES)


@dataclass
class PlaceholderConfig(ModelConfig):
    """Describes a model that other tools run; its config loads here, so that the tools can share one file.

    Further keys of such a tool (INT-ACT has `device` and `use_amp`) are ignored. Nothing here would act on them, and every
    command that would have to refuses the file.
    """

    pretrained_path: str | None = None
    """Where its weights are published."""
    n_obs_steps: int = 1
    """Observations that it sees at once."""
    chunk_size: int = 1
    """Action steps that it predicts at once."""
    n_action_steps: int = 1
    """Action steps that are executed."""
    input_features: dict[str, Any] = field(default_factory=dict)
    """Its inputs."""
    output_features: dict[str, Any] = field(default_factory=dict)
    """Its outputs."""

    @classmethod
    def read(cls, values: dict[str, Any]) -> Reading:
        """Keeps the keys that are known here, see ``ModelConfig``; the other tool alone reads its own keys."""
        known = {"type", *(f.name for f in fields(cls))}
        return Reading({key: value for key, value in values.items() if key in known})

    def cannot_train(self) -> str:
        """Returns the error message for a user who tries to train it."""
        return f"model type '{self.type}' is a placeholder, its config loads but it cannot be trained; trainable: {trainable()}"


@ModelConfig.register_subclass("magma")
@dataclass
class MagmaConfig(PlaceholderConfig):
    """Loads the config of Magma."""


@ModelConfig.register_subclass("spatial-vla")
@dataclass
class SpatialVLAConfig(PlaceholderConfig):
    """Loads the config of SpatialVLA."""


@ModelConfig.register_subclass("octo")
@dataclass
class OctoConfig(PlaceholderConfig):
    """Loads the config of Octo."""
