"""Converts a whole RLDS tree to a LeRobot v3 data set, one process per core, and goes on where it was stopped.

The result is put together beside its place, in ``OUT.partial``, and renamed when it is whole. What one process does with one
file of the tree is in ``shard.py``.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from agent.data.conversion.rlds import Tree
from agent.data.conversion.shard import Layout, Place, convert_shard
from agent.data.conversion.v3_metadata import Totals, write_metadata
from agent.data.orphans import end_with_parent
from agent.safe_files import alone

log = logging.getLogger("agent.data.from_rlds")  # the command by which all of this is known


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
