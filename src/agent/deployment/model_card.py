"""Writes the model card of an export: what the weights are, where they come from, how good they are, how to use them.

The card names no folder of the machine that it was written on: it shows only the last part of a path.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from agent.lifecycle.records import read_metrics

log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_MEANING = {
    "val/loss": "flow-matching loss",
    "val/action_l1": "mean error of sampled actions, in the data's units",
    "val/baseline_mean_l1": "that of the mean action",
    "val/baseline_last_l1": "that of the last action repeated",
    "val/baseline_start_l1": "that of the weights that training began with",
    "val/ema_loss": "flow-matching loss of the averaged weights",
    "val/ema_action_l1": "mean error of theirs",
}


@dataclass
class Facts:
    """Holds what the card says."""

    name: str
    """The model's name."""
    target: str
    """The export's format, as in ``--to``."""
    title: str
    """The title of the type of policy, such as π0."""
    paper: str
    """The URL of its paper."""
    format: str
    """The format's title."""
    usage: str
    """The section on how to load the export, in Markdown."""
    model: Mapping[str, Any]
    """The checkpoint's config.json."""
    dtype: str
    """The type of the weights, such as ``bfloat16``."""
    step: int | None = None
    """The number of updates at the checkpoint; None if unknown."""
    averaged: bool = False
    """Whether the weights are the moving average of the trained ones."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The resolved training config; empty if it was not kept."""
    data: list[Mapping[str, Any]] = field(default_factory=list)
    """For each data set its name, and where known the numbers of episodes and frames in training."""
    validation: Mapping[str, Any] = field(default_factory=dict)
    """The line in ``metrics.jsonl`` of the last validation up to the checkpoint."""
    bases: list[str] = field(default_factory=list)
    """The weights that training started from, then the weights that those started from, and so on."""
    notes: list[str] = field(default_factory=list)
    """What a user should know before loading the export."""


def is_hub_id(reference: str) -> bool:
    """Says whether a reference to weights or data names a repository on the hub, not a local folder."""
    return _HUB_ID.fullmatch(reference) is not None and not Path(reference).expanduser().exists()


def public(value: Any) -> Any:
    """Returns a config in which every path of this machine is reduced to its last part."""
    if isinstance(value, Mapping):
        return {key: public(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:[\\/]", value)):
        return PurePath(value.replace("\\", "/")).name
    return value


def write(folder: Path, facts: Facts) -> None:
    """Writes ``README.md``."""
    sections = [
        _front_matter(facts),
        f"# {facts.name}",
        _summary(facts),
        *(f"> **Note:** {note}." for note in facts.notes),
        "## Use",
        facts.usage,
        "## Training data",
        _data(facts),
        "## Validation",
        _validation(facts),
        "## Training",
        _training(facts),
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front_matter(facts: Facts) -> str:
    datasets = [str(entry["name"]) for entry in facts.data if _HUB_ID.fullmatch(str(entry["name"]))]
    bases = [base.partition("@")[0] for base in facts.bases if is_hub_id(base)]
    tags = ["robotics", facts.model["type"], "vision-language-action", *(facts.model.get("tags") or [])]
    entries = {
        "library_name": "openpi" if facts.target == "openpi" else "lerobot",
        "pipeline_tag": "robotics",
        "license": facts.model.get("license"),
        "base_model": bases[-1] if bases else None,
        "datasets": list(dict.fromkeys(datasets)),
        "tags": list(dict.fromkeys(tags)),
    }
    text = yaml.safe_dump({key: entry for key, entry in entries.items() if entry}, sort_keys=False)
    return f"---\n{text}---"


def _summary(facts: Facts) -> str:
    inputs, outputs = (facts.model.get(key) or {} for key in ("input_features", "output_features"))
    cameras = [key for key, entry in inputs.items() if entry["type"] == "VISUAL"]
    state = [entry["shape"][0] for entry in inputs.values() if entry["type"] == "STATE"]
    action = [entry["shape"][0] for entry in outputs.values()]
    averaged = "averaged " if facts.averaged else ""
    trained = "" if facts.step is None else f", after {facts.step} updates of training"
    lines = [
        f"A {facts.title} policy ([paper]({facts.paper})) in the format of {facts.format}, "
        f"{averaged}weights in {facts.dtype}{trained}.",
        "",
        f"* cameras: {', '.join(f'`{name}`' for name in cameras) or 'none'}",
        f"* state: {', '.join(f'{size} dimensions' for size in state) or 'none'}",
        f"* action: {', '.join(f'{size} dimensions' for size in action) or 'unknown'}, "
        f"{facts.model['chunk_size']} steps at once, {facts.model['n_action_steps']} of them to be executed",
    ]
    if facts.bases:
        lines.append(f"* trained from: {', from '.join(_base(reference) for reference in facts.bases)}")
    elif facts.training:
        lines.append("* trained from: random weights")
    return "\n".join(lines)


def _base(reference: str) -> str:
    if is_hub_id(reference):
        return f"[{reference}](https://huggingface.co/{reference.partition('@')[0]})"
    return f"the local folder `{PurePath(reference).name}`"


def _data(facts: Facts) -> str:
    if not facts.data:
        return "Not recorded with the checkpoint."
    rows = ["| data set | episodes | frames |", "|---|---|---|"]
    for entry in facts.data:
        rows.append(f"| {entry['name']} | {entry.get('episodes', 'unknown')} | {entry.get('frames', 'unknown')} |")
    return "\n".join(rows)


def _validation(facts: Facts) -> str:
    values = {key: value for key, value in facts.validation.items() if key.startswith("val/")}
    if not values:
        return "No validation was recorded up to this checkpoint."
    rows = [f"On held-out samples, at update {facts.validation['step']}:", "", "| measure | value | |", "|---|---|---|"]
    for key, value in values.items():
        meaning = _MEANING.get(key, "")
        if (threshold := re.sub("^val/(ema_)?acc_", "", key)) != key:
            meaning = f"fraction of action values within {threshold} of the recorded ones"
        # A validation that was not finite is null in metrics.jsonl.
        rows.append(f"| `{key}` | {'not finite' if value is None else f'{value:.4g}'} | {meaning} |")
    if facts.averaged:
        rows += ["", "These weights are the averaged ones, which `val/ema_…` are of."]
    return "\n".join(rows)


def _training(facts: Facts) -> str:
    if not facts.training:
        return "The training config was not recorded with the checkpoint."
    shown = {key: entry for key, entry in facts.training.items() if key not in ("wandb", "use_wandb")}
    text = yaml.safe_dump(public(_without_roots(shown)), sort_keys=False, allow_unicode=True)
    return f"<details><summary>The training config</summary>\n\n```yaml\n{text}```\n\n</details>"


def _without_roots(value: Any) -> Any:
    """Reduces every ``root`` to its last part, because a ``root`` is a folder in whatever form it is written."""
    if isinstance(value, Mapping):
        return {
            key: PurePath(entry).name if key == "root" and isinstance(entry, str) else _without_roots(entry)
            for key, entry in value.items()
        }
    return [_without_roots(entry) for entry in value] if isinstance(value, list) else value


def last_validation(metrics: Path, step: int | None) -> dict[str, Any]:
    """Returns the last line of ``metrics.jsonl`` up to ``step`` that has a validation; empty if there is none."""
    lines = read_metrics(metrics)
    if lines.damaged:
        log.warning("%s is damaged, without harm to the weights: %s", metrics, "; ".join(lines.problems()))
    validated = [
        record
        for record in lines.records
        if (step is None or record["step"] <= step) and any(key.startswith("val/") for key in record)
    ]
    return validated[-1] if validated else {}
