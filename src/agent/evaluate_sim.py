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
from pathlib import Path

INSTALL = (
    "install the extra `sim`: uv sync --extra sim, or start with uv run --extra sim python -m agent.evaluate_sim …"
)

_OF_EVAL_CFG = ("tasks", "episodes", "seed", "max_steps", "videos", "out")


def default_out(pretrained: Path) -> Path:
    """``simulation/<checkpoint>`` in the run folder.

    Raises:
        ValueError: if the policy lies in none.
    """
    checkpoint = pretrained.parent
    if checkpoint.parent.name != "checkpoints":
        raise ValueError(f"--out: {pretrained} is not in a run folder, so say where the results are to go: --out DIR")
    ema = "_ema" if pretrained.name.endswith("_ema") else ""
    return checkpoint.parent.parent / "simulation" / f"{checkpoint.name}{ema}"


def evaluate_sim(options: argparse.Namespace) -> None:
    """Runs what the command line asks for and prints the table.

    Raises:
        ValueError: for everything that the user has to put right.
    """
    from agent.simulation.rendering import choose_backend, import_simulator

    choose_backend()
    try:
        import_simulator()
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; {INSTALL}") from None
    from agent.checkpoints.weights import find_weights
    from agent.simulation.evaluation import Request, evaluate
    from agent.simulation.metaworld import TASK_DESCRIPTIONS
    from agent.simulation.results import table

    if options.run:
        from agent.simulation.watching import watch

        return watch(
            Path(options.run),
            list(TASK_DESCRIPTIONS),
            once=options.once,
            device=options.device,
            tokenizer=options.tokenizer,
        )
    tasks = tuple(task.strip() for task in (options.tasks or "").split(",") if task.strip())
    numbers = ("episodes", "seed", "max_steps", "videos")
    request = Request(tasks, **{key: value for key in numbers if (value := getattr(options, key)) is not None})
    request.check(list(TASK_DESCRIPTIONS))

    if not options.out and Path(options.checkpoint).expanduser().exists():
        default_out(find_weights(options.checkpoint, "--checkpoint")[0].parent.resolve())  # before minutes of loading

    def out(pretrained: Path) -> Path:
        return Path(options.out).expanduser() if options.out else default_out(pretrained)

    parts = {key: getattr(options, key) for key in ("device", "tokenizer", "statistics")}
    summary = evaluate(options.checkpoint, request, out, **parts)
    print(table(summary))


def _check_company(options: argparse.Namespace) -> None:
    """Refuses options that would have no effect."""
    if options.checkpoint and options.once:
        raise ValueError("--once has no effect with --checkpoint; leave it out")
    if options.run and options.statistics:
        raise ValueError(
            "--statistics: with --run, a policy acts on its run's data.train.deploy; leave it out, or evaluate single "
            "checkpoints with --checkpoint"
        )
    given = [f"--{key}" for key in _OF_EVAL_CFG if options.run and getattr(options, key) is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: with --run, {options.run}/config.yaml says this in eval_cfg; leave it out, or "
            "evaluate single checkpoints with --checkpoint"
        )


def main(arguments: list[str]) -> int:
    """Exit code 2 for what the user has to put right, 1 if simulation itself failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m agent.evaluate_sim", description=str(__doc__).split("\n")[0])
    parser.add_argument("--checkpoint", metavar="DIR", help="run folder, checkpoint or pretrained_model")
    parser.add_argument("--run", metavar="DIR", help="run folder: evaluate its checkpoints by the config's eval_cfg")
    parser.add_argument("--once", action="store_true", help="with --run: those that are there now, without waiting")
    parser.add_argument("--tasks", help="Meta-World's names, separated by commas")
    parser.add_argument("--episodes", type=int, help="per task; default 20")
    parser.add_argument("--seed", type=int, help="of noise; episode e starts from seed + e; default 1000")
    parser.add_argument("--max_steps", type=int, help="of an episode without success; default 500")
    parser.add_argument("--videos", type=int, metavar="N", help="film the first N episodes of each task")
    parser.add_argument(
        "--out", metavar="DIR", help="of the results; default: simulation/<checkpoint> in the run folder"
    )
    parser.add_argument("--device", help="cpu or cuda; default: the GPU if there is one")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or hub name, if not the checkpoint's own")
    parser.add_argument("--statistics", metavar="NAME", help="of a policy of several robots: the one to act on")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it says what accelerators it lacks
    try:
        if bool(options.checkpoint) == bool(options.run):
            raise ValueError("name what to evaluate: --checkpoint DIR, or --run DIR")
        _check_company(options)
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
