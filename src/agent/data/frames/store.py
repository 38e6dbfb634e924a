"""Reads decoded, resized frames from a store beside a data set: one read per picture instead of decoding a video.

A store is a folder ``frames/<height>x<width>-<encoding>`` in the data set's own:

====================================  ==================================================================================
``manifest.json``                     what the store was made of and how; written last
``index-HASH.arrow``                  one row per frame, in order of episode and frame: for each camera the part, the
                                      byte and the length of its picture
``<camera>/<video>-<episode>.arrow``  a part: the pictures of consecutive episodes, readable by any Arrow library
====================================  ==================================================================================

A picture is found by the integer number of its frame; no time stamp is compared. The index is mapped into memory,
one copy for all processes of a machine; pictures are read, not mapped, so that a process does not seem to grow.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agent.data.frames.encoding import Encoding
from agent.data.frames.manifest import (
    PREPARE,
    VERSION,
    Manifest,
    SourceFile,
    describe_metadata,
    index_name,
    picture_checksum,
)
from agent.data.recorded.arrow import to_numpy
from agent.data.recorded.files import files_of
from agent.data.recorded.metadata import Metadata, spelled

logger = logging.getLogger(__name__)

Setting = Literal["auto", "none", "jpeg", "lossless", "raw"]

_OPEN_FILES = 128  # per process; a limit of 1024 is usual, and torch needs many


@dataclass(frozen=True)
class WantedStore:
    """Which store the config asks for."""

    setting: Setting
    quality: int
    """Of JPEG."""
    resolution: tuple[int, int]
    """Height and width."""
    began_with: Mapping[str, str | None] = field(default_factory=dict)
    """Of a run that goes on: data set → the store that it has read, by the name of its folder, or None for the videos."""

    def encoding(self) -> Encoding:
        """Chooses the encoding of a store to be made: JPEG unless the config names another one."""
        if self.setting == "lossless" or self.setting == "raw":
            return Encoding(self.setting)
        return Encoding("jpeg", self.quality)

    def folder(self, frames: Path) -> Path:
        """Names the folder of a store to be made."""
        height, width = self.resolution
        return frames / f"{height}x{width}-{self.encoding()}"

    def command(self) -> str:
        """Words the command that makes a store."""
        setting = "" if self.setting in ("auto", "none") else f" --data.train.frame_store {self.setting}"
        return PREPARE + setting


def frames_folder(metadata: Metadata, frames: str | None) -> Path:
    """Where the stores of a data set are."""
    return Path(frames).expanduser() if frames is not None else metadata.root / "frames"


def find_store(metadata: Metadata, frames: str | None, wanted: WantedStore, episodes: np.ndarray) -> FrameStore | None:
    """Finds the store to read the chosen episodes from; None if videos are to be decoded instead.

    Args:
        metadata: of the data set.
        frames: the config's folder of stores.
        wanted: what the config asks for.
        episodes: the chosen ones.

    Raises:
        ValueError: if a store is asked for and not there, or one is there that does not fit, or the one is gone that a
            run under `auto` began with and whose pictures no other has; with the command that makes it anew.
    """
    if wanted.setting == "none":
        return None
    place, there = frames_folder(metadata, frames), stores_there(metadata, frames)
    size = "{}x{}-".format(*wanted.resolution)
    if wanted.setting == "auto":
        name = _best(there, size, wanted, metadata.repo_id)
    else:
        name = wanted.folder(place).name
    if name in there and name:
        store = FrameStore(place / name, Manifest.read(place / name / "manifest.json"))
        store.verify(metadata, episodes, wanted)
        return store
    began_with = wanted.began_with.get(metadata.repo_id)
    if wanted.setting == "auto" and (jpeg := jpeg_of(began_with)) is not None:
        raise ValueError(
            f"data set {metadata.repo_id}: this run began with the pictures of the frame store {place / str(began_with)}, "
            f"which is not there any more. Bring it back, or make it again with\n  {PREPARE} --data.train.frame_store jpeg "
            f"--data.train.frame_quality {jpeg.removeprefix('jpeg')}\nThe videos hold other pictures than its JPEGs: to go on "
            "with them all the same, write --data.train.frame_store none --resume_changes true"
        )
    if wanted.setting == "auto" and (not there or metadata.repo_id in wanted.began_with):
        return None
    raise ValueError(
        f"data set {metadata.repo_id}: {place} holds "
        + (f"the frame store {' and '.join(there)}, not {name or size.rstrip('-')}" if there else "no frame store")
        + f". Make it with\n  {wanted.command()}\nor set data.train.frame_store: none to decode the videos while training."
    )


def stores_there(metadata: Metadata, frames: str | None) -> list[str]:
    """Lists the names of a data set's complete stores, of any resolution."""
    return [path.parent.name for path in sorted(frames_folder(metadata, frames).glob("*/manifest.json"))]


def jpeg_of(store: str | None) -> str | None:
    """Returns ``jpeg95`` and the like where a store, by its name, holds other pictures than the videos; else None."""
    match = re.search(r"-(jpeg\d+)", store or "")
    return match[1] if match is not None else None


def _best(there: Sequence[str], size: str, wanted: WantedStore, repo_id: str) -> str:
    """Chooses what `auto` takes of the stores that are there; empty for none of them."""
    fitting = [name for name in there if name.startswith(size)]
    if repo_id in wanted.began_with:
        began_with = wanted.began_with[repo_id]
        if began_with is not None and jpeg_of(began_with) is not None:
            return began_with
        fitting = [name for name in fitting if jpeg_of(name) is None]  # the very pictures of the videos
    order = {"raw": 0, "lossless": 1}
    name = min(fitting, key=lambda name: order.get(name[len(size) :], 2), default="")
    # Of several JPEG stores, the one of the stated quality.
    stated = f"{size}jpeg{wanted.quality}"
    return stated if jpeg_of(name) is not None and stated in fitting else name


class FrameStore:
    """A complete store, opened when it is first read; travels to the workers closed.

    Args:
        folder: of the store.
        manifest: what is in the folder's ``manifest.json``.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.encoding = Encoding.parse(manifest.encoding)
        self._index: dict[str, np.ndarray] | None = None
        self._told = False
        self._first_row: dict[int, int] = {}
        self._files: OrderedDict[tuple[str, int], int] = OrderedDict()

    def __str__(self) -> str:
        return f"the frame store {self.folder}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    # ---- does it fit?

    def verify(self, metadata: Metadata, episodes: np.ndarray, wanted: WantedStore) -> None:
        """Compares the store with the data set and the config.

        A file whose length and time of change are the recorded ones is taken for unchanged; with another time, as
        after a copy, its contents are compared.

        Raises:
            ValueError: with what changed and the command that makes the store anew.
        """
        manifest = self.manifest
        anew = f"Make it anew with\n  {self._command(wanted)}\nor decode the videos while training: data.train.frame_store: none."
        if manifest.version != VERSION:
            raise ValueError(f"{self} is of version {manifest.version}, this program reads {VERSION}. {anew}")
        if manifest.resolution != wanted.resolution:
            sizes = ("{} × {}".format(*size) for size in (manifest.resolution, wanted.resolution))
            raise ValueError("{} holds frames of {}, the model wants {}. {}".format(self, *sizes, anew))
        missing = [key for key in manifest.cameras if key not in metadata.features]
        if missing or manifest.metadata != describe_metadata(metadata, list(manifest.cameras)):
            raise ValueError(
                f"{self} was made of other metadata than {metadata.root / 'meta'} now holds, or at a time when the ends of the "
                f"episodes' stretches of video were not heeded. {anew}"
            )
        self.open(verify=True)
        lacking = [episode for episode in episodes.tolist() if not self._knows(episode)]
        if lacking:
            raise ValueError(
                f"{self} lacks the frames of episodes {spelled(lacking)}. Add them with\n  {self._command(wanted)}"
            )
        self._verify_parts()
        moved: dict[str, SourceFile] = {}
        for name in self._sources(metadata, episodes):
            path = metadata.root / name
            recorded = manifest.sources.get(name)
            if (
                recorded is None
            ):  # of episodes alone that were left out, and not asked for when another camera was added
                continue
            if not path.is_file():
                raise ValueError(f"{self} was made of {path}, which is missing. Copy the file again.")
            status = path.stat()
            if status.st_size == recorded.size and status.st_mtime_ns == recorded.mtime_ns:
                continue
            now = SourceFile.of(path) if status.st_size == recorded.size else None
            if now is None or now.xxh3 != recorded.xxh3:
                raise ValueError(f"{self} no longer matches its data set: {path} has changed. {anew}")
            moved[name] = now
        if moved and os.access(self.folder, os.W_OK):  # so that the next start need not read them again
            manifest.sources.update(moved)
            try:
                manifest.write(self.folder / "manifest.json")
            except OSError as error:  # a full disk, say, which is no reason not to read from it
                logger.info("the times of %d copied files are not noted in %s (%s)", len(moved), self.folder, error)

    def _command(self, wanted: WantedStore) -> str:
        """Words the command that makes or completes this very store, also where `auto` would make another one."""
        kind, quality = self.encoding.kind, self.encoding.quality
        command = PREPARE if kind == "jpeg" else f"{PREPARE} --data.train.frame_store {kind}"
        return command if quality in (None, wanted.quality) else f"{command} --data.train.frame_quality {quality}"

    def _verify_parts(self) -> None:
        """Raises ValueError if a part is missing or shorter than the index says, as after half a copy of the store."""
        assert self._index is not None
        for camera, parts in self.manifest.cameras.items():
            part, offset, size = (self._index[f"{camera}/{name}"] for name in ("part", "offset", "size"))
            least = np.zeros(len(parts), dtype=np.int64)
            np.maximum.at(least, part, offset + size)
            for number in np.flatnonzero(least).tolist():
                path = self._part(camera, number)
                if not path.is_file() or path.stat().st_size < least[number]:
                    raise ValueError(
                        f"{path} is {'cut short' if path.is_file() else 'missing'}. Copy it again, or run `{PREPARE}` again, "
                        "which makes it anew"
                    )

    def _knows(self, episode: int) -> bool:
        return episode in self._first_row or episode in self.manifest.left_out

    def _sources(self, metadata: Metadata, episodes: np.ndarray) -> list[str]:
        """Lists the files of the data set that the pictures of the chosen episodes come from."""
        paths: set[Path] = set()
        for key in self.manifest.cameras:
            kind = f"videos/{key}" if key in metadata.video_keys else "data"
            paths |= {path for path, _ in files_of(metadata, episodes, kind)}
        return sorted(str(path.relative_to(metadata.root)) for path in paths)

    def without_bad(self, episodes: np.ndarray) -> tuple[np.ndarray, str | None]:
        """Returns the episodes that the store holds, and a line for the log on those that preparing left out."""
        bad = np.intersect1d(episodes, np.asarray(sorted(self.manifest.left_out), dtype=np.int64))
        if not len(bad):
            return episodes, None
        return np.setdiff1d(episodes, bad), (
            f"WARNING: episodes {spelled(bad)} are left out: they could not be read when {self} was prepared "
            f"({self.manifest.left_out[int(bad[0])]})"
        )

    def require(self, cameras: Sequence[str], wanted: WantedStore) -> None:
        """Raises ValueError if the store lacks a camera."""
        lacking = [key for key in cameras if key not in self.manifest.cameras]
        if lacking:
            raise ValueError(
                f"{self} lacks the camera {', '.join(lacking)}; it has {', '.join(self.manifest.cameras)}. Add it with\n"
                f"  {self._command(wanted)}\nor set data.train.frame_store: none"
            )

    # ---- reading

    def open(self, verify: bool = False) -> None:
        """Maps the index into memory; ``verify`` holds it against its checksum first."""
        if self._index is None:
            self._index = read_index(self.folder / self.manifest.index, verify)
            if not self.has_checksums and not self._told:
                self._told = True
                logger.info(
                    "%s was made by an earlier version and holds no checksums: damage in it is not noticed. `%s` adds them",
                    self,
                    PREPARE,
                )
            episodes = self._index["episode_index"]
            firsts = np.flatnonzero(np.diff(episodes, prepend=-1))
            self._first_row = dict(zip(episodes[firsts].tolist(), firsts.tolist(), strict=True))

    @property
    def has_checksums(self) -> bool:
        """Whether a damaged picture would be noticed; earlier versions wrote none."""
        assert self._index is not None
        return all(f"{camera}/xxh3" in self._index for camera in self.manifest.cameras)

    def image(self, camera: str, episode: int, frame: int) -> np.ndarray:
        """A picture, (3, H, W) uint8.

        Raises:
            ValueError: if it is not the one that was written, or its file is cut short.
        """
        self.open()
        assert self._index is not None
        row = self._first_row[episode] + frame
        part, offset, size = (int(self._index[f"{camera}/{name}"][row]) for name in ("part", "offset", "size"))
        data = np.empty(size, dtype=np.uint8)
        if os.preadv(self._descriptor(camera, part), [data], offset) != size:
            raise ValueError(f"{self._part(camera, part)} is cut short")
        checksums = self._index.get(f"{camera}/xxh3")
        if checksums is not None and picture_checksum(data, episode, frame) != int(checksums[row]):
            path = self._part(camera, part)
            raise ValueError(f"the picture of {camera} in {path} is damaged: its checksum does not match")
        return self.encoding.decode(data, *self.manifest.resolution)

    def _part(self, camera: str, part: int) -> Path:
        return self.folder / camera / self.manifest.cameras[camera][part]

    def _descriptor(self, camera: str, part: int) -> int:
        key = (camera, part)
        descriptor = self._files.get(key)
        if descriptor is None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            descriptor = self._files[key] = os.open(self._part(camera, part), os.O_RDONLY)
        else:
            self._files.move_to_end(key)
        return descriptor


def read_index(path: Path, verify: bool = False) -> dict[str, np.ndarray]:
    """Column → its values (rows,), mapped into memory.

    Args:
        path: named after its contents.
        verify: whether the contents are held against the name.

    Raises:
        ValueError: if the file is missing, cut short or damaged.
    """
    import pyarrow as pa

    try:
        if verify and index_name(path.read_bytes()) != path.name and path.name != Manifest.index:
            raise pa.ArrowInvalid("its contents are not those it is named after")
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(
            f"{path} is missing, cut short or damaged ({str(error).splitlines()[0]}). Copy it again, or run `{PREPARE}` again, "
            "which makes the index anew from the pictures that are there"
        ) from error
    return {name: to_numpy(table[name]) for name in table.column_names}
