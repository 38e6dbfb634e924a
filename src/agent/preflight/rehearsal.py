"""Makes a real update on the device that is here, saves a checkpoint of it, and loads that to see whether it is the same.

All of this happens in ``check/rehearsal``, which is removed; the run's own ``checkpoints`` are not touched.
"""

from __future__ import annotations

import copy
import itertools
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agent.preflight import disk, needs
from agent.preflight.context import Context, Rehearsal
from agent.preflight.memory import predicted
from agent.preflight.pace import flop
from agent.preflight.report import Row
from agent.spelling import amount, gib, span

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from agent.batch import Batch
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.training.saving import Saver
    from agent.training.train_state import Run

SMALL = 50_000_000  # parameters; a larger model is not trained on a CPU here
_CPU_FLOP = 2e11  # of a micro-batch on a CPU, at most; some seconds
_PATIENCE_S = 20.0  # an update that takes longer is not repeated
_NOT_FINITE = "look for the operation with --debug true; are the statistics this data set's, and the weights whole?"


def check(context: Context) -> list[Row]:
    """Rehearses every model on a GPU, and a small one on a CPU."""
    import torch

    context.require_data()
    size = context.model_size()
    if not context.visible_gpus and (size > SMALL or context.model.device == "cuda"):
        why = f"{size / 1e6:.0f} M parameters are too many for a CPU" if size > SMALL else "model_cfg.device is cuda"
        text = f"not made: there is no GPU here, and {why}"
        return [Row("update", "warn", text, "run the check once more on a machine with a GPU, if you can")]
    device = torch.device("cuda", 0) if context.visible_gpus else torch.device("cpu")
    weights, training = disk.checkpoint_bytes(context)
    free = shutil.disk_usage(context.folder).free
    if free < 1.1 * (weights + training):
        text = f"not made: its checkpoint of {amount(weights + training)} does not fit, {amount(free)} are free"
        return [Row("update", "fail", text, "make room where the run folder is, or set VLA_LOG_DIR to a larger disk")]
    place = context.folder / "rehearsal"
    shutil.rmtree(place, ignore_errors=True)  # of a check that was killed
    config = _config(context, place, device.type)
    try:
        return _rehearse(context, config, device)
    except torch.cuda.OutOfMemoryError as error:  # which the model alone can be too large for
        if context.config.parallel == "fsdp" and context.gpus[0] > 1:
            text = f"not made: {device} does not hold what {context.gpus[0]} GPUs share under parallel: fsdp"
            return [Row("update", "warn", text, "see the row `memory`: one process cannot try this out")]
        batch = config.per_device_batch_size
        change = (
            f"write a smaller per_device_batch_size than {batch}, or what the row `memory` says"
            if batch > 1
            else "do what the row `memory` says, or take a GPU with more memory"
        )
        return [Row("update", "fail", f"out of memory on {device}: {str(error).splitlines()[0]}", change)]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _config(context: Context, place: Path, device: str) -> TrainPipelineConfig:
    """Changes the run's config to two updates of one process, in a folder of their own."""
    config = copy.deepcopy(context.usable)
    config.name = str(place.absolute() / "rehearsal")  # an absolute name is the run's folder, wherever the others lie
    config.use_wandb, config.resume_run, config.resume_changes = False, True, True
    config.use_torch_compile, config.parallel = False, "ddp"
    config.data.train.num_workers = 0
    batch = config.per_device_batch_size
    if device == "cpu":
        batch = max(1, min(batch, int(_CPU_FLOP / flop(context))))
    accumulates = config.global_batch_size > config.per_device_batch_size * context.gpus[0]
    config.per_device_batch_size, config.global_batch_size = batch, batch * (2 if accumulates else 1)
    config.n_updates = max(config.n_updates or 2, 2)
    if not _weights_are_here(config):  # a row says so; what is drawn at random does for a rehearsal
        config.load_from_checkpoint = None
        for key in config.trainable.base_weights:
            setattr(config.model_cfg, key, None)
    return config


def _weights_are_here(config: TrainPipelineConfig) -> bool:
    item = needs.weights(config)
    try:
        return item is None or bool(item.look())
    except ValueError:
        return False


def _rehearse(context: Context, config: TrainPipelineConfig, device: torch.device) -> list[Row]:
    from agent.data.loading.loader import TrainLoader
    from agent.lifecycle.watchdog import Watchdog
    from agent.parallel.launch import Launch
    from agent.parallel.processes import Processes
    from agent.training.building import build
    from agent.training.saving import Saver

    watchdog = Watchdog(0, lambda _: None)
    run = build(config, Launch(), Processes(Launch(), device), None, watchdog)
    saver = Saver(run)
    loader = TrainLoader(
        run.data.reader,
        run.data.mixture,
        per_device_batch=config.per_device_batch_size,
    )
    try:
        batches = list(itertools.islice(loader, run.plan.accumulation_steps))
        row = _update(context, run, batches)
        return [row] if row.result == "fail" else [row, _round_trip(run, saver)]
    finally:
        saver.close()
        loader.close()
        watchdog.close()


def _update(context: Context, run: Run, batches: list[Batch]) -> Row:
    """Makes two updates on the same batch, because the first allocates memory, and times the last."""
    import torch

    from agent.training.step import Clock, train_step

    device = run.processes.device
    cuda = device.type == "cuda"
    run.model.train()
    clock, losses, seconds = Clock(), [], 0.0
    for _ in range(2):
        begin = time.perf_counter()
        try:
            result = train_step(run, iter(batches), clock)
        except FloatingPointError as error:
            return Row("update", "fail", str(error), _NOT_FINITE)
        losses.append(float(result.loss_sums["loss"]) / run.config.global_batch_size)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if seconds > _PATIENCE_S:
            break
    samples, name = run.config.per_device_batch_size, torch.cuda.get_device_name() if cuda else "cpu"
    context.rehearsal = Rehearsal(name, samples, seconds / len(batches))
    text = (
        f"{len(batches)} × {samples} samples on {name}: loss {', then '.join(f'{loss:.4g}' for loss in losses)}; gradient "
        f"{result.grad_norm:.3g}; {span(seconds)} an update"
    )
    details = {"losses": losses, "grad_norm": result.grad_norm, "seconds": seconds}
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        details["peak_bytes"] = peak
        expected = predicted(context, samples, alone=len(batches))
        text += f"; {gib(peak)} at the peak, {expected / 2**30:.1f} predicted with the context"
    if not all(map(math.isfinite, [*losses, result.grad_norm])):
        return Row("update", "fail", text, _NOT_FINITE, details)
    return Row("update", "pass", text, details=details)


def _round_trip(run: Run, saver: Saver) -> Row:
    """Saves as training does, forgets, loads as a restart does, and compares every bit."""
    import torch

    from agent.training import resuming

    before, step, begin = _fingerprints(run), run.state.step, time.perf_counter()
    saver.save()
    saver.finish(must_succeed=True)
    saved = time.perf_counter()
    with torch.no_grad():
        for tensor in [*run.policy.state_dict().values(), *_average(run).values()]:
            tensor.zero_()
    run.optimizer.state.clear()
    found = run.checkpoints.candidates()
    state = resuming.resume(
        run.config, run.data, run.checkpoints, found, run.processes, run.policy, run.optimizer, run.ema
    )
    after = _fingerprints(run)
    size = disk.size_of(found[0])
    text = f"{amount(size)}, saved in {span(saved - begin)}, loaded in {span(time.perf_counter() - saved)}"
    different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if different or state is None or state.step != step:
        text += f"; {len(different)} tensors came back otherwise, {', '.join(different[:3])}"
        return Row("save and load", "fail", text, "do not train on this disk; copy a large file to it and compare")
    return Row("save and load", "pass", f"{text}; {len(before)} tensors the same bit for bit", details={"bytes": size})


def _fingerprints(run: Run) -> dict[str, int]:
    from agent.training.replicas import fingerprints, fingerprints_of

    average = {f"ema/{name}": tensor for name, tensor in _average(run).items()}
    return fingerprints(run.policy, run.optimizer) | (fingerprints_of(average) if average else {})


def _average(run: Run) -> dict[str, Tensor]:
    return run.ema.tensors if run.ema is not None else {}
