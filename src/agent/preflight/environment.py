"""Checks what a run finds around it: Python and its libraries, variables, the run folder, and the key of wandb."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from importlib.util import find_spec

from agent.lifecycle.run_folder import holder
from agent.preflight import needs
from agent.preflight.context import Context
from agent.preflight.report import Row


def check(context: Context) -> list[Row]:
    """Looks at the environment of this process, which is also a job's if its script sources set_path.sh."""
    return [_software(context), _hub(context), _folder(context), _wandb(context)]


def _software(context: Context) -> Row:
    # LeRobot's own code is needed for some formats of data alone.
    found = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lerobot") if find_spec(name))
    gpus = ", ".join(context.visible_gpus) or "no GPU here"
    text = f"Python {platform.python_version()}, {found}; {os.cpu_count()} cores; {gpus}"
    if context.model.device == "cuda" and not context.visible_gpus:
        return Row("environment", "warn", f"{text}; model_cfg.device is cuda", "check again where the job will run")
    return Row("environment", "pass", text, details={"executable": sys.executable})


def _hub(context: Context) -> Row:
    """Says whether the job will ask the hub, which a compute node often cannot reach."""
    from huggingface_hub import constants

    # The constant is what libraries ask; within the check it is always on, so the variable is read anew.
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    names = [dataset.repo_id for _, dataset in needs.data_sets(context.config) if dataset.root is None]
    items = [needs.tokenizer(context.config), needs.weights(context.config)]
    names += [item.name for item in items if item is not None and item.fetch is not None]
    if not names:
        return Row("HF_HUB_OFFLINE", "pass", "nothing comes from the hub")
    text = f"{', '.join(dict.fromkeys(names))} in {constants.HF_HOME}"
    if offline:
        return Row("HF_HUB_OFFLINE", "pass", f"is set: the job takes {text} from the cache")
    change = (
        "where compute nodes have no internet: `uv run python -m agent.prepare --config_path …` here, and export "
        "HF_HUB_OFFLINE=1 in set_path.sh"
    )
    return Row("HF_HUB_OFFLINE", "warn", f"is not set: the job will ask the hub for {text}", change)


def _folder(context: Context) -> Row:
    """Says whether the run folder can be written, and whether another run holds it."""
    folder = context.config.run_dir
    try:
        probe = folder / "check" / ".probe"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        change = "set VLA_LOG_DIR to a folder that can be written, in set_path.sh"
        return Row("run folder", "fail", f"{folder} cannot be written ({error.strerror})", change)
    if (other := holder(folder)) is not None:
        change = "wait for it, stop it, or give this run another name: --name …"
        return Row("run folder", "warn", f"{folder} is in use by {other}: another run in it is refused", change)
    known = "" if "VLA_LOG_DIR" in os.environ else "; VLA_LOG_DIR is not set"
    return Row("run folder", "pass", f"{folder.absolute()}{known}")


def _wandb(context: Context) -> Row:
    config = context.config
    if not config.use_wandb:
        return Row("wandb", "pass", "is not used")
    try:
        config.wandb.check()
    except ValueError as error:
        text, _, change = str(error).partition(": ")
        return Row("wandb", "fail", text, change)
    mode = os.environ.get("WANDB_MODE") or config.wandb.mode
    if mode == "online":
        return Row("wandb", "pass", "a key is there")
    upload = f"; later: python -m agent.sync_wandb {config.run_dir}" if config.wandb.actual_mode() == "offline" else ""
    return Row("wandb", "pass", f"{mode}, needs no key{upload}")
