"""Writes run folders as runs leave them, with numbers that a test chooses."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.lifecycle import history


@dataclass
class RunFolderSpec:
    """One run. What is None or empty is left out of the folder."""

    updates: int = 40
    log_every: int = 2
    name: str = "first"
    names: list[str] = field(default_factory=lambda: ["dx", "dy", "gripper"])
    dataset: str = "demo/metaworld"
    horizon: int = 8
    chunks: int = 2
    evaluations: int = 4
    ema: bool = False
    attempts: list[dict[str, Any]] | None = None
    reason: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    changed_lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Step → what its line of metrics.jsonl holds instead."""


def attempt(begin: int, end: int, started: float, **facts: Any) -> dict[str, Any]:
    """The record of an attempt that took 100 s for its updates and 20 s besides."""
    return {
        "job": "777", "host": "node1", "started": started, "updated": started + 120.0, "ended": started + 120.0,
        "state": "finished", "reason": "", "first_step": begin, "step": end, "first_update_s": 15.0, "busy_s": 100.0,
        "checkpoint_stall_s": 1.5, **facts,
    }  # fmt: skip


def write_run(folder: Path, spec: RunFolderSpec) -> Path:
    """``metrics.jsonl``, ``status.json``, ``config.yaml`` and ``validation/``."""
    folder.mkdir(parents=True)
    steps = range(spec.log_every, spec.updates + 1, spec.log_every)
    every = max(1, len(steps) // spec.evaluations) if spec.evaluations else 0
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as stream:
        for number, step in enumerate(steps, start=1):
            line: dict[str, Any] = {
                "step": step, "loss": 2.0 * math.exp(-3 * step / spec.updates) + 0.1, "lr": 1e-4, "grad_norm": 1.0,
                "step_s": 0.5, "samples_per_s": 64.0, "data_wait": 0.02, "memory_gb": 1.5, "epoch": step / 100,
                "samples_seen": 32 * step,
            }  # fmt: skip
            if every and number % every == 0:
                line |= _validation_line(step, spec)
                _write_evaluation(folder / "validation", step, spec)
            stream.write(json.dumps(line | spec.changed_lines.get(step, {})) + "\n")
    attempts = spec.attempts or [attempt(0, spec.updates, 1.79e9)]
    state = {key: attempts[-1][key] for key in ("state", "updated")}
    status = {"attempts": attempts, "step": spec.updates, "reason": spec.reason, **state}
    (folder / "status.json").write_text(json.dumps(status | history.summary(attempts)))
    config = {"name": spec.name, "n_updates": spec.updates, "seed": 42, **spec.config}
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # which is YAML too
    return folder


def _validation_line(step: int, spec: RunFolderSpec) -> dict[str, float]:
    error = 0.4 - 0.3 * step / spec.updates
    line = {"val/loss": error + 0.2, "val/action_l1": error, "val/acc_0.1": 0.5, "val/acc_0.5": 0.9}
    line |= {"val/baseline_last_l1": 0.09, "val/baseline_mean_l1": 0.3, "val/baseline_start_l1": 0.35}
    return line | ({"val/ema_loss": error + 0.1, "val/ema_action_l1": error - 0.05} if spec.ema else {})


def _write_evaluation(folder: Path, step: int, spec: RunFolderSpec) -> None:
    width, error = len(spec.names), 0.4 - 0.3 * step / spec.updates

    def errors(scale: float) -> dict[str, Any]:
        per_dimension = [scale * (1 + place / 10) for place in range(width)]
        per_step: list[float | None] = [scale * (1 + place / 20) for place in range(spec.horizon - 1)]
        # The last step was padded in every sample.
        return {
            "action_l1": sum(per_dimension) / width,
            "per_dimension_l1": per_dimension,
            "per_step_l1": [*per_step, None],
            "acc": {"0.1": 1 - scale, "0.5": 1 - scale / 2},
        }

    def chunk(number: int) -> dict[str, Any]:
        recorded = [[math.sin(t / 3 + k + number) for k in range(width)] for t in range(spec.horizon)]
        predicted = [[value + error / 4 for value in row] for row in recorded]
        valid = [t < spec.horizon - number for t in range(spec.horizon)]
        where = {"dataset": spec.dataset, "episode": 7 + number, "frame": 11}
        return {**where, "recorded": recorded, "predicted": predicted, "valid": valid}

    policy = {"loss": 0.2, **errors(error), "chunks": [chunk(n) for n in range(spec.chunks)]}
    baselines = {"last": errors(0.09), "mean": errors(0.3), "start": errors(0.35)}
    contents = {"format": 1, "step": step, "names": spec.names, "units": "data set's own", **policy}
    contents |= {"baselines": baselines, "datasets": [], "ema": policy if spec.ema else None}
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step:08d}.json").write_text(json.dumps(contents))
