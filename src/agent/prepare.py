"""Fetches and checks what a training needs from the hub, for compute nodes without internet:
``uv run python -m agent.prepare --config_path config/train/X.yaml [--KEY VALUE …]``, on a machine that has it.

Takes the arguments of the training itself. What is here already is not asked for again; then everything is looked up
once more the way a job without internet will, without a GPU and without reading the weights. The last lines are the
environment that the job needs. With ``--frame_store true`` the videos are decoded into frame stores as well, as
``agent.data.prepare`` does. Exit codes: 0 ready, 2 something is missing or does not fit.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys

from agent import command_line
from agent.data.frames.making import prepare_all
from agent.data.prepare import own_arguments
from agent.preflight.needs import job_environment, prepare

log = logging.getLogger("agent.prepare")


def main(arguments: list[str]) -> int:
    """Exit code 2 for what the user has to put right."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\nThe arguments are those of run.py:\n")
    if os.environ.get("WANDB_MODE", "online") == "online":
        os.environ["WANDB_MODE"] = "offline"  # as the job will have it: no key is needed
    try:
        arguments, skip_bad_episodes, workers, stores = own_arguments(arguments)
        parsed = command_line.parse(arguments, 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if parsed is None:  # --help
        return 0
    config, notes = parsed
    # stdout is for what was found and what to export
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for note in notes:
        log.info(note)
    problems = prepare(config)
    if stores and not problems:
        problems = prepare_all(config, skip_bad_episodes=skip_bad_episodes, workers=workers)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    print("\n# ready; a job needs this environment:")
    environment = job_environment(config)
    for name, value in environment.items():
        print(f"export {name}={shlex.quote(value)}")
    if "WANDB_MODE" in environment:
        print("# the curves are uploaded afterwards: uv run python -m agent.sync_wandb RUN_DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
