"""Says what to write in the config when a GPU's memory is not enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig


def savings(config: TrainPipelineConfig, gpus: int) -> list[str]:
    """Lists what may still be changed in this config besides a smaller batch, the cheapest first."""
    changes = []
    if config.activation_checkpointing != "full":
        changes.append("activation_checkpointing: full")
    if config.precision == "float32_master":
        changes.append("precision: bfloat16_stochastic")
    if config.optimizer == "adamw":
        changes.append("optimizer: adamw8bit")
    if config.parallel == "ddp" and gpus > 1:
        changes.append("parallel: fsdp")
    return changes


def when_exhausted(config: TrainPipelineConfig, gpus: int) -> str:
    """Words a sentence for the error of a run whose GPU has no memory left."""
    batch = config.per_device_batch_size
    smaller = (
        f"a smaller per_device_batch_size than {batch}, which changes no result as long as it divides the global batch"
    )
    changes = ([smaller] if batch > 1 else []) + savings(config, gpus)
    if not changes:
        return "Take a GPU with more memory"
    return f"Write {' or '.join(changes)}, or several of these; `--check true` predicts what each needs"
