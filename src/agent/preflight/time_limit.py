"""Predicts how long the run takes, and how often SLURM's time limit will make the job requeue itself."""

from __future__ import annotations

import math

from agent.preflight.context import Context
from agent.preflight.pace import paces
from agent.preflight.report import Row
from agent.preflight.schedule import plan
from agent.preflight.slurm import SCRIPTS
from agent.preflight.start import own_step
from agent.spelling import span

_SEEN = 0.05  # of the time spent waiting is worth a word
_START_S = 180.0  # from a job's start to its first update: imports, data sets, weights. An allowance.


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
