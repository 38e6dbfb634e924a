"""Pure functions from a sample to a sample: resizing, padding, paraphrasing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agent.reproducibility import stream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SampleSpec:
    """What the model wants of a sample, as plain values: the data code knows no model."""

    chunk_size: int
    """T, actions per sample."""
    max_state_dim: int
    """S, to which the state is padded."""
    max_action_dim: int
    """A, to which the actions are padded."""
    image_resolution: tuple[int, int]
    """Height and width of what the model sees."""
    tokenizer_max_length: int
    """Most tokens of an instruction."""
    camera_slots: tuple[str, ...] = ()
    """The model's camera features; empty to infer them, with the dimensions, from the first data set."""
    state_dim: int | None = None
    """The robot's own state dimensions; None to infer."""
    action_dim: int | None = None
    """The robot's own action dimensions; None to infer."""


def fitted_size(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest picture with the proportions of ``old`` that fits into ``new``."""
    ratio = max(old[1] / new[1], old[0] / new[0])
    # openpi's truncation can round a side of a very long image to nothing
    return max(1, int(old[0] / ratio)), max(1, int(old[1] / ratio))


def resize_with_pad(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes without distortion and centres on black, as openpi does.

    Args:
        image: (3, H, W) uint8.

    Returns:
        (3, height, width) uint8; differs from openpi's float result by rounding only.
    """
    import torch
    from torch.nn.functional import interpolate, pad

    old_height, old_width = image.shape[-2:]
    if (old_height, old_width) == (height, width):
        return image
    new_height, new_width = fitted_size((old_height, old_width), (height, width))
    resized = interpolate(image[None].float(), (new_height, new_width), mode="bilinear", align_corners=False)[0]
    resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return pad(resized, (left, width - new_width - left, top, height - new_height - top))


def pad_vector(values: np.ndarray, size: int) -> np.ndarray:
    """(…, d) → (…, size), zeros behind.

    Raises:
        ValueError: if d is larger than ``size``.
    """
    missing = size - values.shape[-1]
    if missing < 0:
        raise ValueError(f"{values.shape[-1]} dimensions do not fit into {size}")
    padded = np.zeros((*values.shape[:-1], size), dtype=values.dtype)  # np.pad takes ten times as long
    padded[..., : values.shape[-1]] = values
    return padded


def load_paraphrases(path: str, tasks: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The paraphrases of ``{instruction: [paraphrases]}`` and the tasks that have none.

    Raises:
        ValueError: if the file cannot be read, has another form, or knows none of the tasks.
    """
    form = 'task_paraphrase is a JSON file of the form {"instruction": ["paraphrase", …], …}'
    try:
        content = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {form}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; {form}")
    for task, texts in content.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"{path}: the entry of {task!r} is not a list of non-empty strings; {form}")
    wanted = sorted(set(tasks))
    missing = [task for task in wanted if task not in content]
    if len(missing) == len(wanted):
        raise ValueError(f"{path} has an entry for none of the tasks, such as {wanted[0]!r}; {form}")
    return content, missing


def paraphrase(task: str, paraphrases: dict[str, list[str]], seed: int, k: int) -> str:
    """The instruction of sample ``k``: with probability 0.5 one of its paraphrases."""
    if task not in paraphrases:
        return task
    generator = stream(seed, "paraphrase", k)
    if generator.random() < 0.5:
        return task
    return paraphrases[task][int(generator.integers(len(paraphrases[task])))]
