"""Decides when a run saves, and collects what a checkpoint of it holds."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from agent.checkpoints import tensor_reader
from agent.checkpoints.manifest import Folder
from agent.checkpoints.store import PRETRAINED, PRETRAINED_EMA, TRAINING
from agent.checkpoints.tensor_reader import Checksums
from agent.checkpoints.writer import CheckpointWriter, Outcome
from agent.data.normalization.normalizer import to_lerobot_stats
from agent.data.normalization.robot import names_document, robots_document
from agent.models.policy import Policy
from agent.optim.optimizer import allocate_state, optimizer_tensors
from agent.parallel.wrap import is_sharded_module
from agent.training.replicas import check_replicas
from agent.training.train_state import Run, TrainState

log = logging.getLogger(__name__)

_FAILURES_ALLOWED = 3
_OPTIMIZER = "optimizer"
_WEIGHTS = "model.safetensors"
# Where the numbers are that training goes on with, if those of a folder are rounded.
_EXACT = {PRETRAINED: TRAINING, PRETRAINED_EMA: f"{TRAINING}/ema"}
_SHARDABLE = {f"{TRAINING}/{_OPTIMIZER}.safetensors"}


class Saver:
    """Saves a run when it is due, in the background. A failure costs one checkpoint, not the run, up to three in a row.

    Every method but ``interval_over`` is called by all processes at the same update boundary.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stall_s = 0.0
        """Seconds that training has waited for checkpoints."""
        self._writer = CheckpointWriter(run.checkpoints, run.processes)
        self._failures = 0
        self._saves = 0
        self._last_step = run.state.step
        self._last_save = time.monotonic()
        self._preparing: threading.Thread | None = None
        # The passes of an update go on while the last state is copied; what changes it has to wait.
        self._hook = run.optimizer.register_step_pre_hook(lambda *_: self.settle())

    def settle(self) -> None:
        """Called before every step of the optimizer: waits for the copy that a save began."""
        begin = time.perf_counter()
        self._writer.settle()
        self.stall_s += time.perf_counter() - begin

    def interval_over(self) -> bool:
        """Whether ``checkpoint_interval_minutes`` have passed since the last save, by this process's clock."""
        minutes = self.run.config.checkpoint_interval_minutes
        return minutes is not None and time.monotonic() - self._last_save > minutes * 60

    def prepare(self) -> None:
        """Reserves the memory of the copies in the background, once the optimizer has its state.

        That takes longer than a save; the first save waits for it.
        """
        if self._preparing is None:
            files, _ = checkpoint_contents(self.run)
            work = partial(self._writer.prepare, files, _SHARDABLE)
            self._preparing = threading.Thread(target=work, name="reserve checkpoint memory", daemon=True)
            self._preparing.start()

    def save(self) -> None:
        """Begins a checkpoint of the present update, unless there is one; returns when training may go on.

        Weights and optimizer must stay as they are until the optimizer's next step, which waits for their copy.

        Raises:
            RuntimeError: if the processes' weights differ, or an earlier save was the third in a row to fail.
        """
        run = self.run
        if self._last_step == run.state.step:
            return
        self.finish()  # the previous one, should it still be under way
        begin = time.perf_counter()
        if self._preparing is not None:
            self._preparing.join()
        every = run.config.check_replicas_every
        if every and self._saves % every == 0 and not is_sharded_module(run.policy):
            check_replicas(run.policy, run.optimizer, run.processes)
        if run.metrics is not None:
            run.metrics.sync()
        self._saves += 1
        self._last_step = run.state.step
        self._last_save = time.monotonic()
        files, write_small = checkpoint_contents(run)
        self._writer.save(run.state.step, files, _SHARDABLE, write_small, _stored(run))
        self.stall_s += time.perf_counter() - begin

    def poll(self) -> None:
        """Looks how a save in the background is doing.

        Raises:
            RuntimeError: if it was the third in a row to fail.
        """
        if (outcome := self._writer.poll()) is not None:
            self._note(outcome)

    def finish(self, must_succeed: bool = False) -> None:
        """Waits for the save in the background, if there is one.

        Raises:
            RuntimeError: if it failed and is needed, or was the third in a row to fail.
        """
        while (outcome := self._wait()) is not None:
            self._note(outcome, must_succeed)

    def _wait(self) -> Outcome | None:
        begin = time.perf_counter()
        outcome = self._writer.wait()
        self.stall_s += time.perf_counter() - begin
        return outcome

    def close(self) -> None:
        """Gives up what is under way; for an end that no checkpoint can be waited for."""
        self._hook.remove()
        if self._preparing is not None:
            self._preparing.join(timeout=10)
        self._writer.close()

    def _note(self, outcome: Outcome, must_succeed: bool = False) -> None:
        if outcome.error is None:
            self._failures = 0
            if self.run.folder is not None:
                self.run.folder.note(checkpoint_step=outcome.step, checkpoint_stall_s=round(self.stall_s, 2))
                self.run.folder.update("running", self.run.state.step)
            log.info("checkpoint at update %d saved, %.1f s in the background", outcome.step, outcome.background_s)
            return
        self._failures += 1
        text = (
            f"the checkpoint at update {outcome.step} could not be written: {outcome.error}; "
            "earlier checkpoints are intact"
        )
        if must_succeed or self._failures >= _FAILURES_ALLOWED:
            raise RuntimeError(text)
        log.error("%s; training goes on (failure %d of %d in a row)", text, self._failures, _FAILURES_ALLOWED)


def checkpoint_contents(run: Run) -> tuple[dict[str, dict[str, Tensor]], Callable[[Path], None]]:
    """Returns the tensor files of a checkpoint, and a function that writes its small files with the present values."""
    robot = run.data.robots[0]
    statistics = to_lerobot_stats(robot.state_statistics, robot.action_statistics)
    further = {"robots": robots_document(run.data.robots), "names": names_document(robot)}
    saved, model = run.config.family.saved, run.config.trainable
    weights = run.policy.state_dict()
    versions = {PRETRAINED: weights} | ({PRETRAINED_EMA: run.ema.state(weights)} if run.ema is not None else {})
    files: dict[str, dict[str, Tensor]] = {}
    rounded = _stored(run)
    for folder, tensors in versions.items():
        pretrained, write_pretrained = saved.pretrained_contents(
            model, tensors, statistics, run.plan.n_updates, **further
        )
        files |= {f"{folder}/{name}": some for name, some in pretrained.items()}
        if f"{folder}/{_WEIGHTS}" in rounded:  # these are for others; what goes on is what was
            files[f"{_EXACT[folder]}/{_WEIGHTS}"] = pretrained[_WEIGHTS]
    files[f"{TRAINING}/{_OPTIMIZER}.safetensors"] = optimizer_tensors(run.optimizer, run.policy)
    details = {
        "data_fingerprint": run.data.fingerprint,
        "narrow_rule": run.data.narrow_rule,
        "frame_stores": run.data.frame_stores,
        "world_size": run.processes.world_size,
        "torch": torch.__version__,
    }
    state = json.dumps({**asdict(run.state), **details}, indent=1) + "\n"
    config = run.config_yaml

    def write_small(folder: Path) -> None:
        for name in versions:
            (folder / name).mkdir(exist_ok=True)
            write_pretrained(folder / name)
        for path in files:
            (folder / path).parent.mkdir(exist_ok=True)
        (folder / TRAINING / "state.json").write_text(state, encoding="utf-8")
        (folder / TRAINING / "config.yaml").write_text(config, encoding="utf-8")

    return files, write_small


def _stored(run: Run) -> dict[str, torch.dtype]:
    """The files whose numbers are rounded. Weights that are bfloat16 in training are written as they are."""
    if run.config.save_dtype != "bfloat16":
        return {}
    rounded = [PRETRAINED] if run.config.precision == "float32_master" else []
    rounded += [PRETRAINED_EMA] if run.ema is not None else []
    return {f"{folder}/{_WEIGHTS}": torch.bfloat16 for folder in rounded}


def exact_weights(checkpoint: Path, of: str = PRETRAINED) -> Path:
    """The folder with the weights as they were in training; ``of`` is the folder of the published ones."""
    return checkpoint / (_EXACT[of] if Folder(checkpoint / _EXACT[of]).file(_WEIGHTS) is not None else of)


def restore(
    checkpoint: Path, optimizer: torch.optim.Optimizer, policy: Policy, checksums: Checksums | None = None
) -> TrainState:
    """Puts the optimizer's state back and returns the counters.

    Raises:
        ValueError: if the state is of other parameters, or a file is absent or damaged.
    """
    files = tensor_reader.parts(checkpoint / TRAINING, _OPTIMIZER)
    entries = {path: tensor_reader.entries(path) for path in files}
    shapes = {e.name: (e.shape, e.dtype) for some in entries.values() for e in some}
    # A newer checkpoint may have been read before it was found damaged: its state goes before there is room for another.
    optimizer.state.clear()
    # Until the first update that is not skipped an optimizer has no state, and a fresh one has none either.
    state = allocate_state(optimizer, policy, shapes) if shapes else {}
    for path in files:
        digest = checksums(path) if checksums is not None else None
        tensor_reader.stream(path, {entry.name: state[entry.name] for entry in entries[path]}, digest)
    saved = json.loads(Folder(checkpoint / TRAINING).text("state.json"))
    # what is newer than the checkpoint begins anew
    return TrainState(**{field.name: saved[field.name] for field in fields(TrainState) if field.name in saved})
