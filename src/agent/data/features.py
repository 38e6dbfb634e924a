"""Compares the data sets with what the model expects, and tells every mismatch in one table before anything is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agent.batch import EMPTY_CAMERA, SampleSpec
from agent.data.recorded.pictures import check_pictures
from agent.data.source import Source


def check_features(
    sources: Sequence[Source], spec: SampleSpec, robots: Sequence[str] = (), deployed: str = ""
) -> tuple[SampleSpec, list[str]]:
    """Compares cameras, state and action with the model, and sets each source's ``cameras``.

    A model without camera features takes them, with the state and action dimensions, from the first data set of the
    robot that it is for. Another robot's dimensions are those of its own first data set.

    Args:
        sources: all data sets, of training and validation.
        spec: what the model expects.
        robots: the robot of each data set, see ``assign_robots``; one for all when not given.
        deployed: the robot that the model's features are of.

    Returns:
        The spec, completed, and lines for the log.

    Raises:
        ValueError: a table of what the model expects and what the data set has, all mismatches at once.
    """
    notes, robots = [], robots or [deployed] * len(sources)
    if (spec.images and not spec.camera_slots) or spec.state_dim is None or spec.action_dim is None:
        # a data set that is looked at by itself may be of another robot
        first = sources[robots.index(deployed) if deployed in robots else 0]
        spec = _inferred(first, spec)
        notes.append(
            f"the model's features are those of {first}: cameras {', '.join(spec.camera_slots) or 'none'}, "
            f"state {spec.state_dim}, action {spec.action_dim}"
        )
    tables = []
    for source, robot in zip(sources, robots, strict=True):
        first = sources[robots.index(robot)]
        sizes = (spec.state_dim, spec.action_dim)
        if robot != deployed:
            sizes = (_size(first, first.config.state), _size(first, first.config.action))
        mismatches = (_camera_mismatches(source, spec) if spec.images else []) + _vector_mismatches(source, spec, sizes)
        if mismatches:
            tables.append(_table(source, mismatches))
            continue
        cameras = source.config.cameras or {slot: slot for slot in spec.camera_slots if not _is_empty(slot)}
        if not spec.images:
            source.cameras = {}
            continue
        source.cameras = {slot: key for slot, key in cameras.items() if key is not None}
        left_out = [key for key in source.metadata.camera_keys if key not in source.cameras.values()]
        if left_out:
            notes.append(f"{source}: `cameras` leaves out {', '.join(left_out)}")
    if tables:
        raise ValueError("\n\n".join(dict.fromkeys(tables)))  # a held-out part has those of its data set
    for source in sources:
        if source.store is None:  # else they were looked at when it was made, and nothing here may decode a video
            check_pictures(source)
    return spec, notes


def _is_empty(slot: str) -> bool:
    return slot.startswith(EMPTY_CAMERA)


def _size(source: Source, key: str) -> int | None:
    feature = source.metadata.features.get(key)
    return None if feature is None else math.prod(feature["shape"])


def _inferred(source: Source, spec: SampleSpec) -> SampleSpec:
    slots = tuple(source.config.cameras or source.metadata.camera_keys)
    values: dict[str, Any] = {"camera_slots": (spec.camera_slots or slots) if spec.images else ()}
    for name, key in (("state_dim", source.config.state), ("action_dim", source.config.action)):
        size = _size(source, key)
        if size is None:
            raise ValueError(f"{source} has no {key!r}, it has {', '.join(_vectors(source))}: set `{name[:-4]}`")
        if getattr(spec, name) is None:
            values[name] = size
    return replace(spec, **values)


def _vectors(source: Source) -> list[str]:
    return [key for key, feature in source.metadata.features.items() if feature["dtype"].startswith("float")]


def _camera_mismatches(source: Source, spec: SampleSpec) -> list[tuple[str, str]]:
    there = source.metadata.camera_keys
    wanted = [slot for slot in spec.camera_slots if not _is_empty(slot)]
    cameras = source.config.cameras
    if cameras is None:
        rows = [(slot, "-") for slot in wanted if slot not in there]
        return rows + [("-", key) for key in there if key not in wanted]
    rows = [(slot, "not in `cameras`") for slot in wanted if slot not in cameras]
    for slot, key in cameras.items():
        if slot not in spec.camera_slots:
            rows.append(("-", f"`cameras` maps {slot}, which the model does not have"))
        elif key is not None and key not in there:
            rows.append((slot, f"`cameras` says {key}, the cameras are {', '.join(there) or 'none'}"))
    if not rows and not any(cameras.values()):
        rows.append((", ".join(wanted), "`cameras` maps every camera to null"))
    return rows


def _vector_mismatches(source: Source, spec: SampleSpec, sizes: tuple[int | None, int | None]) -> list[tuple[str, str]]:
    rows = []
    for name, key, size, most in (
        ("state", source.config.state, sizes[0], spec.max_state_dim),
        ("action", source.config.action, sizes[1], spec.max_action_dim),
    ):
        found = _size(source, key)
        if found is None:
            expected = name if size is None else f"{name}: {size}"
            rows.append((expected, f"no {key}, it has {', '.join(_vectors(source))}"))
        elif found != size:
            rows.append((f"{name}: {size}", f"{key}: {found}"))
        elif found > most:
            rows.append((f"{name}: at most max_{name}_dim = {most}", f"{key}: {found}"))
    return rows


def _table(source: Source, rows: list[tuple[str, str]]) -> str:
    heads = ("the model expects", "the data set has")
    width = max(len(left) for left, _ in [heads, *rows])
    lines = [f"  {left:<{width}} | {right}" for left, right in [heads, ("-" * width, "-" * len(heads[1])), *rows]]
    advice = (
        "Map every camera of the model in the data set's entry, to null where this robot has none:\n"
        "  cameras: {<camera of the model>: <key in the data set>}\n"
        "name other columns with `state:` and `action:`, or change input_features and output_features of model_cfg."
    )
    if any(left.startswith(("state: ", "action: ")) and ": " in right for left, right in rows):
        advice += (
            "\nA data set of another robot, with dimensions of its own, is trained on beside the others with\n"
            "data.train.normalization: per_dataset."
        )
    return "\n".join([f"{source} does not match the model:", *lines, advice])
