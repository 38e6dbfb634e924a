"""Maps π0's tensor names to those of LeRobot (0.6 and older), openpi's PyTorch port and Hugging Face's PaliGemma.

The model knows only its own names. A ``Layout`` says how another program's checkpoint names the same tensors and which of
them it does not contain; ``agent.checkpoints.weights`` reads the files and accounts for every tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from agent.models.common.names import Layout, Match
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0

if TYPE_CHECKING:
    from torch import Tensor

# Prefixes of PaliGemma's tensor names: ours, then those of transformers from 4.52 on; older ones are derived below.
PALIGEMMA_PARTS = [
    ("vision.patch_embedding.", "model.vision_tower.vision_model.embeddings.patch_embedding."),
    ("vision.position_embedding.", "model.vision_tower.vision_model.embeddings.position_embedding."),
    ("vision.layers.", "model.vision_tower.vision_model.encoder.layers."),
    ("vision.post_layernorm.", "model.vision_tower.vision_model.post_layernorm."),
    ("projector.", "model.multi_modal_projector.linear."),
    ("language.embedding.", "model.language_model.embed_tokens."),
    ("language.layers.", "model.language_model.layers."),
    ("language.norm.", "model.language_model.norm."),
]
OLD_PALIGEMMA_PARTS = [
    (ours, theirs.replace("model.language_model.", "language_model.model.").removeprefix("model."))
    for ours, theirs in PALIGEMMA_PARTS
]
EXPERT_PARTS = [("expert.layers.", "gemma_expert.model.layers."), ("expert.norm.", "gemma_expert.model.norm.")]
SMALL_PARTS = [
    (f"{name}.", f"{name}.")
    for name in ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")
]

EMBEDDING = "language.embedding.weight"
# Tensors that a checkpoint may contain and this model does not load, with the reason.
WAIVED = [
    (r"(.*\.)?gemma_expert\.lm_head\.weight", "the expert's language head is never used"),
    (r"(.*\.)?lm_head\.weight", "the language head is tied to the token embedding"),
    (
        r"(normalize_inputs|normalize_targets|unnormalize_outputs)\..*",
        "statistics of the data it was made with; used with `data.statistics: checkpoint` only",
    ),
]
# Tensors that PaliGemma does not contain, with the reason.
FRESH = [
    (
        r"(expert|state_proj|action_in_proj|action_time_mlp_in|action_time_mlp_out|action_out_proj)\..*",
        "PaliGemma has no action expert",
    )
]


def _policy(title: str, prefix: str, paligemma: list[tuple[str, str]]) -> Layout:
    inner = [(ours, f"paligemma_with_expert.paligemma.{theirs}") for ours, theirs in paligemma]
    inner += [(ours, f"paligemma_with_expert.{theirs}") for ours, theirs in EXPERT_PARTS]
    return Layout(title, [(ours, prefix + theirs) for ours, theirs in inner + SMALL_PARTS])


LEROBOT = _policy("LeRobot 0.4 to 0.6, and this project's own", "model.", PALIGEMMA_PARTS)
POLICIES = [
    LEROBOT,
    _policy("openpi's PyTorch export", "", PALIGEMMA_PARTS),
    _policy("LeRobot v1, of 2025", "model.", OLD_PALIGEMMA_PARTS),
]
PALIGEMMAS = [
    Layout("PaliGemma", PALIGEMMA_PARTS, FRESH),
    Layout("PaliGemma before transformers 4.52", OLD_PALIGEMMA_PARTS, FRESH),
]


def match(names: Iterable[str], layouts: list[Layout], config: PI0Config) -> Match:
    """Assigns the tensor names of a checkpoint to ours, by the layout that explains most of them."""
    names, known = list(names), shapes(config)
    layout = max(layouts, key=lambda layout: sum(layout.ours(name) in known for name in names))
    sources: dict[str, str] = {}
    waived: dict[str, str] = {}
    extra: list[str] = []
    for name in names:
        ours = layout.ours(name)
        reason = next((reason for pattern, reason in WAIVED if re.fullmatch(pattern, name)), None)
        if ours is not None and ours in known:
            sources[ours] = name
        elif reason is not None:
            waived[name] = reason
        else:
            extra.append(name)
    # safetensors stores tied tensors once, and openpi's files keep the head. Where a file has both, the embedding is used,
    # because LeRobot unties them and trains only the embedding.
    head = next((name for name in waived if name.endswith("lm_head.weight") and "gemma_expert" not in name), None)
    if EMBEDDING not in sources and head is not None:
        sources[EMBEDDING] = head
        del waived[head]
    return Match(layout, sources, waived, extra)


def from_policy(names: Iterable[str], config: PI0Config) -> Match:
    """Assigns the tensor names of a π0 policy in LeRobot's format, old or new, or openpi's."""
    return match(names, POLICIES, config)


def from_base(key: str, names: Iterable[str], config: PI0Config) -> Match:
    """Assigns the tensor names of a Hugging Face PaliGemma, which leaves the expert with its initial weights."""
    assert key in config.base_weights, key
    return match(names, PALIGEMMAS, config)


# The projections between the robot's padded vectors and the model: name → the config key of the padded size, and the
# tensor dimension that has this size.
_PADDED = {
    "state_proj.weight": ("max_state_dim", 1),
    "action_in_proj.weight": ("max_action_dim", 1),
    "action_out_proj.weight": ("max_action_dim", 0),
    "action_out_proj.bias": ("max_action_dim", 0),
}


def fit(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> tuple[bool, str] | None:
    """Decides what happens to a tensor whose shape differs, see ``agent.models.family.TensorNames.fit``."""
    if name == EMBEDDING and theirs[1:] == ours[1:] and theirs[0] > ours[0]:
        # The additional rows are the image placeholder and padding, which π0 does not use.
        return (True, "rows that Hugging Face appended to the vocabulary are left behind")
    if name in _PADDED:
        key, dim = _PADDED[name]
        if theirs[:dim] + theirs[dim + 1 :] != ours[:dim] + ours[dim + 1 :]:
            return None
        if theirs[dim] > ours[dim]:
            return (False, f"write {key}: {theirs[dim]}, the dimensions that a robot lacks are padded with zeros")
        # Zero columns ignore the new dimensions and zero rows predict no motion in them, so the function is the same.
        return (True, f"{key} is {theirs[dim]} in the file: the weights of the added dimensions are zero")
    return None


def shapes(config: PI0Config) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor of the model, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in PI0(config).state_dict().items()}


def expected(config: PI0Config) -> dict[str, str]:
    """Maps our name of every tensor of the model → LeRobot 0.6's name."""
    return {name: _lerobot_name(name) for name in shapes(config)}


def _lerobot_name(name: str) -> str:
    theirs = LEROBOT.theirs(name)
    assert theirs is not None, f"{name} has no name in LeRobot"
    return theirs


def to_lerobot(state_dict: dict[str, Tensor], config: PI0Config) -> dict[str, Tensor]:
    """Returns our tensors under LeRobot 0.6's names, with the two language heads that its strict loading requires.

    The tensors are the model's own. The language head shares the embedding's memory and the expert's head is a single zero,
    expanded, so neither takes memory. ``agent.checkpoints.tensor_file`` can write both; the safetensors library would
    require copies.
    """
    out = {_lerobot_name(name): tensor for name, tensor in state_dict.items()}
    prefix = "model.paligemma_with_expert."
    out[f"{prefix}paligemma.lm_head.weight"] = state_dict[EMBEDDING]
    # Nothing reads the expert's head, so it is stored in a small type, which saves half a gigabyte.
    zero = torch.zeros((), dtype=torch.bfloat16, device="cpu")
    out[f"{prefix}gemma_expert.lm_head.weight"] = zero.expand(config.expert.vocab_size, config.expert.width)
    return out
