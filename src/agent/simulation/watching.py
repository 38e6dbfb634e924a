"""Evaluates the checkpoints of a run as its ``eval_cfg`` says, while the run trains or afterwards."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from agent.lifecycle.records import read_object, read_status
from agent.lifecycle.run_folder import is_held
from agent.safe_files import lock, write_text
from agent.simulation.configuration import SimulationConfig
from agent.simulation.evaluation import Request, digest_of, evaluate
from agent.simulation.results import SUMMARY, table

log = logging.getLogger(__name__)
POLL_S = 20.0
SILENCE_S = 600.0
CURVE = "success.jsonl"
_STEP = re.compile(r"step_(\d+)")


def watch(
    run_dir: Path, known: Sequence[str], once: bool, *, device: str | None = None, tokenizer: str | None = None
) -> None:
    """Evaluates the chosen checkpoints; unless ``once``, waits for more until the training has ended.

    Args:
        run_dir: the run folder.
        known: Meta-World's tasks.
        once: only what is there now.
        device, tokenizer: see ``agent.simulation.evaluation.evaluate``.

    Raises:
        ValueError: if there is no such run, it has no ``eval_cfg``, or another process watches it.
        RuntimeError: at the end, if checkpoints that are there could not be evaluated.
    """
    config = read_config(run_dir)
    request = Request(tuple(config.tasks), config.episodes, config.seed, config.max_steps, config.videos)
    request.check(known)
    folder = run_dir / "simulation"
    folder.mkdir(exist_ok=True)
    handle = lock(folder / ".watch.lock", "evaluation", lambda _: f"--run: another process evaluates {run_dir} already")
    done: set[Path] = set()
    failed: set[Path] = set()
    try:
        while True:
            # Asked before looking: what was saved up to the end is then seen by one more look.
            going_on = not once and is_training(run_dir)
            for checkpoint in chosen(run_dir, config.every, last=not going_on):
                if checkpoint not in done | failed:
                    fine = _evaluate(checkpoint, request, folder / checkpoint.name, device, tokenizer)
                    (done if fine else failed).add(checkpoint)
            # Asked again: a run that was preempted may train by now, and what it started has found this process at work.
            if once or not (going_on or is_training(run_dir)):
                break
            time.sleep(POLL_S)
    finally:
        os.close(handle)
    write_curve(folder, request)  # what was there already may not be in it
    log.info("%d checkpoints are evaluated: %s", len(done), folder / CURVE)
    if gone := removed_before(run_dir, config.every):
        log.warning(
            "the checkpoints of the updates %s were removed before they could be evaluated: raise keep_checkpoints",
            ", ".join(map(str, gone)),
        )
    if not done | failed:
        log.warning("%s has no complete checkpoint to evaluate", run_dir)
    if there := sorted(checkpoint.name for checkpoint in failed if checkpoint.exists()):
        raise RuntimeError(f"{', '.join(there)} could not be evaluated; the lines above say why")


def read_config(run_dir: Path) -> SimulationConfig:
    """Reads the ``eval_cfg`` of a run.

    Raises:
        ValueError: if there is none.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ValueError(f"--run: there is no {file}; name the folder of a run that has been started")
    values = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("eval_cfg")
    if not values:
        raise ValueError(
            f"--run: {file} has no eval_cfg; write one in the training config (docs/simulation.md), or evaluate single "
            "checkpoints with --checkpoint"
        )
    return SimulationConfig(**values)


def chosen(run_dir: Path, every: int, last: bool) -> list[Path]:
    """Lists the complete checkpoints at multiples of ``every`` in ascending order, with ``last`` also the newest."""
    steps = {
        int(match[1]): path
        for path in (run_dir / "checkpoints").glob("step_*")
        if (match := _STEP.fullmatch(path.name)) and (path / "manifest.json").is_file()
    }
    wanted = {step for step in steps if step % every == 0} | ({max(steps)} if steps and last else set())
    return [steps[step] for step in sorted(wanted)]


def removed_before(run_dir: Path, every: int) -> list[int]:
    """Lists the updates whose checkpoints should have been evaluated, are gone and have left no results."""
    newest = max((int(path.name.removeprefix("step_")) for path in chosen(run_dir, 1, last=True)), default=0)
    names = {step: f"step_{step:08d}" for step in range(every, newest, every)}
    return [
        step
        for step, name in names.items()
        if not (run_dir / "checkpoints" / name).exists() and not (run_dir / "simulation" / name / SUMMARY).is_file()
    ]


def is_training(run_dir: Path) -> bool:
    """Says whether more checkpoints may come: the run's status is running, and it is alive or was a short time ago."""
    try:
        status, _ = read_status(run_dir / "status.json")
    except OSError:
        return False
    if status.get("state", "running") != "running":  # where it is damaged, the lock tells
        return False
    if time.time() - status.get("updated", 0) < SILENCE_S:
        return True
    return is_held(run_dir)[0] is True  # a copy of the folder has no lock; or locks do not work there


def _evaluate(checkpoint: Path, request: Request, out: Path, device: str | None, tokenizer: str | None) -> bool:
    """Evaluates a checkpoint and says whether that worked; a failure is logged, and the others go on."""
    try:
        if is_complete(out, request, checkpoint):
            return True
        log.info("evaluating %s", checkpoint)
        summary = evaluate(str(checkpoint), request, lambda _: out, device=device, tokenizer=tokenizer)
    except (ValueError, OSError, RuntimeError) as error:
        gone = " It was removed meanwhile: raise keep_checkpoints." if not checkpoint.exists() else ""
        log.error("%s could not be evaluated: %s%s", checkpoint, error, gone)
        return False
    print(f"{checkpoint}\n{table(summary)}", flush=True)
    write_curve(out.parent, request)
    return True


def is_complete(out: Path, request: Request, checkpoint: Path) -> bool:
    """Says whether the results cover the request and are of this checkpoint: a run that went back has saved another."""
    summary = _summary(out)
    if summary is None:
        return False
    done = {row["task"]: row["episodes"] for row in summary["tasks"]}
    videos = [request.video(task, episode, out) for task in request.tasks for episode in range(request.episodes)]
    return (
        all(done.get(task, 0) >= request.episodes for task in request.tasks)
        and all(path is None or path.is_file() for path in videos)
        and _is_like(summary, request)
        and summary["settings"].get("checkpoint") == digest_of(checkpoint / "pretrained_model")
    )


def write_curve(folder: Path, request: Request) -> None:
    """Writes ``success.jsonl``: a line for each checkpoint and task, by update, of what was played with these settings.

    Averaged weights, ``step_…_ema``, are not in it.
    """
    lines = []
    for out in sorted(folder.glob("step_*")):
        if (match := _STEP.fullmatch(out.name)) is None:
            continue
        summary = _summary(out)
        if summary is not None and _is_like(summary, request):
            lines += [json.dumps({"step": int(match[1]), **row}) for row in summary["tasks"]]
    write_text(folder / CURVE, "".join(f"{line}\n" for line in lines))


def _is_like(summary: dict[str, Any], request: Request) -> bool:
    return all(summary["settings"].get(key) == getattr(request, key) for key in ("seed", "max_steps"))


def _summary(out: Path) -> dict[str, Any] | None:
    """Reads the results in a folder; None if there are none or they have another form, which the log says."""
    content, problem = read_object(out / SUMMARY)
    if content is not None:
        tasks = content.get("tasks")
        rows = isinstance(tasks, list) and all(
            isinstance(row, dict) and {"task", "episodes"} <= set(row) for row in tasks
        )
        if rows and isinstance(content.get("settings"), dict):
            return content
        problem = "it has not the form of results"
    if problem:
        log.warning("%s is damaged and counts for nothing: %s", out / SUMMARY, problem)
    return None
