"""The model card of an export: what the weights are, where they come from, how good they are, how to use them.

It names no folder of the machine that it was written on: of a path, the last part alone.
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
_TITLES = {"lerobot": "LeRobot 0.6", "lerobot_v1": "LeRobot before 0.4 (v1)", "openpi": "openpi (PyTorch)"}


@dataclass
class Facts:
    """What the card tells."""

    name: str
    """Of the model."""
    target: str
    """Format of the export."""
    location: str
    """Hub id or the folder's name: what to load."""
    model: Mapping[str, Any]
    """The checkpoint's config.json."""
    dtype: str
    """Of the weights."""
    step: int | None = None
    """Updates of the checkpoint."""
    averaged: bool = False
    """Whether the weights are the moving average of those in training."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The training config, resolved; empty if nobody kept it."""
    data: list[Mapping[str, Any]] = field(default_factory=list)
    """Each data set: name, and episodes and frames that were trained on, where known."""
    validation: Mapping[str, Any] = field(default_factory=dict)
    """The log's line of the last validation up to the checkpoint."""
    bases: list[str] = field(default_factory=list)
    """Where the weights began: what was loaded, what that had been trained from, …"""
    notes: list[str] = field(default_factory=list)
    """What to know before loading it."""


def is_hub_id(reference: str) -> bool:
    """Whether a reference to weights or data names something on the hub rather than something here."""
    return _HUB_ID.fullmatch(reference) is not None and not Path(reference).expanduser().exists()


def public(value: Any) -> Any:
    """A config with the last part alone of every path of this machine."""
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
        _usage(facts),
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
    entries = {
        "library_name": "openpi" if facts.target == "openpi" else "lerobot",
        "pipeline_tag": "robotics",
        "license": facts.model.get("license"),
        "base_model": bases[-1] if bases else None,
        "datasets": list(dict.fromkeys(datasets)),
        "tags": list(dict.fromkeys(["robotics", "pi0", "vision-language-action", *(facts.model.get("tags") or [])])),
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
        f"A π0 policy ([paper](https://arxiv.org/abs/2410.24164)) in the format of {_TITLES[facts.target]}, "
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


def _usage(facts: Facts) -> str:
    if facts.target == "openpi":
        return (
            "`model.safetensors` and `assets/` are what openpi's PyTorch policies load. With a training config of openpi "
            f"whose model is `Pi0Config(action_dim={facts.model['max_action_dim']}, "
            f"action_horizon={facts.model['chunk_size']})` and whose `asset_id` is the folder's name in `assets/`:\n\n"
            "```python\n"
            "from openpi.policies import policy_config\n\n"
            f'policy = policy_config.create_trained_policy(train_config, "{facts.location}")\n'
            "```"
        )
    if facts.target == "lerobot_v1":
        return (
            "With LeRobot before 0.4 (the statistics of the normalisation are in `model.safetensors`):\n\n"
            "```python\n"
            "from lerobot.common.policies.pi0.modeling_pi0 import PI0Policy  # in 0.2 and 0.3: lerobot.policies.pi0…\n\n"
            f'policy = PI0Policy.from_pretrained("{facts.location}")\n'
            "```"
        )
    return (
        "With LeRobot 0.6.1, `uv add 'lerobot[pi]==0.6.1'`:\n\n"
        "```python\n"
        "from lerobot.policies.factory import make_pre_post_processors\n"
        "from lerobot.policies.pi0.modeling_pi0 import PI0Policy\n\n"
        f'policy = PI0Policy.from_pretrained("{facts.location}")\n'
        "preprocess, postprocess = make_pre_post_processors(\n"
        f'    policy.config, pretrained_path="{facts.location}",\n'
        '    preprocessor_overrides={"device_processor": {"device": policy.config.device}},\n'
        ")\n"
        "actions = postprocess(policy.predict_action_chunk(preprocess(observation)))\n"
        "```\n\n"
        "`observation` holds each camera as float (3, height, width) in [0, 1], the state, and the instruction as `task`."
    )


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
    """A ``root`` is a folder however it is written; its name is enough."""
    if isinstance(value, Mapping):
        return {
            key: PurePath(entry).name if key == "root" and isinstance(entry, str) else _without_roots(entry)
            for key, entry in value.items()
        }
    return [_without_roots(entry) for entry in value] if isinstance(value, list) else value


def last_validation(metrics: Path, step: int | None) -> dict[str, Any]:
    """The last line of ``metrics.jsonl`` up to ``step`` with a validation; empty if there is none."""
    lines = read_metrics(metrics)
    if lines.damaged:
        log.warning("%s is damaged, without harm to the weights: %s", metrics, "; ".join(lines.problems()))
    validated = [
        record
        for record in lines.records
        if (step is None or record["step"] <= step) and any(key.startswith("val/") for key in record)
    ]
    return validated[-1] if validated else {}
