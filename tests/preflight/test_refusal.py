"""Errors for users: the problem and the advice, together in one message and apart.

Run: uv run pytest tests/test_refusal.py      (a second)
"""

from __future__ import annotations

import pickle

import pytest

from agent.preflight.refusal import Refusal, parted


def test_a_refusal_is_one_message_with_two_fields() -> None:
    refusal = Refusal("it ends; too early", "copy it again")
    assert str(refusal) == "it ends; too early; copy it again"
    assert parted(refusal) == (refusal.problem, refusal.advice) == ("it ends; too early", "copy it again")
    assert str(Refusal("x has no names", "Write them", joint=". ")) == "x has no names. Write them"
    assert str(Refusal("nothing can be done")) == "nothing can be done" and parted(Refusal("no way")) == ("no way", "")


def test_a_refusal_of_another_process_keeps_its_fields() -> None:
    """What a loader's worker raises is pickled."""
    again = pickle.loads(pickle.dumps(Refusal("it is damaged", "copy it again")))
    assert str(again) == "it is damaged; copy it again" and parted(again) == ("it is damaged", "copy it again")


@pytest.mark.parametrize(
    "message, problem, advice",
    [
        ("7 is not a multiple of 3; write 6 or 9", "7 is not a multiple of 3", "write 6 or 9"),
        ("it ends at 2.5 s. Copy it again.", "it ends at 2.5 s", "Copy it again."),
        ("no answer … .\nRun it again", "no answer … ", "Run it again"),
        ("there are no names: write them as names", "there are no names", "write them as names"),
        ("x.safetensors is damaged", "x.safetensors is damaged", ""),
    ],
)
def test_a_message_without_fields_is_parted(message: str, problem: str, advice: str) -> None:
    assert parted(ValueError(message)) == (problem, advice)
