"""Knows the layouts of RLDS trees, and chooses one: which features of a step become pictures, state and actions."""

from __future__ import annotations

import argparse
from dataclasses import replace

from agent.data.conversion.rlds import Tree
from agent.data.conversion.shard import Layout

_BRIDGE = Layout(
    fps=5,
    images={"image_0": "observation/image_0"},
    state=("observation/state",),
    action=("action",),
    instruction="language_instruction",
)
LAYOUTS = {
    # as published by the authors, and as prepared by those who train on it
    "bridge_dataset": _BRIDGE,
    "bridge_orig": _BRIDGE,
    # as in the first release of Open X-Embodiment
    "bridge": Layout(
        fps=5,
        images={"image_0": "observation/image"},
        state=("observation/state",),
        action=("action/world_vector", "action/rotation_delta", "action/open_gripper"),
        instruction="observation/natural_language_instruction",
    ),
    "fractal20220817_data": Layout(
        fps=3,
        images={"image": "observation/image"},
        state=("observation/base_pose_tool_reached", "observation/gripper_closed"),
        action=("action/world_vector", "action/rotation_delta", "action/gripper_closedness_action"),
        instruction="observation/natural_language_instruction",
    ),
}


def choose_layout(tree: Tree, options: argparse.Namespace) -> Layout:
    """Takes the layout that is known by the tree's name, and changes it by what the command says.

    Raises:
        ValueError: if something is left open, or a feature is not there, or is of another kind.
    """
    layout = LAYOUTS.get(tree.name)
    if layout is None:
        needed = ("image", "state", "action", "instruction", "fps")
        if missing := [f"--{name}" for name in needed if getattr(options, name) is None]:
            raise ValueError(
                f"the layout of {tree.name} is not known: give {', '.join(missing)}. A step has\n{_listed(tree)}"
            )
        layout = Layout(0, {}, (), (), "")
    if options.image:
        pairs = [text.rpartition("=") for text in options.image]
        layout = replace(layout, images={name or feature.rpartition("/")[2]: feature for name, _, feature in pairs})
        if len(layout.images) != len(pairs):
            raise ValueError("--image names a camera twice: write CAMERA=FEATURE")
    changes = {
        name: getattr(options, name) for name in ("state", "action", "instruction", "fps") if getattr(options, name)
    }
    layout = replace(layout, size=options.size, crf=options.crf, **changes)
    layout = replace(layout, state=tuple(layout.state), action=tuple(layout.action))
    if layout.fps < 1 or layout.size < 2 or layout.size % 2 or options.processes < 1:
        raise ValueError("--fps and --processes must be at least 1, --size an even number")
    wanted: list[tuple[str, tuple[str, ...]]] = [(feature, ("Image",)) for feature in layout.images.values()]
    wanted += [(feature, ("Tensor", "Scalar")) for feature in (*layout.state, *layout.action)]
    for feature, kinds in [*wanted, (layout.instruction, ("Text", "Tensor"))]:
        kind = tree.features.get(feature)
        if kind not in kinds:
            what = "there is no such feature" if kind is None else f"it is of kind {kind}, not {' or '.join(kinds)}"
            raise ValueError(f"{feature}: {what}. A step has\n{_listed(tree)}")
    return layout


def _listed(tree: Tree) -> str:
    return "\n".join(f"  {name} ({kind})" for name, kind in sorted(tree.features.items()))
