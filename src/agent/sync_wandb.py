"""Makes one wandb run out of a run folder, and uploads it: ``uv run python -m agent.sync_wandb RUN_DIR``.

``metrics.jsonl`` holds every update once, whatever happened to the job; wandb's own files lose their tail when a process
is killed, and hold an update twice that was done twice. So this is the way to upload a run that wandb does not have, or
not whole, and `wandb sync` is not. It uploads whatever ``WANDB_MODE`` says, which is for the training::

    uv run python -m agent.sync_wandb runs/pi0_finetune_bridge

wandb keeps the first value of a step that it has: a run that is there already is continued, not replaced. To begin
anew, give another ``--id``. ``--mode offline`` uploads nothing; it writes wandb's own folder, to be looked into.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from agent.lifecycle import history
from agent.lifecycle.records import parse_metrics, read_metrics, read_status
from agent.lifecycle.run_folder import holder
from agent.safe_files import lock
from agent.tracking.wandb_sink import Wandb, WandbConfig, missing_key

_OPENS_WITHIN_S, _WRITES_WITHIN_S, _CLOSES_WITHIN_S = 150, 60, 45
_ENDS_WITHIN_S = 90.0  # an earlier start's process that has lost its training


def refuse_a_live_run(run_dir: Path) -> None:
    """Raises:
    ValueError: if a process holds the folder's lock.
    """
    if (who := holder(run_dir)) is not None:
        raise ValueError(f"{run_dir} is being trained by {who}; wait for its end, or take what there is with --force")


def settings_of(run_dir: Path) -> dict[str, Any]:
    """What ``config.yaml`` holds; empty without one, or where it is damaged."""
    try:
        content = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError) as error:
        logging.warning("%s is damaged, the settings are left out: %s", run_dir / "config.yaml", error)
        return {}
    return content if isinstance(content, dict) else {}


def destination(options: argparse.Namespace, settings: dict[str, Any]) -> WandbConfig:
    """Where the run goes: what was asked for, else what its config says."""
    of_run = settings.get("wandb")
    of_run = of_run if isinstance(of_run, dict) else {}
    return WandbConfig(
        project=options.project or of_run.get("project") or "agent",
        entity=options.entity or of_run.get("entity"),
        mode=options.mode,
        run_id=options.id or of_run.get("run_id"),
    )


# ── a run that has ended ────────────────────────────────────────────────────────────────────────────────────────


def sync(run_dir: Path, options: argparse.Namespace) -> None:
    """Sends the whole run.

    Raises:
        ValueError: for everything that the user has to put right first.
        Exception: whatever wandb raises; not everything is uploaded then.
    """
    path, settings = run_dir / "metrics.jsonl", settings_of(run_dir)
    found = read_metrics(path)
    if not found.there:
        raise ValueError(f"there is no {path}; RUN_DIR is the folder of one run, like runs/pi0_demo")
    if not found.records:
        raise ValueError(f"{path} holds no update yet")
    for problem in found.problems():
        print(f"{path}, {problem}: left out")
    if not options.force:
        refuse_a_live_run(run_dir)
    if options.mode == "online" and (missing := missing_key()) is not None:
        raise ValueError(f"nothing was uploaded: {missing}")
    if options.mode == "online" and os.environ.get("WANDB_MODE", "online") != "online":
        print(f"WANDB_MODE={os.environ['WANDB_MODE']} is for the training; this command uploads")
    os.environ["WANDB_MODE"] = options.mode
    sink = Wandb(destination(options, settings), run_dir, run_dir.name, settings, pid=None)
    there = sink.first_missing
    records = [record for record in found.records if record["step"] >= there]
    for record in records:
        sink.write(record)
    status = read_status(run_dir / "status.json")[0]
    sink.summarize(summary(status))
    sink.close(1 if status.get("state") == "failed" else 0)
    steps = f"steps {found.records[0]['step']} to {found.records[-1]['step']}"
    already = f", {len(found.records) - len(records)} of them there already" if there else ""
    print(f"wandb run {sink.run_id}: {len(found.records)} lines, {steps}{already}, {options.mode}: {sink.place}")
    if options.mode == "offline":
        print(f"nothing was uploaded; that does: python -m agent.sync_wandb {run_dir}")


def summary(status: dict[str, Any]) -> dict[str, Any]:
    """Figures of the whole run for wandb's summary, from ``status.json``."""
    figures: dict[str, Any] = {f"run/{key}": status[key] for key in history.FIGURES if key in status}
    return figures | {"run/story": "\n".join(history.story([*status.get("attempts", []), {}]))}


# ── a run that goes on ──────────────────────────────────────────────────────────────────────────────────────────


def follow(run_dir: Path, options: argparse.Namespace) -> None:
    """Sends every line when it is written, until standard input ends; the end of a run is then in ``status.json``.

    Raises:
        Exception: whatever wandb raises.
    """
    settings = settings_of(run_dir)
    os.environ["WANDB_MODE"] = options.mode
    held = "another process sends this run to wandb"
    lock(run_dir / "wandb" / ".lock", "process for wandb", lambda _: held, _ENDS_WITHIN_S)
    if training_has_ended(0.0) and read_status(run_dir / "status.json")[0].get("state") == "running":
        return  # it was killed, and its next start sends everything
    with within(_OPENS_WITHIN_S):
        sink = Wandb(destination(options, settings), run_dir, options.name, settings, pid=os.getppid())
    logging.info("wandb: %s", sink.place)
    for record in lines_to_come(run_dir / "metrics.jsonl", training_has_ended):
        if record["step"] >= sink.first_missing:
            with within(_WRITES_WITHIN_S):
                sink.write(record)
    status = read_status(run_dir / "status.json")[0]
    with within(_CLOSES_WITHIN_S):
        sink.summarize(summary(status))
        sink.close({"finished": 0, "failed": 1, "running": 1}.get(status.get("state", "failed"), 75))


def lines_to_come(path: Path, ended: Callable[[float], bool]) -> Iterator[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, and those that are added, until there are no more after the end.

    Args:
        path: opened once: a later start of the run makes another file.
        ended: waits so many seconds at most for the run's end, and tells whether it has come.
    """
    with open(path, "rb") as stream:
        rest, last = b"", False
        while True:
            new = stream.read()
            whole, newline, rest = (rest + new).rpartition(b"\n")
            yield from parse_metrics(whole + newline).records
            if last and not new:
                return
            last = ended(0.0 if new else 1.0)


def training_has_ended(patience_s: float) -> bool:
    """Whether the process that started this one has closed its end of the pipe, or is gone."""
    return bool(select.select([sys.stdin], [], [], patience_s)[0])


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends this process, with its stack in the error log, if wandb hangs."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def attend(run_dir: Path, options: argparse.Namespace) -> int:
    """``--follow``: what goes wrong is a line for the training's log, and an exit code other than 0."""
    # The cluster sends these to every process of a job. The training's end is this one's, too.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout, force=True)
    try:
        follow(run_dir, options)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        logging.warning("wandb: %s; training goes on, and it is tried again: metrics.jsonl has every line", text)
        return 1
    return 0


def main(arguments: list[str]) -> int:
    """Exit code 2 for what the user has to put right, 1 if wandb does not have the whole run for another reason."""
    parser = argparse.ArgumentParser(prog="python -m agent.sync_wandb", description=str(__doc__).split("\n")[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--project", help="default: wandb.project of the run's config")
    parser.add_argument("--entity", help="user or team; default: wandb.entity, then $VLA_WANDB_ENTITY")
    parser.add_argument(
        "--mode", choices=["online", "offline"], default="online", help="offline uploads nothing and writes a folder"
    )
    parser.add_argument("--id", help="wandb run id; default: the one kept in RUN_DIR/wandb/run_id")
    parser.add_argument("--force", action="store_true", help="even while the run is being trained")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)  # a training starts it so
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    run_dir = options.run_dir.resolve()
    if options.follow:
        code = attend(run_dir, options)
        sys.stdout.flush()
        os._exit(code)  # wandb's own exit waits for its service, which may be what has hung
    try:
        sync(run_dir, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # wandb's own
        print(f"error: not everything was uploaded, run this again: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
