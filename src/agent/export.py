"""Takes weights elsewhere: ``uv run python -m agent.export --checkpoint DIR --to FORMAT --out DIR``.

``--checkpoint`` is a run folder (its newest checkpoint is taken), a checkpoint, or its ``pretrained_model``::

    uv run python -m agent.export --checkpoint runs/pi0_finetune_bridge --to lerobot --out pi0_bridge
    uv run python -m agent.export --checkpoint runs/pi0_finetune_bridge --to openpi --out pi0_bridge --save_dtype bfloat16
    uv run python -m agent.export --checkpoint runs/pi0_finetune_bridge --to lerobot --out pi0_bridge --push_to_hub you/pi0_bridge

Each export has a model card, ``README.md``.
"""

from __future__ import annotations

import argparse
import sys

from agent.deployment.exporting import export

_FORMATS = ("lerobot", "lerobot_v1", "openpi")


def main(arguments: list[str]) -> int:
    """Runs the command; returns 2 for mistakes that the user has to correct, 1 for a file that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m agent.export", description=str(__doc__).split("\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder, checkpoint or pretrained_model")
    parser.add_argument("--to", required=True, choices=_FORMATS, help="LeRobot 0.6, LeRobot before 0.4, or openpi")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, not there or empty")
    parser.add_argument("--save_dtype", choices=["float32", "bfloat16"], help="of the weights; default: as they are")
    parser.add_argument("--statistics", metavar="ROBOT", help="of the robots it was trained on, the one to act on")
    parser.add_argument("--tokenizer", metavar="NAME", help="for lerobot: name of the tokenizer, if not the one in use")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload it as well")
    parser.add_argument("--private", action="store_true", help="the model on the hub is private if it is created")
    options = parser.parse_args(arguments)
    try:
        if options.private and not options.push_to_hub:
            raise ValueError("--private: nothing is uploaded without --push_to_hub OWNER/NAME")
        export(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
