"""When the watchdog ends a run, and when not; tests/test_reliability.py has it end real ones.

Run: uv run pytest tests/test_watchdog.py      (a second)
"""

from __future__ import annotations

import threading
import time

import pytest

from agent.watchdog import Watchdog


def test_a_long_phase_is_over_with_its_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, reason: ended.append(reason))
    dog = Watchdog(0.2, [], lambda reason: None)
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
