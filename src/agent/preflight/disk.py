"""Room for all checkpoints that are kept, and for the one that is being written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from agent.models import registry
from agent.preflight.context import Context
from agent.preflight.report import Row, amount


def check(context: Context) -> list[Row]:
    """Sizes follow from the shapes of the tensors; the disk is asked. A quota is not seen."""
    config = context.config
    weights, training = checkpoint_bytes(context)
    # The best one stays too, and one more is there while it is written, before the oldest goes.
    best = 1 if config.eval_freq else 0
    kept = config.keep_checkpoints + best
    need = (kept + 1) * weights + ((config.keep_training_states or kept) + 1) * training
    place = _existing(config.run_dir)
    used = _size(config.run_dir / "checkpoints")
    free = shutil.disk_usage(place).free
    text = (
        f"a checkpoint is {amount(weights)} of weights and {amount(training)} for a resume; {config.keep_checkpoints} "
        f"kept, {'the best, ' if best else ''}and one in the writing are {amount(need)}; {place} has {amount(free)} free"
        + (f" and {amount(used)} of this run" if used else "")
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


def checkpoint_bytes(context: Context) -> tuple[int, int]:
    """Bytes of a checkpoint's ``pretrained_model`` and of its ``training_state``."""
    import torch

    config = context.config
    half = config.precision == "bfloat16_stochastic"
    with torch.device("meta"):
        policy = registry.policy_class(context.model)(context.model)
    if half:
        policy.to(torch.bfloat16)
    tensors, _ = registry.pretrained_contents(context.model)(context.model, policy.state_dict(), {}, 1)
    numbers = [tensor for some in tensors.values() for tensor in some.values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in numbers)
    two_bytes, four_bytes = (width * sum(tensor.numel() for tensor in numbers) for width in (2, 4))
    predictor: Any = registry.memory(context.model)
    state = predictor.Training(batch=1, cameras=context.cameras, optimizer=config.optimizer, precision=config.precision)
    training = predictor.predict(context.model, state).optimizer
    rounded = config.save_dtype == "bfloat16"
    weights = two_bytes if rounded else held
    training += held if rounded and not half else 0  # what a resume needs is kept beside what is rounded
    if config.ema_decay is not None:
        weights += two_bytes if rounded else four_bytes
        training += four_bytes if rounded else 0
    return weights, training


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
