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
import os
import sys
from pathlib import Path

from agent.tracking.wandb_replay import Wanted, attend, sync


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
    run_dir, wanted = options.run_dir.resolve(), Wanted(options.project, options.entity, options.mode, options.id)
    if options.follow:
        code = attend(run_dir, wanted, options.name)
        sys.stdout.flush()
        os._exit(code)  # wandb's own exit waits for its service, which may be what has hung
    try:
        sync(run_dir, wanted, options.force)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # wandb's own
        print(f"error: not everything was uploaded, run this again: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
