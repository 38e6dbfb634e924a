"""Defines what data and policies exchange: a policy's requirements of a sample, and the batches that it receives.

The whole package uses these shape suffixes:

====  =====================================================================
B     samples of a micro-batch
T     time steps of an action chunk (``chunk_size``)
K     random draws of a sample (``flow_samples_per_observation``)
A     action dimensions, padded to ``max_action_dim``
S     state dimensions, padded to ``max_state_dim``
L     language tokens, padded on the right
C,H,W colour channels, height and width of an image
P     image patches (tokens) of one camera
N     tokens of a sequence
D     width of a transformer
====  =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

T_co = TypeVar("T_co")
EMPTY_CAMERA = "observation.images.empty_camera_"
"""The prefix of LeRobot's names for camera slots that never hold an image."""


@dataclass(frozen=True)
class SampleSpec:
    """States what a policy needs of a sample, as plain values, so that the data code imports no model."""

    chunk_size: int
    """T, actions per sample."""
    max_state_dim: int
    """S, the size to which states are padded."""
    max_action_dim: int
    """A, the size to which actions are padded."""
    image_resolution: tuple[int, int]
    """Height and width of the policy's input images, in pixels."""
    tokenizer_max_length: int
    """The maximum number of tokens of an instruction; 0 for a policy that reads none."""
    camera_slots: tuple[str, ...] = ()
    """The policy's camera features; if empty, they and the dimensions are inferred from the first data set."""
    state_dim: int | None = None
    """The dimensions of the robot's state without padding; None to infer them."""
    action_dim: int | None = None
    """The dimensions of the robot's actions without padding; None to infer them."""
    images: bool = True
    """Whether the policy sees images; if False, none are read."""


@dataclass(frozen=True)
class Prompt:
    """Says how an instruction is turned into the tokens that a policy reads."""

    tokenizer: str
    """The tokenizer's folder or hub name."""
    max_length: int
    """A longer prompt is cut to this many tokens."""
    text: Callable[[str], str]
    """Maps an instruction to the text that is tokenized. A module-level function, so that it can be pickled."""
    vocabulary: int
    """The size of the policy's vocabulary."""
    vocabulary_key: str
    """The key of the model JSON that states ``vocabulary``, for messages."""
    key: str = "tokenizer_path"
    """The key of the model JSON that names the tokenizer."""
    advice: str = ""
    """Advice for when the tokenizer is unavailable; it ends with a conjunction, as advice to name a folder follows."""


@dataclass(frozen=True)
class Draws:
    """Holds a sample's random numbers, the only randomness of a policy's loss and of its predicted actions.

    A family has a subclass whose fields are arrays or numbers for one sample and tensors (B, …) for a batch; a family that
    draws nothing uses this class. The numbers come with the batch instead of being drawn in the model, because they are a
    function of (seed, sample number): so the loss does not depend on how samples are split over processes.
    """


class Real(NamedTuple):
    """States which images and tokens of a batch are real, in plain numbers on the host.

    The shapes of a computation on the real parts alone depend on them. They are noted where the batch is made, because
    reading them from the masks would make the CPU wait for the GPU.
    """

    cameras: dict[str, list[bool]]
    """Maps camera slot → for each sample whether it has this camera."""
    tokens: list[int]
    """The number of instruction tokens of each sample, padding not counted."""


@dataclass(frozen=True)
class Observation:
    """Holds what the policy observes at one time step.

    ``images`` has one entry per camera slot that at least one sample of the batch fills. A slot that no sample fills is left
    out, because its tokens would be masked everywhere.
    """

    images: dict[str, Tensor]
    """Maps camera slot → (B, 3, H, W), uint8 in [0, 255] or float in [0, 1]."""
    image_masks: dict[str, Tensor]
    """Maps camera slot → (B,) bool, False where a sample has no such camera."""
    state: Tensor
    """(B, S) float32, normalised, zero beyond the robot's own dimensions."""
    tokens: Tensor
    """(B, L) int64 token ids of the instruction."""
    token_mask: Tensor
    """(B, L) bool, False on padding."""
    real: Real | None = None
    """What the masks say, as plain numbers; None if nobody has read them yet, see :meth:`parts`."""

    def parts(self) -> Real:
        """Returns which images and tokens are real; without ``real`` it waits for the device of the masks."""
        if self.real is not None:
            assert len(self.real.tokens) == len(self.tokens), "a part of a batch was taken without its ``real``"
            return self.real
        cameras = {slot: mask.tolist() for slot, mask in self.image_masks.items()}
        return Real(cameras, self.token_mask.sum(dim=1).tolist())


@dataclass(frozen=True)
class ActionChunk:
    """Holds the recorded actions that follow the observation."""

    values: Tensor
    """(B, T, A) float32, normalised, zero beyond the robot's own dimensions."""
    is_pad: Tensor
    """(B, T) bool, True past the end of the episode."""
    dim_mask: Tensor
    """(B, A) bool, True on the robot's own dimensions."""


@dataclass(frozen=True)
class Batch:
    """Holds one micro-batch, with the random draws of its samples."""

    observation: Observation
    actions: ActionChunk
    draws: Draws
    """The random numbers of the samples, of the policy's own subclass, as tensors (B, …)."""
    sample_index: Tensor
    """(B,) int64, the number k of each sample in the run's stream."""
    provenance: Tensor
    """(B, 3) int64: data set, episode, frame; for messages and tests."""

    def __len__(self) -> int:
        return int(self.sample_index.shape[0])


@dataclass(frozen=True)
class ValidationBatch:
    """Holds a batch of validation samples with the recorded values that predicted actions are compared to."""

    batch: Batch
    index: np.ndarray
    """(B,) int64, the position of each sample in the validation set."""
    state: np.ndarray
    """(B, s) float32, the recorded state in the data set's own units, zero beyond its own dimensions."""
    actions: np.ndarray
    """(B, T, a) float32, the recorded actions in the data set's own units. Data sets of several robots may differ in
    their dimensions: ``batch.actions.dim_mask`` says which are real, and the others are zero."""
    previous_action: np.ndarray
    """(B, a) float32, the action recorded one frame before the observation, in the same units."""
    has_previous: np.ndarray
    """(B,) bool, False on an episode's first frame, where ``previous_action`` is that frame's own."""


def stack_draws(draws: Sequence[Draws]) -> Draws:
    """Stacks the draws of samples into those of a batch, as tensors (B, …)."""
    import numpy as np
    import torch

    first = draws[0]
    stacked = {f.name: np.stack([getattr(one, f.name) for one in draws]) for f in fields(first)}
    return replace(first, **{name: torch.from_numpy(values) for name, values in stacked.items()})


def map_tensors(tree: T_co, function: Callable[[Tensor], Any]) -> T_co:
    """Returns a copy of a (nested) batch in which each tensor is replaced by ``function`` of it."""
    mapped: dict[str, Any] = {}
    assert is_dataclass(tree)
    for field in fields(tree):
        value = getattr(tree, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            mapped[field.name] = map_tensors(value, function)
        elif isinstance(value, dict):
            mapped[field.name] = {key: function(tensor) for key, tensor in value.items()}
        elif value is None or isinstance(value, Real):
            mapped[field.name] = value
        else:
            mapped[field.name] = function(value)
    return replace(tree, **mapped)  # type: ignore[type-var]


def to_device(tree: T_co, device: torch.device | str, non_blocking: bool = True) -> T_co:
    """Returns a copy of a (nested) batch with all its tensors on ``device``."""
    return map_tensors(tree, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def no_draws(k: int) -> Draws:
    """Returns the draws of sample ``k`` for a policy that draws nothing."""
    return Draws()
