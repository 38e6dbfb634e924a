"""One sample from its number and frame, and many of them as a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from agent.batch import ActionChunk, Batch, Draws, Observation, Real, SampleSpec, ValidationBatch, stack_draws
from agent.data.normalization.robot import Robot
from agent.data.resizing import resize_with_pad
from agent.data.samples.augmentation import Augmentation
from agent.data.samples.task_tokens import TaskTokens
from agent.data.samples.transforms import pad_vector, paraphrase
from agent.data.source import Source

if TYPE_CHECKING:
    import torch

Draw = Callable[[int], Draws]
"""A sample's number → its random numbers, of the policy's own type; a pure function."""


@dataclass
class Sample:
    """One sample, ready to be put into a batch."""

    images: dict[str, torch.Tensor]
    """Camera slot → (3, H, W) uint8."""
    state: np.ndarray
    """(S,) float32, normalised."""
    tokens: np.ndarray
    """(at most L,) int64."""
    actions: np.ndarray
    """(T, A) float32, normalised."""
    is_pad: np.ndarray
    """(T,) bool."""
    dim_mask: np.ndarray
    """(A,) bool."""
    draws: Draws
    k: int
    provenance: tuple[int, int, int]
    raw_state: np.ndarray
    """(s,) float32, physical units."""
    raw_actions: np.ndarray
    """(T, a) float32, physical units."""
    previous_action: np.ndarray | None
    """(a,) float32, physical units."""
    previous_is_pad: bool


@dataclass
class SampleReader:
    """Reads and transforms samples; travels to the workers, where ``sample`` is called.

    ``paraphrases`` is empty for validation.
    """

    sources: Sequence[Source]
    robots: Sequence[Robot]
    """The robot of each source."""
    tokens: TaskTokens
    spec: SampleSpec
    draw: Draw
    """See ``Draw``."""
    seed: int = 0
    paraphrases: dict[str, list[str]] = field(default_factory=dict)
    augmentations: Sequence[Mapping[str, Augmentation]] = ()
    """For each source: camera → how its pictures are changed. Empty for validation."""

    def sample(self, k: int, dataset: int, position: int) -> Sample:
        """Sample ``k`` of the stream, which is the frame at ``position`` of a data set.

        Raises:
            RuntimeError: if the frame cannot be read, naming data set, episode and frame.
        """
        raw, robot = self.sources[dataset].read(position), self.robots[dataset]
        images = {slot: resize_with_pad(image, *self.spec.image_resolution) for slot, image in raw.images.items()}
        if self.augmentations:
            for slot, change in self.augmentations[dataset].items():
                images[slot] = change(images[slot], self.seed, k, slot)
        return Sample(
            images=images,
            state=pad_vector(robot.state.normalize(raw.state), self.spec.max_state_dim),
            tokens=self.tokens(paraphrase(raw.task, self.paraphrases, self.seed, k)),
            actions=pad_vector(robot.encode(raw.actions, raw.state), self.spec.max_action_dim),
            is_pad=raw.action_is_pad,
            dim_mask=np.arange(self.spec.max_action_dim) < raw.actions.shape[-1],
            draws=self.draw(k),
            k=k,
            provenance=(dataset, raw.episode, raw.frame),
            raw_state=raw.state,
            raw_actions=raw.actions,
            previous_action=raw.previous_action,
            previous_is_pad=raw.previous_is_pad,
        )

    @property
    def mean_actions(self) -> np.ndarray:
        """(data sets, a) float32, the mean training action of each data set's robot, zero beyond its dimensions."""
        widest = max(len(robot.mean_action) for robot in self.robots)
        return np.stack([pad_vector(robot.mean_action, widest) for robot in self.robots])

    def unnormalize(self, values: torch.Tensor, item: ValidationBatch) -> np.ndarray:
        """Brings sampled actions back to each robot's own units.

        Args:
            values: (B, T, A) on the CPU, normalised.
            item: the batch that they were sampled for.

        Returns:
            (B, T, a) float32, absolute, zero beyond a robot's own dimensions.
        """
        actions = np.zeros_like(item.actions)
        for place, dataset in enumerate(item.batch.provenance[:, 0].tolist()):
            decoded = self.robots[dataset].decode(values[place].numpy(), item.state[place])
            actions[place, :, : decoded.shape[-1]] = decoded
        return actions


def collate_observation(
    images: Sequence[Mapping[str, torch.Tensor]],
    state: torch.Tensor,
    tokens: Sequence[Sequence[int] | np.ndarray],
    spec: SampleSpec,
    pad_token_id: int,
) -> Observation:
    """The observations of a batch, in training and where a policy acts.

    Camera slots that no sample has are left out, and so is language padding beyond the longest instruction,
    rounded up to a multiple of 8: both would be masked everywhere.

    Args:
        images: of each sample, camera slot → (3, H, W) uint8 of the policy's size.
        state: (B, S) float32, normalised.
        tokens: of each sample, without padding.
        spec: what the policy wants.
        pad_token_id: what fills up the tokens.
    """
    import torch

    stacked, masks, cameras = {}, {}, {}
    for slot in spec.camera_slots:
        have = [slot in some for some in images]
        if any(have):
            blank = torch.zeros(3, *spec.image_resolution, dtype=torch.uint8)
            masks[slot], cameras[slot] = torch.tensor(have), have
            stacked[slot] = torch.stack([some.get(slot, blank) for some in images])
    lengths = np.asarray([len(some) for some in tokens])
    longest = min(-(-int(lengths.max()) // 8) * 8, spec.tokenizer_max_length)
    padded = np.full((len(tokens), longest), pad_token_id, dtype=np.int64)
    for row, some in zip(padded, tokens, strict=True):
        row[: len(some)] = some
    token_mask = np.arange(longest) < lengths[:, None]
    return Observation(
        images=stacked,
        image_masks=masks,
        state=state,
        tokens=torch.from_numpy(padded),
        token_mask=torch.from_numpy(token_mask),
        real=Real(cameras, lengths.tolist()),
    )


def collate(samples: Sequence[Sample], spec: SampleSpec, pad_token_id: int) -> Batch:
    """One batch of samples."""
    import torch

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))

    return Batch(
        observation=collate_observation(
            [sample.images for sample in samples],
            stacked("state"),
            [sample.tokens for sample in samples],
            spec,
            pad_token_id,
        ),
        actions=ActionChunk(values=stacked("actions"), is_pad=stacked("is_pad"), dim_mask=stacked("dim_mask")),
        draws=stack_draws([sample.draws for sample in samples]),
        sample_index=torch.tensor([sample.k for sample in samples], dtype=torch.int64),
        provenance=torch.tensor([sample.provenance for sample in samples], dtype=torch.int64),
    )
