"""A saved policy in simulation: ``uv run --extra sim python -m agent.evaluate_sim --checkpoint DIR --tasks reach-v3``.

``--checkpoint`` is a run folder (its newest checkpoint is taken), a checkpoint, or its ``pretrained_model``::

    uv run --extra sim python -m agent.evaluate_sim --checkpoint runs/pi0_metaworld --tasks reach-v3,push-v3 --episodes 20

prints success rates with 95% Wilson intervals. The same command again plays what is missing and changes nothing else.
``--run DIR`` evaluates the checkpoints of a run as its config's ``eval_cfg`` says, and waits for more while it trains.
"""

from __future__ import annotations

import argparse
import logging
import sys

from agent.simulation.session import evaluate_sim


def main(arguments: list[str]) -> int:
    """Exit code 2 for what the user has to put right, 1 if simulation itself failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m agent.evaluate_sim", description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="run folder, checkpoint or pretrained_model")
    add("--run", metavar="DIR", help="run folder: evaluate its checkpoints by the config's eval_cfg")
    add("--once", action="store_true", help="with --run: those that are there now, without waiting")
    add("--tasks", help="Meta-World's names, separated by commas")
    add("--episodes", type=int, help="per task; default 20")
    add("--seed", type=int, help="of noise; episode e starts from seed + e; default 1000")
    add("--max_steps", type=int, help="of an episode without success; default 500")
    add("--videos", type=int, metavar="N", help="film the first N episodes of each task")
    add("--out", metavar="DIR", help="of the results; default: simulation/<checkpoint> in the run folder")
    add("--device", help="cpu or cuda; default: the GPU if there is one")
    add("--tokenizer", metavar="NAME", help="folder or hub name, if not the checkpoint's own")
    add("--statistics", metavar="NAME", help="of a policy of several robots: the one to act on")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it says what accelerators it lacks
    try:
        evaluate_sim(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command plays what is missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
