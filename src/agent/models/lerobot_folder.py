"""Makes a policy's folder in LeRobot 0.6.1's layout: ``config.json``, ``model.safetensors`` and two processor pipelines.

The processors' JSON is written here rather than by LeRobot's classes, because building those would load the tokenizer
from the hub again in the middle of a checkpoint; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.checkpoints.manifest import Folder

if TYPE_CHECKING:
    from torch import Tensor

    from agent.batch import Prompt
    from agent.models.lerobot_config import TrainableConfig

PREPROCESSOR = "policy_preprocessor.json"
ROBOTS = "robots.json"
NAMES = "dimension_names.json"
_FEATURES = {"observation.state": "state", "action": "action"}
Statistics = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Instructions:
    """Says how LeRobot's preprocessor turns an instruction into tokens."""

    prompt: Prompt
    steps: Sequence[str] = ()
    """Registered names of the family's own steps before the tokenizer, which take no settings."""


def pretrained_contents(
    config: TrainableConfig,
    published: dict[str, Tensor],
    instructions: Instructions | None,
    statistics: Statistics,
    last_update: int,
    robots: dict[str, Any] | None = None,
    names: dict[str, list[str]] | None = None,
) -> tuple[dict[str, dict[str, Tensor]], Callable[[Path], None]]:
    """Collects the contents of ``pretrained_model/``, so that a background thread can write them.

    Args:
        config: the model's config, with its features filled in.
        published: the model's tensors under the names of published checkpoints.
        instructions: how instructions are tokenized; None for a policy that reads none.
        statistics: feature → statistic → values (dims,), under the names of LeRobot's normaliser.
        last_update: number of the run's last update, where the learning rate's decay ends if the config states no other.
        robots: statistics of every robot, for ``robots.json``; None for a single robot.
        names: feature → names of its dimensions, for ``dimension_names.json``; None if they are unknown.

    Returns:
        File → tensors, which are the model's own and not copies; and a function that writes all other files into a folder.
        That function keeps the values of this moment, so it may be called later, from any thread.
    """
    documents: dict[str, Any] = {"config.json": config.to_lerobot(last_update)}
    documents |= {file: content for file, content in ((ROBOTS, robots), (NAMES, names)) if content is not None}
    normalizers = []
    for pipeline, steps in _processors(config, instructions).items():
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

    return {"model.safetensors": published}, write_small


def _processors(config: TrainableConfig, instructions: Instructions | None) -> dict[str, list[dict[str, Any]]]:
    lerobot = config.to_lerobot()
    device = lerobot["device"] or "cpu"
    inputs, outputs = lerobot["input_features"], lerobot["output_features"]
    mapping = lerobot["normalization_mapping"]
    normalize = {"eps": 1e-8, "features": {**inputs, **outputs}, "norm_map": mapping}
    before = [
        _step("rename_observations_processor", rename_map={}),
        _step("to_batch_processor"),
        *(_tokenizing(instructions) if instructions is not None else ()),
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


def _tokenizing(instructions: Instructions) -> list[dict[str, Any]]:
    prompt = instructions.prompt
    # The path is made absolute, because a relative one would not be found from another working directory.
    local = Path(prompt.tokenizer).expanduser()
    return [
        *(_step(name) for name in instructions.steps),
        _step(
            "tokenizer_processor",
            max_length=prompt.max_length,
            task_key="task",
            padding_side="right",
            padding="max_length",
            truncation=True,
            tokenizer_name=str(local.resolve()) if local.is_dir() else prompt.tokenizer,
        ),
    ]


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def check_relative(folder: Path, config: TrainableConfig) -> None:
    steps = json.loads(Folder(folder).text(PREPROCESSOR))["steps"]
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


def statistics_of_processors(folder: Path) -> dict[str, dict[str, np.ndarray]] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    there = Folder(folder)
    if (description := there.file(PREPROCESSOR)) is None:
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
    return by_feature({(feature, name): flat[f"{feature}.{name}"] for feature, _, name in pairs}, _FEATURES) or None


def by_feature(
    flat: Mapping[tuple[str, str], np.ndarray], features: Mapping[str, str]
) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for (feature, name), values in flat.items():
        if feature in features and values.ndim == 1:
            found.setdefault(features[feature], {})[name] = values.astype(np.float32)
    return found
