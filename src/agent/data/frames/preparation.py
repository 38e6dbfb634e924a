"""Plans the making of a frame store: what it needs, what of it is there already, and its index at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from agent.data.frames.manifest import (
    VERSION,
    Manifest,
    SourceFile,
    describe_metadata,
    index_name,
    seal,
    unseal,
)
from agent.data.frames.parts import Part, checksums_of, places
from agent.data.frames.store import WantedStore, frames_folder
from agent.data.frames.times import FileIndex, times_of_episodes
from agent.data.recorded.arrow import to_numpy
from agent.data.recorded.stretches import Stretches, astray, offsets_of, wrong_by_the_table
from agent.safe_files import write_bytes

if TYPE_CHECKING:
    from agent.data.source import Source

log = logging.getLogger("agent.data.prepare")

PART_FRAMES = 4096  # at least, unless the file ends: many enough for all cores, few enough files


@dataclass
class Job:
    """One source file of one camera."""

    camera: str
    path: Path
    video: bool
    episodes: np.ndarray
    """All episodes in the file, in order."""
    parts: list[tuple[Path, np.ndarray]]
    """Target → its episodes, of those that are wanted."""
    source: SourceFile | None = None
    done: set[Path] = field(default_factory=set)
    bad: dict[int, str] = field(default_factory=dict)


class Preparation:
    """Plans the making of one store, and ends it.

    Args:
        source: the data set, its cameras known.
        wanted: what the config asks for.
    """

    def __init__(self, source: Source, wanted: WantedStore) -> None:
        self.source, self.metadata, self.wanted = source, source.metadata, wanted
        self.encoding = wanted.encoding()
        self.folder = wanted.folder(frames_folder(source.metadata, source.config.frames))
        self.cameras = sorted(set(source.cameras.values()))
        self.episodes = source.episodes
        self._left_out: dict[int, str] = {}
        """What the store as it is lacks, of episodes that are not asked for now."""
        self._sources: dict[str, SourceFile] = {}
        """The files that the store as it is was made of, those of left out episodes among them."""
        self._keep_what_is_there()
        videos = [camera for camera in self.cameras if camera in self.metadata.video_keys]
        self._stretches = {camera: Stretches.of(self.metadata, camera, source.tolerance_s) for camera in videos}
        self._wrong = {
            camera: wrong_by_the_table(stretches, partial(self.metadata.video_file, key=camera))
            for camera, stretches in self._stretches.items()
        }
        self.jobs = [job for camera in self.cameras for job in self._jobs(camera)]

    def _keep_what_is_there(self) -> None:
        """Cameras and episodes of the store as it is, if it is of this data set, stay in it."""
        path = self.folder / "manifest.json"
        if not path.is_file():
            return
        before = Manifest.read(path)
        known = [key for key in before.cameras if key in self.metadata.camera_keys]
        if before.version != VERSION or before.metadata != describe_metadata(self.metadata, known):
            return
        notes = [read_note(self.folder / camera / part) for camera in known for part in before.cameras[camera]]
        listed = {int(episode) for note in notes if note is not None for episode in note["episodes"]}
        stored = np.asarray(sorted(listed - set(before.left_out)), dtype=np.int64)
        self._sources = before.sources
        self.cameras = sorted({*self.cameras, *known})
        self.episodes = np.union1d(self.episodes, stored)
        asked = set(self.episodes.tolist())
        self._left_out = {episode: why for episode, why in before.left_out.items() if episode not in asked}

    def _jobs(self, camera: str) -> Iterator[Job]:
        metadata, video = self.metadata, camera in self.metadata.video_keys
        place = f"videos/{camera}" if video else "data"
        chunks, files = (metadata.episodes[f"{place}/{name}"] for name in ("chunk_index", "file_index"))
        for chunk, file in sorted({(int(chunks[e]), int(files[e])) for e in self.episodes}):
            members = np.flatnonzero((chunks == chunk) & (files == file))
            if video:
                members = members[np.argsort(self._stretches[camera].starts[members], kind="stable")]
            path = metadata.file(place, members[0])
            # Always the same groups, whichever episodes are wanted, so that parts can be used again.
            group = np.cumsum(metadata.episodes["length"][members]) // PART_FRAMES
            parts = []
            for number in np.unique(group):
                together = members[group == number]
                if not len(wanted := together[np.isin(together, self.episodes)]):
                    continue
                # A part with more episodes has another name: until its index is there, the old one is read with the old.
                name = f"chunk-{chunk:03d}-file-{file:03d}-episode-{together[0]:06d}"
                if len(wanted) < len(together):
                    name += f"-{xxhash.xxh3_64(wanted.astype(np.int64)).hexdigest()}"
                parts.append((self.folder / camera / f"{name}.arrow", wanted))
            yield Job(camera, path, video, members, parts)

    def frames(self, episodes: np.ndarray | Sequence[int]) -> int:
        """Counts the frames of episodes, by the metadata."""
        return int(self.metadata.episodes["length"][np.asarray(episodes, dtype=np.int64)].sum())

    # ---- what is done already

    def verify(self, workers: int) -> None:
        """Holds every part that is there against its checksums; what is damaged counts as not done.

        A part that an earlier version wrote gets checksums of the pictures that it holds now.
        """
        from tqdm import tqdm

        there = [
            target for job in self.jobs for target, _ in job.parts if target.is_file() and note_of(target).is_file()
        ]
        if not there:
            return
        new = 0
        # Reading and hashing leave Python's lock to the others.
        with (
            ThreadPoolExecutor(workers) as pool,
            tqdm(total=len(there), unit="part", desc="verifying", disable=None) as bar,
        ):
            for added in pool.map(self._verify, there):
                new += added
                bar.update()
        if new:
            log.warning(
                "%s: %d of %d parts were written by an earlier version, without checksums; they were taken now, of the pictures "
                "as they are. If you have reason to doubt these, remove %s and prepare anew",
                self.source,
                new,
                len(there),
                self.folder,
            )

    def _verify(self, target: Path) -> bool:
        """Tells whether the part has had no checksums; removes the note of a damaged one."""
        if (note := read_note(target)) is None:
            return False
        try:
            found = checksums_of(target, self.encoding)
        except ValueError as error:
            problem = str(error)
        else:
            if "checksums" not in note:
                write_bytes(note_of(target), seal({**note, "checksums": to_text(found)}))
                return True
            if to_text(found) == note["checksums"]:
                return False
            problem = "the checksums of its pictures do not match"
        log.warning("%s is damaged, and made anew: %s", target, problem)
        note_of(target).unlink()
        return False

    def look(self) -> list[Job]:
        """Finds what an earlier preparation left; returns the jobs that need a closer look."""
        unsure = []
        for job in self.jobs:
            if not job.path.is_file():
                raise ValueError(f"{self.source}: {job.path} is missing; copy it again")
            status = job.path.stat()
            notes = [read_note(target) for target, _ in job.parts]
            for note, (target, episodes) in zip(notes, job.parts, strict=True):
                if note is None or not self._is_of(note, job, episodes):
                    break
                source = SourceFile(**note["source"])
                if (source.size, source.mtime_ns) != (status.st_size, status.st_mtime_ns):
                    break
                job.source = source
                self._take(job, target, note)
            else:
                continue
            job.done.clear()
            job.bad.clear()
            unsure.append(job)
        return unsure

    def described(self, job: Job) -> str:
        """Hashes what the metadata say of a file: which of its frames are which episode's."""
        episodes, digest = self.metadata.episodes, xxhash.xxh3_128()
        columns = [[float(self.metadata.info["fps"])], job.episodes, episodes["length"][job.episodes]]
        if job.video:
            stretches = self._stretches[job.camera][job.episodes]
            columns.append(stretches.starts)
            if not stretches.counted().all():  # else the ends say nothing more
                columns.append(stretches.ends)
            if (abs((offsets := self._offsets(stretches)) - stretches.offsets()) >= stretches.half).any():
                columns.append(offsets)
        for column in columns:
            digest.update(np.ascontiguousarray(column, dtype=np.float64))
        return digest.hexdigest()

    def _offsets(self, stretches: Stretches) -> np.ndarray:
        """Returns the seconds from its episode's first row to each row. Invalid time stamps do not count: what a store
        holds is found by its number."""
        offsets = stretches.offsets()
        known = np.isin(stretches.episodes, self.source.table.episodes)
        if known.any():
            offsets[np.repeat(known, stretches.lengths)] = offsets_of(self.source.table, stretches[known])
        owner = np.repeat(np.arange(len(known)), stretches.lengths)
        return np.where(np.isin(owner, owner[astray(offsets, stretches)]), stretches.offsets(), offsets)

    def _is_of(self, note: dict[str, Any], job: Job, episodes: np.ndarray) -> bool:
        return note.get("metadata") == self.described(job) and set(episodes.tolist()) <= set(note["episodes"])

    def _take(self, job: Job, target: Path, note: dict[str, Any]) -> None:
        job.done.add(target)
        job.bad.update({int(episode): why for episode, why in note["bad"].items()})

    def parts(self, job: Job, index: FileIndex) -> list[Part]:
        """Lists the parts of a file that are still to be written."""
        job.source = index.source
        lengths = self.metadata.episodes["length"]
        if job.video:
            stretches = self._stretches[job.camera][job.episodes]
            found = times_of_episodes(index, stretches, self._offsets(stretches), self._wrong[job.camera])
        else:
            found = list(np.split(_rows(job.path), np.cumsum(lengths[job.episodes])[:-1]))
        of_episode = dict(zip(job.episodes.tolist(), found, strict=True))
        todo = []
        for target, episodes in job.parts:
            note = read_note(target)
            # What was bad is tried again: reading may have failed, not the file.
            same = note is not None and note["source"]["xxh3"] == index.source.xxh3 and not note["bad"]
            if note is not None and same and self._is_of(note, job, episodes):
                self._take(job, target, note)
                continue
            times = {int(e): times for e in episodes if not isinstance(times := of_episode[int(e)], str)}
            job.bad.update({int(e): why for e in episodes if isinstance(why := of_episode[int(e)], str)})
            todo.append(Part(job.camera, job.path, target, times, self.encoding, self.wanted.resolution, job.video))
        return todo

    # ---- the end

    def bad(self) -> dict[int, str]:
        """Episode → why it could not be read, over all cameras."""
        found: dict[int, str] = {}
        for job in self.jobs:
            for episode, why in sorted(job.bad.items()):
                found.setdefault(episode, f"{job.camera}: {why}")
        return dict(sorted(found.items()))

    def finish(self) -> None:
        """Writes the index, then ``manifest.json``, which names it, and removes what belongs to neither."""
        bad = self.bad()
        good = np.setdiff1d(self.episodes, list(bad))
        if not len(good):
            raise ValueError(f"{self.source}: none of its episodes could be read")
        lengths = self.metadata.episodes["length"][good]
        begins = np.cumsum(lengths) - lengths
        index = {
            "episode_index": np.repeat(good, lengths).astype(np.int32),
            "frame_index": (np.arange(lengths.sum()) - np.repeat(begins, lengths)).astype(np.int32),
        }
        cameras = {
            camera: [t.name for j in self.jobs if j.camera == camera for t, _ in j.parts] for camera in self.cameras
        }
        first = np.full(self.metadata.total_episodes, -1, dtype=np.int64)
        first[good] = begins
        for camera, parts in cameras.items():
            index |= self._places(camera, parts, first, int(lengths.sum()))
        index_name = _write_index(self.folder, index)
        sources = {job.path: job.source for job in self.jobs}
        import av

        names = {str(path.relative_to(self.metadata.root)): source for path, source in sources.items() if source}
        Manifest(
            version=VERSION,
            resolution=self.wanted.resolution,
            encoding=str(self.encoding),
            decoder=f"PyAV {av.__version__}",
            metadata=describe_metadata(self.metadata, self.cameras),
            cameras=cameras,
            sources=dict(sorted({**self._sources, **names}.items())),
            left_out=dict(sorted({**self._left_out, **bad}.items())),
            frames=int(lengths.sum()),
            index=index_name,
        ).write(self.folder / "manifest.json")
        known = {self.folder / camera / part for camera, parts in cameras.items() for part in parts}
        for path in self.folder.glob("*/*"):
            if path not in known and path.with_suffix(".arrow") not in known:
                path.unlink()
        for path in self.folder.glob("index*.arrow"):
            if path.name != index_name:
                path.unlink()

    def _places(self, camera: str, parts: list[str], first: np.ndarray, rows: int) -> dict[str, np.ndarray]:
        """Finds where each row's picture is; ``first`` is the first row of each episode, -1 for those without."""
        columns: dict[str, np.ndarray] = {
            "part": np.full(rows, -1, dtype=np.int32),
            "offset": np.zeros(rows, dtype=np.int64),
            "size": np.zeros(rows, dtype=np.int32),
            "xxh3": np.zeros(rows, dtype=np.uint64),
        }
        for number, part in enumerate(parts):
            note = read_note(self.folder / camera / part)
            assert note is not None
            found = places(self.folder / camera / part, self.encoding) | {"xxh3": from_text(note["checksums"])}
            kept = first[found["episode"]] >= 0  # not of an episode that is bad
            there = first[found["episode"][kept]] + found["frame"][kept]
            columns["part"][there] = number
            for name in ("offset", "size", "xxh3"):
                columns[name][there] = found[name][kept]
        assert (columns["part"] >= 0).all(), "every frame of a good episode was written"
        return {f"{camera}/{name}": values for name, values in columns.items()}


def _rows(path: Path) -> np.ndarray:
    """Finds the rows of a data file in order of episode and frame, as LeRobot writes them."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        table = file.read(columns=["episode_index", "frame_index"], use_threads=False)
    return np.lexsort((to_numpy(table["frame_index"]), to_numpy(table["episode_index"])))


def note_of(target: Path) -> Path:
    return target.with_suffix(".json")


def read_note(target: Path) -> dict[str, Any] | None:
    """Reads what is known of a part; None if it is not there or cannot be read: the part is not done then."""
    note = note_of(target)
    if not (note.is_file() and target.is_file()):
        return None
    try:
        return unseal(note.read_bytes())
    except ValueError as error:
        log.warning("%s is damaged, and its part is made anew: %s", note, error)
        note.unlink()
        return None


def to_text(checksums: list[int]) -> str:
    """Writes checksums as a note has them."""
    return np.asarray(checksums, dtype="<u8").tobytes().hex()


def from_text(text: str) -> np.ndarray:
    """Reads checksums of a note, (pictures,) uint64."""
    return np.frombuffer(bytes.fromhex(text), dtype="<u8")


def _write_index(folder: Path, columns: dict[str, np.ndarray]) -> str:
    """Writes the index, and returns the name of its file, which a hash tells from that of an older one."""
    import pyarrow as pa

    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = memoryview(sink.getvalue())
    name = index_name(content)
    write_bytes(folder / name, content)
    return name
