"""Adds up the attempts of one run: how much of the time that it was given became progress."""

from __future__ import annotations

from typing import Any

FIGURES = ("restarts", "updates_redone", "waited_s", "checkpoint_stall_s", "first_update_s", "ettr")
"""What ``status.json`` says over all attempts: ``restarts``, and what :func:`summary` gives."""


def summary(attempts: list[dict[str, Any]]) -> dict[str, float]:
    """Computes figures over all attempts so far.

    Args:
        attempts: oldest first; each with ``started``, ``updated`` (unix seconds), ``first_step``, ``step`` and
            ``busy_s``, the seconds that its updates took. An attempt that died before it trained lacks the last three.

    Returns:
        ``restarts``: starts after the first, without those that were refused. ``updates_redone``: updates that were lost
        with a crash and done again. ``waited_s``: time between attempts, in a queue for the most part.
        ``checkpoint_stall_s``: time that training waited for checkpoints. ``first_update_s``: time from the last start to
        its first update. ``ettr``: the effective-training-time ratio, seconds spent on updates that count over seconds
        since the first start (Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research
        Clusters", HPCA 2025).
    """
    each = costs(attempts)
    effective = sum(cost["effective_s"] for cost in each)
    last = attempts[-1]
    total = last.get("updated", last["started"]) - attempts[0]["started"]
    return {
        "restarts": max(sum(not refused(attempt) for attempt in attempts) - 1, 0),
        "updates_redone": int(sum(cost["redone"] for cost in each)),
        "waited_s": round(sum(cost["waited_s"] for cost in each), 1),
        "checkpoint_stall_s": round(sum(attempt.get("checkpoint_stall_s", 0.0) for attempt in attempts), 2),
        "first_update_s": last.get("first_update_s", 0.0),
        "ettr": round(effective / total, 4) if total > 0 else 0.0,
    }


def refused(attempt: dict[str, Any]) -> bool:
    """Whether this start found a mistake to correct (config, data, weights) before it trained."""
    return attempt.get("state") == "failed" and attempt.get("error_kind") == "config"


def costs(attempts: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Computes what each attempt cost: ``redone``, its updates that were lost with it and done again; ``waited_s`` since the end
    of the one before; ``effective_s``, the seconds of its updates that count."""
    found = []
    for number, attempt in enumerate(attempts):
        later = [other["first_step"] for other in attempts[number + 1 :] if "first_step" in other]
        cost = {"redone": 0.0, "waited_s": 0.0, "effective_s": 0.0}
        if "first_step" in attempt:
            done = attempt["step"] - attempt["first_step"]
            # What a later attempt began from is what was left of this one.
            kept = min([attempt["step"], *later]) - attempt["first_step"]
            cost["redone"] = done - max(kept, 0)
            cost["effective_s"] = attempt.get("busy_s", 0.0) * max(kept, 0) / done if done > 0 else 0.0
        if number:
            before = attempts[number - 1]
            cost["waited_s"] = max(0.0, attempt["started"] - before.get("updated", before["started"]))
        found.append(cost)
    return found


def story(attempts: list[dict[str, Any]]) -> list[str]:
    """Words a line for each earlier attempt: what it did and why it ended."""
    lines = []
    for number, attempt in enumerate(attempts[:-1], start=1):
        state = attempt.get("state", "running")
        ended = "ended without a word (killed, or its node failed)" if state == "running" else state
        ended = "refused" if refused(attempt) else ended
        reason = f": {attempt['reason']}" if attempt.get("reason") and state != "running" else ""
        did = f"updates {attempt['first_step']} to {attempt['step']}" if "first_step" in attempt else "no update"
        lines.append(f"attempt {number} on {attempt.get('host', '?')}, {did}, {ended}{reason}")
    return lines
