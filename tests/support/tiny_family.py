"""A second family of policies, as small as the contract allows: two linear layers from the state to a chunk of actions.

It sees no images, reads no instructions and draws nothing at random, and it has two losses. ``register()`` makes the type
``tiny`` known; ``run(module)`` in a fresh process starts one of the program's commands with it.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from agent.batch import Batch, Draws, Observation, SampleSpec, no_draws
from agent.models import lerobot_folder, registry
from agent.models.base import ModelConfig
from agent.models.common import memory
from agent.models.common.memory import Memory, Training, Unit
from agent.models.common.names import Layout, Match
from agent.models.family import Contents, Statistics
from agent.models.lerobot_config import TrainableConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from agent.models.policy import Policy


@dataclass
class TinyConfig(TrainableConfig):
    """The keys of every policy, and one more."""

    title: ClassVar[str] = "Tiny"
    positive: ClassVar[tuple[str, ...]] = (*TrainableConfig.positive, "hidden")

    hidden: int = 16
    """Numbers between the two layers."""


class TinyFamily:
    """See ``agent.models.family.Family``."""

    config = TinyConfig

    def policy(self, config: TinyConfig) -> Policy:
        return network()(config)

    def sample_spec(self, config: TinyConfig) -> SampleSpec:
        return SampleSpec(
            chunk_size=config.chunk_size,
            max_state_dim=config.max_state_dim,
            max_action_dim=config.max_action_dim,
            image_resolution=(config.image_resolution[0], config.image_resolution[1]),
            tokenizer_max_length=0,
            state_dim=config.state_dim,
            action_dim=config.action_dim,
            images=False,
        )

    def prompt(self, config: TinyConfig) -> None:
        return None

    def draws(self, config: TinyConfig, seed: int, purpose: str, per_sample: int = 1) -> Callable[[int], Draws]:
        if per_sample != 1:
            raise ValueError(f"flow_samples_per_observation: {config.title} draws nothing at random; write 1")
        return no_draws

    def flop_per_sample(
        self, config: TinyConfig, cameras_present: int, language_tokens: int | None = None, draws: int = 1
    ) -> float:
        # The first layer's input wants no gradient.
        return 4.0 * config.max_state_dim * config.hidden + 6.0 * config.hidden * width(config)

    def memory(self, config: TinyConfig, training: Training) -> Memory:
        shapes = (
            (config.hidden, config.max_state_dim),
            (config.hidden,),
            (width(config), config.hidden),
            (width(config),),
        )
        numbers = sum(memory.product_of(shape) for shape in shapes)
        kept = 4 * training.batch * (config.max_state_dim + 2 * config.hidden + 3 * width(config))
        return memory.predict([Unit(shapes, products=numbers, kept=kept, hand=kept)], training)

    @property
    def names(self) -> TinyNames:
        return TinyNames()

    @property
    def saved(self) -> TinySaved:
        return TinySaved()


def width(config: TinyConfig) -> int:
    """Numbers of a whole chunk of actions."""
    return config.chunk_size * config.max_action_dim


def network() -> type[Policy]:
    """The class of the network, whose definition needs torch."""
    import torch
    from torch import nn

    from agent.models.policy import Policy

    class Tiny(Policy):
        loss_weights: ClassVar[Mapping[str, float]] = {"squared": 1.0, "absolute": 0.5}

        def __init__(self, config: TinyConfig) -> None:
            super().__init__()
            self.config = config
            self.read = nn.Linear(config.max_state_dim, config.hidden)
            self.write = nn.Linear(config.hidden, width(config))

        def forward(self, batch: Batch) -> dict[str, Tensor]:
            error = self.sample_actions(batch.observation, batch.draws) - batch.actions.values
            real = (~batch.actions.is_pad[:, :, None] & batch.actions.dim_mask[:, None, :]).expand_as(error)
            mean = lambda values: values.masked_fill(~real, 0.0).sum((1, 2)) / real.sum((1, 2))  # noqa: E731
            return {"squared": mean(error.square()), "absolute": mean(error.abs())}

        def sample_actions(self, observation: Observation, draws: Draws) -> Tensor:
            hidden = torch.tanh(self.read(observation.state)).float()
            return self.write(hidden).float().unflatten(-1, (self.config.chunk_size, self.config.max_action_dim))

        def frozen_parameters(self) -> dict[str, str]:
            return {}

        def wrap_units(self) -> list[nn.Module]:
            return [self.read, self.write]

        def init_weights(self, generator: torch.Generator) -> None:
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.1, generator=generator)

    return Tiny


LAYOUT = Layout("this test's own", [("", "model.")])


class TinyNames:
    """See ``agent.models.family.TensorNames``."""

    def shapes(self, config: TinyConfig) -> dict[str, tuple[int, ...]]:
        import torch

        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in network()(config).state_dict().items()}

    def from_policy(self, names: Iterable[str], config: TinyConfig) -> Match:
        known, names = self.shapes(config), list(names)
        sources = {ours: name for name in names if (ours := LAYOUT.ours(name)) in known}
        return Match(LAYOUT, sources, {}, [name for name in names if name not in sources.values()])

    def from_base(self, key: str, names: Iterable[str], config: TinyConfig) -> Match:
        raise AssertionError("there is no such key")

    def fit(self, name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
        return None


class TinySaved:
    """See ``agent.models.family.SavedForm``."""

    formats: Mapping[str, str] = {"lerobot": "a folder like LeRobot's"}
    prompt_steps: Mapping[str, Callable[[str], str]] = {}
    paper = "https://example.org/tiny"

    def pretrained_contents(
        self,
        config: TinyConfig,
        tensors: dict[str, Tensor],
        statistics: Statistics,
        last_update: int,
        robots: dict[str, Any] | None = None,
        names: dict[str, list[str]] | None = None,
    ) -> tuple[dict[str, dict[str, Tensor]], Callable[[Path], None]]:
        published = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return lerobot_folder.pretrained_contents(config, published, None, statistics, last_update, robots, names)

    def read_statistics(self, files: Sequence[Path], config: TinyConfig) -> dict[str, dict[str, np.ndarray]]:
        found = lerobot_folder.statistics_of_processors(files[0].parent)
        assert found is not None
        return found

    def export(
        self,
        target: str,
        config: TinyConfig,
        written: dict[str, Any],
        statistics: Statistics | None,
        dtype: torch.dtype,
        asset: str,
    ) -> Contents:
        names = {f"model.{name}": name for name in TinyNames().shapes(config)}
        return Contents(names, documents={"config.json": written})

    def usage(self, target: str, location: str, model: Mapping[str, Any]) -> str:
        return f"Load `{location}` with this test."


def register() -> None:
    """Makes the type ``tiny`` known in this process."""
    registry.register("tiny", TinyFamily())


def known() -> Iterator[None]:
    """What a fixture does around tests that need the type; the others of the process must not meet it."""
    register()
    yield
    ModelConfig.get_known_choices().pop("tiny")
    registry._FAMILIES.pop("tiny")


def command(module: str, *arguments: str) -> list[str]:
    """A command of this program, ``agent.export`` for example, in a process that knows the family."""
    program = f"from support.tiny_family import run; run({module!r})"
    return [sys.executable, "-c", program, *arguments]


def run(module: str) -> None:
    """Runs a module as ``python -m`` does, with the arguments of this process."""
    register()
    sys.argv[0] = module
    runpy.run_module(module, run_name="__main__", alter_sys=True)
