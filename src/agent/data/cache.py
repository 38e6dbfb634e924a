"""Keeps what was computed from a data set, so that the next start finds it: beside the data set, or with the user.

What is kept is named by a fingerprint of all that it was computed from, and is there whole or not at all. Beside each file
or folder, ``NAME.xxh3`` has the checksum of every file of it. What does not hold, or was kept by a version that wrote no
checksums, is computed anew. Deleting it costs the time to compute it, nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import xxhash

from agent.checkpoints.manifest import checksum
from agent.safe_files import sync

Kept = TypeVar("Kept")

logger = logging.getLogger(__name__)

_FOLDER = "agent_cache"


def places(root: Path, name: str) -> list[Path]:
    """Lists where ``name`` of the data set at ``root`` may be: beside it, else in the user's cache."""
    found = [root / _FOLDER / name]
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # Two data sets may have files of the same names, sizes and times: one in a folder for each.
        of_root = xxhash.xxh3_64(str(root.resolve()).encode()).hexdigest()
        found.append(caches / "agent" / f"{root.name}-{of_root}" / name)
    except RuntimeError:  # a container may run as a user that has no home
        logger.info("this user has no home folder to keep %s in", name)
    return found


def find(root: Path, name: str, read: Callable[[Path], Kept]) -> Kept | None:
    """Returns what ``read`` makes of what was kept under this name; None if nothing was kept, or if it is damaged.

    Damage is a line in the log that names the file, and no more: what was kept can be computed again.
    """
    for place in places(root, name):
        if not _readable(place):
            continue
        problem = _damage(place)
        if problem is None:
            try:
                return read(place)
            except Exception as error:  # it is what was written, but by a version that wrote something else
                problem = f"{place} cannot be read ({type(error).__name__}: {error})"
        logger.warning("what was kept from an earlier start is not used but computed anew: %s", problem)
    return None


def _damage(place: Path) -> str | None:
    """Compares a file or folder with its checksums; returns what is wrong, with the name of the file, or None."""
    noted = _note(place)
    try:
        wanted = json.loads(noted.read_text(encoding="utf-8"))
        found = _checksums(place)
    except FileNotFoundError:
        return f"{place} has no checksum, it is of an earlier version"
    except OSError as error:
        return f"{place} cannot be read ({error})"
    except ValueError:
        return f"{noted}, the checksums of {place.name}, is damaged"
    if found == wanted:
        return None
    if not isinstance(wanted, dict) or set(found) != set(wanted):
        return f"{place} does not hold the files that {noted.name} lists"
    return (
        f"{place / next(name for name in found if found[name] != wanted[name])} is damaged: its checksum does not match"
    )


def _note(place: Path) -> Path:
    return place.with_name(f"{place.name}.xxh3")


def _checksums(place: Path) -> dict[str, str]:
    """Returns name in a folder, or the empty one for a single file → checksum."""
    if place.is_dir():
        return {path.name: checksum(path) for path in sorted(place.iterdir())}
    return {"": checksum(place)}


def _readable(place: Path) -> bool:
    """Tells whether this user may read it; where another user forbids that, ``Path.exists`` raises an error."""
    return os.access(place, os.R_OK | os.X_OK if os.path.isdir(place) else os.R_OK)


def keep(root: Path, name: str, write: Callable[[Path], None]) -> Path | None:
    """Keeps something at the first place that can be written.

    Args:
        root: of the data set.
        name: with the fingerprint in it.
        write: writes a file or folder to the path that it is given.

    Returns:
        Where it is, or None if no place can be written.
    """
    for place in places(root, name):
        # Not by the process id: two nodes, or two containers, that share a disk may have the same.
        partial = place.with_name(f".{place.name}.{os.urandom(8).hex()}.partial")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            _into_place(partial, place)
        except OSError as error:
            logger.info("%s is not kept in %s (%s)", name, place.parent, error)
        else:
            return place
        finally:
            _remove(partial)
    return None


def _into_place(partial: Path, place: Path) -> None:
    """Gives what was written its name, unless the same is there. Its checksums come first, so that it is never without them.

    Raises:
        OSError: if that cannot be, or something else is there by then.
    """
    wanted = _checksums(partial)
    for path in [*partial.glob("*"), partial] if partial.is_dir() else [partial]:
        sync(path)  # a machine that stops must not leave a whole name on half a file
    there = _readable(place) and _same(place, wanted)
    if there and _damage(place) is None:
        return  # another process was faster
    if not there and os.path.lexists(place):  # out of the way at once, since jobs that run may read it
        aside = partial.with_suffix(".replaced")
        place.rename(aside)
        _remove(aside)
    note = _note(partial)
    try:
        note.write_text(json.dumps(wanted), encoding="utf-8")
        sync(note)
        note.rename(_note(place))
    finally:
        _remove(note)
    if there:  # of an earlier version, and right: jobs that run may have it mapped, so it stays where it is
        return
    try:
        partial.rename(place)
    except OSError:
        if not _readable(place) or _damage(place) is not None:  # else another process was faster
            raise


def _same(place: Path, wanted: dict[str, str]) -> bool:
    try:
        return _checksums(place) == wanted
    except OSError:
        return False


def _remove(path: Path) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def describe(root: Path, paths: Sequence[Path]) -> list[list]:
    """Returns name, size and time of files, for a fingerprint."""
    found = [(path.relative_to(root), path.stat()) for path in paths]
    return [[str(path), status.st_size, status.st_mtime_ns] for path, status in found]
