"""When a run saves, and what a checkpoint of it holds."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agent import optim
from agent.checkpoint import PRETRAINED, TRAINING
from agent.configuration_pipeline import dump_yaml
from agent.data.normalization import to_lerobot_stats
from agent.models import registry
from agent.replicas import check_replicas
from agent.train_state import Run, TrainState

log = logging.getLogger(__name__)

_FAILURES_ALLOWED = 3


class Saver:
    """Saves a run when it is due. A failure costs one checkpoint, not the run, up to three in a row."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stall_s = 0.0
        """Seconds that training has waited for checkpoints."""
        self._failures = 0
        self._saves = 0
        self._saved_step = run.state.step
        self._last_save = time.monotonic()

    def interval_over(self) -> bool:
        """Whether ``checkpoint_interval_minutes`` have passed since the last save, by this process's clock."""
        minutes = self.run.config.checkpoint_interval_minutes
        return minutes is not None and time.monotonic() - self._last_save > minutes * 60

    def save(self, must_succeed: bool) -> None:
        """A checkpoint of the present update, unless there is one; called by all processes at the same boundary.

        Raises:
            RuntimeError: if it failed three times in a row, if this one is needed, or if the processes' weights differ.
        """
        run = self.run
        if self._saved_step == run.state.step:
            return
        every = run.config.check_replicas_every
        if every and self._saves % every == 0:
            check_replicas(run.policy, run.optimizer, run.processes)
        self._saves += 1
        if run.metrics is not None:
            run.metrics.sync()
        begin = time.perf_counter()
        problem = run.processes.main_decides(self._save_on_main)
        self.stall_s += time.perf_counter() - begin
        self._last_save = time.monotonic()
        if problem is None:
            self._failures = 0
            self._saved_step = run.state.step
            if run.folder is not None:
                run.folder.note(checkpoint_step=run.state.step)
            log.info("checkpoint at update %d saved in %.1f s", run.state.step, time.perf_counter() - begin)
            return
        self._failures += 1
        text = (
            f"the checkpoint at update {run.state.step} could not be written: {problem}; earlier checkpoints are intact"
        )
        if must_succeed or self._failures >= _FAILURES_ALLOWED:
            raise RuntimeError(text)
        log.error("%s; training goes on (failure %d of %d in a row)", text, self._failures, _FAILURES_ALLOWED)

    def _save_on_main(self) -> str | None:
        try:
            self.run.checkpoints.save(self.run.state.step, partial(write_checkpoint, self.run))
        except OSError as error:
            return f"{error.strerror or error} ({error.filename or self.run.checkpoints.folder})"
        except SafetensorError as error:  # safetensors wraps the operating system's error in its own
            return str(error)
        return None


def write_checkpoint(run: Run, folder: Path) -> None:
    """Fills a checkpoint's folder."""
    statistics = to_lerobot_stats(run.data.state_statistics, run.data.action_statistics)
    writer = registry.pretrained_writer(run.config.model_cfg)
    writer(folder / PRETRAINED, run.config.model_cfg, run.policy.state_dict(), statistics, run.plan.n_updates)
    training = folder / TRAINING
    tensors = {name: t.contiguous() for name, t in optim.optimizer_tensors(run.optimizer, run.policy).items()}
    save_file(tensors, training / "optimizer.safetensors")
    details = {
        "data_fingerprint": run.data.fingerprint,
        "world_size": run.processes.world_size,
        "torch": torch.__version__,
    }
    (training / "state.json").write_text(
        json.dumps({**asdict(run.state), **details}, indent=1) + "\n", encoding="utf-8"
    )
    (training / "config.yaml").write_text(dump_yaml(run.config), encoding="utf-8")


def restore(checkpoint: Path, optimizer: torch.optim.Optimizer, policy: Any) -> TrainState:
    """Puts the optimizer's state back and returns the counters."""
    optim.restore_optimizer(optimizer, policy, load_file(checkpoint / TRAINING / "optimizer.safetensors"))
    saved = json.loads((checkpoint / TRAINING / "state.json").read_text(encoding="utf-8"))
    return TrainState(**{field.name: saved[field.name] for field in fields(TrainState)})
