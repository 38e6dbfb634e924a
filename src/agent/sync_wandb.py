"""Makes one wandb run out of a run folder: ``uv run python -m agent.sync_wandb RUN_DIR``.

``metrics.jsonl`` holds every update once, whatever happened to the job; wandb's own offline files lose their tail when
a process is killed. So offline runs are replayed from the former::

    uv run python -m agent.sync_wandb runs/pi0_finetune_bridge                    # to wandb
    uv run python -m agent.sync_wandb runs/pi0_finetune_bridge --mode offline     # to a folder for `wandb sync`

wandb keeps the first value of a step that it has: a run that is there already is continued, not replaced. To begin
anew, give another ``--id``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from agent.wandb_sink import Wandb, WandbConfig


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a torn last line is left out.

    Raises:
        ValueError: if there are none, or they are not in order.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {path}; RUN_DIR is the folder of one run, like runs/pi0_demo")
    records: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break  # the process died while writing it
            raise ValueError(f"{path}, line {number} is not JSON; the next start of the run mends it") from None
        if records and record["step"] <= records[-1]["step"]:
            raise ValueError(f"{path}, line {number}: step {record['step']} comes after step {records[-1]['step']}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no update yet")
    return records


def refuse_a_live_run(run_dir: Path) -> None:
    """Raises:
    ValueError: if a process holds the folder's lock.
    """
    lock = run_dir / ".lock"
    if not lock.exists():
        return
    with open(lock, encoding="utf-8", errors="replace") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{run_dir} is being trained by {handle.read() or 'an unknown process'}; wait for its end, or take what "
                "there is with --force"
            ) from None
        except OSError:
            return  # a file system without locks


def settings_of(run_dir: Path) -> dict[str, Any]:
    """What ``config.yaml`` holds; empty without one."""
    path = run_dir / "config.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def sync(run_dir: Path, options: argparse.Namespace) -> str:
    """Writes the run. Returns its wandb id.

    Raises:
        ValueError: for everything that the user has to put right first.
    """
    records, settings = read_metrics(run_dir), settings_of(run_dir)
    if not options.force:
        refuse_a_live_run(run_dir)
    of_run = settings.get("wandb") or {}
    mode = options.mode or os.environ.get("WANDB_MODE") or "online"
    if mode not in ("online", "offline"):
        raise ValueError(f"WANDB_MODE is {mode}; give --mode online or --mode offline")
    os.environ["WANDB_MODE"] = mode
    config = WandbConfig(
        project=options.project or of_run.get("project") or "agent",
        entity=options.entity or of_run.get("entity"),
        mode=mode,  # type: ignore[arg-type]
        run_id=options.id or of_run.get("run_id"),
    )
    config.check()
    sink = Wandb(config, run_dir, run_dir.name, settings, [])
    for record in records:
        sink.write(record)
    sink.close(0)
    print(
        f"wandb run {sink.run_id}: {len(records)} lines, steps {records[0]['step']} to {records[-1]['step']}, {sink.mode}"
    )
    upload = f"wandb sync {run_dir / 'wandb'}/offline-run-*"
    if sink.mode != mode:
        raise ValueError(f"wandb could not be reached; where it can be, upload this with: {upload}")
    if mode == "offline":
        print(f"upload it with: {upload}")
    return sink.run_id


def main(arguments: list[str]) -> int:
    """Exit code 2 for what the user has to put right."""
    parser = argparse.ArgumentParser(prog="python -m agent.sync_wandb", description=str(__doc__).split("\n")[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--project", help="default: wandb.project of the run's config")
    parser.add_argument("--entity", help="user or team; default: wandb.entity, then $VLA_WANDB_ENTITY")
    parser.add_argument("--mode", choices=["online", "offline"], help="default: $WANDB_MODE, then online")
    parser.add_argument("--id", help="wandb run id; default: the one kept in RUN_DIR/wandb/run_id")
    parser.add_argument("--force", action="store_true", help="even while the run is being trained")
    options = parser.parse_args(arguments)
    try:
        sync(options.run_dir.resolve(), options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
