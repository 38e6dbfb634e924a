"""Checks the data sets: whether their files are whole, and every number, time stamp and instruction is there."""

from __future__ import annotations

from agent.data.recorded.metadata import spelled
from agent.preflight.context import Context
from agent.preflight.report import NotChecked, Row, failed
from agent.preflight.survey import Survey

_WARNING = "WARNING: "  # how lines of the data's report begin that are more than information


def check(context: Context) -> list[Row]:
    """Gives rows of what the survey of each data set has found."""
    return [row for found in context.surveys for row in _rows(found)]


def check_together(context: Context) -> list[Row]:
    """Says what training would refuse, or warn of, for all data sets together; gives no row if it does neither."""
    problem = context.data_problem()
    if problem is not None:
        return [failed("data: together", problem)]
    try:
        lines = context.data.report
    except NotChecked:  # for what the rows above say
        return []
    change = "training says so in its log and goes on; put it right unless it is meant"
    return [
        Row("data: together", "warn", line.removeprefix(_WARNING), change)
        for line in lines
        if line.startswith(_WARNING)
    ]


def _rows(found: Survey) -> list[Row]:
    name = f"data: {found.config.repo_id}"
    rows = _bad(found, name)
    if found.problem is not None:
        text = str(found.problem).replace("HF_HUB_OFFLINE is set", "a check downloads nothing")
        return [*rows, failed(name, text)]
    assert found.metadata is not None
    if not rows:
        frames = int(found.metadata.episodes["length"][found.chosen].sum())
        text = (
            f"{len(found.chosen)} of {found.metadata.total_episodes} episodes, {frames} frames at "
            f"{found.metadata.info['fps']} Hz; {found.files[0]} files whole, every number finite, {found.frames_read} frames read"
        )
        rows.append(Row(name, "pass", text, details={"frames": frames, "key": found.key}))
    if found.files[1]:
        text = f"{found.files[1]} files were not looked at: this disk is slow"
        rows.append(Row(name, "warn", text, "training looks at all of them when it starts; expect a slow start"))
    if found.uneven:
        first, how = next(iter(found.uneven.items()))
        text = f"uneven time stamps in {len(found.uneven)} episodes ({spelled(list(found.uneven))}); {first}: {how}"
        change = "record at a steady rate, or correct `fps` in meta/info.json; action chunks assume even steps"
        rows.append(Row(name, "warn", text, change, {"episodes": sorted(found.uneven)}))
    for key, how in found.sizes.items():
        change = f"write their size as the `shape` of {key} there: crops are measured by it"
        rows.append(Row(name, "warn", f"pictures of {key} have {how}", change))
    if found.dark:
        text = f"{len(found.dark)} of {found.frames_read} frames that were read have a picture of one colour: {found.dark[0]}"
        rows.append(Row(name, "warn", text, "look at cameras.png: was the camera plugged in, its lens free?"))
    return rows


def _bad(found: Survey, name: str) -> list[Row]:
    if not found.bad or found.metadata is None:
        return []
    why: dict[str, list[int]] = {}
    for episode, reason in found.bad.items():
        why.setdefault(reason, []).append(episode)
    shown = [f"episode {', '.join(map(str, episodes[:20]))}: {reason}" for reason, episodes in list(why.items())[:6]]
    more = f"\nand {len(why) - 6} reasons more, in report.json" if len(why) > 6 else ""
    text = f"{len(found.bad)} of {len(found.chosen)} episodes cannot be used ({spelled(list(found.bad))}):\n"
    change = (
        "repair them, or copy the data set again; or leave them out: the `episodes` to write are in check/report.json "
        "under `good_episodes`"
    )
    details = {
        "bad_episodes": {str(episode): found.bad[episode] for episode in sorted(found.bad)},
        "good_episodes": found.good.tolist(),
    }
    return [Row(name, "fail", text + "\n".join(shown) + more, change, details)]
