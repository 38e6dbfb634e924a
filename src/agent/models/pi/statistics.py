"""Reads the normalisation statistics that a published π0 policy brings, wherever its format keeps them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.checkpoints.manifest import Folder

if TYPE_CHECKING:
    from agent.models.pi.configuration import PI0Config

Statistics = dict[str, dict[str, np.ndarray]]
"""``state`` and ``action`` → statistic → values, (dims,) float32."""

_PREPROCESSOR = "policy_preprocessor.json"
_FEATURES = {"observation.state": "state", "action": "action"}
_V1_BUFFER = re.compile(
    r"(?:normalize_inputs\.buffer_observation_(state)|(?:normalize_targets|unnormalize_outputs)\.buffer_(action))\.(\w+)"
)
_OPENPI = {"state": "state", "actions": "action"}


def read_statistics(files: Sequence[Path], config: PI0Config) -> Statistics:
    """The statistics beside, or in, the weights.

    LeRobot from 0.4 on, and this project, keep them in the file of the normalising step of ``policy_preprocessor.json``;
    LeRobot v1 in buffers among the weights; openpi in ``assets/…/norm_stats.json``.

    Args:
        files: of the weights, as ``agent.checkpoints.finding.find_weights`` finds them.
        config: of the model that is to be normalised with them.

    Raises:
        ValueError: if there are none, they are not of one robot, or of relative actions where the model learns absolute
            ones or reverse. (openpi's files do not say which they are of.)
    """
    folder = files[0].parent
    found = _from_processor(folder) or _from_buffers(files) or _from_openpi(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds no statistics: no policy_preprocessor.json with a normalising step, no buffers "
            "normalize_inputs.* among the weights, and no assets/…/norm_stats.json"
        )
    if set(found) != {"state", "action"}:
        raise ValueError(f"{folder} holds statistics of {', '.join(found) or 'nothing'}, not of state and action")
    if Folder(folder).file(_PREPROCESSOR) is not None:
        _check_relative(folder, config)
    return found


def _check_relative(folder: Path, config: PI0Config) -> None:
    steps = json.loads(Folder(folder).text(_PREPROCESSOR))["steps"]
    theirs: dict[str, Any] = next(
        (step["config"] for step in steps if step["registry_name"] == "relative_actions_processor"), {}
    )
    relative = bool(theirs.get("enabled"))
    if relative != config.use_relative_actions:
        kinds = {True: "relative", False: "absolute"}
        raise ValueError(
            f"{folder} was trained on {kinds[relative]} actions, and model_cfg.use_relative_actions is "
            f"{str(config.use_relative_actions).lower()}: its statistics of actions are others"
        )
    if relative and sorted(theirs.get("exclude_joints") or []) != sorted(config.relative_exclude_joints):
        raise ValueError(
            f"{folder} was trained with relative_exclude_joints {theirs.get('exclude_joints')}, and model_cfg has "
            f"{config.relative_exclude_joints}: its statistics of actions are others"
        )


def _from_processor(folder: Path) -> Statistics | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    there = Folder(folder)
    if (description := there.file(_PREPROCESSOR)) is None:
        return None
    try:
        steps = json.loads(description.read_text(encoding="utf-8"))["steps"]
        names = [s["state_file"] for s in steps if s["registry_name"] == "normalizer_processor" and "state_file" in s]
        if absent := [name for name in names if there.file(name) is None]:
            raise ValueError(f"it names {absent[0]}, which is not there")
        flat = {key: value for name in names for key, value in load_file(folder / name).items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{description} and the files it names cannot be read: {error}") from None
    pairs = (key.rpartition(".") for key in flat)
    return _sorted({(feature, name): flat[f"{feature}.{name}"] for feature, _, name in pairs}, _FEATURES) or None


def _from_buffers(files: Sequence[Path]) -> Statistics | None:
    from agent.checkpoints import tensor_reader

    found: Statistics = {}
    for path in files:
        names = {e.name: m for e in tensor_reader.entries(path) if (m := _V1_BUFFER.fullmatch(e.name))}
        if not names:
            continue
        for name, tensor in tensor_reader.read(path, only=set(names)).items():
            feature = names[name][1] or names[name][2]
            found.setdefault(feature, {})[names[name][3]] = tensor.float().numpy()
    return found or None


def _from_openpi(folder: Path) -> Statistics | None:
    files = Folder(folder).matching("assets/**/norm_stats.json")
    if len(files) > 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in files)
        raise ValueError(f"{folder} holds the statistics of several robots ({listed}); leave one of them there")
    if not files:
        return None
    try:
        content = json.loads(files[0].read_text(encoding="utf-8"))["norm_stats"]
        flat = {
            (f, name): np.asarray(v, np.float32)
            for f, some in content.items()
            for name, v in some.items()
            if v is not None
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{files[0]} cannot be read as openpi's statistics: {error}") from None
    return _sorted(flat, _OPENPI)


def _sorted(flat: Mapping[tuple[str, str], np.ndarray], features: Mapping[str, str]) -> Statistics:
    found: Statistics = {}
    for (feature, name), values in flat.items():
        if feature in features and values.ndim == 1:
            found.setdefault(features[feature], {})[name] = values.astype(np.float32)
    return found
