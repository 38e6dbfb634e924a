"""Tells how long a micro-batch takes on the job's GPU: measured if that GPU is here, else predicted from its data sheet."""

from __future__ import annotations

from agent.models import registry
from agent.preflight.context import Context
from agent.settings.gpus import Gpu

MFU = 0.45
"""Fraction of a GPU's peak FLOP/s that a training step of a large model is assumed to reach (model FLOP utilisation)."""
SHORTEST_S = 0.02
"""Seconds that forward and backward pass of a micro-batch are assumed to take at least, to launch their kernels."""


def paces(context: Context) -> list[tuple[str, float]]:
    """Lists each device and the seconds that a micro-batch takes there; empty if nothing is known.

    A measurement on the device that the job will use counts before a prediction.
    """
    batch, measured, (kinds, source) = context.config.per_device_batch_size, context.rehearsal, context.kinds
    # An update on the CPU says nothing of a GPU, nor one on the login node's GPU of the job's.
    if measured is not None and (not kinds or (measured.device != "cpu" and source == "the GPU here")):
        return [(f"measured on {measured.device}", measured.micro_batch_s * batch / measured.samples)]
    known = [gpu for gpu in kinds if gpu.bfloat16]
    return [(f"predicted for {gpu.name} at {MFU:.0%} of its arithmetic", predicted(context, gpu)) for gpu in known]


def predicted(context: Context, gpu: Gpu) -> float:
    """Predicts the seconds of a micro-batch on a GPU."""
    rate = gpu.bfloat16 if context.config.use_bf16 else gpu.float32
    return max(context.config.per_device_batch_size * flop(context) / (rate * MFU), SHORTEST_S)


def flop(context: Context) -> float:
    """Counts the FLOP of a sample's forward and backward pass, recomputed activations included."""
    draws = context.config.flow_samples_per_observation
    count = registry.accounting(context.model).flop_per_sample
    needed = count(context.model, context.cameras, context.language_tokens, draws)
    return needed * (4 / 3 if context.config.activation_checkpointing == "full" else 1)
