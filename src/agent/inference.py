"""Loads a saved policy from its checkpoint and lets it act: observations in, actions in physical units out.

Everything that the policy needs besides its weights comes from the processors that were saved with it: the tokenizer, the
statistics and their normalisation, and relative actions. The policy's ``Family`` provides the network and its draws::

    policy = load_policy("runs/pi0_demo")
    observation = {camera: image for camera in policy.cameras} | {"observation.state": state, "task": "Press a button"}
    (actions,) = policy.act([observation], [policy.draws(seed=0, purpose="robot", k=0)])

Scripts, the policy server and the evaluation in simulation all use this module, so that a policy acts alike in them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from agent.batch import Draws, Observation, stack_draws, to_device
from agent.deployment.instructions import InstructionTokens, NoTokens, load_instruction_tokens
from agent.deployment.observations import TASK, channels_first, check_observation, is_empty
from agent.deployment.processors import ACTION, STATE, Processors, read_processors
from agent.models import registry
from agent.models.lerobot_config import TrainableConfig

if TYPE_CHECKING:
    import torch

    from agent.deployment.saved_checkpoint import Source
    from agent.models.policy import Policy

log = logging.getLogger(__name__)


class LoadedPolicy:
    """Holds a policy with its processors; :func:`load_policy` makes it."""

    def __init__(
        self,
        policy: Policy,
        config: TrainableConfig,
        processors: Processors,
        tokens: InstructionTokens | NoTokens,
        device: torch.device,
        source: Source,
        robot: str | None,
        names: Mapping[str, list[str]] | None = None,
    ) -> None:
        self._policy, self._processors, self._tokens = policy, processors, tokens
        self._family = registry.family(config)
        self._spec = self._family.sample_spec(config)
        self.config = config
        """The model's config, as it was saved."""
        self.device = device
        self.pretrained = source.pretrained
        """The folder that it was loaded from."""
        step = "" if source.step is None else f", update {source.step}"
        self.name = f"{source.name}{step}{', averaged weights' if source.averaged else ''}"
        """A name for messages: the run or folder, the update, and whether the weights are averaged."""
        self.robot = robot
        """The robot that it acts on, if it was trained on several robots with statistics of each; else None."""
        self.dimension_names = dict(names or {})
        """Maps ``observation.state`` and ``action`` → names of their dimensions, where the training data had them."""

    @property
    def cameras(self) -> dict[str, tuple[int, ...]]:
        """Maps each camera that an observation must name → the shape (3, H, W) of its images in training."""
        features = self.config.input_features or {}
        return {slot: tuple(features[slot].shape) for slot in self._spec.camera_slots if not is_empty(slot)}

    @property
    def renamed(self) -> dict[str, str]:
        """Maps other names that the policy's saved processors accept for its keys → the policy's own keys."""
        return dict(self._processors.renamed)

    @property
    def state_dim(self) -> int:
        """Returns s, the dimensions of ``observation.state``."""
        return cast("int", self.config.state_dim)

    @property
    def action_dim(self) -> int:
        """Returns a, the dimensions of an action."""
        return cast("int", self.config.action_dim)

    @property
    def chunk_size(self) -> int:
        """Returns T, the number of actions that are predicted at once."""
        return self.config.chunk_size

    @property
    def action_steps(self) -> int:
        """Returns how many actions of a chunk should be executed before the next prediction."""
        return self.config.action_steps

    def draws(self, seed: int, purpose: str, k: int) -> Draws:
        """Draws the random numbers of prediction number ``k``, such as flow matching's initial noise (T, A).

        The result is a function of the arguments alone; every purpose has an independent stream.
        """
        return self._family.draws(self.config, seed, purpose)(k)

    noise = draws
    """The older name of ``draws``."""

    def check(self, observation: Mapping[str, Any]) -> None:
        """Checks that an observation has what the policy expects.

        Raises:
            ValueError: if it does not; the message names the key, what it holds and what is expected.
        """
        observation = self._renamed(observation)
        check_observation(observation, self._spec.camera_slots, self.state_dim)
        self._tokens(observation[TASK])

    def act(self, observations: Sequence[Mapping[str, Any]], draws: Sequence[Draws | np.ndarray]) -> list[np.ndarray]:
        """Predicts an action chunk for each observation of a batch.

        A chunk does not depend on the other observations in the batch, up to floating-point rounding.

        Args:
            observations: each has every camera of ``cameras`` as uint8 (H, W, 3) or (3, H, W) of any size, or None where the
                robot lacks it; ``observation.state`` (s,) in physical units; and ``task``, the instruction.
            draws: the random numbers of each, from :meth:`draws`; or, of a policy whose draws have a ``noise``, that alone,
                (T, A) float32.

        Returns:
            For each observation, absolute actions (T, a) float32 in physical units.

        Raises:
            ValueError: if an observation does not fit, see :meth:`check`.
            RuntimeError: if the policy's actions are not finite.
        """
        answers = self.act_each(observations, draws)
        for answer in answers:
            if isinstance(answer, RuntimeError):
                raise answer
        return [answer for answer in answers if isinstance(answer, np.ndarray)]

    def act_each(
        self, observations: Sequence[Mapping[str, Any]], draws: Sequence[Draws | np.ndarray]
    ) -> list[np.ndarray | RuntimeError]:
        """Returns for each observation what :meth:`act` would return for it alone, or the RuntimeError it would raise."""
        import torch

        assert observations and len(observations) == len(draws), (len(observations), len(draws))
        for observation in observations:
            self.check(observation)
        renamed = [self._renamed(observation) for observation in observations]
        states = np.stack([np.asarray(observation[STATE], np.float32) for observation in renamed])
        batch = self._batch(renamed, states)
        bfloat16 = self.config.dtype == "bfloat16"
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16) if bfloat16 else nullcontext():
            drawn = stack_draws([self._drawn(given) for given in draws])
            normalized = self._policy.sample_actions(batch, to_device(drawn, self.device))
        actions = self._processors.physical(normalized[..., : self.action_dim].float().cpu().numpy(), states)
        failed = RuntimeError("the policy's actions are not finite: are its weights damaged, or the state far off?")
        return [chunk if np.isfinite(chunk).all() else failed for chunk in actions]

    def _drawn(self, given: Draws | np.ndarray) -> Draws:
        return given if isinstance(given, Draws) else replace(self.draws(0, "act", 0), noise=given)  # type: ignore[call-arg]

    def _renamed(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        return {self._processors.renamed.get(key, key): value for key, value in observation.items()}

    def _batch(self, observations: list[dict[str, Any]], states: np.ndarray) -> Observation:
        """Builds the policy's input in the same way as training does."""
        import torch

        from agent.data.resizing import resize_with_pad
        from agent.data.samples.reader import collate_observation
        from agent.data.samples.transforms import pad_vector

        spec = self._spec
        state = pad_vector(self._processors.state.normalize(states), spec.max_state_dim)
        images = [
            {
                slot: resize_with_pad(channels_first(observation[slot]), *spec.image_resolution)
                for slot in spec.camera_slots
                if observation.get(slot) is not None
            }
            for observation in observations
        ]
        tokens = [self._tokens(observation[TASK]) for observation in observations]
        whole = collate_observation(images, torch.from_numpy(state), tokens, spec, self._tokens.pad)
        return to_device(whole, self.device)


def load_policy(
    checkpoint: str,
    device: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    statistics: str | None = None,
) -> LoadedPolicy:
    """Loads a saved policy, ready to act.

    Args:
        checkpoint: a run folder (its last checkpoint is taken), a checkpoint, its ``pretrained_model``, or a folder in
            LeRobot's format.
        device: ``cpu``, ``cuda`` or ``cuda:1``; None takes the GPU if there is one.
        dtype: ``float32`` or ``bfloat16``, the type of weights and matrix products; None takes the config's.
        tokenizer: folder or hub name of the tokenizer, for a checkpoint whose own is on another machine.
        statistics: the data set or robot to act on, for a checkpoint of several robots; None takes its ``deploy``.

    Raises:
        ValueError: if a part is missing, damaged or does not fit; the message says what to do.
    """
    from agent.checkpoints.weights import load_into
    from agent.deployment import robots
    from agent.deployment.saved_checkpoint import open_checkpoint
    from agent.models.common.attention_kernels import choose_attention

    source = open_checkpoint(checkpoint)
    config, instead, robot = source.config, {}, statistics
    if statistics is not None:
        deployed = robots.deployment(source.pretrained, config, source.written, statistics)
        config, instead = deployed.config, deployed.processors
    elif known := robots.robots_of(source.pretrained):
        robot = known[0]
        log.info("acts on %s; --statistics takes %s", robot, " or ".join(known[1:]))
    if config.state_dim is None or config.action_dim is None:
        raise ValueError(
            f"{source.pretrained / 'config.json'}: input_features has no {STATE}, or output_features no {ACTION}, so that "
            "nobody knows what the policy sees; it needs both"
        )
    names = robots.dimension_names(source.pretrained, instead)
    family = registry.family(config)
    processors = read_processors(source.pretrained, config, instead)

    import torch  # imported only now, so that mistakes in the checkpoint's files show without waiting for it

    tokens = load_instruction_tokens(source.pretrained, processors, tokenizer)
    target = _device(device)
    config.dtype = dtype or config.dtype
    with torch.device("meta"):
        policy = family.policy(config)
    if config.dtype == "bfloat16":
        policy.to(torch.bfloat16)
    policy.to_empty(device=target)
    if target.type == "cuda":
        choose_attention(policy, target, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)
    match = partial(family.names.from_policy, config=config)
    load_into(policy.state_dict(), source.files, match, family.names.fit)
    policy.eval().requires_grad_(False)
    return LoadedPolicy(policy, config, processors, tokens, target, source, robot, names)


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used ({str(error).splitlines()[0]}); write cpu or cuda") from None
    return device
