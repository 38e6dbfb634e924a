"""A saved policy that acts: from a checkpoint's folder alone, observations in, actions in physical units out.

What the policy needs besides its weights comes from the processors that were saved with it: the tokenizer, the
statistics and their normalisation, relative actions. Names of a model are behind ``agent.models.registry``::

    policy = load_policy("runs/pi0_demo")
    observation = {camera: image for camera in policy.cameras} | {"observation.state": state, "task": "Press a button"}
    (actions,) = policy.act([observation], [policy.noise(seed=0, purpose="robot", k=0)])

Command-line modules share this one, so that they act alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.batch import Observation
from agent.deployment.instructions import InstructionTokens, load_instruction_tokens
from agent.deployment.observations import TASK, channels_first, check_observation, is_empty
from agent.deployment.processors import ACTION, STATE, Processors, read_processors

if TYPE_CHECKING:
    import torch

    from agent.deployment.saved_checkpoint import Source

log = logging.getLogger(__name__)


class LoadedPolicy:
    """A policy with its processors; see :func:`load_policy`."""

    def __init__(
        self,
        policy: Any,
        processors: Processors,
        tokens: InstructionTokens,
        device: torch.device,
        source: Source,
        robot: str | None,
        names: Mapping[str, list[str]] | None = None,
    ) -> None:
        self._policy, self._processors, self._tokens = policy, processors, tokens
        self.config = policy.config
        """The model's config, as saved."""
        self.device = device
        self.pretrained = source.pretrained
        """The folder that it was loaded from."""
        step = "" if source.step is None else f", update {source.step}"
        self.name = f"{source.name}{step}{', averaged weights' if source.averaged else ''}"
        """For people."""
        self.robot = robot
        """Of a policy that was trained on several robots, each with statistics of its own: the one it acts on."""
        self.dimension_names = dict(names or {})
        """``observation.state`` and ``action`` → names of their dimensions, where the training data had them."""

    @property
    def cameras(self) -> dict[str, tuple[int, ...]]:
        """The cameras that an observation names → (3, H, W) of the pictures that the policy was trained on."""
        features = self.config.input_features
        return {slot: tuple(features[slot].shape) for slot in self.config.camera_slots if not is_empty(slot)}

    @property
    def renamed(self) -> dict[str, str]:
        """Other names of the policy's keys, by which its own processors know them → the policy's."""
        return dict(self._processors.renamed)

    @property
    def state_dim(self) -> int:
        """Numbers in ``observation.state``."""
        return self.config.state_dim

    @property
    def action_dim(self) -> int:
        """Numbers in an action, a."""
        return self.config.action_dim

    @property
    def chunk_size(self) -> int:
        """Actions that are predicted at once, T."""
        return self.config.chunk_size

    @property
    def action_steps(self) -> int:
        """How many of them are meant to be executed before the next prediction."""
        return self.config.action_steps

    def noise(self, seed: int, purpose: str, k: int) -> np.ndarray:
        """Initial noise (T, A), a function of the arguments alone; every purpose has a stream of its own."""
        from agent.reproducibility import stream

        shape = (self.chunk_size, self.config.max_action_dim)
        return stream(seed, f"{purpose}/noise", k).standard_normal(shape, dtype=np.float32)

    def check(self, observation: Mapping[str, Any]) -> None:
        """Holds an observation against the policy's features.

        Raises:
            ValueError: names the key, what it holds and what belongs there.
        """
        observation = self._renamed(observation)
        check_observation(observation, tuple(self.config.camera_slots), self.state_dim)
        self._tokens(observation[TASK])

    def act(self, observations: Sequence[Mapping[str, Any]], noise: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The action chunks for a batch of observations; each is the same in any batch, up to float rounding.

        Args:
            observations: each with every camera of ``cameras`` as uint8 (H, W, 3) or (3, H, W) of any size, or None
                where the robot has none; ``observation.state`` (state_dim,) in physical units; ``task``, a text.
            noise: for each (T, A), see :meth:`noise`.

        Returns:
            For each (T, a) float32 in physical units, absolute.

        Raises:
            ValueError: if an observation does not fit, see :meth:`check`.
            RuntimeError: if the policy's actions are not finite.
        """
        answers = self.act_each(observations, noise)
        for answer in answers:
            if isinstance(answer, RuntimeError):
                raise answer
        return [answer for answer in answers if isinstance(answer, np.ndarray)]

    def act_each(
        self, observations: Sequence[Mapping[str, Any]], noise: Sequence[np.ndarray]
    ) -> list[np.ndarray | RuntimeError]:
        """What :meth:`act` returns, or would raise, for each observation by itself."""
        import torch

        assert observations and len(observations) == len(noise), (len(observations), len(noise))
        for observation in observations:
            self.check(observation)
        renamed = [self._renamed(observation) for observation in observations]
        states = np.stack([np.asarray(observation[STATE], np.float32) for observation in renamed])
        batch = self._batch(renamed, states)
        bfloat16 = self.config.dtype == "bfloat16"
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16) if bfloat16 else nullcontext():
            normalized = self._policy.sample_actions(batch, torch.from_numpy(np.stack(noise)).to(self.device))
        actions = self._processors.physical(normalized[..., : self.action_dim].float().cpu().numpy(), states)
        failed = RuntimeError("the policy's actions are not finite: are its weights damaged, or the state far off?")
        return [chunk if np.isfinite(chunk).all() else failed for chunk in actions]

    def _renamed(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        return {self._processors.renamed.get(key, key): value for key, value in observation.items()}

    def _batch(self, observations: list[dict[str, Any]], states: np.ndarray) -> Observation:
        """As the training data's ``collate`` makes it."""
        import torch

        from agent.batch import to_device
        from agent.data.resizing import resize_with_pad
        from agent.data.samples.transforms import pad_vector

        height, width = self.config.image_resolution
        images, masks = {}, {}
        for slot in self.config.camera_slots:
            given = [observation.get(slot) for observation in observations]
            if all(image is None for image in given):
                continue
            masks[slot] = torch.tensor([image is not None for image in given])
            blank = torch.zeros(3, height, width, dtype=torch.uint8)
            images[slot] = torch.stack(
                [blank if image is None else resize_with_pad(channels_first(image), height, width) for image in given]
            )
        rows = [self._tokens(observation[TASK]) for observation in observations]
        longest = min(-(-max(map(len, rows)) // 8) * 8, self._processors.max_tokens)
        tokens = np.full((len(rows), longest), self._tokens.pad, dtype=np.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        token_mask = torch.from_numpy(np.arange(longest) < np.asarray([len(ids) for ids in rows])[:, None])
        state = pad_vector(self._processors.state.normalize(states), self.config.max_state_dim)
        padded = not (token_mask.all() and all(bool(mask.all()) for mask in masks.values()))
        observation = Observation(
            images, masks, torch.from_numpy(state), torch.from_numpy(tokens), token_mask, padded=padded
        )
        return to_device(observation, self.device)


def load_policy(
    checkpoint: str,
    device: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    statistics: str | None = None,
) -> LoadedPolicy:
    """A saved policy, ready to act.

    Args:
        checkpoint: a run folder (its last checkpoint), a checkpoint, its ``pretrained_model``, or a folder in LeRobot's
            format.
        device: ``cpu``, ``cuda``, ``cuda:1``; by default the GPU if there is one.
        dtype: ``float32`` or ``bfloat16``, in which weights are held and products computed; by default the config's.
        tokenizer: folder or hub name of the tokenizer, for a checkpoint whose own is on another machine.
        statistics: of a checkpoint of several robots, the data set or robot to act on; by default its ``deploy``.

    Raises:
        ValueError: if a part is missing, damaged or does not fit, with what to do.
    """
    from agent.checkpoints.weights import load_into
    from agent.deployment.saved_checkpoint import open_checkpoint
    from agent.models import registry

    source = open_checkpoint(checkpoint)
    config, instead, robot = source.config, {}, statistics
    deployment = registry.deployment(config)
    if statistics is not None:
        deployed = deployment.deployment(source.pretrained, config, source.written, statistics)
        config, instead = deployed.config, deployed.processors
    elif robots := deployment.robots_of(source.pretrained):
        robot = robots[0]
        log.info("acts on %s; --statistics takes %s", robot, " or ".join(robots[1:]))
    if config.state_dim is None or config.action_dim is None:
        raise ValueError(
            f"{source.pretrained / 'config.json'}: input_features has no {STATE}, or output_features no {ACTION}, so that "
            "nobody knows what the policy sees; it needs both"
        )
    names = deployment.dimension_names(source.pretrained, instead)
    processors = read_processors(source.pretrained, config.state_dim, config.action_dim, instead)

    import torch  # after what is quickly found to be wrong

    tokens = load_instruction_tokens(source.pretrained, processors, tokenizer, config.language.vocab_size)
    target = _device(device)
    config.dtype = dtype or config.dtype
    with torch.device("meta"):
        policy = registry.policy_class(config)(config)
    if config.dtype == "bfloat16":
        policy.to(torch.bfloat16)
    policy.to_empty(device=target)
    adapter = registry.adapter(config)
    load_into(policy.state_dict(), source.files, partial(adapter.from_lerobot, config=config), adapter.fit)
    return LoadedPolicy(policy.eval().requires_grad_(False), processors, tokens, target, source, robot, names)


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
