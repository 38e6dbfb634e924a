"""Checks that an observation has what a policy expects; errors name the key, what it holds and what is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.batch import EMPTY_CAMERA
from agent.deployment.processors import STATE

if TYPE_CHECKING:
    import torch

TASK = "task"
_MOST_CHARACTERS = 10_000


def is_empty(slot: str) -> bool:
    """Says whether a camera slot never holds an image."""
    return slot.startswith(EMPTY_CAMERA)


class UnfitKeys(ValueError):
    """Is raised if an observation has keys that the policy does not know, or lacks some.

    Args:
        unknown: keys of the observation that the policy does not know.
        missing: keys of the policy that the observation lacks.
        expected: all keys of the policy.
    """

    def __init__(self, unknown: Sequence[str], missing: Sequence[str], expected: Sequence[str]) -> None:
        self.unknown, self.missing, self.expected = tuple(unknown), tuple(missing), tuple(expected)
        wrong = [f"the policy knows no {', '.join(map(repr, unknown))}"] if unknown else []
        wrong += [f"the observation has no {', '.join(missing)}"] if missing else []
        hint = "; a camera that the robot does not have is given as None" if {*missing} - {STATE, TASK} else ""
        super().__init__(f"{', and '.join(wrong)}; an observation holds {', '.join(expected)}{hint}")


def check_observation(observation: Mapping[str, Any], slots: Sequence[str], state_dim: int) -> None:
    """Checks an observation against a policy's features.

    Args:
        observation: the observation under the policy's own keys.
        slots: the policy's camera slots, including those that are always empty.
        state_dim: the dimensions of the state.

    Raises:
        UnfitKeys: if keys are unknown or missing.
        ValueError: for the first value that does not fit.
    """
    cameras = [slot for slot in slots if not is_empty(slot)]
    expected = [*cameras, STATE, TASK]
    unknown = [key for key in observation if key not in slots and key not in expected]
    missing = [key for key in expected if key not in observation]
    if unknown or missing:
        raise UnfitKeys(unknown, missing, expected)
    for slot in slots:
        if observation.get(slot) is not None:
            _check_image(slot, observation[slot])
    if cameras and all(observation[slot] is None for slot in cameras):
        raise ValueError(f"{', '.join(cameras)}: got None, expected a picture of at least one camera")
    _check_state(observation[STATE], state_dim)
    check_task(observation[TASK])


def check_task(task: Any) -> None:
    """Checks an instruction.

    Raises:
        ValueError: if it is not a text, is empty or is too long.
    """
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"{TASK}: got {task!r:.60}, expected an instruction, a text that is not empty")
    if len(task) > _MOST_CHARACTERS:  # it would be tokenized before it is cut, and then cached
        raise ValueError(f"{TASK}: got {len(task)} characters, expected at most {_MOST_CHARACTERS}")


def _check_image(key: str, image: Any) -> None:
    wanted = "expected uint8 of shape (height, width, 3) or (3, height, width)"
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{key}: got a {type(image).__name__}, {wanted}")
    if image.dtype != np.uint8:
        raise ValueError(f"{key}: got {image.dtype} of shape {image.shape}, {wanted}, values 0 to 255")
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]) or image.size == 0:
        raise ValueError(f"{key}: got uint8 of shape {image.shape}, {wanted}")


def _check_state(state: Any, dims: int) -> None:
    wanted = f"expected {dims} finite numbers, shape ({dims},)"
    try:
        values = np.asarray(state) if isinstance(state, np.ndarray | list | tuple) else None
    except ValueError:
        raise ValueError(f"{STATE}: got lists of several lengths, {wanted}") from None
    if values is None or values.dtype.kind not in "fiu":
        kind = type(state).__name__ if values is None else f"values of type {values.dtype}"
        raise ValueError(f"{STATE}: got {kind}, {wanted}")
    if values.shape != (dims,):
        raise ValueError(f"{STATE}: got shape {values.shape}, {wanted}")
    with np.errstate(over="ignore"):  # values too large for float32 count as not finite
        bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)))
    if len(bad):
        raise ValueError(f"{STATE}: got {values[bad[0]]} at dimension {bad[0]}, {wanted}")


def channels_first(image: np.ndarray) -> torch.Tensor:
    """Returns a checked image as (3, H, W); an image that fits both layouts is taken as (H, W, 3)."""
    import torch

    # It is always a copy, because torch warns about read-only memory, such as a client's message.
    return torch.from_numpy(np.array(image.transpose(2, 0, 1) if image.shape[2] == 3 else image, order="C"))
