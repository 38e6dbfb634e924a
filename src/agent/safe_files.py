"""Writes files that are never seen half written, and locks places for one process at a time.

A file or folder is written beside its place, flushed to the disk, and renamed: a reader, or a machine that stops, finds
the old contents or the new ones. A lock goes with its process, however that dies.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Replaces a small file by another text, in UTF-8.

    Raises:
        OSError: naming the file, which an error of writing does not do by itself.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file by other contents.

    Raises:
        OSError: naming the file, which an error of writing does not do by itself.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_link(path: Path, target: str) -> None:
    """Replaces a symbolic link by one to another target, and flushes that to the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a place for a file or folder, which is flushed and takes the name ``path`` when the block has ended well.

    The place is in the same folder, hidden, and its name is this call's own: two nodes that share a disk may have the
    same process ids. What is written there is removed when the block raises. A folder can only take the name of an empty
    one or of none.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        yield temporary
        for written in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            sync(written)
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


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


def lock(path: Path, kind: str, held: Callable[[str], str], patience_s: float = 0.0) -> int:
    """Locks a file until the handle that is returned is closed, or the process ends.

    Args:
        path: made if it is not there.
        kind: what works there, a word for the warning where files cannot be locked.
        held: the error's text if another process has locked it, from what that process has written into the file.
        patience_s: how long to wait for a holder that may be dead already, with a thread still in the kernel.

    Raises:
        ValueError: if another process has locked it.
    """
    handle, end = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            text = held(_text_of(handle))
            os.close(handle)
            raise ValueError(text) from None
        except OSError as error:  # Lustre without its flock option, for instance: no reason to refuse all work there
            log.warning(
                "%s cannot be locked (%s): make sure that no second %s is at work there", path.parent, error, kind
            )
        return handle


@contextmanager
def alone(path: Path, kind: str) -> Iterator[None]:
    """Refuses a second piece of work of this kind in the folder of the file ``path``, which is locked meanwhile."""
    handle = lock(path, kind, lambda _: f"another {kind} is at work in {path.parent}; wait for it, or end it")
    try:
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> tuple[bool | None, str]:
    """Whether a process holds the lock of a file, None where that cannot be told, and what the file says about it.

    Nobody who locks it for good is turned away by the question.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None, ""
    try:
        # Shared, and given back at once: who takes the lock in this moment tries again.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, _text_of(handle)
    except OSError:
        return None, ""
    finally:
        os.close(handle)
    return False, ""


def _text_of(handle: int) -> str:
    return os.pread(handle, 4096, 0).decode(errors="replace")
