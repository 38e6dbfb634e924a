"""The error for a mistake that a user can put right, with two fields: what is wrong, and what to do about it.

Shown as one message it is both; a table shows them apart. It is a ``ValueError``, as every mistake of a user's is.
"""

from __future__ import annotations

import re

# Where the advice begins in the message of an error that has no fields: behind a semicolon, the end of a sentence (no
# "3. " or "… "), a line, or a colon and an order.
_ADVICE = re.compile(r"; |(?<=[^.\d])\. |\.?\n|: (?=(?:write|set|give|choose|name) )")


class Refusal(ValueError):
    """Something that a user has to put right.

    Args:
        problem: what is wrong.
        advice: what to write or do instead; empty where the problem says it all.
        joint: what stands between them in the message.
    """

    def __init__(self, problem: str, advice: str = "", joint: str = "; ") -> None:
        super().__init__(f"{problem}{joint}{advice}" if advice else problem)
        self.problem, self.advice = problem, advice


def parted(error: Exception | str) -> tuple[str, str]:
    """The problem and the advice of any error: its fields, or the parts of its message, of which the second may be empty."""
    if isinstance(error, Refusal):
        return error.problem, error.advice
    problem, *advice = _ADVICE.split(str(error).strip(), maxsplit=1)
    return problem, advice[0].strip() if advice else ""
