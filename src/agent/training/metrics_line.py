"""Reports an update: puts its line of ``metrics.jsonl`` together, and opens what takes the lines when a run starts."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Mapping
from dataclasses import replace

import torch

from agent.safe_files import write_text
from agent.training.saving import Saver
from agent.training.step import Clock, StepResult
from agent.training.train_state import Run
from agent.training.validating import which_may_be_best
from agent.validation.record import ValidationRecords

log = logging.getLogger(__name__)


def start_reporting(run: Run) -> None:
    """Opens metrics, wandb and ``config.yaml`` on rank 0."""

    def on_main() -> str | None:
        assert run.metrics is not None and run.folder is not None
        write_text(run.config.run_dir / "config.yaml", run.config_yaml)
        ValidationRecords(run.config.run_dir).rewind(run.state.step or -1)
        if (note := which_may_be_best(run.config)) is not None:
            log.info(note)
        wandb = run.config.wandb if run.config.use_wandb else None
        if wandb is not None and wandb.run_id is None:
            wandb = replace(wandb, run_id=run.state.wandb_run_id)
        assert run.config.name is not None
        reported = run.state.step - (run.state.unreported is not None)
        return run.metrics.open(reported, wandb, run.config.run_dir, run.config.name)

    run.state.wandb_run_id = run.processes.main_decides(on_main) or run.state.wandb_run_id


def forget_reported(run: Run) -> None:
    """Forgets the validation that is owed if an earlier start has made it and saved nothing since."""
    state = run.state

    def reported() -> bool:
        assert run.metrics is not None
        return run.metrics.has(state.step)

    if state.unreported is not None and run.processes.main_decides(reported):
        state.unreported = None


def numbers_of(run: Run, result: StepResult, clock: Clock) -> dict[str, float | None]:
    """Gathers from all processes what ``metrics.jsonl`` says of an update; call it once, as it resets the clock."""
    config, state, processes = run.config, run.state, run.processes
    step_s, waited = clock.read()
    of_this_process = [waited if rank == processes.rank else 0.0 for rank in range(processes.world_size)]
    sums = processes.sum([*map(float, result.loss_sums.values()), *of_this_process])
    losses, waits = sums[: len(result.loss_sums)], sums[len(result.loss_sums) :]
    return {
        "step": state.step,
        **{n: _finite(some / config.global_batch_size) for n, some in zip(result.loss_sums, losses, strict=True)},
        "lr": result.lr,
        "grad_norm": _finite(result.grad_norm),
        "step_s": step_s,
        "samples_per_s": config.global_batch_size / step_s,
        "data_wait": sum(waits) / processes.world_size,
        "data_wait_max": max(waits),  # of the process that all others wait for in the next collective
        "memory_gb": _peak_memory_gb(processes.device),
        "epoch": state.samples_seen / run.plan.train_frames,
        "samples_seen": state.samples_seen,
        **run.data.mix(state.drawn),
        "skipped_updates": state.skipped_updates,
        "eta_s": (run.plan.n_updates - state.step) * step_s,
    }


def write_line(run: Run, numbers: Mapping[str, float | None], clock: Clock, saver: Saver) -> None:
    """Writes one line of metrics, on rank 0."""
    if run.metrics is not None and run.folder is not None:
        run.metrics.write({name: _finite(value) for name, value in numbers.items()})
        run.folder.note(busy_s=round(clock.total_s, 2), checkpoint_stall_s=round(saver.stall_s, 2))
        run.folder.update("running", run.state.step)


def _finite(value: float | None) -> float | None:
    """Turns what is not finite into null, as JSON has no NaN; a skipped update has such numbers."""
    return value if value is not None and math.isfinite(value) else None


def _peak_memory_gb(device: torch.device) -> float:
    """Returns the most memory that this process has held: the GPU's where there is one, else the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
