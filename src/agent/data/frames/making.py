"""Makes the frame stores of a run: decodes every wanted picture once, in parallel, and goes on where it was interrupted.

What a store needs and what of it is there already is planned in ``preparation.py``; the processes that decode run
``parts.py``. Here are the order of the steps, the size told in advance, and what is said when the disk, a file or a process
fails.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.data.frames.manifest import seal
from agent.data.frames.parts import Part, start_worker, write_part
from agent.data.frames.preparation import Preparation, note_of, to_text
from agent.data.frames.store import WantedStore, frames_folder
from agent.data.frames.times import index_file
from agent.data.recorded.metadata import spelled
from agent.data.recorded.pictures import NoColours, check_pictures
from agent.safe_files import alone, write_bytes
from agent.spelling import amount

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.spelling import amount
from agent.data.source import Source

log = logging.getLogger("agent.data.prepare")  # the command by which all of this is known


def prepare(source: Source, wanted: WantedStore, *, skip_bad_episodes: bool, workers: int) -> None:
    """Makes the frame store of one data set, or completes it.

    Raises:
        ValueError: if a file is missing, the disk is too small or full, or an episode cannot be read.
    """
    check_pictures(source)
    folder = wanted.folder(frames_folder(source.metadata, source.config.frames))
    try:
        work = Preparation(source, wanted)
        for camera in work.cameras:
            (work.folder / camera).mkdir(parents=True, exist_ok=True)
        with alone(work.folder / ".lock", "preparation"):
            _prepare(work, skip_bad_episodes, workers)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(place for place in (folder, *folder.absolute().parents) if os.path.isdir(place))
            free = shutil.disk_usage(there).free
            raise ValueError(
                f"{source}: the disk of {folder} is full ({amount(free)} free). What is finished stays: make room "
                "and run the same command again, or name another place with `frames: FOLDER` in the data set's entry."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            named = Path(error.filename or folder)
            if not (named.is_relative_to(folder) or folder.is_relative_to(named)):
                raise ValueError(f"{source}: {named} cannot be read ({error.strerror})") from error
            raise ValueError(
                f"{source}: {folder} cannot be written ({error.strerror}); name another place with `frames: FOLDER` "
                "in the data set's entry"
            ) from error
        raise


def _prepare(work: Preparation, skip_bad_episodes: bool, workers: int) -> None:
    for leftover in work.folder.glob("*/.*.tmp"):  # of a preparation that was killed
        leftover.unlink()
    work.verify(workers)
    unsure = work.look()
    if unsure:
        with _Pool(workers) as pool:
            log.info("%s: looking through %d of %d files", work.source, len(unsure), len(work.jobs))
            indices = pool.run(index_file, [(job.path, job.video) for job in unsure])
            owners = [
                (job, part) for job, index in zip(unsure, indices, strict=True) for part in work.parts(job, index)
            ]
            _announce(work, [part for _, part in owners])
            total = sum(len(times) for _, part in owners for times in part.episodes.values())
            for number, written in pool.each(write_part, [(part,) for _, part in owners], total):
                job, part = owners[number]
                job.done.add(part.target)
                job.bad.update(written.bad)
                assert job.source is not None
                episodes = dict(job.parts)[part.target].tolist()
                unread = {str(episode): job.bad[episode] for episode in episodes if episode in job.bad}
                note = {"source": asdict(job.source), "metadata": work.described(job), "episodes": episodes}
                note |= {"frames": written.frames, "bad": unread, "checksums": to_text(written.checksums)}
                write_bytes(note_of(part.target), seal(note))
    bad = work.bad()
    for episode, why in bad.items():
        log.warning("%s: episode %d is bad: %s", work.source, episode, why)
    if bad and not skip_bad_episodes:
        raise ValueError(
            f"{work.source}: episodes {spelled(list(bad))} cannot be read. The first: {next(iter(bad.values()))}. Copy the "
            "files again; or leave these episodes out of store and training with --skip_bad_episodes. The others are done."
        )
    work.finish()
    size = sum(path.stat().st_size for path in work.folder.rglob("*") if path.is_file())
    log.info("%s: the frame store %s is complete, %s", work.source, work.folder, amount(size))


def _announce(work: Preparation, parts: list[Part]) -> None:
    """Says how large the store will be, and refuses a disk that is too small for it."""
    frames = sum(len(times) for part in parts for times in part.episodes.values())
    height, width = work.wanted.resolution
    if work.encoding.kind == "raw":
        each, basis = 3.0 * height * width, "exact"
    else:
        samples = [part for part in parts if part.episodes]
        samples = samples[:: max(1, len(samples) // 8)][:8]
        sizes = [size for part in samples for size in _sampled(part, 16 // len(samples) + 1)]
        each, basis = float(np.mean(sizes or [0])), f"from {len(sizes)} frames"
    need = frames * (each + 100)
    free = shutil.disk_usage(work.folder).free
    log.info(
        "%s: %d pictures to decode (%s) into %s, about %s (%s; %s free)",
        *(work.source, frames, ", ".join(work.cameras), work.folder, amount(need), basis, amount(free)),
    )
    if need > free:
        raise ValueError(
            f"{work.source}: the frame store takes about {amount(need)} more, {work.folder} has {amount(free)} free. "
            "Make room, or name another place with `frames: FOLDER` in the data set's entry"
            + ("" if work.encoding.kind == "jpeg" else ", or take --data.train.frame_store jpeg")
        )


def _sampled(part: Part, count: int) -> list[int]:
    """Measures the sizes of a few encoded pictures; what is bad is left to the real pass."""
    import av

    from agent.data.frames.parts import FrameMissing, _from_data_file, decode, encoded

    if not part.video:
        episode, rows = next(iter(part.episodes.items()))
        sizes: list[int] = []
        writer: Any = SimpleNamespace(add=lambda _, __, picture: sizes.append(len(picture)))
        _from_data_file(replace(part, episodes={episode: rows[:count]}), writer, {})
        return sizes
    times = np.concatenate(list(part.episodes.values()))
    times = times[: min(count, len(times))]
    try:
        return [len(encoded(part, picture)) for picture in decode(part.source, times)]
    except (av.FFmpegError, FrameMissing, NoColours):
        return []


class _Pool:
    """Runs the work in processes, and shows a progress bar."""

    def __init__(self, workers: int) -> None:
        import multiprocessing

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["agent.data.frames.parts", "torch", "cv2", "av", "simplejpeg", "pyarrow.parquet"]
        )
        self._written = context.Value("q", 0)
        self._pool = ProcessPoolExecutor(workers, context, start_worker, (self._written,))

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, function: Any, arguments: list[tuple]) -> list[Any]:
        """Waits for the results, in order."""
        futures = [self._pool.submit(function, *each) for each in arguments]
        return [_result(future) for future in futures]

    def each(self, function: Any, arguments: list[tuple], frames: int) -> Iterator[tuple[int, Any]]:
        """Yields number and result of each as it is done."""
        from tqdm import tqdm

        pending: dict[Future, int] = {self._pool.submit(function, *each): n for n, each in enumerate(arguments)}
        with tqdm(total=frames, unit="frame", disable=None, smoothing=0.1) as bar:
            while pending:
                done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(self._written.value - bar.n)
                for future in done:
                    yield pending.pop(future), _result(future)


def _result(future: Future) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that decodes was killed, most often by the system when memory runs out; take fewer with --workers, or "
            "ask for more memory. What is finished stays."
        ) from error


def prepare_all(
    config: TrainPipelineConfig, *, skip_bad_episodes: bool = False, workers: int | None = None
) -> list[str]:
    """Makes the frame stores of all data sets of a run.

    Returns:
        What is wrong, one entry per data set; empty if all stores are complete.
    """
    from agent import hub
    from agent.data.features import check_features
    from agent.data.normalization.robot_names import assign_robots
    from agent.data.source import open_source

    spec = config.family.sample_spec(config.trainable)
    train = config.data.train
    wanted = WantedStore(train.frame_store, train.frame_quality, spec.image_resolution)
    try:
        sources = [
            open_source(dataset, spec.chunk_size, "pyav", train.tolerance_s, verify_videos=False)
            for dataset in [*train.datasets, *config.data.val.datasets]
        ]
        count = len(train.datasets)
        check_features(sources, spec, *assign_robots(sources[:count], sources[count:], train))
        _check_folders(sources)
    except (ValueError, hub.HubTrouble) as error:
        return [str(error)]
    problems = []
    for source in _each_once(sources):
        try:
            prepare(
                source, wanted, skip_bad_episodes=skip_bad_episodes, workers=workers or len(os.sched_getaffinity(0))
            )
        except ValueError as error:
            problems.append(str(error))
    return problems


def _check_folders(sources: list[Source]) -> None:
    """Raises ValueError if two data sets would have their stores in one folder: each would replace the other's."""
    owners: dict[Path, Source] = {}
    for source in sources:
        folder = frames_folder(source.metadata, source.config.frames)
        owner = owners.setdefault(folder.resolve(), source)
        if owner.metadata.root.resolve() != source.metadata.root.resolve():
            raise ValueError(
                f"{owner} and {source} both have `frames: {folder}`, where the store of one would replace that of the other: "
                f"give each a folder of its own, such as {folder / source.config.repo_id.rpartition('/')[2]}"
            )


def _each_once(sources: list[Source]) -> list[Source]:
    """Merges entries of the same data set, such as two splits of it."""
    merged: dict[tuple, Source] = {}
    for source in sources:
        source.cameras = {key: key for key in source.cameras.values()}
        key = (source.metadata.root.resolve(), source.config.frames)
        if key in merged:
            other = merged[key]
            both = np.union1d(other.episodes, source.episodes)
            merged[key] = replace(other, episodes=both, chosen=both, cameras={**other.cameras, **source.cameras})
        else:
            merged[key] = source
    return list(merged.values())
