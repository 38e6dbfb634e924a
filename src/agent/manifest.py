"""The list of a checkpoint's files with size and checksum: writing it last, and holding files against it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import xxhash

MANIFEST = "manifest.json"
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
    _write(folder / MANIFEST, {"step": step, "files": files})
    sync(folder)
    return sum(entry["size"] for entry in files.values())


def forget(folder: Path, beginning: str) -> None:
    """Takes the files under ``beginning`` out of the manifest, in one step; the files themselves stay."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    content["files"] = {name: entry for name, entry in content["files"].items() if not name.startswith(beginning)}
    temporary = folder / f".{MANIFEST}.tmp"
    _write(temporary, content)
    os.replace(temporary, folder / MANIFEST)
    sync(folder)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync(path)


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
    return files


def check_sizes(folder: Path) -> str | None:
    """None if every file of the manifest is there in its size; otherwise what is wrong. Reads no file.

    Raises:
        OSError: if it cannot be looked at now, which says nothing about it.
    """
    try:
        listed = files_of(folder)
    except Damaged as damage:
        return str(damage)
    for name, (size, _) in listed.items():
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
    """Holds a checkpoint against its manifest while it is loaded, so that no file is read twice.

    Whoever reads a file feeds its :meth:`checksum`. What nobody has read to the end, :meth:`result` reads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
        damage = check_sizes(self._folder)
        if damage is not None:
            return damage
        by_size = sorted(files_of(self._folder).items(), key=lambda item: -item[1][0])
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
    """A checksum that knows how much it was fed."""

    def __init__(self) -> None:
        self.size = 0
        self._hash = xxhash.xxh3_128()

    def update(self, block: memoryview) -> None:
        """Takes the next bytes."""
        self._hash.update(block)
        self.size += len(block)

    def hexdigest(self) -> str:
        """Of all so far."""
        return self._hash.hexdigest()


def checksum(path: Path) -> str:
    """xxh3-128 of a file's contents."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # What the system says where no folder can be synced (AFS, OrangeFS): no failure, and the files themselves are.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)
