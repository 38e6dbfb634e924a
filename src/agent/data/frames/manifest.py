"""Reads and writes ``manifest.json``, which says what a frame store was made of and how."""

from __future__ import annotations

import json
from collections.abc import Buffer, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agent.checkpoints.manifest import is_inside
from agent.data.recorded.metadata import Metadata
from agent.data.recorded.stretches import Stretches
from agent.safe_files import write_bytes

VERSION = 1
PREPARE = "uv run python -m agent.data.prepare --config_path CONFIG"


@dataclass(frozen=True)
class SourceFile:
    """A file that frames were taken from, as it was then."""

    size: int
    mtime_ns: int
    xxh3: str
    """Of the whole contents."""

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Reads the whole file."""
        status, digest = path.stat(), xxhash.xxh3_128()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return cls(status.st_size, status.st_mtime_ns, digest.hexdigest())


@dataclass
class Manifest:
    """``manifest.json``."""

    version: int
    resolution: tuple[int, int]
    encoding: str
    decoder: str
    """Program and version that decoded the videos."""
    metadata: str
    """Fingerprint of what the metadata say of episodes and cameras."""
    cameras: dict[str, list[str]]
    """Key of the data set → its parts."""
    sources: dict[str, SourceFile]
    """Path in the data set → the file it was: videos, or data files with pictures."""
    left_out: dict[int, str]
    """Episode that could not be stored → why."""
    frames: int
    index: str = "index.arrow"
    """The file that belongs to these parts: a store that is added to has both indices for a moment."""

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises ValueError if the file is not one, or damaged."""
        try:
            content = path.read_bytes()
            values: dict[str, Any] = json.loads(content)
            if values["version"] == VERSION:  # that of another one is told by its version
                values = unseal(content)
            names = [values.get("index", cls.index), *values["sources"], *values["cameras"]]
            names += [part for parts in values["cameras"].values() for part in parts]
            if outside := [name for name in names if not is_inside(name)]:
                raise ValueError(f"it names {outside[0]}, which is outside of its folder")
            values["resolution"] = tuple(values["resolution"])
            values["sources"] = {name: SourceFile(**source) for name, source in values["sources"].items()}
            values["left_out"] = {int(episode): why for episode, why in values["left_out"].items()}
            return cls(**{name: value for name, value in values.items() if name != "xxh3"})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is no manifest that this version reads ({error}). Remove this file and run `{PREPARE}` again, which "
                "keeps the pictures that are there"
            ) from error

    def write(self, path: Path) -> None:
        """Replaces the file in one step."""
        write_bytes(path, seal(asdict(self)))


def seal(values: dict[str, Any]) -> bytes:
    """Writes a JSON object with a checksum of the rest of it."""
    content = json.dumps(values, indent=1)
    return json.dumps({**values, "xxh3": xxhash.xxh3_64_hexdigest(content.encode())}, indent=1).encode()


def unseal(content: bytes) -> dict[str, Any]:
    """Reads what was sealed; earlier versions left no checksum.

    Raises:
        ValueError: if it is no JSON object, or not what was written.
    """
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    wanted = values.pop("xxh3", None)
    if wanted is not None and wanted != xxhash.xxh3_64_hexdigest(json.dumps(values, indent=1).encode()):
        raise ValueError("its checksum does not match")
    return values


def picture_checksum(data: Buffer, episode: int, frame: int) -> int:
    """Hashes the bytes of a picture and whose it is, so that a whole picture of another frame does not pass for this one."""
    return xxhash.xxh3_64_intdigest(data, (episode << 32) + frame)  # type: ignore[arg-type]


def index_name(content: Buffer) -> str:
    """Names an index file by a hash of its contents, so that an older one stays as it is."""
    return f"index-{xxhash.xxh3_64(content).hexdigest()}.arrow"  # type: ignore[arg-type]


def describe_metadata(metadata: Metadata, cameras: Sequence[str]) -> str:
    """Hashes what decides which picture belongs to which frame."""
    digest = xxhash.xxh3_128(json.dumps([metadata.info["fps"], metadata.info["data_path"]]).encode())
    names = ["length", "data/chunk_index", "data/file_index"]
    for key in sorted(cameras):
        digest.update(json.dumps([key, metadata.features[key]["dtype"], metadata.features[key]["shape"]]).encode())
        if key in metadata.video_keys:
            names += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
            # Where the ends say more than the lengths, stores were made once that did not heed them.
            names += [] if Stretches.of(metadata, key).counted().all() else [f"videos/{key}/to_timestamp"]
    for name in names:
        digest.update(np.ascontiguousarray(metadata.episodes[name], dtype=np.float64))
    return digest.hexdigest()
