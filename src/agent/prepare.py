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
from typing import TYPE_CHECKING

from agent import command_line, hub
from agent.data.prepare import own_arguments, prepare_all
from agent.preflight.needs import check_together, items
from agent.spelling import amount

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.data.source import Source

log = logging.getLogger("agent.prepare")


def environment(config: TrainPipelineConfig) -> dict[str, str]:
    """The variables under which a job finds the same things, and asks nobody."""
    from huggingface_hub import constants
    from lerobot.utils.constants import HF_LEROBOT_HOME

    home = os.path.abspath(constants.HF_HOME)
    values = {"HF_HOME": home, "HF_HUB_OFFLINE": "1"}
    for name, place, usual in (
        ("HF_HUB_CACHE", constants.HF_HUB_CACHE, "hub"),
        ("HF_LEROBOT_HOME", HF_LEROBOT_HOME, "lerobot"),
    ):
        if os.path.abspath(place) != os.path.join(home, usual):
            values[name] = os.path.abspath(place)
    of_one_attempt = ("VLA_ATTEMPT", "VLA_STATUS_FILE")
    values |= {k: v for k, v in sorted(os.environ.items()) if k.startswith("VLA_") and v and k not in of_one_attempt}
    if config.use_wandb and config.wandb.mode == "online":
        values["WANDB_MODE"] = "offline"
    return values


def prepare(config: TrainPipelineConfig) -> list[str]:
    """Fetches and checks everything, and prints what is where.

    Returns:
        What is wrong, all of it; empty if a job can start.
    """
    problems: list[str] = []
    sources: list[Source] = []
    rows = [("what", "size", "config key", "where")]
    away = False
    for item in items(config, sources):
        try:
            found = item.obtain(away)
        except (ValueError, hub.HubTrouble) as error:
            away = away or isinstance(error, hub.Unreachable)
            problems.append(str(error))
            rows.append((item.kind, "missing", item.key, item.name))
            continue
        for line in found.note.splitlines():
            log.info(line)
        rows.append((item.kind, amount(found.size), item.key, str(found.folder.resolve())))
    if not any(row[0] == "data set" and row[1] == "missing" for row in rows):
        try:
            for line in check_together(config, sources):
                log.info(line)
        except ValueError as error:
            problems.append(str(error))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for what, size, key, where in rows:
        print(f"{what:<{widths[0]}}  {size:>{widths[1]}}  {key:<{widths[2]}}  {where}")
    return problems


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
    for name, value in environment(config).items():
        print(f"export {name}={shlex.quote(value)}")
    if "WANDB_MODE" in environment(config):
        print("# the curves are uploaded afterwards: uv run python -m agent.sync_wandb RUN_DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
