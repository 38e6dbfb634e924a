"""Writes a π0 the way LeRobot 0.6.1 does: ``config.json``, ``model.safetensors``, and the two processor pipelines.

The processors' JSON is written here rather than by LeRobot's classes, because building those would load the
tokenizer from the hub once more in the middle of a checkpoint; a test holds both against each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.models.pi.adapter import to_lerobot

if TYPE_CHECKING:
    from torch import Tensor

    from agent.models.pi.configuration import PI0Config

ROBOTS = "robots.json"
NAMES = "dimension_names.json"
Statistics = dict[str, dict[str, np.ndarray]]


def pretrained_contents(
    config: PI0Config,
    tensors: dict[str, Tensor],
    statistics: Statistics,
    last_update: int,
    robots: dict[str, Any] | None = None,
    names: dict[str, list[str]] | None = None,
) -> tuple[dict[str, dict[str, Tensor]], Callable[[Path], None]]:
    """What ``pretrained_model/`` consists of, for a writer that works in the background.

    Args:
        config: the model's config, with its features.
        tensors: the model's state, by its own names.
        statistics: feature → statistic → values, as LeRobot's normaliser wants them.
        last_update: of the run, at which the learning rate's decay ends when the config does not say.
        robots: statistics of every robot, for ``robots.json``; None if it is one.
        names: feature → names of its dimensions, for ``dimension_names.json``; None if it has none.

    Returns:
        The tensor files, whose tensors are the model's own and not copies, and a function that writes all other files
        into a folder. That function holds values of now: it may be called later, from any thread.
    """
    documents: dict[str, Any] = {"config.json": config.to_lerobot(last_update)}
    documents |= {file: content for file, content in ((ROBOTS, robots), (NAMES, names)) if content is not None}
    normalizers = []
    for pipeline, steps in _processors(config).items():
        for index, step in enumerate(steps):
            if step["registry_name"].endswith("normalizer_processor"):
                step["state_file"] = f"{pipeline}_step_{index}_{step['registry_name']}.safetensors"
                normalizers.append(step["state_file"])
        documents[f"{pipeline}.json"] = {"name": pipeline, "steps": steps}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in documents.items()}
    flat = {f"{key}.{name}": np.array(values) for key, entry in statistics.items() for name, values in entry.items()}

    def write_small(folder: Path) -> None:
        from safetensors.numpy import save_file

        for name in normalizers:
            save_file(flat, folder / name)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    return {"model.safetensors": to_lerobot(tensors, config)}, write_small


def _processors(config: PI0Config) -> dict[str, list[dict[str, Any]]]:
    lerobot = config.to_lerobot()
    device = lerobot["device"] or "cpu"
    inputs, outputs = lerobot["input_features"], lerobot["output_features"]
    mapping = lerobot["normalization_mapping"]
    # A folder given relative to here would not be found from elsewhere.
    local = Path(config.tokenizer_path).expanduser()
    tokenizer = str(local.resolve()) if local.is_dir() else config.tokenizer_path
    normalize = {"eps": 1e-8, "features": {**inputs, **outputs}, "norm_map": mapping}
    before = [
        _step("rename_observations_processor", rename_map={}),
        _step("to_batch_processor"),
        _step("pi0_new_line_processor"),
        _step(
            "tokenizer_processor",
            max_length=config.tokenizer_max_length,
            task_key="task",
            padding_side="right",
            padding="max_length",
            truncation=True,
            tokenizer_name=tokenizer,
        ),
        _step("device_processor", device=device, float_dtype=None),
        _step(
            "relative_actions_processor",
            enabled=config.use_relative_actions,
            exclude_joints=config.relative_exclude_joints,
            action_names=config.action_feature_names,
        ),
        _step("normalizer_processor", **normalize),
    ]
    after = [
        _step("unnormalizer_processor", eps=1e-8, features=outputs, norm_map=mapping),
        _step("absolute_actions_processor", enabled=config.use_relative_actions),
        _step("device_processor", device="cpu", float_dtype=None),
    ]
    return {"policy_preprocessor": before, "policy_postprocessor": after}


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}
