"""Defines the interface that every type of policy implements: one ``Family`` object per ``"type"`` of a model JSON.

Only ``agent.models.registry`` imports a family's folder; all other code gets the object from
``agent.models.registry.family(config)`` and calls the methods below. Importing a family imports no torch: the methods that
need torch import it when they are called. ``docs/adding_a_policy.md`` shows how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from agent.models.lerobot_config import TrainableConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from agent.batch import Draws, Prompt, SampleSpec
    from agent.models.common.memory import Memory, Training
    from agent.models.common.names import Match
    from agent.models.policy import Policy

C = TypeVar("C", bound=TrainableConfig, contravariant=True)
Statistics = Mapping[str, Mapping[str, "np.ndarray"]]
"""Maps feature (``state`` or ``observation.state``, ``action``) → statistic (``mean``, ``q01``, …) → values (dims,)."""


class Family(Protocol[C]):
    """Describes one type of policy to the rest of the program.

    The object holds no state: every method takes the policy's config and depends on its arguments alone. The shape letters
    (B, T, A, …) are explained in ``agent.batch``.
    """

    @property
    def config(self) -> type[TrainableConfig]:
        """Returns the dataclass that the model JSON is decoded into."""

    def policy(self, config: C) -> Policy:
        """Builds the network, whose weights are not initialised yet.

        The caller fills them with ``Policy.init_weights`` or from a checkpoint. Under ``torch.device("meta")`` the network
        allocates no memory.
        """

    def sample_spec(self, config: C) -> SampleSpec:
        """Says which features, sizes and cameras the policy needs of a sample.

        Features that the config leaves open stay open (None or empty); the data set fills them in.
        """

    def prompt(self, config: C) -> Prompt | None:
        """Says how an instruction is turned into tokens; returns None for a policy that reads no instructions."""

    def draws(self, config: C, seed: int, purpose: str, per_sample: int = 1) -> Callable[[int], Draws]:
        """Makes the function that maps a sample's number k to the random numbers of its loss or its prediction.

        Args:
            config: the policy's config.
            seed: the run's seed.
            purpose: what the numbers are for (``train``, ``validation``, …); each purpose has an independent stream.
            per_sample: K, the draws per sample (the training YAML's ``flow_samples_per_observation``).

        Returns:
            A pure function of k. It can be pickled, because the data loader's workers call it. The fields of the ``Draws``
            that it returns are arrays or numbers of one sample; ``agent.batch.stack_draws`` makes tensors (B, …) of them.

        Raises:
            ValueError: if the policy supports only one draw per sample and ``per_sample`` is larger.
        """

    def flop_per_sample(
        self, config: C, cameras_present: int, language_tokens: int | None = None, draws: int = 1
    ) -> float:
        """Estimates the floating-point operations of one forward and backward pass on one sample.

        Activations that are recomputed in the backward pass are not counted. The estimate is for throughput figures and
        should lie within a tenth of what is measured.

        Args:
            config: the policy's config.
            cameras_present: number of cameras for which the sample has an image.
            language_tokens: L, tokens of the instruction without padding; None for ``tokenizer_max_length``.
            draws: K, the random draws per sample.
        """

    def memory(self, config: C, training: Training) -> Memory:
        """Predicts the GPU memory of one training process in bytes, without building the network.

        Raises:
            ValueError: if ``training`` has a value that the prediction does not know.
        """

    @property
    def names(self) -> TensorNames[C]:
        """Returns the mapping between the network's tensor names and those of published checkpoints."""

    @property
    def saved(self) -> SavedForm[C]:
        """Returns the object that knows how checkpoints and exports of this policy are written and read."""


class TensorNames(Protocol[C]):
    """Maps the network's tensor names to the names in published checkpoints.

    The network itself knows only its own names ("ours"); the names in a file are called "theirs".
    """

    def shapes(self, config: C) -> dict[str, tuple[int, ...]]:
        """Returns the name and shape of every tensor of the network, without allocating it."""

    def from_policy(self, names: Iterable[str], config: C) -> Match:
        """Assigns the tensor names of a checkpoint of this policy to the network's tensors.

        Args:
            names: every tensor name in the checkpoint's files, in any of the known formats.
            config: the policy's config.

        Returns:
            A ``Match``, which says for every name which of our tensors it fills, why it is left behind, or that it is unknown.
            It never raises for an unknown name: the caller reports all of them at once.
        """

    def from_base(self, key: str, names: Iterable[str], config: C) -> Match:
        """Assigns the tensor names of pretrained weights of a part of the network, such as its language model.

        Args:
            key: the config key, one of ``TrainableConfig.base_weights``, that names these weights.
            names: every tensor name in their files.
            config: the policy's config.

        Returns:
            A ``Match`` as from ``from_policy``, whose layout lists the tensors that these weights do not contain.
        """

    def fit(self, name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> tuple[bool, str] | None:
        """Decides what happens to a tensor whose shape in a file differs from its shape in the network.

        Args:
            name: our name of the tensor.
            theirs: its shape in the file.
            ours: its shape in the network.

        Returns:
            (True, rule) if the part that both shapes share is loaded, with the rule for the log; (False, advice) if it is
            refused, with what to write in the config instead; None if no rule covers these shapes, which is an error.
        """


class SavedForm(Protocol[C]):
    """Writes and reads what a checkpoint or an export holds beside the values of the weights.

    That is the names of the tensors, ``config.json``, the processors with the normalisation statistics, and the section
    of the model card that shows how to load an export.
    """

    @property
    def formats(self) -> Mapping[str, str]:
        """Maps each format that the policy can be exported to → the format's title on the model card."""

    @property
    def prompt_steps(self) -> Mapping[str, Callable[[str], str]]:
        """Maps the registered name of each LeRobot preprocessor step that only this policy has → the step's function.

        The function takes an instruction and returns the text after the step.
        """

    def pretrained_contents(
        self,
        config: C,
        tensors: dict[str, Tensor],
        statistics: Statistics,
        last_update: int,
        robots: dict[str, Any] | None = None,
        names: dict[str, list[str]] | None = None,
    ) -> tuple[dict[str, dict[str, Tensor]], Callable[[Path], None]]:
        """Collects the contents of ``pretrained_model/``, so that a background thread can write them.

        It renames the tensors and calls ``agent.models.lerobot_folder.pretrained_contents``, which explains the other
        arguments.

        Args:
            config: the policy's config, with its features filled in.
            tensors: the network's tensors under our names.
            statistics: the normalisation statistics, ``observation.state`` and ``action`` → statistic → (dims,).
            last_update: number of the run's last update.
            robots: the statistics of every robot, if there are several.
            names: feature → names of its dimensions, where they are known.

        Returns:
            File → tensors under published names, which are the network's own and not copies; and a function that writes all
            other files into a folder and may be called later, from any thread.
        """

    def read_statistics(self, files: Sequence[Path], config: C) -> dict[str, dict[str, np.ndarray]]:
        """Reads the normalisation statistics that come with a checkpoint, in any of the known formats.

        Args:
            files: the weight files, as ``agent.checkpoints.finding.find_weights`` returns them.
            config: the config of the policy that will normalise with the statistics.

        Returns:
            ``state`` and ``action`` → statistic → values (dims,) float32, in the data's own units.

        Raises:
            ValueError: if there are none, or if they describe other features, several robots, or another kind of actions.
        """

    def export(
        self,
        target: str,
        config: C,
        written: dict[str, Any],
        statistics: Statistics | None,
        dtype: torch.dtype,
        asset: str,
    ) -> Contents:
        """Collects the contents of an export, apart from the values of the weights and the model card.

        Args:
            target: the format, one of ``formats``.
            config: the checkpoint's config.
            written: the checkpoint's ``config.json`` as it was read.
            statistics: the statistics that its processors normalise with; None if it has none.
            dtype: the type of the exported weights.
            asset: the name under which the statistics are stored, in formats that store them under a name.

        Raises:
            ValueError: if the program that reads the format would silently compute something else, or if the format stores
                statistics and there are none.
        """

    def usage(self, target: str, location: str, model: Mapping[str, Any]) -> str:
        """Returns the model card's section on how to load an export, in Markdown.

        Args:
            target: the format, one of ``formats``.
            location: the export's hub id, or the name of its folder.
            model: the checkpoint's ``config.json``.
        """

    @property
    def paper(self) -> str:
        """Returns the URL of the policy's paper, for the model card."""


@dataclass(frozen=True)
class Contents:
    """Holds the contents of an export, apart from the values of the weights and the model card."""

    names: dict[str, str]
    """Maps each tensor's name in the exported ``model.safetensors`` → our name of the tensor that it holds."""
    further: dict[str, Tensor] = field(default_factory=dict)
    """Additional tensors of that file under their exported names; ``--save_dtype`` does not cast them."""
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Maps each JSON file's name, relative to the export's folder → its content."""
    notes: list[str] = field(default_factory=list)
    """What the user should know before loading the export, one sentence each."""
