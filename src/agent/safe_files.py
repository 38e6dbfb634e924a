"""Locks that keep two processes from working in one place. They go with their process, however that dies."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def lock(path: Path, kind: str, held: Callable[[int], str], patience_s: float = 0.0) -> int:
    """Locks a file until the handle that is returned is closed, or the process ends.

    Args:
        path: made if it is not there.
        kind: what works there, a word for the warning where files cannot be locked.
        held: the error's text if another process has locked it, from the handle.
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
            text = held(handle)
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
