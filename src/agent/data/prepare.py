"""Decodes every video of a training's data sets once, into a store that is read many times as fast:
``uv run python -m agent.data.prepare --config_path config/train/X.yaml [--skip_bad_episodes] [--workers N] [--KEY VALUE …]``

Takes the arguments of the training itself; ``--data.train.frame_store lossless`` or ``raw`` make another kind than JPEG.
Interrupt it whenever you like: the same command goes on with what is not done. Exit codes: 0 done, 2 something has to be
put right first.
"""

from __future__ import annotations

import logging
import sys

from agent.data.frames.making import prepare_all

log = logging.getLogger("agent.data.prepare")


def main(arguments: list[str]) -> int:
    """Exit code 2 for what the user has to put right."""
    from agent import command_line

    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\nThe other arguments are those of run.py:\n")
    try:
        rest, skip, workers, _ = own_arguments(arguments)
        parsed = command_line.parse(rest, 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if parsed is None:  # --help
        return 0
    config, notes = parsed
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for note in notes:
        log.info(note)
    problems = prepare_all(config, skip_bad_episodes=skip, workers=workers)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


def own_arguments(arguments: list[str]) -> tuple[list[str], bool, int | None, bool]:
    """The arguments that are not the training's: the rest, ``--skip_bad_episodes``, ``--workers``, ``--frame_store``.

    Raises:
        ValueError: if one has a value that it does not take.
    """
    rest, skip, workers, stores = [], False, None, False
    remaining = iter(arguments)
    for argument in remaining:
        name, given, value = argument.partition("=")
        if name == "--skip_bad_episodes":
            if given and value not in ("true", "false"):
                raise ValueError(f"--skip_bad_episodes takes no value, or =true or =false, got '{value}'")
            skip = value != "false"
        elif name == "--workers":
            value = value if given else next(remaining, "")
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"--workers takes a number of processes, got '{value}'")
            workers = int(value)
        elif name == "--frame_store":
            value = value if given else next(remaining, "")
            if value not in ("true", "false"):
                raise ValueError(
                    f"--frame_store takes true or false, got '{value}'; the kind of store is --data.train.frame_store"
                )
            stores = value == "true"
        else:
            rest.append(argument)
    return rest, skip, workers, stores


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
