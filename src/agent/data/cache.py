"""Where something computed from a data set is kept, so that the next start finds it: beside the data set, or with the user.

What is kept is named by a fingerprint of all that it was computed from, and is there whole or not at all. Deleting it costs
the time to compute it, nothing else.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

logger = logging.getLogger(__name__)

_FOLDER = "agent_cache"


def places(root: Path, name: str) -> list[Path]:
    """Where ``name`` of the data set at ``root`` may be: beside it, else in the user's cache."""
    found = [root / _FOLDER / name]
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # Two data sets may have files of the same names, sizes and times: one in a folder for each.
        of_root = xxhash.xxh3_64(str(root.resolve()).encode()).hexdigest()
        found.append(caches / "agent" / f"{root.name}-{of_root}" / name)
    except RuntimeError:  # a container may run as a user that has no home
        logger.info("this user has no home folder to keep %s in", name)
    return found


def find(root: Path, name: str) -> Path | None:
    """What was kept under this name, or None."""
    return next((place for place in places(root, name) if _readable(place)), None)


def _readable(place: Path) -> bool:
    """Not so where another user keeps it to himself, of which ``Path.exists`` makes an error."""
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
            if os.path.isdir(partial):
                shutil.rmtree(partial)
            elif os.path.exists(partial):
                partial.unlink()
    return None


def _into_place(partial: Path, place: Path) -> None:
    for path in [*partial.glob("*"), partial] if partial.is_dir() else [partial]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a machine that stops must not leave a whole name on half a file
        finally:
            os.close(descriptor)
    try:
        partial.rename(place)
    except OSError:
        if not _readable(place):  # else another process was faster; it has written the same
            raise


def describe(root: Path, paths: Sequence[Path]) -> list[list]:
    """Name, size and time of files, for a fingerprint."""
    found = [(path.relative_to(root), path.stat()) for path in paths]
    return [[str(path), status.st_size, status.st_mtime_ns] for path, status in found]
