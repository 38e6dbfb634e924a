"""Reads the pictures that a data set keeps in its data files instead of videos, by episode and frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from agent.data.recorded.arrow import to_numpy
from agent.data.recorded.metadata import Metadata
from agent.data.recorded.pictures import NoColours, stored_picture

if TYPE_CHECKING:
    import torch


class PictureTable:
    """Reads pictures of the chosen episodes from a copy of the data files in the cache of ``datasets``.

    Args:
        metadata: of the data set.
        chosen: the episodes, ascending.
        keys: the cameras.
    """

    def __init__(self, metadata: Metadata, chosen: np.ndarray, keys: Sequence[str]) -> None:
        from datasets import Image
        from lerobot.datasets.feature_utils import get_hf_features_from_features
        from lerobot.datasets.io_utils import load_nested_dataset

        self._chosen, self._lengths, self._keys = chosen, metadata.episodes["length"][chosen], tuple(keys)
        self._begins = np.cumsum(self._lengths) - self._lengths
        self._rows: np.ndarray | range | None = None
        described = {key: {**feature, "shape": tuple(feature["shape"])} for key, feature in metadata.features.items()}
        pictures = load_nested_dataset(
            metadata.root / "data",
            features=get_hf_features_from_features(described),
            # Asking for all of them costs no filter.
            episodes=None if len(chosen) == metadata.total_episodes else [int(episode) for episode in chosen],
        )
        pictures = pictures.select_columns([*keys, "episode_index", "frame_index"])
        for key in keys:
            pictures = pictures.cast_column(key, Image(decode=False))
        self._table = pictures

    def read(self, episode: int, frame: int) -> dict[str, torch.Tensor]:
        """Reads the pictures of a frame: camera → (3, H, W) uint8.

        Raises:
            NoColours: if a picture is not one of 8-bit colours, naming its camera.
        """
        import torch

        if self._rows is None:
            self._rows = self._find_rows()
        place = int(self._begins[np.searchsorted(self._chosen, episode)]) + frame
        item, images = self._table[int(self._rows[place])], {}
        for key in self._keys:
            try:
                picture = stored_picture(item[key])
            except NoColours as error:
                raise NoColours(f"the picture of {key} {error}") from None
            images[key] = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        return images

    def _find_rows(self) -> np.ndarray | range:
        """Finds the row of each frame of the chosen episodes: a range, which takes no memory, where they are in order."""
        owner, frame = (to_numpy(self._table.data.column(name)) for name in ("episode_index", "frame_index"))
        index = np.searchsorted(self._chosen, owner).clip(max=len(self._chosen) - 1)
        known = (self._chosen[index] == owner) & (frame >= 0) & (frame < self._lengths[index])
        rows = np.full(self._lengths.sum(), -1, dtype=np.int64)
        rows[(self._begins[index] + frame)[known]] = np.flatnonzero(known)
        assert (rows >= 0).all(), "the files hold the frames that the metadata count"
        return rows
