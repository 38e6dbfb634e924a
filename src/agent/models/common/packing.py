"""Arranges the images and instructions of a batch into sequences of real tokens, without padding.

If all samples have the same cameras and equally long instructions, the batch is dense, (B, N, D). Otherwise the samples' tokens
lie behind one another, (1, N, D) with N tokens in all, shortest samples first, so that those of equal length are neighbours.
The arrangement is computed on the host, from numbers that come with the batch, and sent to the device in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agent.models.common.attention import Packing

if TYPE_CHECKING:
    from agent.batch import Real
    from agent.models.common.modules import KeysValues


@dataclass(frozen=True)
class Arrangement:
    """Says where each real token of a batch of B samples stands; all tensors but ``packing.lengths`` are on the device."""

    positions: Tensor
    """(1, N) int64, the position of each token in its own sequence."""
    lengths: Tensor
    """(B, 1) int64, or (1, 1) for a dense batch: the tokens of each sequence."""
    words: int | Tensor
    """The instruction's length in a dense batch, else the flat positions (W,) in (B, L) of all real tokens."""
    rows: list[Tensor | None]
    """For each camera the samples that have it, int64; None for all of them."""
    order: Tensor | None = None
    """(N,) int64: where each packed token is among all patches, camera by camera, followed by all words."""
    packing: Packing | None = None
    """How the sequences lie behind one another; None in a dense batch."""
    places: Tensor | None = None
    """(B, M) int64: the packed place of each sample's tokens, M being the longest; beyond a sample's end, of any token."""
    mask: Tensor | None = None
    """(B, M) bool, True where ``places`` are the sample's own."""

    def join(self, images: Sequence[Tensor], words: Tensor) -> Tensor:
        """Joins patches and words into sequences.

        Args:
            images: for each camera the patches (samples that have it, P, D).
            words: (B, n, D) in a dense batch, else (W, D).

        Returns:
            (B, N, D), or (1, N, D) packed.
        """
        if self.order is None:
            return torch.cat([*images, words], dim=1)
        return torch.cat([*(patches.flatten(0, 1) for patches in images), words]).index_select(0, self.order)[None]

    def spread(self, keys_values: KeysValues) -> KeysValues:
        """Brings packed keys and values (1, kv_heads, N, head_dim) to (B, kv_heads, M, head_dim), with fillers at the end."""
        if self.places is None:
            return keys_values
        keys, values = (
            x[0].index_select(1, self.places.flatten()).unflatten(1, self.places.shape).transpose(0, 1)
            for x in keys_values
        )
        return keys, values


def arrange(real: Real, slots: Sequence[str], patches: int, padded_to: int, device: torch.device) -> Arrangement:
    """Arranges a batch.

    Args:
        real: which images and tokens are real; the tokens of an instruction are its first ones.
        slots: the cameras of the batch, in the model's order.
        patches: P, tokens of an image.
        padded_to: L, to which the instructions were padded.
        device: where the tensors shall be.
    """
    have = np.asarray([real.cameras[slot] for slot in slots], dtype=bool).reshape(len(slots), len(real.tokens))
    words = np.asarray(real.tokens)
    lengths = patches * have.sum(axis=0) + words
    if have.all() and (words == words[0]).all():
        positions = torch.arange(int(lengths[0]), device=device)[None]
        count = torch.full((1, 1), int(lengths[0]), device=device)
        return Arrangement(positions, count, int(words[0]), [None] * len(slots))
    by_length = np.argsort(lengths, kind="stable")
    begin = np.empty_like(lengths)
    begin[by_length] = np.cumsum(lengths[by_length]) - lengths[by_length]
    image = (np.cumsum(have) - 1).reshape(have.shape)  # the number of each image among all
    first_word = have.sum() * patches + np.cumsum(words) - words
    pieces = [
        part
        for sample in by_length
        for part in (
            *(np.arange(patches) + number * patches for number in image[have[:, sample], sample]),
            np.arange(words[sample]) + first_word[sample],
        )
    ]
    total, longest = int(lengths.sum()), int(lengths.max())
    steps = np.arange(longest)
    host = [
        np.concatenate([np.arange(lengths[sample]) for sample in by_length]),
        lengths,
        np.flatnonzero(np.arange(padded_to) < words[:, None]),
        np.concatenate(pieces),
        # Fillers are different tokens: their gradients, all zero, are added up without waiting for each other.
        (begin[:, None] + steps) % total,
        steps < lengths[:, None],
        np.append(0, np.cumsum(lengths[by_length])),
        *(np.flatnonzero(row) for row in have),
    ]
    positions, count, token, order, places, mask, boundaries, *rows = _send(host, device)
    bound = patches * len(slots) + padded_to
    packing = Packing(boundaries.int(), torch.from_numpy(lengths[by_length]), bound)
    return Arrangement(
        positions=positions[None],
        lengths=count[:, None],
        words=token,
        rows=[None if whole else row for row, whole in zip(rows, map(all, have), strict=True)],
        order=order,
        packing=packing,
        places=places,
        mask=mask.bool(),
    )


def _send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Brings whole numbers to the device as int64, in one copy that nothing waits for."""
    block = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]).astype(np.int64))
    if device.type == "cuda":
        block = block.pin_memory()
    parts = block.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
