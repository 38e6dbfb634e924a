"""Translates the ``config.json`` of LeRobot's first π0 (2025) to today's keys.

Some keys have another name today, some have no effect, and some may ask for what this code does not do. Where an older file
leaves out a key whose default was another then, the log says so. Imports no torch.
"""

from __future__ import annotations

from typing import Any

from agent.models.base import Reading
from agent.models.lerobot_config import USE_AMP
from agent.spelling import literal

RENAMED = {"num_steps": "num_inference_steps", "resize_imgs_with_padding": "image_resolution"}

NO_EFFECT = {
    "attention_implementation": "it named a kernel; the attention is the same one",
    "use_cache": "keys and values of images and instruction are computed once per sampling either way",
}

# Maps key → the only value that is supported, and why the others are not.
FIXED = {
    "train_state_proj": (
        True,
        "the state's projection always trains here; write true (freeze_vlm and freeze_lm_head of the training YAML "
        "freeze other parts)",
    ),
    "adapt_to_pi_aloha": (
        False,
        "joints and grippers are not converted into the space of Physical Intelligence's own robots; convert states "
        "and actions in the data set, and write false",
    ),
    "use_delta_joint_actions_aloha": (
        False,
        "actions are not made relative to the state by this key; write use_relative_actions: true, and false here",
    ),
}

# Maps key → its default in 2025, for keys whose default is another today.
OLD_DEFAULTS = {
    "freeze_vision_encoder": True,
    "optimizer_weight_decay": 1e-10,
    "optimizer_grad_clip_norm": 10.0,
    "scheduler_decay_steps": 30_000,
}

_ONLY_THEN = {*RENAMED, *NO_EFFECT, *FIXED, "proj_width"}


def read(values: dict[str, Any], expert_width: Any, defaults: dict[str, Any]) -> Reading:
    """Returns a model JSON of 2025 or of today in today's keys; one of today is returned unchanged.

    Args:
        values: the file's values, with changes from the command line.
        expert_width: the width of the action expert that the values describe; None if they describe none.
        defaults: key → today's default.
    """
    # Among LeRobot's files only older ones have this key, where "" meant none.
    if values.get("paligemma_pretrained_path") == "":
        values = values | {"paligemma_pretrained_path": None}
    old = {key: value for key, value in values.items() if key in _ONLY_THEN}
    reading = Reading({key: value for key, value in values.items() if key not in old})
    for key, value in old.items():
        if key in RENAMED:
            _rename(reading, key, value)
        elif key in NO_EFFECT:
            reading.notes.append(f"{key}: {literal(value)} of an older file has no effect: {NO_EFFECT[key]}")
        elif key in FIXED:
            _check_fixed(reading, key, value)
        else:
            _check_width(reading, value, expert_width)
    if old:
        _check_meaning(reading, defaults)
    return reading


def _rename(reading: Reading, key: str, value: Any) -> None:
    today = RENAMED[key]
    other = reading.values.get(today, value)
    if other != value:
        text = (
            f"{literal(value)}, but {today}, the name of the same key today, is {literal(other)}; keep one of the two"
        )
        reading.mistakes.append((key, text))
    elif key == "resize_imgs_with_padding" and value is None:
        reading.mistakes.append((key, "null: images are always resized to the vision tower's size; write [224, 224]"))
    else:
        reading.values[today] = value
        # LeRobot's first π0 padded on the left and on top; openpi, where its weights came from, and LeRobot 0.6 do not.
        padding = "; images are padded evenly on both sides, as in LeRobot 0.6" if value and key != "num_steps" else ""
        reading.notes.append(f"{key}: {literal(value)} of an older file is {today} today{padding}")


def _check_fixed(reading: Reading, key: str, value: Any) -> None:
    possible, why_not = FIXED[key]
    if value is possible:
        reading.notes.append(f"{key}: {literal(value)} of an older file is what always happens here")
    else:
        reading.mistakes.append((key, f"{literal(value)}: {why_not}"))


def _check_width(reading: Reading, value: Any, expert_width: Any) -> None:
    if value == expert_width:
        reading.notes.append(f"proj_width: {literal(value)} of an older file is the width of the action expert")
    elif expert_width is not None:
        text = (
            f"{literal(value)}, but the action expert (action_expert_variant) is {expert_width} wide; write "
            f"{expert_width}, or the table of sizes of an expert of this width as action_expert_variant"
        )
        reading.mistakes.append(("proj_width", text))


def _check_meaning(reading: Reading, defaults: dict[str, Any]) -> None:
    """Reports what an older file states or leaves out that has another effect today."""
    values = reading.values
    if values.get("use_amp") is True:
        reading.mistakes.append(("use_amp", USE_AMP))
    if values.get("device") == "cpu":
        reading.notes.append("device: cpu of an older file is obeyed: no GPU is used; write null for the GPU if any")
    mapping = values.get("normalization_mapping")
    if isinstance(mapping, dict) and mapping.get("STATE") == mapping.get("ACTION") == "IDENTITY":
        reading.notes.append(
            "normalization_mapping: IDENTITY for STATE and ACTION of an older file is obeyed: nothing is normalised, "
            "unless the data set was; write MEAN_STD or QUANTILES if the older code normalised while reading"
        )
    for key, then in OLD_DEFAULTS.items():
        if key not in values and defaults[key] != then:
            today = literal(defaults[key])
            reading.notes.append(f"{key}: not in this older file, where that meant {literal(then)}; here it is {today}")
