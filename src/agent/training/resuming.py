"""Continues a run: chooses the checkpoint, refuses one that may not be continued, and verifies it while it is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent.checkpoints import weights
from agent.checkpoints.finding import find_weights
from agent.checkpoints.manifest import Folder, Verification
from agent.checkpoints.store import PRETRAINED, PRETRAINED_EMA, TRAINING, CheckpointStore
from agent.checkpoints.tensor_reader import Checksums
from agent.configuration_pipeline import TrainPipelineConfig
from agent.data.build import Data
from agent.data.normalization.normalizer import NARROW_RULE
from agent.deployment.robots import saved_statistics
from agent.models.policy import Policy
from agent.optim.ema import Ema
from agent.parallel.processes import Processes
from agent.training.config_changes import changes_since_checkpoint, settle
from agent.training.saving import exact_weights, restore
from agent.training.train_state import TrainState

log = logging.getLogger(__name__)


def candidates(config: TrainPipelineConfig, checkpoints: CheckpointStore) -> list[Path]:
    """What this run might continue from, the newest first; says in the log how it starts. Rank 0 looks.

    Raises:
        ValueError: if there is something, but ``resume_run`` is false.
    """
    checkpoints.recover()
    checkpoints.relink()
    found = checkpoints.candidates()
    order = "start: own checkpoint of this run → load_from_checkpoint → from scratch; taking "
    unusable = [] if found else checkpoints.unusable()
    if (found or unusable) and not config.resume_run:
        raise ValueError(
            f"resume_run is false, but {(found or unusable)[0]} exists and would be overwritten; give this run another "
            "name, or remove its folder"
        )
    if unusable:
        raise ValueError(
            "this run has checkpoints, but none that it could continue from: "
            + ", ".join(map(str, unusable))
            + "; it is not started over silently. Begin a new run from one with load_from_checkpoint and another name, "
            "or remove the folder `checkpoints`"
        )
    if found:
        log.info("%sown checkpoint %s", order, found[0])
    else:
        source = f"weights of {config.load_from_checkpoint}" if config.load_from_checkpoint else "a fresh start"
        log.info("%s%s", order, source)
    return found


def resume(
    config: TrainPipelineConfig,
    data: Data,
    checkpoints: CheckpointStore,
    found: list[Path],
    processes: Processes,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None = None,
) -> TrainState | None:
    """Loads the newest checkpoint that is what was written; None if the run has none.

    Rank 0 verifies what it loads, and its verdict counts for all. A damaged checkpoint is renamed, the one
    before it is taken.

    Raises:
        ValueError: if the run's config or data are others than the checkpoint's, or every checkpoint is damaged.
    """
    damages = []
    for path in found:
        verification = Verification(path) if processes.is_main else None
        problem: Exception | None = None
        state: TrainState | None = None
        try:
            state = _load(config, data, path, policy, optimizer, ema, verification.checksum if verification else None)
        except Exception as error:  # damage can show in any way; what counts is the verdict on the checkpoint
            problem = error
        damage = processes.main_decides(verification.result if verification is not None else lambda: None)
        if damage is None:
            told = (isinstance(problem, ValueError), f"{path}: {problem}") if problem is not None else None
            problems = [entry for entry in processes.gather(told) if entry is not None]
            if not problems:
                for line in settle(config, path):
                    log.info(line)
                return state
            # The checkpoint is sound. What does not fit it is the user's to mend; a disk that fails may recover.
            if all(is_user_error for is_user_error, _ in problems):
                raise ValueError(problems[0][1]) from problem
            raise RuntimeError(next(text for is_user_error, text in problems if not is_user_error)) from problem
        damages.append(f"{path}: {damage}")
        processes.on_main(partial(checkpoints.set_aside, path, damage))
    if damages:
        raise ValueError(
            "every checkpoint of this run is damaged:\n  "
            + "\n  ".join(damages)
            + "\nThe run is not started over silently; remove the folder `checkpoints` to start from the beginning"
        )
    return None


def _load(
    config: TrainPipelineConfig,
    data: Data,
    path: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    checksums: Checksums | None,
) -> TrainState:
    _refuse_changes(config, data, path)
    names = config.family.names
    read = partial(
        weights.load_into,
        match=partial(names.from_policy, config=config.trainable),
        fit=names.fit,
        checksums=checksums,
    )
    state = policy.state_dict()
    log.info(read(state, find_weights(str(exact_weights(path)), "resume")).table())
    if ema is not None and Folder(path / PRETRAINED_EMA).matching("*"):
        read(ema.state(state), find_weights(str(exact_weights(path, PRETRAINED_EMA)), "resume"))
    elif ema is not None:  # switched on by resume_changes
        log.warning("%s has no moving average of the weights; it begins now, at these weights", path)
        ema.begin()
    return restore(path, optimizer, policy, checksums)


def narrow_rule(found: Sequence[Path]) -> int:
    """Finds the rule by which a run calls statistics narrow: that of its newest readable checkpoint, else today's rule.

    Raises:
        ValueError: if it is a rule that is not known here.
    """
    for path in found:
        try:
            rule = json.loads(Folder(path / TRAINING).text("state.json")).get("narrow_rule", 1)
        except (OSError, ValueError, AttributeError):  # damaged, which is found out where it is loaded
            continue
        if rule not in range(1, NARROW_RULE + 1):
            raise ValueError(
                f"{path / TRAINING / 'state.json'} has narrow_rule {rule!r}, and this program knows rules 1 to {NARROW_RULE}: "
                "continue the run with the version of this program that wrote it, or copy the checkpoint again"
            )
        return rule
    return NARROW_RULE


def _refuse_changes(config: TrainPipelineConfig, data: Data, checkpoint: Path) -> None:
    if (rule := narrow_rule([checkpoint])) != data.narrow_rule:  # a newer checkpoint said otherwise and was damaged
        raise RuntimeError(
            f"the data were normalised by rule {data.narrow_rule}, the checkpoint has {rule}; start again"
        )
    changes = changes_since_checkpoint(checkpoint, config, data)
    if not any(change.startswith(("data.", "model_cfg.", "the training data")) for change in changes):
        for line in keep_statistics(config, data, checkpoint):
            log.warning(line)
    if changes and not config.resume_changes:
        raise ValueError(
            f"this run was started with another config than the one it would continue with ({checkpoint}):\n  "
            + "\n  ".join(changes)
            + "\nTake these changes back, give the new run another name, or allow them with --resume_changes true"
        )
    for line in changes:
        log.warning("resume_changes: %s", line)


def keep_statistics(config: TrainPipelineConfig, data: Data, checkpoint: Path) -> list[str]:
    """Normalises with the statistics that the run began with, a checkpoint's of the same data and config.

    Today's are the same, unless another version of this program computes them in another way, or a cache is wrong in a way
    that its checksum does not show.

    Returns:
        A line for each feature whose statistics are others today.
    """
    saved = saved_statistics(checkpoint / PRETRAINED, config.trainable)
    lines = []
    for robot in data.robots:
        of_robot = saved[robot.name if len(data.robots) > 1 else None]
        for feature, normalizer in (("state", robot.state), ("action", robot.action)):
            now = normalizer.statistics
            then: dict[str, Any] = {name: values for name, values in of_robot[feature].items() if name in now.known}
            others = [n for n in then if not np.array_equal(then[n], getattr(now, n), equal_nan=True)]
            if not others:
                continue
            name, of_now, of_then = others[0], getattr(now, others[0]), then[others[0]]
            dim = int(np.flatnonzero(of_now != of_then)[0])
            lines.append(
                f"{feature} statistics: {name} of dimension {dim} is {of_now[dim]} as computed now"
                + (f" (kept in {now.kept_in})" if now.kept_in is not None else "")
                + f" and {of_then[dim]} in {checkpoint / PRETRAINED}, though data and config are the same: another version "
                "computed it, or one of the two is wrong. The run goes on with the checkpoint's, with which it began"
            )
            normalizer.statistics = replace(now, **then)
    return lines
