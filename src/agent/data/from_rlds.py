"""Converts an RLDS data set of Open X-Embodiment, as TFDS stores it, to the LeRobot v3 format:
``uv run --extra rlds python -m agent.data.from_rlds --source DIR --out DIR``.

Every file of the tree becomes one video per camera and one data file, in as many processes as there are cores. The result
is put together in ``OUT.partial``; a conversion that was stopped goes on with the files that are not done when the same
command is run again. Exit codes: 0 converted, 2 something is wrong with the data or the command.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from agent.data.conversion.converting import convert
from agent.data.conversion.layouts import LAYOUTS, choose_layout
from agent.data.conversion.rlds import open_tree

log = logging.getLogger("agent.data.from_rlds")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    options = _parser().parse_args(arguments)
    try:
        if find_spec("google_crc32c") is None:
            raise ValueError(
                "google-crc32c is not installed: run this with `uv run --extra rlds python -m agent.data.from_rlds`"
            )
        tree = open_tree(options.source.expanduser(), options.split)
        layout = choose_layout(tree, options)
        convert(tree, layout, options.out.expanduser(), options.repo_id or tree.name, options.processes)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m agent.data.from_rlds", description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="folder with dataset_info.json, or a parent of one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the LeRobot data set, which must not exist")
    parser.add_argument("--split", default="train", help="of the tree")
    parser.add_argument("--repo_id", help="name written into the log's example; that of the tree when not given")
    known = ", ".join(LAYOUTS)
    group = parser.add_argument_group("layout", f"Known by name: {known}. Anything given here replaces that part.")
    group.add_argument("--image", action="append", metavar="[CAMERA=]FEATURE", help="such as wrist=observation/image_1")
    group.add_argument("--state", action="append", metavar="FEATURE", help="repeat it to put several together")
    group.add_argument("--action", action="append", metavar="FEATURE", help="repeat it to put several together")
    group.add_argument("--instruction", metavar="FEATURE")
    group.add_argument("--fps", type=int, help="control rate of the robot, which RLDS does not store")
    parser.add_argument("--size", type=int, default=224, help="height and width of the pictures")
    parser.add_argument("--crf", type=int, default=18, help="quality of H.264, smaller is better")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    return parser


if __name__ == "__main__":
    sys.exit(main())
