"""The command line of a training run: ``--config_path FILE``, overrides, ``--help``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig

_USAGE = """usage: torchrun --standalone --nproc_per_node=N src/agent/run.py --config_path config/train/X.yaml [--KEY VALUE …]
       python src/agent/run.py --config_path config/train/X.yaml [--KEY VALUE …]

Every key of the YAML can be given here as well and then wins, for instance
  --global_batch_size 64 --model_cfg.chunk_size 8 --data.train.datasets.0.root PATH

"""


def parse(arguments: list[str], world_size: int) -> tuple[TrainPipelineConfig, list[str]] | None:
    """The config and lines for the log; None after ``--help``.

    Raises:
        ValueError: with what to write instead.
    """
    from agent.configuration_pipeline import load_config

    if "--help" in arguments or "-h" in arguments:
        from agent.describe_config import as_help

        try:
            print(_USAGE + as_help(), flush=True)
        except BrokenPipeError:  # `--help | head` reads no further; nor must the interpreter's flush at the exit fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None
    path, rest = None, []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config_path":
            path = next(remaining, None)
        elif argument.startswith("--config_path="):
            path = argument.partition("=")[2]
        else:
            rest.append(argument)
    if not path or path.startswith("--"):
        raise ValueError("which config? add --config_path config/train/X.yaml; --help lists every key")
    return load_config(path, rest, world_size)
