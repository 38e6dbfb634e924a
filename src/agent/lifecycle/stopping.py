"""Takes requests to stop a run, which come as a signal or as a file, and remembers them for the training loop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.parallel.processes import Processes


BY_HAND = "Ctrl-C"
"""What a person's stop says, as the answer to SIGINT and in the stop file of slurms/common.sh; see :func:`by_hand`."""

_WRITTEN_WITHIN_S = 0.2

_ONE_PRESS_S = 0.5

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def by_hand(reason: str) -> bool:
    """Whether a person has stopped the run, which then waits for that person, and no queue takes it back."""
    return BY_HAND in reason


class StopRequest:
    """Remembers that somebody asked this process to stop; the training loop looks at every update boundary.

    Somebody is a signal to this process, or a file: ``$VLA_STOP_FILE``, which the launching script writes, or ``stop``
    in the run folder, which anybody may. A file reaches a run through torchrun, containers and nodes, where a signal
    to torchrun would end it or never arrive.

    Args:
        speaks: whether this process answers Ctrl-C with a line; rank 0 does.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.reason = ""
        self.can_save = False
        """Whether the loop has begun. Before, there is nothing to save, and Ctrl-C ends the start at once."""
        self.leave: Callable[[str], None] = _leave
        """Ends this process at once, without saving; called with the reason, from a signal's handler or a thread."""
        self._speaks, self._pressed = speaks, 0.0
        self._files: list[Path] = []

    def watch_files(self, run_dir: Path) -> None:
        """Looks for stop files from now on; rank 0 does. One left in the run folder by an earlier attempt is removed."""
        own = run_dir / "stop"
        own.unlink(missing_ok=True)
        self._files = [own, *(Path(name) for name in [os.environ.get("VLA_STOP_FILE")] if name)]

    def pending(self) -> bool:
        """True once this process has been asked to stop."""
        for path in self._files:
            # Path.exists would raise the errors that NFS gives now and then.
            if not self.reason and os.path.exists(path):
                self.reason = _text_of(path) or f"asked to by the file {path}"
        return bool(self.reason)

    def abandoned(self, reason: str) -> None:
        """Saves and stops, or leaves where there is nothing to save, because nobody waits for this process any more."""
        if self.can_save and not self._pressed:
            self.reason = self.reason or reason
            _say(f"{reason}: saving at the next update, and stopping")
        else:
            self.leave(reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._on_interrupt()
        self.reason = self.reason or f"received {signal.Signals(number).name}"

    def _on_interrupt(self) -> None:
        now, first = time.monotonic(), not self._pressed
        if not first and now - self._pressed < _ONE_PRESS_S:
            return  # one press comes twice: from the terminal and from the launcher
        self._pressed = self._pressed or now
        if not first or not self.can_save:
            self.leave(BY_HAND if first else f"{BY_HAND} twice")
        self.reason = BY_HAND
        if self._speaks:
            _say(f"{BY_HAND}: saving at the end of this update, and stopping; once more leaves at once")

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catches SIGTERM, SIGUSR1, SIGINT and SIGHUP while the context lasts; not what `nohup` has turned off."""
        wanted = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in wanted}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def reasons(self, processes: Processes) -> str:
        """Joins the reasons that all processes have; a collective, for when one of them is known to be asked."""
        return ", ".join(sorted({reason for reason in processes.gather(self.reason) if reason}))


def _text_of(stop_file: Path) -> str:
    """Returns what a stop file says; nothing where whoever made it has left it unreadable for this process."""
    try:
        text = stop_file.read_text(encoding="utf-8", errors="replace").strip()
        if not text:  # made with `touch`, or not yet written by who has just opened it
            time.sleep(_WRITTEN_WITHIN_S)
            text = stop_file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return text


def _say(line: str) -> None:
    # Not a print and no log line: a signal's handler may have interrupted one.
    begin = "\n" if os.isatty(2) else ""  # below the bar, or the ^C that the terminal shows
    os.write(2, f"{begin}{line}\n".encode())


def _leave(reason: str) -> None:
    _say(f"{reason}: nothing was started")
    os._exit(1)
