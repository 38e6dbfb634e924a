"""A checkpoint that is to be exported: where it is, whether it is whole, and what is known of how it came about."""

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

if TYPE_CHECKING:
    import numpy as np
    import torch

PREPROCESSOR = "policy_preprocessor.json"
FOLDERS = ("pretrained_model", "pretrained_model_ema")
"""Of a checkpoint: the weights, and their moving average."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, verified."""

    files: list[Path]
    """Its weights."""
    pretrained: Path
    """``pretrained_model``, or the folder that stands for it."""
    written: dict[str, Any]
    """Its config.json."""
    config: Any
    """The same as the model's config object."""
    run: Path | None
    """The run folder it is in, if it is in one."""
    step: int | None
    """Updates done, if the checkpoint says."""
    training: dict[str, Any]
    """The training config; empty if nobody kept it."""

    @property
    def averaged(self) -> bool:
        """Whether the weights are the moving average of those in training."""
        return self.pretrained.name == FOLDERS[1]

    @property
    def name(self) -> str:
        """The run's, else the folder's."""
        folder = self.pretrained.parent if self.pretrained.name in FOLDERS else self.pretrained
        return self.run.name if self.run is not None else folder.name


def open_checkpoint(reference: str) -> Source:
    """Finds a checkpoint and makes sure that it is whole.

    Args:
        reference: a run folder, a checkpoint, or its ``pretrained_model``.

    Raises:
        ValueError: if it is not there, damaged, or not of a model that is known here.
    """
    from agent.checkpoints import manifest
    from agent.checkpoints.finding import find_weights

    if not Path(reference).expanduser().exists():
        raise ValueError(
            f"--checkpoint: there is no {reference}; name a run folder, a checkpoint or its pretrained_model"
        )
    # The folder alone: `last` leads to a checkpoint, but a file of the hub's cache to a blob without its companions.
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


def _model_config(pretrained: Path, written: dict[str, Any]) -> Any:
    import draccus

    from agent.models import registry as _registry  # noqa: F401  (registers "pi0")
    from agent.models.base import ModelConfig
    from agent.settings import other_models

    path, kind = pretrained / "config.json", written.get("type")
    if kind != "pi0":
        found = "names no type of model" if kind is None else f"is of a model of type {kind!r}"
        what = "" if kind is None else other_models.title(str(kind))
        raise ValueError(f'{path} {found}{what}; name a checkpoint of π0, whose config.json has "type": "pi0"')
    try:
        return draccus.decode(ModelConfig, written)
    except draccus.utils.DecodingError as error:
        raise ValueError(f"{path}: {error}; only the format that this project writes is read") from None
    except draccus.utils.ParsingError as error:  # around what the config class says of a value
        raise ValueError(f"{path}: {error.__cause__ or error}") from None


def _training_config(pretrained: Path) -> dict[str, Any]:
    """The config that a checkpoint was trained with; empty for weights from elsewhere."""
    checkpoint = pretrained.parent
    if pretrained.name not in FOLDERS:
        return {}
    of_run = checkpoint.parent.parent / "config.yaml"
    path = Folder(checkpoint / "training_state").file("config.yaml") or (of_run if of_run.is_file() else None)
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path is not None else {}


def prevailing_dtype(files: list[Path]) -> torch.dtype:
    """The type of most of the weights."""
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
    """Feature → statistic → (dims,), as the checkpoint's preprocessor normalises."""
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
    """Name of a data set, and how much of it was trained on if its folder is here."""
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
    """Where the weights began: what was loaded first, what that had been trained from, and so on."""
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
            break  # the weights are gone by now, and with them what they came from
        config = Folder(pretrained).file("config.json")
        training, written = _training_config(pretrained), read_json(config) if config is not None else {}
    return found


def _began_from(training: dict[str, Any], written: dict[str, Any]) -> str | None:
    model = training.get("model_cfg") or written
    return (
        training.get("load_from_checkpoint") or model.get("pretrained_path") or model.get("paligemma_pretrained_path")
    )
