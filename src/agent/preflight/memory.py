"""Predicts the peak memory of a GPU, and the largest batch per device that fits."""

from __future__ import annotations

from dataclasses import replace

from agent.models.common.memory import Training
from agent.preflight.context import Context
from agent.preflight.report import Row
from agent.settings.gpus import GPUS, Gpu
from agent.spelling import gib
from agent.training.memory_advice import savings

_MOST = 4096  # nobody asks for a larger batch, and none is looked for
_TIGHT = 0.95  # of a GPU's memory: what needs more gets a warning


def check(context: Context) -> list[Row]:
    """Gives a row for each kind of GPU that the job may get, or one for all known kinds."""
    kinds, source = context.kinds
    if kinds:
        rows = [_verdict(context, gpu, source) for gpu in kinds]
        if any(row.result != "fail" for row in rows):  # the job may get one that it fits
            advice = f"ask for another kind of GPU than this in {source}, or "
            rows = [replace(r, result="warn", change=advice + r.change) if r.result == "fail" else r for r in rows]
        return rows
    largest = {name: largest_batch(context, gpu.memory) for name, gpu in GPUS.items()}
    batch = context.config.per_device_batch_size
    fits = [name for name, most in largest.items() if most >= batch]
    text = f"{_needed(context)}; largest per_device_batch_size: " + ", ".join(
        f"{name} {_spelled(most)}" for name, most in largest.items()
    )
    details = {"largest": largest, "predicted_bytes": predicted(context, batch)}
    if len(fits) == len(largest):
        return [Row("memory", "pass", f"{_needed(context)}; fits every known GPU", details=details)]
    return [Row("memory", "warn", text, "name the job's GPU with --check_gpu for a verdict", details)]


def predicted(context: Context, batch: int, alone: int = 0) -> int:
    """Predicts the bytes that a card must have for a batch in the job, or in ``alone`` micro-batches of one process."""
    config, gpus = context.config, 1 if alone else context.gpus[0]
    several = alone > 1 if alone else config.global_batch_size > batch * gpus
    sharded = config.parallel == "fsdp" and gpus > 1
    training = Training(
        batch=batch,
        cameras=context.cameras,
        language_tokens=context.language_tokens,
        draws=config.flow_samples_per_observation,
        activation_checkpointing=config.activation_checkpointing or "none",
        optimizer=config.optimizer,
        precision=config.precision,
        use_bf16=bool(config.use_bf16),
        ema=config.ema_decay is not None,
        # DDP holds its buckets of gradients from the first update to the last.
        accumulates=several or (gpus > 1 and not sharded),
        shards=gpus if sharded else 1,
    )
    return config.family.memory(context.model, training).card


def largest_batch(context: Context, memory: int) -> int:
    """Finds the largest batch up to 4096 whose prediction fits; 0 if not even one sample does."""
    low, high = 0, 1
    while high <= _MOST and predicted(context, high) <= memory:
        low, high = high, high * 2
    if high > _MOST:
        return _MOST
    while high - low > 1:
        middle = (low + high) // 2
        if predicted(context, middle) <= memory:
            low = middle
        else:
            high = middle
    return low


def _needed(context: Context) -> str:
    batch = context.config.per_device_batch_size
    return f"about {gib(predicted(context, batch))} with {batch} samples on a GPU, {context.cameras} cameras"


def _verdict(context: Context, gpu: Gpu, source: str) -> Row:
    config, batch = context.config, context.config.per_device_batch_size
    need, most = predicted(context, batch), largest_batch(context, gpu.memory)
    text = (
        f"{gpu.name} ({source}) has {gib(gpu.memory)}: {_needed(context)}; largest per_device_batch_size "
        f"{_spelled(most)}"
    )
    details = {"gpu": gpu.name, "predicted_bytes": need, "gpu_bytes": gpu.memory, "largest_batch": most}
    if need <= _TIGHT * gpu.memory:
        return Row("memory", "pass", text, details=details)
    easily = largest_batch(context, int(_TIGHT * gpu.memory))
    changes = [f"per_device_batch_size: {_divisor(context, easily)}"] if easily else []
    changes += savings(config, context.gpus[0])
    change = f"write {' or '.join(changes)}, or several of these" if changes else "take a GPU with more memory"
    if need <= gpu.memory:
        return Row("memory", "warn", f"{text}; less than 5% is left", change, details)
    return Row("memory", "fail", text, change, details)


def _spelled(most: int) -> str:
    return "none" if most == 0 else f"{most} or more" if most == _MOST else str(most)


def _divisor(context: Context, most: int) -> int:
    """Finds the largest batch up to this one that divides the global batch."""
    whole = context.config.global_batch_size // context.gpus[0] or 1
    return max(batch for batch in range(1, min(most, whole) + 1) if whole % batch == 0)
