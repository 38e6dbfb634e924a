"""Ends a run that hangs, with every process's stack in the log, and tells a process that nobody waits for it any more.

A collective whose partner is stuck, or a file system that does not answer, blocks for ever and burns GPU hours. Each
process has a thread that expects a sign of life; when none comes for too long, it prints the stacks of its process and
ends it. A process that is stopped (SIGSTOP, a debugger) cannot do that for itself, so its neighbours on the node wake
it, and its C-level handler prints where its main thread stood.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

_DUMP_SIGNAL = signal.SIGUSR2
_GRACE_S = 3.0  # for the neighbours to print their stacks before the first of us is gone and torchrun ends the rest
EXIT_HUNG = 70


def watch_launcher(gone: Callable[[str], None]) -> None:
    """Calls ``gone``, from a thread, once the process that started this one has ended.

    A rank whose torchrun was killed would train on unseen, or look for torchrun's store for hours, and hold GPU, memory
    and run folder meanwhile.
    """
    parent = os.getppid()

    def watch() -> None:
        # Where torchrun ended before we asked, the parent is another already; but its store answers no more.
        refused = _refuses(os.environ)
        while os.getppid() == parent and not refused:
            time.sleep(1.0)
        gone("torchrun, which started this process, is gone")

    threading.Thread(target=watch, name="watch_launcher", daemon=True).start()


def _refuses(environment: Mapping[str, str]) -> bool:
    """Whether nothing listens where torchrun said that it keeps its store."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        socket.create_connection((environment["MASTER_ADDR"], int(environment["MASTER_PORT"])), timeout=10).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # says nothing about torchrun
        return False
    return False


class Watchdog:
    """Watches this process from a thread.

    Args:
        timeout_s: seconds without a sign of life that end the run; 0 turns the watchdog off.
        report: called with the reason before the process ends.
    """

    def __init__(self, timeout_s: float, report: Callable[[str], None]) -> None:
        self._timeout_s, self._report = timeout_s, report
        self.neighbours: list[int] = []
        """Process ids of the run's processes on this node, once they are known."""
        self._sign = ("", 0.0, timeout_s)
        """The last sign of life: the phase, when it began, how long it may take; one object, which the thread reads whole."""
        self._closed = threading.Event()
        # One thread, the interrupted one: the others run while the handler reads their frames, and it crashes on one that
        # changes.
        faulthandler.register(_DUMP_SIGNAL, file=sys.stderr, all_threads=False)
        self.alive("start", patience=4)
        if timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, phase: str, patience: float = 1) -> None:
        """A sign of life; ``phase`` says what comes next, ``patience`` how many timeouts it may take."""
        limit_s = self._timeout_s * patience
        self._sign = (phase, time.monotonic(), limit_s)
        if self._timeout_s:
            # Python threads stand still while a library holds the interpreter's lock; this one does not need it.
            faulthandler.dump_traceback_later(limit_s + 60, exit=True, file=sys.stderr)

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout_s / 4)):
            phase, since, limit_s = self._sign
            silent = time.monotonic() - since
            if silent > limit_s:
                self._end(f"no progress for {silent:.0f} s in: {phase}")

    def _end(self, reason: str) -> None:
        log.critical("%s; ending the run, the stacks of all its processes follow", reason)
        print(f"--- process {os.getpid()}: stacks ---", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._report(reason)
        for pid in self.neighbours:
            if pid != os.getpid() and _is_stopped(pid):
                print(f"--- process {pid} is stopped; its main thread's stack ---", file=sys.stderr, flush=True)
                _wake_to_dump(pid)
        time.sleep(_GRACE_S)
        os._exit(EXIT_HUNG)  # the main thread may be stuck in a place that no exception reaches


def _is_stopped(pid: int) -> bool:
    try:
        # The state follows the command's name, which stands in brackets and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def _wake_to_dump(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        try:
            # To the main thread: of a process that is stopped, any thread may take what is sent to the whole.
            ctypes.CDLL(None).tgkill(pid, pid, _DUMP_SIGNAL)
        except AttributeError:  # glibc before 2.30
            os.kill(pid, _DUMP_SIGNAL)
        os.kill(pid, signal.SIGCONT)
