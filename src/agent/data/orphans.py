"""Ends worker processes whose parent is gone."""

from __future__ import annotations

import os
import threading
from multiprocessing import connection, parent_process


def end_with_parent() -> None:
    """Ends this worker when its parent process is gone, however it went.

    A worker would notice when it next speaks to its parent, which may be never: it may wait for a file system, or for
    work from a queue whose other end it holds itself.
    """
    parent = parent_process()
    assert parent is not None, "called in a worker only"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
