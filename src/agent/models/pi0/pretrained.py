"""Writes a π0 the way LeRobot 0.6.1 does: ``config.json``, ``model.safetensors``, and the two processor pipelines.

The processors' JSON is written here rather than by LeRobot's classes, because building those would load the
tokenizer from the hub once more in the middle of a checkpoint; a test holds both against each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.models.pi0.adapter import to_lerobot

if TYPE_CHECKING:
    from torch import Tensor

    from agent.models.pi0.configuration import PI0Config

Statistics = dict[str, dict[str, np.ndarray]]


def write_pretrained(
    folder: Path, config: PI0Config, tensors: dict[str, Tensor], statistics: Statistics, last_update: int
) -> None:
    """Fills ``pretrained_model/``.

    Args:
        folder: an existing folder.
        config: the model's config, with its features.
        tensors: the model's state, by its own names.
        statistics: feature → statistic → values, as LeRobot's normaliser wants them.
        last_update: of the run, at which the learning rate's decay ends when the config does not say.
    """
    from safetensors.torch import save_file

    weights = {name: t.detach().cpu().contiguous() for name, t in to_lerobot(tensors, config).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config.to_lerobot(last_update))
    _write_processors(folder, config, statistics)


def _write_processors(folder: Path, config: PI0Config, statistics: Statistics) -> None:
    from safetensors.numpy import save_file

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
            enabled=False,
            exclude_joints=config.relative_exclude_joints,
            action_names=config.action_feature_names,
        ),
        _step("normalizer_processor", **normalize),
    ]
    after = [
        _step("unnormalizer_processor", eps=1e-8, features=outputs, norm_map=mapping),
        _step("absolute_actions_processor", enabled=False),
        _step("device_processor", device="cpu", float_dtype=None),
    ]
    flat = {f"{key}.{name}": values for key, entry in statistics.items() for name, values in entry.items()}
    for pipeline, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        for index, step in enumerate(steps):
            if step["registry_name"].endswith("normalizer_processor"):
                step["state_file"] = f"{pipeline}_step_{index}_{step['registry_name']}.safetensors"
                save_file(flat, folder / step["state_file"])
        _write_json(folder / f"{pipeline}.json", {"name": pipeline, "steps": steps})


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
