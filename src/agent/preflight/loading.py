"""Measures how fast samples are read here, against what the GPUs consume, and says how many workers to ask for."""

from __future__ import annotations

import math
import os
import time

from agent.preflight.context import Context
from agent.preflight.pace import paces
from agent.preflight.report import Row

_SECONDS = 10.0
_WARM_S = 15.0  # for workers to start, at most
_SPARE = 1.2  # workers that are asked for beyond what is needed
_BETWEEN = 0.05  # of the time may be reading that no worker does meanwhile


def check(context: Context) -> list[Row]:
    """Reads the run's own first samples, with its workers as far as there are cores."""
    here = _cores()
    workers = min(context.config.data.train.num_workers, here)
    rate, samples, seconds = _measure(context, workers)
    each = rate / max(workers, 1)
    text = f"{rate:.0f} samples/s with {workers} workers on {here} cores here ({samples} samples in {seconds:.1f} s)"
    details = {"samples_per_s": rate, "workers": workers, "per_worker": each}
    known = paces(context)
    if not known:
        change = "name the job's GPU with --check_gpu, to compare this with what it eats"
        return [Row("loader", "warn", text, change, details)]
    where, micro_batch_s = min(known, key=lambda pace: pace[1])  # the fastest eats most
    needed = context.config.per_device_batch_size / micro_batch_s
    ask = math.ceil(_SPARE * needed / each)
    text += f"; training eats {needed:.0f} on each device ({where})"
    details |= {"needed_per_gpu": needed, "workers_to_ask_for": ask}
    return [_verdict(context, text, details, needed, each, ask)]


def _verdict(context: Context, text: str, details: dict, needed: float, each: float, ask: int) -> Row:
    gpus, own = context.gpus[0], context.config.data.train.num_workers
    known = context.job.cores if context.job is not None else None
    cores = known or _cores()
    room = max(cores // gpus - 1, 1)  # one core for the training process itself
    if own:
        wait, allowed = max(1 - each * max(min(own, cores // gpus), 1) / needed, 0.0), 0.0
    else:  # between the updates, not beside them; on a CPU a worker would take the time from them all the same
        wait, allowed = needed / (needed + each), _BETWEEN if context.kinds[0] else 0.5
        text += f"; without workers it reads between the updates, {wait:.0%} of the time"
    context.waiting = wait
    if wait <= allowed:
        enough = f"; {own} workers for each suffice" if own else ""
        return Row("loader", "pass", text + enough, details=details)
    if own:
        text += f"; it would wait {wait:.0%} of the time"
    if ask <= room:
        return Row("loader", "warn", text, f"write data.train.num_workers: {ask}", details)
    place = "the job" if known else "this machine"
    change = (
        f"{ask} workers for each would do, {gpus * (ask + 1)} cores in all, and {place} has {cores}; ask for them "
        "(--cpus-per-task) with as many data.train.num_workers, or make a frame store: `uv run python -m agent.data.prepare …`"
    )
    return Row("loader", "warn", text, change, details)


def _measure(context: Context, workers: int) -> tuple[float, int, float]:
    """Measures samples per second over samples and seconds; those that workers have ready at the beginning do not count."""
    from agent.data.loading.loader import TrainLoader

    data, config = context.data, context.config
    batch = min(config.per_device_batch_size, 16)
    loader = TrainLoader(
        data.reader,
        data.mixture,
        per_device_batch=batch,
        num_workers=workers,
        prefetch_factor=config.data.train.prefetch_factor,
    )
    try:
        start = time.perf_counter()
        for _ in range(max(1, workers * config.data.train.prefetch_factor)):
            next(loader)
            if time.perf_counter() > start + _WARM_S:
                break
        begin, samples = time.perf_counter(), 0
        while (seconds := time.perf_counter() - begin) < _SECONDS and (samples < data.mixture.frames or not samples):
            next(loader)
            samples += batch
    finally:
        loader.close()
    return samples / seconds, samples, seconds


def _cores() -> int:
    return len(os.sched_getaffinity(0))
