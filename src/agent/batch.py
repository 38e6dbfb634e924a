"""What travels from the data to the model: one typed batch, and the legend of its shapes.

Shape suffixes used all over this package:

====  =====================================================================
B     samples of a micro-batch
T     time steps of an action chunk (``chunk_size``)
K     flow-matching draws of a sample (``flow_samples_per_observation``)
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

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

T_co = TypeVar("T_co")


@dataclass(frozen=True)
class Observation:
    """What the policy sees.

    ``images`` holds one entry per camera slot that at least one sample of the batch has; a slot that no
    sample has is left out altogether, because its tokens would be masked everywhere.
    """

    images: dict[str, Tensor]
    """Camera slot → (B, 3, H, W), uint8 in [0, 255] or float in [0, 1]."""
    image_masks: dict[str, Tensor]
    """Camera slot → (B,) bool; False where this sample has no such camera."""
    state: Tensor
    """(B, S) float32, normalised, zero beyond the robot's own dimensions."""
    tokens: Tensor
    """(B, L) int64 token ids of the instruction."""
    token_mask: Tensor
    """(B, L) bool, False on padding."""
    padded: bool = True
    """False if every image and every token is real, so that no mask is needed. Known where the batch is made: to look
    for it in the masks would make the CPU wait for the GPU."""


@dataclass(frozen=True)
class ActionChunk:
    """The actions that follow the observation."""

    values: Tensor
    """(B, T, A) float32, normalised, zero beyond the robot's own dimensions."""
    is_pad: Tensor
    """(B, T) bool, True past the end of the episode."""
    dim_mask: Tensor
    """(B, A) bool, True on the robot's own dimensions."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, with the flow-matching draws that belong to its samples.

    Noise and time are part of the batch and not drawn in the model: they are a function of (seed, sample
    number), so that the loss does not depend on how the samples are split over processes.
    """

    observation: Observation
    actions: ActionChunk
    noise: Tensor
    """(B, T, A) float32, standard normal; (B, K, T, A) when there are K > 1 draws per sample."""
    time: Tensor
    """(B,) float32 in (0, 1]; 1 is pure noise, 0 is the action (openpi's convention). (B, K) for K > 1 draws."""
    sample_index: Tensor
    """(B,) int64, the number k of each sample in the run's stream."""
    provenance: Tensor
    """(B, 3) int64: data set, episode, frame; for messages and tests."""

    def __len__(self) -> int:
        return int(self.sample_index.shape[0])


@dataclass(frozen=True)
class ValidationBatch:
    """A batch of validation samples with what is needed to judge sampled actions."""

    batch: Batch
    index: np.ndarray
    """(B,) int64, place of each sample in the validation set."""
    state: np.ndarray
    """(B, s) float32, the recorded state in the data set's own units, zero beyond its own dimensions."""
    actions: np.ndarray
    """(B, T, a) float32, the recorded actions in the data set's own units. Data sets of several robots may differ in
    their dimensions: ``batch.actions.dim_mask`` says which are real, and the others are zero."""
    previous_action: np.ndarray
    """(B, a) float32, the action recorded one frame before the observation, in the same units."""
    has_previous: np.ndarray
    """(B,) bool, False on an episode's first frame, where ``previous_action`` is that frame's own."""


def map_tensors(tree: T_co, function: Callable[[Tensor], Any]) -> T_co:
    """A copy of a (nested) batch with what ``function`` makes of each tensor in the tensor's place."""
    mapped: dict[str, Any] = {}
    assert is_dataclass(tree)
    for field in fields(tree):
        value = getattr(tree, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            mapped[field.name] = map_tensors(value, function)
        elif isinstance(value, dict):
            mapped[field.name] = {key: function(tensor) for key, tensor in value.items()}
        elif isinstance(value, bool):
            mapped[field.name] = value
        else:
            mapped[field.name] = function(value)
    return replace(tree, **mapped)  # type: ignore[type-var]


def to_device(tree: T_co, device: torch.device | str, non_blocking: bool = True) -> T_co:
    """A copy of a (nested) batch with all its tensors on ``device``."""
    return map_tensors(tree, lambda tensor: tensor.to(device, non_blocking=non_blocking))
