"""Reads a saved policy's processors, the two pipelines that LeRobot keeps in ``pretrained_model``, without LeRobot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agent.batch import Prompt
from agent.checkpoints.manifest import Folder
from agent.data.normalization.normalizer import Normalizer, given_statistics
from agent.data.normalization.relative import relative_dims
from agent.models import registry
from agent.models.lerobot_config import TrainableConfig

STATE, ACTION = "observation.state", "action"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
_KNOWN = {
    PREPROCESSOR: {
        "rename_observations_processor",
        "to_batch_processor",
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
    """Holds the steps before and after a policy."""

    renamed: dict[str, str]
    """Maps a key of an observation → the policy's key."""
    prompt: Prompt | None
    """How an instruction is turned into tokens; None for a policy that reads none."""
    state: Normalizer
    action: Normalizer
    relative: np.ndarray
    """(a,) bool, True where an action is relative to the state's value at the same index."""

    def physical(self, actions: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Converts the policy's actions (B, T, a) to absolute physical units, given states (B, s) in physical units."""
        actions = self.action.unnormalize(actions)
        dims = np.flatnonzero(self.relative)
        actions[..., dims] += states[:, None, dims]
        return actions


def read_processors(pretrained: Path, config: TrainableConfig, instead: Mapping[str, bytes]) -> Processors:
    """Reads both pipelines of a checkpoint.

    Args:
        pretrained: the checkpoint's folder.
        config: the policy's config, with its features.
        instead: file → contents that replace the folder's file of that name.

    Raises:
        ValueError: if a pipeline is missing, has an unknown step, or lacks a step that acting needs.
    """
    state_dim, action_dim = config.state_dim, config.action_dim
    assert state_dim is not None and action_dim is not None
    own = registry.family(config).saved.prompt_steps
    before, after = (_steps(pretrained, file, instead, own) for file in (PREPROCESSOR, POSTPROCESSOR))
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
        prompt=_prompt(pretrained, config, before),
        state=_normalizer(pretrained, PREPROCESSOR, before, instead, STATE, state_dim),
        action=_normalizer(pretrained, POSTPROCESSOR, after, instead, ACTION, action_dim),
        relative=mask,
    )


def _prompt(pretrained: Path, config: TrainableConfig, steps: list[dict[str, Any]]) -> Prompt | None:
    """Returns the policy's prompt with the settings of its saved steps."""
    family = registry.family(config)
    if (prompt := family.prompt(config)) is None:
        return None
    tokenizer = _only(steps, "tokenizer_processor", pretrained / PREPROCESSOR)["config"]
    changes = [change for name, change in family.saved.prompt_steps.items() if _named(steps, name)]

    def text(task: str) -> str:
        for change in changes:
            task = change(task)
        return task

    return replace(prompt, tokenizer=tokenizer["tokenizer_name"], max_length=int(tokenizer["max_length"]), text=text)


def _named(steps: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [step for step in steps if step["registry_name"] == name]


def _steps(pretrained: Path, file: str, instead: Mapping[str, bytes], own: Iterable[str]) -> list[dict[str, Any]]:
    from agent.deployment.saved_checkpoint import read_json

    path, known = pretrained / file, _KNOWN[file] | ({*own} if file == PREPROCESSOR else set())
    if file not in instead and Folder(pretrained).file(file) is None:
        raise ValueError(
            f"{pretrained} has no {file}: without the processors nobody knows the policy's tokenizer and statistics. Name a "
            "checkpoint that training saved, or copy the policy_*.json and policy_*.safetensors of such a one into it"
        )
    content = json.loads(instead[file]) if file in instead else read_json(path)
    try:
        steps = [{**step, "config": dict(step.get("config") or {})} for step in content["steps"]]
        unknown = [step["registry_name"] for step in steps if step["registry_name"] not in known]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no list of processor steps as LeRobot writes it") from None
    if unknown:
        raise ValueError(f"{path}: the step {unknown[0]} is not known here; known are {', '.join(sorted(known))}")
    return steps


def _only(steps: list[dict[str, Any]], name: str, path: Path) -> dict[str, Any]:
    found = _named(steps, name)
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
