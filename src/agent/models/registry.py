"""Which models there are: ``"type"`` of the model JSON → config, builder and adapter.

Importing this module registers the config classes and nothing heavier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from types import ModuleType
from typing import Any

from agent.models.base import ModelConfig, Reading
from agent.models.pi import configuration as _pi0  # noqa: F401  (registers "pi0")

# type → package that holds model.py, adapter.py and pretrained.py; name of the policy's class
_IMPLEMENTATIONS = {"pi0": ("agent.models.pi", "PI0")}


@dataclass
class PlaceholderConfig(ModelConfig):
    """A model that other tools of this family run; its config loads, so that they can share the file.

    What else such a tool has in its file (INT-ACT: `device`, `use_amp`) is its own business and is passed over: nothing
    here would obey it, and the file is refused where it would have to.
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
        """See ``ModelConfig``. Only what is known here; a tool's own keys are read by that tool alone."""
        known = {"type", *(f.name for f in fields(cls))}
        return Reading({key: value for key, value in values.items() if key in known})

    def cannot_train(self) -> str:
        """One line for the user who tries."""
        return f"model type '{self.type}' is a placeholder, its config loads but it cannot be trained; trainable: {trainable()}"


@ModelConfig.register_subclass("magma")
@dataclass
class MagmaConfig(PlaceholderConfig):
    """Magma."""


@ModelConfig.register_subclass("spatial-vla")
@dataclass
class SpatialVLAConfig(PlaceholderConfig):
    """SpatialVLA."""


@ModelConfig.register_subclass("octo")
@dataclass
class OctoConfig(PlaceholderConfig):
    """Octo."""


def trainable() -> str:
    """The types that can be trained, as a text."""
    return ", ".join(_IMPLEMENTATIONS)


def policy_class(config: ModelConfig) -> Callable[[Any], Any]:
    """The class whose instances are the policy; takes the config."""
    package, name = _IMPLEMENTATIONS[config.type]
    return getattr(import_module(f"{package}.model"), name)


def adapter(config: ModelConfig) -> ModuleType:
    """The module that maps this model's tensor names to those of published checkpoints."""
    return import_module(f"{_IMPLEMENTATIONS[config.type][0]}.adapter")


def pretrained_contents(config: ModelConfig) -> Callable[..., Any]:
    """``contents(config, tensors, statistics, last_update)``: as published: tensor files, and a writer of the rest."""
    return import_module(f"{_IMPLEMENTATIONS[config.type][0]}.pretrained").pretrained_contents


def accounting(config: ModelConfig) -> ModuleType:
    """The module with ``flop_per_sample(config, cameras_present, language_tokens, draws)``, forward and backward."""
    return import_module(f"{_IMPLEMENTATIONS[config.type][0]}.accounting")


def memory(config: ModelConfig) -> ModuleType:
    """The module with ``Training(batch, cameras, …)`` and ``predict(config, training)``: bytes of a training step."""
    return import_module(f"{_IMPLEMENTATIONS[config.type][0]}.memory")


def deployment(config: ModelConfig) -> ModuleType:
    """The module with ``robots_of(pretrained)`` and ``deployment(pretrained, config, written, robot)``: a checkpoint of
    several robots for one of them; ``dimension_names(pretrained)``; and ``saved_statistics(pretrained, config)``: what it
    normalises with."""
    return import_module(f"{_IMPLEMENTATIONS[config.type][0]}.deployment")
