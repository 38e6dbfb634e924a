"""Writes the list of a checkpoint's files with size and checksum, which comes last, and compares files with it."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, Protocol

import xxhash

from agent.safe_files import sync, write_text

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FOLDERS = ("pretrained_model", "pretrained_model_ema", "training_state")
"""The folders of a checkpoint: weights, their moving average, and what only a resume needs."""
_BLOCK = 1 << 22  # stays in the processor's cache between the read and the hash
# What the system says of a disk that has lost something. Any other error is of the moment: too many open files, a file
# server that restarts, a permission. A checkpoint that cannot be read then is not damaged.
_LOST = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)


class Known(Protocol):
    """Size and checksum of a file that is on the disk already."""

    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def xxh3_128(self) -> str: ...  # noqa: D102


class Damaged(ValueError):
    """A checkpoint is not what was written."""


def seal(folder: Path, step: int, known: Mapping[str, Known] | None = None) -> int:
    """Flushes every file of a folder to the disk, then writes the manifest that lists them.

    Args:
        folder: of the checkpoint.
        step: optimizer updates done.
        known: what was written, synced and hashed already.

    Returns:
        The bytes of all files.

    Raises:
        OSError: if one cannot be synced, or is not of the size that was written.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        size = path.stat().st_size
        if known is not None and name in known:
            if size != known[name].size:
                raise OSError(f"{name} has {size} bytes, {known[name].size} were written")
            files[name] = {"size": size, "xxh3_128": known[name].xxh3_128}
        else:
            sync(path)
            files[name] = {"size": size, "xxh3_128": checksum(path)}
    absent = set(known or ()) - set(files)
    if absent:
        raise OSError(f"{', '.join(sorted(absent))} was written and is not there")
    for path in sorted(p for p in folder.rglob("*") if p.is_dir()):
        sync(path)
    (folder / MANIFEST).write_text(_text({"step": step, "files": files}), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)
    return sum(entry["size"] for entry in files.values())


def forget(folder: Path, beginning: str) -> None:
    """Takes the files under ``beginning`` out of the manifest, in one step; the files themselves stay."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    content["files"] = {name: entry for name, entry in content["files"].items() if not name.startswith(beginning)}
    write_text(folder / MANIFEST, _text(content))
    sync(folder)


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def files_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of every file in the manifest.

    Raises:
        Damaged: if there is none that can be read.
        OSError: if none can be read now.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["xxh3_128"])) for name, entry in content["files"].items()}
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}") from None
    except OSError as error:
        raise Damaged(_unreadable(f"its {MANIFEST}", error)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"its {MANIFEST} cannot be read") from None
    if not files:
        raise Damaged(f"its {MANIFEST} lists no file")
    if outside := [name for name in files if not is_inside(name)]:
        raise Damaged(f"its {MANIFEST} names {outside[0]}, which is outside of it")
    return files


def is_inside(name: str) -> bool:
    """Whether a name that a file gives for another stays within the folder that both are in."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


class Folder:
    """A folder with weights and what belongs to them. Of a checkpoint's, only what the manifest lists is there.

    Args:
        path: ``pretrained_model`` or another folder of a checkpoint, or one without a manifest, as others publish it.

    Raises:
        ValueError: if there is a manifest that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: Path | None = None
        """The one with the manifest that lists this folder's files."""
        self._listed: set[str] | None = None
        place = path.resolve()
        for checkpoint, of in ((place.parent, place.name), (place.parent.parent, place.parent.name)):
            if of in FOLDERS and (checkpoint / MANIFEST).is_file():
                try:
                    names = set(files_of(checkpoint))
                except Damaged as damage:
                    raise Damaged(f"the checkpoint {checkpoint} is damaged: {damage}") from None
                _tell_unlisted(checkpoint, frozenset(names))
                self.checkpoint, begin = checkpoint, f"{place.relative_to(checkpoint)}/"
                self._listed = {name.removeprefix(begin) for name in names if name.startswith(begin)}

    def file(self, name: str) -> Path | None:
        """Where a file is; None if there is none of this name.

        Raises:
            ValueError: if the name leads out of the folder, as no file of weights may make it.
        """
        if not is_inside(name):
            raise ValueError(f"{self.path}: the file name {name!r} leads out of this folder")
        path = self.path / name
        return path if (self._listed is None or name in self._listed) and path.is_file() else None

    def text(self, name: str) -> str:
        """The contents of a file.

        Raises:
            ValueError: if it is not there, or its name leads out of the folder.
        """
        if (path := self.file(name)) is None:
            listed = "" if self._listed is None else f", or not in the {MANIFEST} of the checkpoint"
            raise ValueError(f"{self.path / name} is not there{listed}")
        return path.read_text(encoding="utf-8")

    def matching(self, pattern: str) -> list[Path]:
        """The files of a pattern, as ``Path.glob`` has it, by name."""
        found = sorted(path for path in self.path.glob(pattern) if path.is_file())
        return [p for p in found if self._listed is None or str(p.relative_to(self.path)) in self._listed]


@lru_cache(maxsize=16)  # once for a checkpoint, however many of its folders are looked into
def _tell_unlisted(checkpoint: Path, listed: frozenset[str]) -> None:
    found = (path for folder in FOLDERS for path in (checkpoint / folder).rglob("*") if path.is_file())
    names = sorted(str(path.relative_to(checkpoint)) for path in found if not path.name.startswith("."))
    if extra := [name for name in names if name not in listed]:
        log.warning("%s: not in its %s, and ignored: %s", checkpoint, MANIFEST, ", ".join(extra))


def check_sizes(folder: Path, under: str = "") -> str | None:
    """None if every file of the manifest is there in its size; otherwise what is wrong. Reads no file.

    Args:
        folder: of the checkpoint.
        under: how the names begin that are looked at.

    Raises:
        OSError: if it cannot be looked at now, which says nothing about it.
    """
    try:
        listed = files_of(folder)
    except Damaged as damage:
        return str(damage)
    for name, (size, _) in listed.items():
        if not name.startswith(under):
            continue
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {size} were written"
        except OSError as error:
            return _unreadable(name, error)
    return None


def _unreadable(what: str, error: OSError) -> str:
    """What is damaged by this error, which is raised if nothing is."""
    if error.errno not in _LOST:
        raise error
    return f"{what} cannot be read: {error.strerror}"


def verify(folder: Path) -> str | None:
    """None if every file of the manifest is there, unchanged; otherwise what is wrong. Errors as of its ``result``."""
    return Verification(folder).result()


class Verification:
    """Compares a checkpoint with its manifest while it is loaded, so that no file is read twice.

    Whoever reads a file feeds its :meth:`checksum`. What nobody has read to the end, :meth:`result` reads.

    Args:
        folder: of the checkpoint.
        under: how the names of the files begin that are compared.
    """

    def __init__(self, folder: Path, under: str = "") -> None:
        self._folder, self._under = folder, under
        self._fed: dict[str, _Digest] = {}

    def checksum(self, path: Path) -> _Digest:
        """To be fed with a file of the checkpoint from its first byte to its last."""
        digest = self._fed[str(path.relative_to(self._folder))] = _Digest()
        return digest

    def result(self) -> str | None:
        """None if the checkpoint is good, otherwise what is wrong.

        Raises:
            OSError: if it cannot be read now, which says nothing about it.
        """
        try:
            return self._compare()
        except OSError:
            raise
        except Exception as error:  # reaches the caller as damage: what could not be verified is not taken
            return f"it could not be verified: {error!r}"

    def _compare(self) -> str | None:
        damage = check_sizes(self._folder, self._under)
        if damage is not None:
            return damage
        listed = {name: entry for name, entry in files_of(self._folder).items() if name.startswith(self._under)}
        by_size = sorted(listed.items(), key=lambda item: -item[1][0])
        with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
            # The largest first: one file is hashed by one thread.
            checks = [pool.submit(self._check, name, size, expected) for name, (size, expected) in by_size]
            return next((damage for check in checks if (damage := check.result()) is not None), None)

    def _check(self, name: str, size: int, expected: str) -> str | None:
        fed = self._fed.get(name)
        try:
            found = fed.hexdigest() if fed is not None and fed.size == size else checksum(self._folder / name)
        except OSError as error:
            return _unreadable(name, error)
        return None if found == expected else f"{name} is damaged: its checksum does not match"


class _Digest:
    """A checksum that also counts the bytes that it was fed."""

    def __init__(self) -> None:
        self.size = 0
        self._hash = xxhash.xxh3_128()

    def update(self, block: memoryview) -> None:
        """Takes the next bytes."""
        self._hash.update(block)
        self.size += len(block)

    def hexdigest(self) -> str:
        """Returns the checksum of all bytes so far."""
        return self._hash.hexdigest()


def checksum(path: Path) -> str:
    """xxh3-128 of a file's contents."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()
