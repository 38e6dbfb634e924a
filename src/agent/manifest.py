"""The list of a checkpoint's files with size and checksum: writing it last, and holding files against it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import xxhash

MANIFEST = "manifest.json"
_BLOCK = 1 << 22  # stays in the processor's cache between the read and the hash


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
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["xxh3_128"])) for name, entry in content["files"].items()}
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"its {MANIFEST} cannot be read") from None
    if not files:
        raise Damaged(f"its {MANIFEST} lists no file")
    return files


def check_sizes(folder: Path) -> str | None:
    """None if every file of the manifest is there in its size; otherwise what is wrong. Reads no file."""
    try:
        for name, (size, _) in files_of(folder).items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {size} were written"
    except Damaged as damage:
        return str(damage)
    return None


def verify(folder: Path, cancel: threading.Event | None = None) -> str | None:
    """None if every file of the manifest is there, unchanged; otherwise what is wrong."""
    damage = check_sizes(folder)
    if damage is not None:
        return damage
    by_size = sorted(files_of(folder).items(), key=lambda item: -item[1][0])
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        # The largest first: one file is hashed by one thread.
        checks = [pool.submit(_check, folder, name, expected, cancel) for name, (_, expected) in by_size]
        return next((damage for check in checks if (damage := check.result()) is not None), None)


def _check(folder: Path, name: str, expected: str, cancel: threading.Event | None) -> str | None:
    try:
        if checksum(folder / name, cancel) != expected:
            return f"{name} is damaged: its checksum does not match"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


class Verification:
    """Verifies a checkpoint in the background while it is loaded.

    As a context manager it gives up when the block ends in an exception: the caller knows already.
    """

    def __init__(self, folder: Path) -> None:
        self._damage: str | None = None
        self._cancel = threading.Event()
        self._thread = threading.Thread(target=self._verify, args=(folder,), name="verify", daemon=True)
        self._thread.start()

    def _verify(self, folder: Path) -> None:
        try:
            self._damage = verify(folder, self._cancel)
        except Exception as error:  # reaches the caller as damage: what could not be verified is not taken
            self._damage = f"it could not be verified: {error!r}"

    def result(self) -> str | None:
        """Waits for the end; None if the checkpoint is good, otherwise what is wrong."""
        self._thread.join()
        return self._damage

    def __enter__(self) -> Verification:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._cancel.set()
            self._thread.join()


def checksum(path: Path, cancel: threading.Event | None = None) -> str:
    """xxh3-128 of a file's contents."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
            if cancel is not None and cancel.is_set():
                raise InterruptedError
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
