"""Predicts how long a micro-batch and the whole run take, and how often SLURM's time limit will make the job requeue itself.

A micro-batch is measured where the job's GPU is here, else predicted from its data sheet.
"""

from __future__ import annotations

import math

from agent.preflight.context import Context
from agent.preflight.report import Row
from agent.preflight.schedule import plan
from agent.preflight.slurm import SCRIPTS
from agent.preflight.start import own_step
from agent.settings.gpus import Gpu
from agent.spelling import span

_SEEN = 0.05  # of the time spent waiting is worth a word
_START_S = 180.0  # from a job's start to its first update: imports, data sets, weights. An allowance.
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
    count = context.config.family.flop_per_sample
    needed = count(context.model, context.cameras, context.language_tokens, draws)
    return needed * (4 / 3 if context.config.activation_checkpointing == "full" else 1)


def check(context: Context) -> list[Row]:
    """Counts the updates alone: no validations or checkpoints, and no wait in the queue."""
    numbers, known = plan(context), paces(context)
    left = max(numbers.n_updates - (own_step(context) or 0), 0)
    if not known:
        return [
            Row("time", "warn", f"{left} updates", "name the job's GPU with --check_gpu, to predict how long they take")
        ]
    where, micro_batch_s = max(known, key=lambda pace: pace[1])  # the slowest that it may get
    seconds = left * numbers.accumulation_steps * micro_batch_s
    text = f"{left} updates of {span(numbers.accumulation_steps * micro_batch_s)} are {span(seconds)} ({where})"
    if context.waiting > _SEEN:
        text += f", {span(seconds / (1 - context.waiting))} with data as slow as here"
    details = {"updates": left, "seconds": seconds}
    job = context.job
    if job is None or job.limit_s is None:
        missing = f"no {SCRIPTS / str(context.config.name)}.sh" if job is None else f"{job.source} has no time limit"
        return [Row("time", "pass", f"{text}; {missing} to compare it with", details=details)]
    each = job.limit_s - job.warning_s - _START_S
    if each <= 0:
        change = f"ask for more than {span(job.warning_s + _START_S)} in --time"
        return [
            Row(
                "time", "fail", f"{text}; {job.source} allows {span(job.limit_s)}, which is used up by starting", change
            )
        ]
    jobs = max(math.ceil(seconds / each), 1)
    details |= {"limit_s": job.limit_s, "requeues": jobs - 1}
    text += f"; {job.source} allows {span(job.limit_s)}: {jobs - 1 or 'no'} requeue{'s' if jobs != 2 else ''}"
    if jobs > 1 and not (job.requeue and job.warning_s):
        change = "add `#SBATCH --requeue` and `#SBATCH --signal=B:USR1@300` to the script, or raise its --time"
        return [Row("time", "fail", f"{text}, which the script does not allow for", change, details)]
    return [Row("time", "pass", text, details=details)]
