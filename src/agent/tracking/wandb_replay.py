"""Sends a run folder to wandb: the whole run once it has ended, or each line as the training beside it writes it.

``metrics.jsonl`` holds every update once, whatever happened to the job, and wandb ignores steps that it has: so both ways
may be repeated until wandb has the whole run. Any call to wandb may raise anything or take for ever; only the processes of
``python -m agent.sync_wandb`` make them.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from agent.lifecycle import history
from agent.lifecycle.records import follow_metrics, read_metrics, read_status
from agent.lifecycle.run_folder import holder
from agent.safe_files import lock
from agent.tracking.wandb_sink import Wandb, WandbConfig, missing_key

_OPENS_WITHIN_S, _WRITES_WITHIN_S, _CLOSES_WITHIN_S = 150, 60, 45
_ENDS_WITHIN_S = 90.0  # an earlier start's process that has lost its training


@dataclass(frozen=True)
class Wanted:
    """Where a person, or the training, wants the run to go; None leaves it to the run's config."""

    project: str | None
    entity: str | None
    mode: Literal["online", "offline"]
    run_id: str | None

    def completed(self, settings: dict[str, Any]) -> WandbConfig:
        """The same with what the run's config says where nothing was asked for."""
        of_run = settings.get("wandb")
        of_run = of_run if isinstance(of_run, dict) else {}
        return WandbConfig(
            project=self.project or of_run.get("project") or "agent",
            entity=self.entity or of_run.get("entity"),
            mode=self.mode,
            run_id=self.run_id or of_run.get("run_id"),
        )


def sync(run_dir: Path, wanted: Wanted, force: bool) -> None:
    """Sends the whole run; with ``force`` also while it is being trained.

    Raises:
        ValueError: for everything that the user has to put right first.
        Exception: whatever wandb raises; not everything is uploaded then.
    """
    path, settings = run_dir / "metrics.jsonl", _settings_of(run_dir)
    found = read_metrics(path)
    if not found.there:
        raise ValueError(f"there is no {path}; RUN_DIR is the folder of one run, like runs/pi0_demo")
    if not found.records:
        raise ValueError(f"{path} holds no update yet")
    for problem in found.problems():
        print(f"{path}, {problem}: left out")
    if not force and (who := holder(run_dir)) is not None:
        raise ValueError(f"{run_dir} is being trained by {who}; wait for its end, or take what there is with --force")
    if wanted.mode == "online" and (missing := missing_key()) is not None:
        raise ValueError(f"nothing was uploaded: {missing}")
    if wanted.mode == "online" and os.environ.get("WANDB_MODE", "online") != "online":
        print(f"WANDB_MODE={os.environ['WANDB_MODE']} is for the training; this command uploads")
    os.environ["WANDB_MODE"] = wanted.mode
    sink = Wandb(wanted.completed(settings), run_dir, run_dir.name, settings, pid=None)
    there = sink.first_missing
    records = [record for record in found.records if record["step"] >= there]
    for record in records:
        sink.write(record)
    status = read_status(run_dir / "status.json")[0]
    sink.summarize(_summary(status))
    sink.close(1 if status.get("state") == "failed" else 0)
    steps = f"steps {found.records[0]['step']} to {found.records[-1]['step']}"
    already = f", {len(found.records) - len(records)} of them there already" if there else ""
    print(f"wandb run {sink.run_id}: {len(found.records)} lines, {steps}{already}, {wanted.mode}: {sink.place}")
    if wanted.mode == "offline":
        print(f"nothing was uploaded; that does: python -m agent.sync_wandb {run_dir}")


def attend(run_dir: Path, wanted: Wanted, name: str) -> int:
    """Sends the run while it goes on. What goes wrong is a line for the training's log, and an exit code other than 0."""
    # The cluster sends these to every process of a job. The training's end is this one's, too.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout, force=True)
    try:
        _follow(run_dir, wanted, name)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        logging.warning("wandb: %s; training goes on, and it is tried again: metrics.jsonl has every line", text)
        return 1
    return 0


def _follow(run_dir: Path, wanted: Wanted, name: str) -> None:
    """Sends every line when it is written, until standard input ends; the end of a run is then in ``status.json``.

    Raises:
        Exception: whatever wandb raises.
    """
    settings = _settings_of(run_dir)
    os.environ["WANDB_MODE"] = wanted.mode
    held = "another process sends this run to wandb"
    lock(run_dir / "wandb" / ".lock", "process for wandb", lambda _: held, _ENDS_WITHIN_S)
    if _training_has_ended(0.0) and read_status(run_dir / "status.json")[0].get("state") == "running":
        return  # it was killed, and its next start sends everything
    with _within(_OPENS_WITHIN_S):
        sink = Wandb(wanted.completed(settings), run_dir, name, settings, pid=os.getppid())
    logging.info("wandb: %s", sink.place)
    for record in follow_metrics(run_dir / "metrics.jsonl", _training_has_ended):
        if record["step"] >= sink.first_missing:
            with _within(_WRITES_WITHIN_S):
                sink.write(record)
    status = read_status(run_dir / "status.json")[0]
    with _within(_CLOSES_WITHIN_S):
        sink.summarize(_summary(status))
        sink.close({"finished": 0, "failed": 1, "running": 1}.get(status.get("state", "failed"), 75))


def _settings_of(run_dir: Path) -> dict[str, Any]:
    """What ``config.yaml`` holds; empty without one, or where it is damaged."""
    try:
        content = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError) as error:
        logging.warning("%s is damaged, the settings are left out: %s", run_dir / "config.yaml", error)
        return {}
    return content if isinstance(content, dict) else {}


def _summary(status: dict[str, Any]) -> dict[str, Any]:
    """Figures of the whole run for wandb's summary, from ``status.json``."""
    figures: dict[str, Any] = {f"run/{key}": status[key] for key in history.FIGURES if key in status}
    return figures | {"run/story": "\n".join(history.story([*status.get("attempts", []), {}]))}


def _training_has_ended(patience_s: float) -> bool:
    """Whether the process that started this one has closed its end of the pipe, or is gone."""
    return bool(select.select([sys.stdin], [], [], patience_s)[0])


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Ends this process, with its stack in the error log, if wandb hangs."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
