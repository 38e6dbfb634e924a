"""Checks what the run would begin with: its own checkpoint, else weights that cover the model; and the tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from agent import hub
from agent.checkpoints.manifest import Folder
from agent.checkpoints.store import TRAINING
from agent.lifecycle.records import read_metrics, read_status
from agent.preflight import needs
from agent.preflight.context import Context
from agent.preflight.refusal import parted
from agent.preflight.report import NotChecked, Row, failed
from agent.preflight.schedule import plan
from agent.tracking.jsonl import JsonLines
from agent.training.config_changes import changes_since_checkpoint
from agent.validation.record import read_record


def check(context: Context) -> list[Row]:
    """Reads headers of weights and the run's own records; changes nothing in the run folder."""
    rows = _own(context)
    if own_step(context) is None:
        rows += _weights(context)
    tokenizer = needs.tokenizer(context.config)
    return [*rows, *([_look(tokenizer)] if tokenizer is not None else [])]


def own_step(context: Context) -> int | None:
    """Gives the update after which the run would continue; None if it would begin anew."""
    whole, _ = context.own
    return int(whole[0].name.removeprefix("step_")) if whole else None


def _own(context: Context) -> list[Row]:
    """Says whether the run would begin or continue, by the rules of training."""
    whole, damaged = context.own
    there = [*context.store.candidates(), *context.store.unusable()]
    if not there:
        return [Row("start", "pass", "a new run; nothing to continue from")]
    if not context.config.resume_run:
        text = f"resume_run is false, but {there[0]} exists and would be overwritten"
        return [Row("start", "fail", text, "give this run another name, or remove its folder")]
    if not whole:
        told = "\n".join(f"{path}: {damaged[path]}" if path in damaged else str(path) for path in there)
        change = "begin a new run with load_from_checkpoint and another name, or remove the folder `checkpoints`"
        return [Row("start", "fail", f"this run has checkpoints, but none that it can continue from:\n{told}", change)]
    try:
        rows = [_resume(context, whole[0])]
    except NotChecked as error:
        text = f"would continue after update {own_step(context)}; whether it may was not checked, because {error}"
        rows = [Row("start", "warn", text, "put right what fails above, and check again")]
    if damaged:
        text = "damaged, and passed over:\n" + "\n".join(f"{path}: {damage}" for path, damage in damaged.items())
        rows.append(Row("start", "warn", text, "look why: does the disk fail, or was a copy cut short?"))
    if bad := _damaged_records(context.config.run_dir):
        text = "the run goes on without what is damaged of its records:\n" + "\n".join(bad)
        rows.append(
            Row("start", "warn", text, "nothing has to be done; but does the disk fail, or was a copy cut short?")
        )
    return rows


def _damaged_records(run_dir: Path) -> list[str]:
    """Lists the records of the run that are damaged, which a start would set aside, each with what is wrong."""
    status, metrics = run_dir / "status.json", run_dir / "metrics.jsonl"
    lines = read_metrics(metrics)
    told = [f"{status}: {problem}" for problem in read_status(status)[1]]
    told += [f"{metrics}: {problem}" for problem in lines.problems()]
    if not lines.there:
        told.append(f"{metrics} is not there")
    for path in sorted((run_dir / "validation").glob("step_*.json")):
        try:
            read_record(path)
        except ValueError as error:
            told.append(f"{path}: {error}")
    return told


def _resume(context: Context, checkpoint: Path) -> Row:
    config = context.config
    context.require_data()
    same_words = context.tokenizer_problem is None and context.usable.task_paraphrase == config.task_paraphrase
    whole = same_words and not any(survey.bad for survey in context.surveys)
    # The model's features, where the config leaves them open, are completed from the data.
    completed = replace(config, model_cfg=context.usable.model_cfg)
    changes = changes_since_checkpoint(checkpoint, completed, context.data if whole else None)
    text = f"continues from {checkpoint}"
    if changes and not config.resume_changes:
        change = "take these changes back, write another name, or allow them with --resume_changes true"
        return Row("start", "fail", f"{text}, which was made with another config:\n" + "\n".join(changes), change)
    n_updates = plan(context).n_updates
    if (own_step(context) or 0) >= n_updates:
        if _owes_a_validation(config.run_dir, checkpoint):
            return Row("start", "pass", f"{text}; only a validation is left to do, which a stop has cut short")
        change = "write more n_updates or n_epochs, with --resume_changes true, or another name for a new run"
        return Row("start", "warn", f"this run is finished with its {n_updates} updates: nothing is left to do", change)
    return Row("start", "pass", text)


def _owes_a_validation(run_dir: Path, checkpoint: Path) -> bool:
    """As ``metrics_line.forget_reported`` decides it when the run starts."""
    state = json.loads(Folder(checkpoint / TRAINING).text("state.json"))
    return state.get("unreported") is not None and not JsonLines(run_dir / "metrics.jsonl").has(state["step"])


def _weights(context: Context) -> list[Row]:
    item = needs.weights(context.config)
    if item is None:
        text = "none are named: every tensor is drawn at random"
        large = context.model_size() > 100e6
        change = "write load_from_checkpoint: lerobot/pi0_base, or other weights, unless that is meant"
        return [Row("weights", "warn", text, change) if large else Row("weights", "pass", text)]
    return [_look(item)]


def _look(item: needs.Item) -> Row:
    """Gives a row for something that a training needs; a look never downloads."""
    try:
        found = item.look()
    except hub.Unreachable as error:
        text = f"{item.key}: '{item.name}' is not on this machine"
        return Row(item.kind, "fail", text, parted(error)[1].removeprefix("It is not in the cache of this machine. "))
    except ValueError as error:
        return failed(item.kind, error, f"copy or download it again, or write another {item.key}")
    return Row(item.kind, "pass", found.note, details={"folder": str(found.folder), "bytes": found.size})
