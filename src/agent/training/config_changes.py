"""Says which keys of the config may change between a checkpoint and the run that continues it, and finds those that did."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import draccus
import yaml

from agent.checkpoints.manifest import Folder, Verification
from agent.checkpoints.store import TRAINING
from agent.configuration_pipeline import TrainPipelineConfig, dump
from agent.data.frames.store import frames_folder, jpeg_of

if TYPE_CHECKING:
    from agent.data.build import Data
    from agent.data.source import Source

# Keys that may differ between a checkpoint and the run that continues it: they change neither mathematics nor data.
# Where data, tokenizer and paraphrases lie is free too, because what they contain is compared by its fingerprint.
_FREE_ON_RESUME = (
    "name",
    "debug",
    "check",
    "check_gpu",
    "resume_run",
    "resume_changes",
    "load_from_checkpoint",
    "per_device_batch_size",
    "use_torch_compile",
    "cuda_graph",
    "activation_checkpointing",
    "parallel",
    "deterministic",
    "save_model_freq",
    "checkpoint_interval_minutes",
    "keep_checkpoints",
    "keep_training_states",
    "save_dtype",
    "check_replicas_every",
    "hang_timeout_minutes",
    "log_freq",
    "eval_cfg",
    "eval_freq",
    "eval_size",
    "eval_start",
    "eval_thresholds",
    "use_wandb",
    "wandb",
    "data.train.num_workers",
    "data.train.prefetch_factor",
    "data.train.video_backend",
    "data.train.frame_store",
    "data.train.frame_quality",
    "data.train.datasets.N.frames",
    "task_paraphrase",
    "data.train.tolerance_s",
    "data.train.datasets.N.root",
    "data.val.datasets",
)
"""Keys of the training YAML that may change; ``TrainableConfig.free_on_resume`` has those of the model."""


# Keys whose null leaves it to the run, which keeps to what it began with; and what that is for one that begins.
_LEFT_OPEN = {"model_cfg.scheduler_decay_start": "after_warmup"}

# Keys that are newer than some checkpoints, and what was done then, where that is not what their default does.
_DONE_THEN = {"model_cfg.scheduler_decay_start": "first_update"}


def settle(config: TrainPipelineConfig, checkpoint: Path | None) -> list[str]:
    """Fills in the keys that the config leaves to the run, in place.

    Args:
        config: of the run.
        checkpoint: that it continues from; None for a run that begins.

    Returns:
        For a run that continues, lines for the log: the keys and what it keeps to, where a run that begins now would not.
    """
    saved = _saved_config(checkpoint) if checkpoint is not None else {}
    lines = []
    for key, at_first in _LEFT_OPEN.items():
        part, name = key.split(".")
        section = getattr(config, part)
        if getattr(section, name) is not None:
            continue
        kept = saved.get(part, {}).get(name) or at_first
        setattr(section, name, kept)
        if kept != at_first:
            lines.append(f"{key}: {kept}, with which this run began; one that begins now has {at_first}")
    return lines


def _saved_config(checkpoint: Path) -> dict[str, Any]:
    """Reads the config that a checkpoint was made with; keys that are newer than it say what was done then."""
    saved = yaml.safe_load(Folder(checkpoint / TRAINING).text("config.yaml"))
    for key, then in _DONE_THEN.items():
        part, name = key.split(".")
        saved[part].setdefault(name, then)
    return saved


def began_with(checkpoints: Sequence[Path]) -> dict[str, str | None]:
    """Data set → the frame store that a run has read so far, by name, or None for the videos; empty if nothing is known.

    Args:
        checkpoints: of the run, the newest first, unverified; older ones do not say it.
    """
    state = f"{TRAINING}/state.json"
    sound = next((path for path in checkpoints if Verification(path, state).result() is None), None)
    return json.loads((sound / state).read_text(encoding="utf-8")).get("frame_stores", {}) if sound is not None else {}


def changes_since_checkpoint(checkpoint: Path, config: TrainPipelineConfig, data: Data | None) -> list[str]:
    """Lists what a run with this config would silently do in another way than the one that wrote the checkpoint, a line each.

    Args:
        checkpoint: with its training state.
        config: with the model's features completed from the data.
        data: of the run; None if it is not known.
    """
    training = Folder(checkpoint / TRAINING)
    saved = _completed(_saved_config(checkpoint), config)
    changes = changes_since(saved, config)
    state = json.loads(training.text("state.json"))
    trained_on = state["data_fingerprint"]
    if data is None or data.fingerprint == trained_on:
        return changes
    if (pictures := _pictures_changed(data, state, config)) is not None:
        return [*changes, *pictures]
    told = "the training data itself (states, actions, episodes or instructions as tokens)"
    return [*changes, f"{told}: fingerprint {trained_on} → {data.fingerprint}"]


def _pictures_changed(data: Data, state: dict[str, Any], config: TrainPipelineConfig) -> list[str] | None:
    """A line for each data set, if nothing else differs than that its pictures come from another place; else None."""
    sources, size = data.reader.sources, "{}x{}".format(*data.spec.image_resolution)
    known = state.get("frame_stores")
    if known is not None:
        before = [[known.get(source.config.repo_id, source.store_name) for source in sources]]
    else:  # a checkpoint of an earlier version
        before = [[store] * len(sources) for store in (None, f"{size}-jpeg{config.data.train.frame_quality}")]
    for stores in before:
        if data.fingerprint_if(stores) != state["data_fingerprint"]:
            continue
        return [
            f"data.train.frame_store: the pictures of {source} came from {_spoken(source, then)} → come from "
            f"{_spoken(source, source.store_name)}; to go on as before write --data.train.frame_store "
            + ("none" if jpeg is None else f"jpeg --data.train.frame_quality {jpeg.removeprefix('jpeg')}")
            for source, then in zip(sources, stores, strict=True)
            if (jpeg := jpeg_of(then)) != jpeg_of(source.store_name)
        ]
    return None


def _spoken(source: Source, store: str | None) -> str:
    if store is None:
        return "the videos"
    return f"the frame store {frames_folder(source.metadata, source.config.frames) / store}"


def _completed(saved: Any, config: Any) -> Any:
    """Adds to a saved config the keys that are newer than it, with their defaults, whose effect they had then."""
    if isinstance(saved, list) and isinstance(config, list) and len(saved) == len(config):
        return [_completed(*pair) for pair in zip(saved, config, strict=True)]
    if not isinstance(saved, dict) or not is_dataclass(config):
        return saved
    whole = dict(saved)
    for field in fields(config):
        if field.name in saved:
            whole[field.name] = _completed(saved[field.name], getattr(config, field.name))
        elif field.default is not MISSING:
            whole[field.name] = draccus.encode(field.default)
        elif field.default_factory is not MISSING:
            whole[field.name] = draccus.encode(field.default_factory())
    return whole


def changes_since(saved: dict[str, Any], config: TrainPipelineConfig) -> list[str]:
    """Lines ``key: old → new`` of all keys that a resume must not change silently; ``saved`` is the config of before."""
    free = {*_FREE_ON_RESUME, *(f"model_cfg.{key}" for key in config.trainable.free_on_resume)}
    return list(_differences(saved, dump(config), free))


def _differences(saved: dict[str, Any], current: dict[str, Any], free: Set[str], prefix: str = "") -> Iterator[str]:
    for key in [*saved, *(k for k in current if k not in saved)]:
        name = f"{prefix}{key}"
        old, new = saved.get(key), current.get(key)
        if old == new or re.sub(r"\.\d+\.", ".N.", name) in free:
            continue
        if new is None and name in _LEFT_OPEN:
            continue
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            old, new = ({str(i): item for i, item in enumerate(items)} for items in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, free, f"{name}.")
        else:
            yield f"{name}: {old} → {new}"
