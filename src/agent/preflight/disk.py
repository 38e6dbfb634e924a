"""Checks that the disk has room for all checkpoints that are kept, and for the one that is being written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from agent.models.common.memory import Training
from agent.preflight.combinations import validates
from agent.preflight.context import Context
from agent.preflight.report import NotChecked, Row
from agent.preflight.schedule import plan
from agent.spelling import amount

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig


def check(context: Context) -> list[Row]:
    """Compares sizes computed from the tensors' shapes with the free space of the disk; a quota does not show there."""
    config = context.config
    weights, training = checkpoint_bytes(context)
    # The best one stays too, and one more is there while it is written, before the oldest goes.
    best = 1 if validates(config) else 0
    kept, saves = config.keep_checkpoints + best, _saves(context)
    need = min(kept + 1, saves) * weights + min((config.keep_training_states or kept) + 1, saves) * training
    place = _existing(config.run_dir)
    used = size_of(config.run_dir / "checkpoints")
    free = shutil.disk_usage(place).free
    text = (
        f"a checkpoint is {amount(weights)} of weights and {amount(training)} for a resume; {_spelled(config, best, saves)} "
        f"{amount(need)}; {place} has {amount(free)} free" + (f" and {amount(used)} of this run" if used else "")
    )
    details = {"weights_bytes": weights, "training_bytes": training, "needed_bytes": need, "free_bytes": free}
    if need <= 0.9 * (free + used):
        return [Row("disk", "pass", text, details=details)]
    changes = []
    if config.keep_training_states != 1:
        changes.append("write keep_training_states: 1")
    if config.keep_checkpoints > 1:
        changes.append("a smaller keep_checkpoints")
    if config.save_dtype == "float32" and config.precision == "float32_master":
        changes.append("save_dtype: bfloat16")
    change = ", ".join(changes + ["make room, or set VLA_LOG_DIR to a larger disk"])
    return [Row("disk", "warn" if need <= free + used else "fail", text, change, details)]


def _saves(context: Context) -> float:
    """Counts the checkpoints that the run will make; infinite if that is not known."""
    config = context.config
    try:
        updates = plan(context).n_updates
    except NotChecked:
        return math.inf
    return math.inf if config.checkpoint_interval_minutes is not None else -(-updates // config.save_model_freq)


def _spelled(config: TrainPipelineConfig, best: int, saves: float) -> str:
    if saves <= config.keep_checkpoints + best:
        return f"the {saves} that the run makes are"
    return f"{config.keep_checkpoints} kept, {'the best, ' if best else ''}and one in the writing are"


def checkpoint_bytes(context: Context) -> tuple[int, int]:
    """Computes the bytes of a checkpoint's ``pretrained_model`` and of its ``training_state``."""
    import torch

    config = context.config
    half = config.precision == "bfloat16_stochastic"
    with torch.device("meta"):
        policy = config.family.policy(context.model)
    if half:
        policy.to(torch.bfloat16)
    tensors, _ = config.family.saved.pretrained_contents(context.model, policy.state_dict(), {}, 1)
    numbers = [tensor for some in tensors.values() for tensor in some.values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in numbers)
    two_bytes = 2 * sum(tensor.numel() for tensor in numbers)
    state = Training(batch=1, cameras=context.cameras, optimizer=config.optimizer, precision=config.precision, ema=True)
    memory = config.family.memory(context.model, state)
    training = memory.optimizer
    # Of what is not trained the average has the weights themselves, in their type.
    average = held + (memory.ema // 2 if half else 0)
    rounded = config.save_dtype == "bfloat16"
    weights = two_bytes if rounded else held
    training += held if rounded and not half else 0  # what a resume needs is kept beside what is rounded
    if config.ema_decay is not None:
        weights += two_bytes if rounded else average
        training += average if rounded else 0
    return weights, training


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def size_of(folder: Path) -> int:
    """Adds up the bytes of the files in a folder; 0 if there is no such folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
