"""Converts an RLDS data set of Open X-Embodiment, as TFDS stores it, to the LeRobot v3 format:
``uv run --extra rlds python -m agent.data.from_rlds --source DIR --out DIR``.

Every file of the tree becomes one video per camera and one data file, in as many processes as there are cores. The result
is put together in ``OUT.partial``; a conversion that was stopped goes on with the files that are not done when the same
command is run again. Exit codes: 0 converted, 2 something is wrong with the data or the command.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from agent.data.conversion.rlds import Tree, open_tree
from agent.data.conversion.shard import Layout, Place, convert_shard
from agent.data.conversion.v3_metadata import Totals, write_metadata
from agent.data.orphans import end_with_parent
from agent.safe_files import alone

log = logging.getLogger("agent.data.from_rlds")

_BRIDGE = Layout(
    fps=5,
    images={"image_0": "observation/image_0"},
    state=("observation/state",),
    action=("action",),
    instruction="language_instruction",
)
LAYOUTS = {
    # as published by the authors, and as prepared by those who train on it
    "bridge_dataset": _BRIDGE,
    "bridge_orig": _BRIDGE,
    # as in the first release of Open X-Embodiment
    "bridge": Layout(
        fps=5,
        images={"image_0": "observation/image"},
        state=("observation/state",),
        action=("action/world_vector", "action/rotation_delta", "action/open_gripper"),
        instruction="observation/natural_language_instruction",
    ),
    "fractal20220817_data": Layout(
        fps=3,
        images={"image": "observation/image"},
        state=("observation/base_pose_tool_reached", "observation/gripper_closed"),
        action=("action/world_vector", "action/rotation_delta", "action/gripper_closedness_action"),
        instruction="observation/natural_language_instruction",
    ),
}


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


def choose_layout(tree: Tree, options: argparse.Namespace) -> Layout:
    """The layout that is known by the tree's name, changed by what the command says.

    Raises:
        ValueError: if something is left open, or a feature is not there, or is of another kind.
    """
    layout = LAYOUTS.get(tree.name)
    if layout is None:
        needed = ("image", "state", "action", "instruction", "fps")
        if missing := [f"--{name}" for name in needed if getattr(options, name) is None]:
            raise ValueError(
                f"the layout of {tree.name} is not known: give {', '.join(missing)}. A step has\n{_listed(tree)}"
            )
        layout = Layout(0, {}, (), (), "")
    if options.image:
        pairs = [text.rpartition("=") for text in options.image]
        layout = replace(layout, images={name or feature.rpartition("/")[2]: feature for name, _, feature in pairs})
        if len(layout.images) != len(pairs):
            raise ValueError("--image names a camera twice: write CAMERA=FEATURE")
    changes = {
        name: getattr(options, name) for name in ("state", "action", "instruction", "fps") if getattr(options, name)
    }
    layout = replace(layout, size=options.size, crf=options.crf, **changes)
    layout = replace(layout, state=tuple(layout.state), action=tuple(layout.action))
    if layout.fps < 1 or layout.size < 2 or layout.size % 2 or options.processes < 1:
        raise ValueError("--fps and --processes must be at least 1, --size an even number")
    wanted: list[tuple[str, tuple[str, ...]]] = [(feature, ("Image",)) for feature in layout.images.values()]
    wanted += [(feature, ("Tensor", "Scalar")) for feature in (*layout.state, *layout.action)]
    for feature, kinds in [*wanted, (layout.instruction, ("Text", "Tensor"))]:
        kind = tree.features.get(feature)
        if kind not in kinds:
            what = "there is no such feature" if kind is None else f"it is of kind {kind}, not {' or '.join(kinds)}"
            raise ValueError(f"{feature}: {what}. A step has\n{_listed(tree)}")
    return layout


def _listed(tree: Tree) -> str:
    return "\n".join(f"  {name} ({kind})" for name, kind in sorted(tree.features.items()))


def convert(tree: Tree, layout: Layout, out: Path, repo_id: str, processes: int) -> None:
    """Writes the data set to ``out``.

    Raises:
        ValueError: if ``out`` exists, holds another conversion that was begun, or the data are damaged.
    """
    if out.exists():
        raise ValueError(f"--out {out} exists: name another folder, or delete it")
    partial = out.with_name(f"{out.name}.partial")
    _begin(partial, {"source": str(tree.folder), "shards": [path.name for path in tree.shards], **asdict(layout)})
    # A second one would begin the videos anew that the first has written.
    with alone(partial / "conversion.json", "conversion"):
        totals = _convert(tree, layout, partial, processes)
    partial.rename(out)
    if totals.left_out:
        log.warning("%d episodes have no instruction and were left out: meta/left_out.json names them", totals.left_out)
    log.info("%d episodes, %d frames in %s; in a data YAML:", totals.episodes, totals.frames, out)
    log.info("- {repo_id: %s, root: %s}", repo_id, out)


def _convert(tree: Tree, layout: Layout, partial: Path, processes: int) -> Totals:
    places = [Place(partial, number) for number in range(len(tree.shards))]
    todo = [place for place in places if not place.report.is_file()]
    log.info(
        "%s: %d files, %d of them done before; %d processes", tree.name, len(places), len(places) - len(todo), processes
    )
    _convert_all(tree, layout, todo, processes)
    totals = write_metadata(partial, layout, places)
    shutil.rmtree(partial / "shards")
    (partial / "conversion.json").unlink()
    return totals


def _begin(partial: Path, conversion: dict) -> None:
    """Makes the folder, or checks that what is there was begun by the same command."""
    record = partial / "conversion.json"
    conversion = json.loads(json.dumps(conversion))
    if record.is_file():
        begun = json.loads(record.read_text())
        if changed := [
            f"{key}: {begun.get(key)} → {conversion[key]}" for key in conversion if begun.get(key) != conversion[key]
        ]:
            raise ValueError(
                f"{partial} was begun with other settings ({'; '.join(changed)}): give those, or delete it"
            )
        return
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(conversion))


def _convert_all(tree: Tree, layout: Layout, todo: Sequence[Place], processes: int) -> None:
    from tqdm import tqdm

    if not todo:
        return
    count = sum(tree.episodes[place.number] for place in todo)
    pool = ProcessPoolExecutor(min(processes, len(todo)), get_context("spawn"), end_with_parent)
    try:
        futures = {
            pool.submit(
                convert_shard, tree.shards[place.number], tree.episodes[place.number], layout, place
            ): place.number
            for place in todo
        }
        with tqdm(total=count, unit="episode", smoothing=0) as bar:
            for future in as_completed(futures):
                future.result()
                bar.update(tree.episodes[futures[future]])
    except BrokenProcessPool as error:
        raise ValueError(
            "a process was killed, most often by the system when memory runs out: run the same command with fewer --processes; "
            "the files that are done stay done"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
