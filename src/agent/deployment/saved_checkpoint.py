"""Opens a saved checkpoint: finds and verifies its files, and reads its config and how it was trained."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from agent.checkpoints.manifest import Folder
from agent.models import registry
from agent.models.lerobot_config import TrainableConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

PREPROCESSOR = "policy_preprocessor.json"
FOLDERS = ("pretrained_model", "pretrained_model_ema")
"""The folders of a checkpoint that hold the weights and their moving average."""


@dataclass(frozen=True)
class Source:
    """Describes a checkpoint that has been verified."""

    files: list[Path]
    """The weight files."""
    pretrained: Path
    """``pretrained_model``, or another folder in its layout."""
    written: dict[str, Any]
    """The content of its ``config.json``."""
    config: TrainableConfig
    """The same, decoded as the policy's config."""
    run: Path | None
    """The run folder that contains it; None outside a run."""
    step: int | None
    """The number of updates at the checkpoint; None if it has no manifest."""
    training: dict[str, Any]
    """The training config; empty if it was not kept."""

    @property
    def averaged(self) -> bool:
        """Says whether the weights are the moving average of the trained ones."""
        return self.pretrained.name == FOLDERS[1]

    @property
    def name(self) -> str:
        """Returns the run's name, or the folder's outside a run."""
        folder = self.pretrained.parent if self.pretrained.name in FOLDERS else self.pretrained
        return self.run.name if self.run is not None else folder.name


def open_checkpoint(reference: str) -> Source:
    """Finds a checkpoint, verifies its files and reads its config.

    Args:
        reference: a run folder, a checkpoint, or its ``pretrained_model``.

    Raises:
        ValueError: if it does not exist, is damaged, or is of an unknown type of policy.
    """
    from agent.checkpoints import manifest
    from agent.checkpoints.finding import find_weights

    if not Path(reference).expanduser().exists():
        raise ValueError(
            f"--checkpoint: there is no {reference}; name a run folder, a checkpoint or its pretrained_model"
        )
    # Only the folder is resolved, because `last` links to a checkpoint; a file in the hub's cache links to a blob, beside
    # which the other files are missing.
    files = [file.parent.resolve() / file.name for file in find_weights(reference, "--checkpoint")]
    pretrained = files[0].parent
    checkpoint = pretrained.parent
    step = None
    if (checkpoint / manifest.MANIFEST).exists() and pretrained.name in FOLDERS:
        if (damage := manifest.verify(checkpoint)) is not None:
            others = sorted(path.name for path in checkpoint.parent.glob("step_*") if path.name != checkpoint.name)
            hint = f"; there are also {', '.join(others)}" if others else ""
            raise ValueError(f"--checkpoint: {checkpoint} is damaged: {damage}{hint}")
        step = int(json.loads((checkpoint / manifest.MANIFEST).read_text(encoding="utf-8"))["step"])
    if (config := Folder(pretrained).file("config.json")) is None:
        raise ValueError(f"there is no {pretrained / 'config.json'}, which says what model the weights are of")
    written = read_json(config)
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None
    return Source(
        files, pretrained, written, _model_config(pretrained, written), run, step, _training_config(pretrained)
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _model_config(pretrained: Path, written: dict[str, Any]) -> TrainableConfig:
    import draccus

    from agent.models import other_models
    from agent.models.base import ModelConfig

    path, kind = pretrained / "config.json", written.get("type")
    families = registry.families()
    if kind not in families:
        found = "names no type of model" if kind is None else f"is of a model of type {kind!r}"
        what = "" if kind is None else other_models.title(str(kind))
        titles = " or ".join(family.config.title for family in families.values())
        types = " or ".join(f'"{known}"' for known in families)
        raise ValueError(f'{path} {found}{what}; name a checkpoint of {titles}, whose config.json has "type": {types}')
    try:
        return draccus.decode(ModelConfig, written)
    except draccus.utils.DecodingError as error:
        raise ValueError(f"{path}: {error}; only the format that this project writes is read") from None
    except draccus.utils.ParsingError as error:  # it wraps the config class's own error about a value
        raise ValueError(f"{path}: {error.__cause__ or error}") from None


def _training_config(pretrained: Path) -> dict[str, Any]:
    """Reads the config that a checkpoint was trained with; empty for weights that no run of this project saved."""
    checkpoint = pretrained.parent
    if pretrained.name not in FOLDERS:
        return {}
    of_run = checkpoint.parent.parent / "config.yaml"
    path = Folder(checkpoint / "training_state").file("config.yaml") or (of_run if of_run.is_file() else None)
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path is not None else {}


def prevailing_dtype(files: list[Path]) -> torch.dtype:
    """Returns the type of most of the weights, by their bytes."""
    from agent.checkpoints.tensor_reader import entries

    sizes: Counter[torch.dtype] = Counter()
    for file in files:
        for entry in entries(file):
            if not entry.name.endswith("lm_head.weight"):
                sizes[entry.dtype] += entry.end - entry.begin
    if not sizes:
        raise ValueError(f"{files[0]} holds no weights")
    return sizes.most_common(1)[0][0]


def statistics_of(pretrained: Path) -> dict[str, dict[str, np.ndarray]] | None:
    """Reads feature → statistic → values (dims,), from the checkpoint's preprocessor; None if it has none."""
    from safetensors.numpy import load_file

    there = Folder(pretrained)
    if (path := there.file(PREPROCESSOR)) is None:
        return None
    for step in read_json(path).get("steps", []):
        if step.get("registry_name") == "normalizer_processor" and "state_file" in step:
            statistics: dict[str, dict[str, np.ndarray]] = {}
            if (stored := there.file(step["state_file"])) is None:
                raise ValueError(f"{path} names {step['state_file']}, which is not there")
            for key, values in load_file(stored).items():
                feature, _, name = key.rpartition(".")
                statistics.setdefault(feature, {})[name] = values
            return statistics
    return None


def datasets_of(training: dict[str, Any]) -> list[dict[str, Any]]:
    return ((training.get("data") or {}).get("train") or {}).get("datasets") or []


def trained_on(entry: dict[str, Any], training: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Returns a data set's name, and the episodes and frames that were in training if its folder is on this machine."""
    from agent.data.recorded.episodes import choose_episodes, hold_out
    from agent.data.recorded.metadata import read_metadata

    name = {"name": entry["repo_id"]}
    root = Path(entry.get("root") or "").expanduser()
    if not entry.get("root") or not root.is_dir():
        return name
    try:
        metadata = read_metadata(entry["repo_id"], root)
        episodes = choose_episodes(metadata, entry.get("episodes"), entry.get("split"))
        validation = training["data"].get("val") or {}
        if validation.get("fraction") and not validation.get("datasets"):
            episodes, _ = hold_out(episodes, validation["fraction"])
    except ValueError as error:
        notes.append(f"the size of data set {entry['repo_id']} is unknown, since its metadata cannot be read now")
        print(f"note: {error}", file=sys.stderr)
        return name
    frames = sum(int(metadata.episodes["length"][episode]) for episode in episodes)
    return {**name, "episodes": len(episodes), "frames": frames}


def bases(source: Source) -> list[str]:
    """Lists the weights that training started from, then the weights that those started from, and so on."""
    from agent.checkpoints.finding import find_weights
    from agent.deployment.model_card import is_hub_id

    found: list[str] = []
    training, written = source.training, source.written
    while (reference := _began_from(training, written)) is not None and reference not in found:
        found.append(reference)
        if is_hub_id(reference) or not Path(reference).expanduser().exists():
            break
        try:
            pretrained = find_weights(reference, "load_from_checkpoint")[0].parent.resolve()
        except ValueError:
            break  # the weights no longer exist, so nothing says what they were trained from
        config = Folder(pretrained).file("config.json")
        training, written = _training_config(pretrained), read_json(config) if config is not None else {}
    return found


def _began_from(training: dict[str, Any], written: dict[str, Any]) -> str | None:
    model = training.get("model_cfg") or written
    family = registry.families().get(model.get("type", ""))
    keys = ("pretrained_path", *(family.config.base_weights if family is not None else ()))
    return training.get("load_from_checkpoint") or next((model[key] for key in keys if model.get(key)), None)
