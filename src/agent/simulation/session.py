"""One call of ``agent.evaluate_sim``: a single checkpoint is evaluated, or the checkpoints of a run are watched."""

from __future__ import annotations

import argparse
from pathlib import Path

from agent.simulation.configuration import known_tasks
from agent.simulation.rendering import choose_backend, import_simulator
from agent.simulation.results import table

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
    _check_options(options)
    choose_backend()
    try:
        import_simulator()
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; {INSTALL}") from None
    from agent.checkpoints.finding import find_weights
    from agent.simulation.evaluation import Request, evaluate
    from agent.simulation.watching import watch

    if options.run:
        given = {key: getattr(options, key) for key in ("once", "device", "tokenizer")}
        return watch(Path(options.run), known_tasks(), **given)
    tasks = tuple(task.strip() for task in (options.tasks or "").split(",") if task.strip())
    numbers = ("episodes", "seed", "max_steps", "videos")
    request = Request(tasks, **{key: value for key in numbers if (value := getattr(options, key)) is not None})
    request.check(known_tasks())

    if not options.out and Path(options.checkpoint).expanduser().exists():
        default_out(find_weights(options.checkpoint, "--checkpoint")[0].parent.resolve())  # before minutes of loading

    def out(pretrained: Path) -> Path:
        return Path(options.out).expanduser() if options.out else default_out(pretrained)

    parts = {key: getattr(options, key) for key in ("device", "tokenizer", "statistics")}
    summary = evaluate(options.checkpoint, request, out, **parts)
    print(table(summary))


def _check_options(options: argparse.Namespace) -> None:
    """Refuses a command that names nothing to evaluate, or has options without effect."""
    if bool(options.checkpoint) == bool(options.run):
        raise ValueError("name what to evaluate: --checkpoint DIR, or --run DIR")
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
