"""Reads the normalisation statistics of a published π0 policy, from wherever its format stores them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agent.checkpoints.manifest import Folder
from agent.models.lerobot_folder import PREPROCESSOR, by_feature, check_relative, statistics_of_processors

if TYPE_CHECKING:
    from agent.models.pi.configuration import PI0Config

Statistics = dict[str, dict[str, np.ndarray]]
"""Maps ``state`` and ``action`` → statistic → values, (dims,) float32."""

_V1_BUFFER = re.compile(
    r"(?:normalize_inputs\.buffer_observation_(state)|(?:normalize_targets|unnormalize_outputs)\.buffer_(action))\.(\w+)"
)
_OPENPI = {"state": "state", "actions": "action"}


def read_statistics(files: Sequence[Path], config: PI0Config) -> Statistics:
    """Reads the statistics that are stored beside the weights or among them.

    LeRobot from 0.4 on, and this project, keep them in the file of the normalising step of ``policy_preprocessor.json``;
    LeRobot v1 in buffers among the weights; openpi in ``assets/…/norm_stats.json``.

    Args:
        files: the weight files, as ``agent.checkpoints.finding.find_weights`` returns them.
        config: the config of the model that will normalise with them.

    Raises:
        ValueError: if there are none, if they are not of a single robot, or if they are of relative actions and the model
            learns absolute ones, or the reverse. (openpi's files do not say which they are of.)
    """
    folder = files[0].parent
    found = statistics_of_processors(folder) or _from_buffers(files) or _from_openpi(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds no statistics: no policy_preprocessor.json with a normalising step, no buffers "
            "normalize_inputs.* among the weights, and no assets/…/norm_stats.json"
        )
    if set(found) != {"state", "action"}:
        raise ValueError(f"{folder} holds statistics of {', '.join(found) or 'nothing'}, not of state and action")
    if Folder(folder).file(PREPROCESSOR) is not None:
        check_relative(folder, config)
    return found


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
    return by_feature(flat, _OPENPI)
