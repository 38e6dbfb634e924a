"""Tells a client whose keys do not fit the policy what is wrong, and with which options of the server they would."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agent.deployment.observations import TASK, UnfitKeys
from agent.deployment.processors import STATE
from agent.spelling import nearest


def told_to_client(
    unfit: UnfitKeys, observation: Mapping[str, Any], said: Mapping[str, str], dropped: Sequence[str], state_dim: int
) -> str:
    """Writes the refusal.

    Args:
        unfit: what the check found.
        observation: by the policy's keys where these are known, else by the client's.
        said: the policy's key → the client's.
        dropped: keys of the client that ``--ignore`` names.
        state_dim: numbers in the policy's state.
    """
    # A client that uses the policy's own names knows `task`; openpi's knows `prompt`.
    task = (
        TASK if any(ours == theirs and ours in unfit.expected for ours, theirs in said.items()) else f"prompt ({TASK})"
    )
    words = {TASK: task, **{ours: f"{theirs} ({ours})" if theirs != ours else ours for ours, theirs in said.items()}}
    unknown = {said.get(key, key): observation[key] for key in unfit.unknown}
    wrong = [f"the request has no {', '.join(words.get(key, key) for key in unfit.missing)}"] if unfit.missing else []
    wrong += [f"the policy knows no {', '.join(map(repr, unknown))}"] if unknown else []
    text = f"{', and '.join(wrong)}; a request holds {', '.join(words.get(key, key) for key in unfit.expected)}"
    if cameras := [key for key in unfit.missing if key not in (STATE, TASK)]:
        text += f"; {', '.join(cameras)} is given as None where the robot has no such camera"
    if dropped:
        text += f"; --ignore drops {', '.join(dropped)}"
    options, certain = _options(unfit.missing, unknown, state_dim)
    if options:
        text += f". Or start the server with {'' if certain else 'what belongs together, for example '}{options}"
    return text


def _options(missing: Sequence[str], unknown: Mapping[str, Any], state_dim: int) -> tuple[str, bool]:
    """Finds the options that would make the request fit, and whether they are the only ones."""
    left, options, certain = dict(unknown), [], True
    for ours in missing:
        theirs = _fitting(ours, left, state_dim)
        if not theirs and ours == TASK:
            options.append("--default_prompt 'what the robot is to do'")
        if theirs and ours == STATE:
            options.append(f"--rename {shlex.quote(','.join(theirs))}={STATE}")
        elif theirs:
            theirs = [_alike(ours, theirs)]
            options.append(f"--rename {shlex.quote(theirs[0])}={ours}")
        certain = certain and not theirs
        left = {key: value for key, value in left.items() if key not in theirs}
    options += [f"--ignore {shlex.quote(key)}" for key in left]
    return " ".join(options), certain


def _alike(ours: str, theirs: Sequence[str]) -> str:
    """Finds the client's key whose last part resembles the policy's most; the first one if none does."""
    short = {key.replace("/", ".").rpartition(".")[2]: key for key in reversed(theirs)}
    near = nearest(ours.rpartition(".")[2], short)
    return theirs[0] if near is None else short[near]


def _fitting(ours: str, unknown: Mapping[str, Any], state_dim: int) -> list[str]:
    """Finds the unknown keys with values that fit this key of the policy; for the state, keys that make it up together."""
    if ours == TASK:
        return [key for key, value in unknown.items() if isinstance(value, str)]
    if ours != STATE:
        return [key for key, value in unknown.items() if isinstance(value, np.ndarray) and value.ndim == 3]
    sizes = {key: size for key, value in unknown.items() if (size := _size(value))}
    whole = [key for key, size in sizes.items() if size == state_dim]
    return whole[:1] if whole else list(sizes) if sum(sizes.values()) == state_dim else []


def _size(value: Any) -> int:
    """Counts the numbers in a vector or a number; 0 for anything else."""
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return 1
    if isinstance(value, np.ndarray):
        return value.size if value.ndim <= 1 and value.dtype.kind in "fiu" else 0
    is_list = isinstance(value, list | tuple) and all(isinstance(item, int | float | np.number) for item in value)
    return len(value) if is_list else 0
