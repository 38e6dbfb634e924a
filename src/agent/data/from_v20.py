"""Converts a LeRobot v2.0 data set to v3 in place, without network: ``uv run python -m agent.data.from_v20 --root DIR``.

LeRobot's own converter starts from v2.1, which differs from v2.0 by statistics of every episode. They are added here, with
LeRobot's functions, and its converter does the rest. The data set as it was stays beside the new one, as ``DIR_old``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from agent.data.conversion.v21_statistics import to_v21


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 converted, 2 this is no whole v2.0 data set."""
    parser = argparse.ArgumentParser(prog="python -m agent.data.from_v20", description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder with meta/, data/ and videos/")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    root = options.root.expanduser().absolute()
    try:
        to_v21(root, options.processes)
    except (ValueError, OSError) as error:
        print(f"{root} cannot be converted: {error}", file=sys.stderr)
        return 2
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    convert_dataset(f"local/{root.name}", root=root, push_to_hub=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
