"""When the watchdog ends a run, and when not; tests/system/test_reliability.py has it end real ones.

Run: uv run pytest tests/lifecycle/test_watchdog.py      (a second)
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from agent.lifecycle.watchdog import Watchdog


def test_a_long_phase_is_over_with_its_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, reason: ended.append(reason))
    dog = Watchdog(0.2, lambda reason: None)
    try:
        dog.alive("the start", patience=100)
        time.sleep(0.4)
        clock, main = time.monotonic, threading.main_thread()

        def slow() -> float:
            """The training loop is held up in the middle of giving its sign, while the watchdog looks."""
            if threading.current_thread() is main:
                time.sleep(0.3)
            return clock()

        with monkeypatch.context() as held_up:
            held_up.setattr(time, "monotonic", slow)
            dog.alive("update 1")
        assert not ended
        time.sleep(0.5)
        assert ended and ended[0].endswith("in: update 1")
    finally:
        dog.close()


BUSY = """
import sys, threading, time
from agent.lifecycle.watchdog import Watchdog

def deep(n):
    return n and deep(n - 1)

def spin():
    while True:
        deep(900)

Watchdog(0, print)
for _ in range(3):
    threading.Thread(target=spin, daemon=True).start()
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def test_where_a_process_stands_can_be_printed_while_its_threads_run() -> None:
    """Reading the frames of a thread that runs crashes, in one of sixty runs whose neighbour was stopped and woken."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    busy = subprocess.Popen([sys.executable, "-c", BUSY], **pipes)
    assert busy.stdout and busy.stdout.readline() == "ready\n"
    for _ in range(200):
        busy.send_signal(signal.SIGUSR2)
        time.sleep(0.005)
    _, printed = busy.communicate(timeout=60)
    assert busy.returncode == 0, printed[-2000:]
    assert 'File "<string>", line 17 in <module>' in printed
