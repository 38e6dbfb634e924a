"""Writes files atomically, so that nobody sees them half written, and locks files for one process at a time.

A file or folder is written under a temporary name beside its destination, flushed to the disk and renamed: a reader finds
the old contents or the new ones, even after the machine has stopped. A lock ends with its process, however that dies.
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
    """Replaces the contents of a small file by a text, in UTF-8.

    Raises:
        OSError: if writing fails; unlike the system's own error it always names the file.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replaces the contents of a file.

    Raises:
        OSError: if writing fails; unlike the system's own error it always names the file.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_link(path: Path, target: str) -> None:
    """Replaces a symbolic link by one to another target, and flushes the change to the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder, which is flushed and renamed to ``path`` if the block succeeds.

    The temporary path is hidden, in the same folder, and has a random name, because two nodes that share a disk may have
    the same process ids. If the block raises, what was written there is removed. A folder can only replace an empty folder.
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
        # Some file systems (AFS, OrangeFS) cannot sync folders and say so. The files themselves are synced: no failure.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def lock(path: Path, kind: str, held: Callable[[str], str], patience_s: float = 0.0) -> int:
    """Locks a file until the handle that is returned is closed, or the process ends.

    Args:
        path: the file, which is created if it does not exist.
        kind: a word for what works there, for the warning where files cannot be locked.
        held: makes the error's text from what the process that holds the lock has written into the file.
        patience_s: seconds to wait for a holder that may be dead already, with a thread still in the kernel.

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
        except OSError as error:  # such as Lustre without its flock option, which is no reason to refuse all work
            log.warning(
                "%s cannot be locked (%s): make sure that no second %s is at work there", path.parent, error, kind
            )
        return handle


@contextmanager
def alone(path: Path, kind: str) -> Iterator[None]:
    """Locks the file ``path`` during the block, so that a second piece of work of this kind in its folder is refused."""
    handle = lock(path, kind, lambda _: f"another {kind} is at work in {path.parent}; wait for it, or end it")
    try:
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> tuple[bool | None, str]:
    """Returns whether a process holds a file's lock (None if that cannot be told), and the file's text about the holder.

    Asking never makes a process that wants the lock fail.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None, ""
    try:
        # The shared lock is released at once, and a process that wants the lock in this moment tries again.
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
