"""The acceptance on a machine with one GPU: is everything right there that was written without one, and how fast is it?

    scripts/gpu_wheels.sh --with_lerobot               # where there is internet; fills .gpu/, which travels with the repository
    python3 benchmarks/gpu.py --out runs/acceptance    # where the GPU is: torch and little else; eight minutes
    python3 benchmarks/gpu.py --report runs/acceptance/results.jsonl        # the tables of docs/benchmarks.md
    uv run python benchmarks/gpu.py --rehearse         # the same steps on a CPU, tiny: does the program itself work?

Each step is a process of its own (a module of `gpu_steps/`) with a time limit, at whose end it is killed with all that it
started; what one costs by failing is its own results alone. The lines of `results.jsonl` are on the disk as soon as
something is known, so that a program that is stopped has told all it knew. `log.txt` has what the steps printed. A step
that no longer fits into ``--budget_s`` is skipped, and the table says so. Exit code 1 if a step failed or was skipped.

This process imports neither torch nor the project: it survives whatever happens there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """A row of the table."""

    number: int
    module: str
    """With a function ``run`` of a ``Place``."""
    limit_s: float
    lerobot: bool = False
    """Whether LeRobot is imported, which wants another transformers than the machine has."""
    arguments: tuple[str, ...] = ()
    """Of ``run``, beside the place. What needs a process of its own has a row of the same number."""

    @property
    def name(self) -> str:
        return " ".join((f"{self.number} {self.module.rpartition('.')[2]}", *self.arguments))


STEPS = (
    Step(0, "gpu_steps.ceilings", 15),
    Step(1, "gpu_steps.attention", 30),
    Step(2, "gpu_steps.parity", 45, lerobot=True),
    Step(3, "gpu_steps.demo", 60),
    Step(4, "gpu_steps.waits", 20),
    Step(5, "gpu_steps.peaks", 60),
    Step(6, "gpu_steps.speed", 60, arguments=("compiled",)),
    Step(6, "gpu_steps.speed", 15, arguments=("eager",)),
    Step(6, "gpu_steps.speed", 25, arguments=("small",)),
    Step(6, "gpu_steps.speed", 25, lerobot=True, arguments=("lerobot",)),
    Step(7, "gpu_steps.snapshot", 50),
    Step(8, "gpu_steps.groups", 40),
    Step(9, "gpu_steps.acting", 30),
)


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Runs the steps, or one of them in this process, or fills the tables of the documentation."""
    options = read_options(arguments)
    if options.report:
        from gpu_steps.report import report

        return report(options.report, options.docs)
    if options.step:
        return run_here(options)
    chosen = [s for s in steps if options.steps is None or s.number in options.steps]
    # Results, not only a screen: what a step found before it was killed has to be somewhere.
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt"):
        (options.out / name).unlink(missing_ok=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-acceptance-") as folder:
        paths = unpack(options.carried, Path(folder))
        for step in chosen:
            left = options.budget_s - (time.monotonic() - begin)
            run_step(step, options, Path(folder), paths, left)
    return summary(chosen, lines_of(options.out / "results.jsonl"))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "acceptance")
    parser.add_argument("--out", type=Path, default=out, help="for results and log; default: $OUT, or runs/acceptance")
    parser.add_argument("--steps", type=lambda text: [int(part) for part in text.split(",")], help="e.g. 0,3,8")
    parser.add_argument("--budget_s", type=float, help="seconds for everything; default: 480, none in a rehearsal")
    parser.add_argument("--patience", type=float, help="multiplies the limits; default: 1, in a rehearsal 10")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--carried", type=Path, default=ROOT / ".gpu", help="what scripts/gpu_wheels.sh has filled")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="write these results into the documentation")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page of --report")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # of a child: module and arguments
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out, options.carried = options.out.absolute(), options.carried.absolute()
    options.budget_s = options.budget_s or (float("inf") if options.rehearse else 480.0)
    options.patience = options.patience or (10.0 if options.rehearse else 1.0)
    return options


def run_here(options: argparse.Namespace) -> int:
    """One step, in this process."""
    from gpu_steps.place import Place

    module, *arguments = options.step.split()
    place = Place(options.name, options.out / "results.jsonl", options.work, options.rehearse, options.carried)
    importlib.import_module(module).run(place, *arguments)
    return 0


def unpack(carried: Path, folder: Path) -> dict[str, list[str]]:
    """Unpacks the wheels that travelled; what is for everyone, and what is for LeRobot besides."""
    paths: dict[str, list[str]] = {"wheels": [], "wheels_lerobot": []}
    for kind, found in paths.items():
        for wheel in sorted((carried / kind).glob("*.whl")):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(folder / kind)
            found[:] = [str(folder / kind)]
    return paths


def run_step(step: Step, options: argparse.Namespace, folder: Path, paths: dict[str, list[str]], left_s: float) -> None:
    """One step in a child, and the line that says how it ended."""
    limit_s = step.limit_s * options.patience
    if left_s < limit_s:
        note(options, step, False, why=f"skipped: {left_s:.0f} s are left of the budget, and it may take {limit_s:.0f}")
        return
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--step", " ".join((step.module, *step.arguments)),
               "--name", step.name, "--work", str(work), "--out", str(options.out), "--carried", str(options.carried),
               *["--rehearse"] * options.rehearse]  # fmt: skip
    log, begin = folder / "log", time.monotonic()
    with open(log, "wb") as stream:
        child = subprocess.Popen(command, cwd=ROOT, env=environment(step, options, paths), stdout=stream,
                                 stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            code: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # with all that it started and left
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    why = f"killed at its limit of {limit_s:.0f} s" if code is None else f"exit code {code}" if code else None
    text = log.read_text(errors="replace")
    with open(options.out / "log.txt", "a") as stream_of_all:
        stream_of_all.write(f"==== {step.name}\n{text}\n")
    if why:
        print("\n".join(text.splitlines()[-25:]), flush=True)
    note(options, step, why is None, seconds=round(time.monotonic() - begin, 1), why=why)
    shutil.rmtree(work, ignore_errors=True)


def environment(step: Step, options: argparse.Namespace, paths: dict[str, list[str]]) -> dict[str, str]:
    """Of a child: what it imports, and that nothing is asked of the internet."""
    carried = [*(paths["wheels_lerobot"] if step.lerobot else []), *paths["wheels"]]
    given = os.environ.get("PYTHONPATH")
    folders = [*carried, str(ROOT / "src"), str(ROOT / "benchmarks"), *([given] if given else [])]
    changes = {"PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # fmt: skip
    if options.rehearse:
        changes |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | changes


def note(options: argparse.Namespace, step: Step, passed: bool, **values: Any) -> None:
    """Says how a step ended, on the screen and among the results."""
    line = {"step": step.name, "check": "end", "passed": passed, **values}
    with open(options.out / "results.jsonl", "a") as stream:
        stream.write(json.dumps(line) + "\n")
    print(f"{step.name}: {values.get('why') or 'ended'}, {values.get('seconds', 0)} s", flush=True)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The results; a last line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def summary(steps: Iterable[Step], lines: list[dict[str, Any]]) -> int:
    """The table; the exit code."""
    failed = False
    print(f"\n{'step':<20}{'s':>7}  {'checks':>6}  {'':8}what failed")
    for step in steps:
        own = [line for line in lines if line["step"] == step.name]
        end = next(line for line in own if line["check"] == "end")
        wrong = [line["check"] for line in own if line["passed"] is False and line["check"] != "end"]
        told = "; ".join([*([end["why"]] if end.get("why") else []), *wrong])
        failed |= bool(told)
        word = "FAILED" if told else "passed"
        print(f"{step.name:<20}{end.get('seconds', 0):7.1f}  {len(own) - 1:>6}  {word:<8}{told}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
