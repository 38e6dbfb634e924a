"""What a saved policy's processors say: LeRobot's two pipelines of ``pretrained_model``, read without LeRobot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.checkpoints.manifest import Folder
from agent.data.normalization.normalizer import Normalizer, given_statistics
from agent.data.normalization.relative import relative_dims

STATE, ACTION = "observation.state", "action"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
_KNOWN = {
    PREPROCESSOR: {
        "rename_observations_processor",
        "to_batch_processor",
        "pi0_new_line_processor",
        "tokenizer_processor",
        "device_processor",
        "relative_actions_processor",
        "normalizer_processor",
    },
    POSTPROCESSOR: {"unnormalizer_processor", "absolute_actions_processor", "device_processor"},
}
_NORMALIZERS = {PREPROCESSOR: "normalizer_processor", POSTPROCESSOR: "unnormalizer_processor"}
_MODES = {STATE: "STATE", ACTION: "ACTION"}


@dataclass(frozen=True)
class Processors:
    """The steps around a policy."""

    renamed: dict[str, str]
    """Key of an observation → the policy's key."""
    newline: bool
    """Whether an instruction must end with a newline."""
    tokenizer: str
    """Folder or hub name."""
    max_tokens: int
    """Longer instructions are cut."""
    state: Normalizer
    action: Normalizer
    relative: np.ndarray
    """(a,) bool: where an action is relative to the state's number of the same place."""

    def physical(self, actions: np.ndarray, states: np.ndarray) -> np.ndarray:
        """The policy's actions (B, T, a) in physical units, absolute, for states (B, s) in physical units."""
        actions = self.action.unnormalize(actions)
        dims = np.flatnonzero(self.relative)
        actions[..., dims] += states[:, None, dims]
        return actions


def read_processors(pretrained: Path, state_dim: int, action_dim: int, instead: Mapping[str, bytes]) -> Processors:
    """Reads both pipelines of a checkpoint.

    Args:
        pretrained: its folder.
        state_dim, action_dim: of the policy.
        instead: file → contents, in place of what the folder holds under that name.

    Raises:
        ValueError: if one is missing, has a step that is not known here, or lacks what acting needs.
    """
    before, after = (_steps(pretrained, file, instead) for file in (PREPROCESSOR, POSTPROCESSOR))
    tokenizer = _only(before, "tokenizer_processor", pretrained / PREPROCESSOR)["config"]
    relative: dict[str, Any] = next(
        (s["config"] for s in before if s["registry_name"] == "relative_actions_processor"), {}
    )
    absolute: dict[str, Any] = next(
        (s["config"] for s in after if s["registry_name"] == "absolute_actions_processor"), {}
    )
    if relative.get("enabled", False) != absolute.get("enabled", False):
        raise ValueError(
            f"{pretrained}: the preprocessor's actions are relative and the postprocessor's not, or reverse"
        )
    renames = [s["config"].get("rename_map") or {} for s in before if s["registry_name"].startswith("rename_")]
    mask = np.zeros(action_dim, dtype=bool)
    if relative.get("enabled", False):
        mask = relative_dims(relative.get("action_names") or [], relative.get("exclude_joints") or [], action_dim)
        if mask[state_dim:].any():
            raise ValueError(
                f"{pretrained / PREPROCESSOR}: action dimension {int(np.flatnonzero(mask)[-1])} is relative to the state, "
                f"which has {state_dim} dimensions"
            )
    return Processors(
        renamed={key: value for rename in renames for key, value in rename.items()},
        newline=any(s["registry_name"] == "pi0_new_line_processor" for s in before),
        tokenizer=tokenizer["tokenizer_name"],
        max_tokens=int(tokenizer["max_length"]),
        state=_normalizer(pretrained, PREPROCESSOR, before, instead, STATE, state_dim),
        action=_normalizer(pretrained, POSTPROCESSOR, after, instead, ACTION, action_dim),
        relative=mask,
    )


def _steps(pretrained: Path, file: str, instead: Mapping[str, bytes]) -> list[dict[str, Any]]:
    from agent.deployment.saved_checkpoint import read_json

    path = pretrained / file
    if file not in instead and Folder(pretrained).file(file) is None:
        raise ValueError(
            f"{pretrained} has no {file}: without the processors nobody knows the policy's tokenizer and statistics. Name a "
            "checkpoint that training saved, or copy the policy_*.json and policy_*.safetensors of such a one into it"
        )
    content = json.loads(instead[file]) if file in instead else read_json(path)
    try:
        steps = [{**step, "config": dict(step.get("config") or {})} for step in content["steps"]]
        unknown = [step["registry_name"] for step in steps if step["registry_name"] not in _KNOWN[file]]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no list of processor steps as LeRobot writes it") from None
    if unknown:
        raise ValueError(
            f"{path}: the step {unknown[0]} is not known here; known are {', '.join(sorted(_KNOWN[file]))}"
        )
    return steps


def _only(steps: list[dict[str, Any]], name: str, path: Path) -> dict[str, Any]:
    found = [step for step in steps if step["registry_name"] == name]
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} steps {name}, acting needs one")
    return found[0]


def _normalizer(
    pretrained: Path, file: str, steps: list[dict[str, Any]], instead: Mapping[str, bytes], key: str, dims: int
) -> Normalizer:
    step = _only(steps, _NORMALIZERS[file], pretrained / file)
    mode = (step["config"].get("norm_map") or {}).get(_MODES[key], "IDENTITY")
    stored = _statistics(pretrained, file, step["state_file"], instead) if "state_file" in step else {}
    values = {name.rpartition(".")[2]: value for name, value in stored.items() if name.rpartition(".")[0] == key}
    try:
        return Normalizer(mode, given_statistics(values, mode, dims))
    except ValueError as error:
        raise ValueError(f"{pretrained / file}: the statistics of {key} do not serve: {error}") from None


def _statistics(pretrained: Path, file: str, name: str, instead: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    stored = None if name in instead else Folder(pretrained).file(name)
    if name not in instead and stored is None:
        raise ValueError(f"{pretrained / file} names {name}, which is not there")
    try:
        return load(instead[name] if stored is None else stored.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{pretrained / name}, statistics of {file}, cannot be read: {error}") from None
